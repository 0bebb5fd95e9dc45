"""Models in GGUF files: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.gguf_file import PLAIN
from lora_tools.formats.gguf_model import GgufTensors
from lora_tools.formats.quantized.gguf import GgufWeight
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, GgufWeight]:
    files = [file for file in stored.files if isinstance(file, GgufTensors)]
    return {name: weight for file in files for name, weight in file.weights.items()}


def _decode(weight: GgufWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """By ``gguf.quants.dequantize``; then rows are put into transformers' order, and what was added
    to norms is taken off."""
    from lora_tools.linalg import ggml

    rows, stop = weight.plain.numel // out.shape[1], first + out.shape[0]
    stored = parts[""].reshape(rows, -1)
    if weight.heads:
        stored = stored[ggml.half_from_interleaved(first, stop, rows, weight.heads)]
    else:
        stored = stored[first:stop]
    if weight.label not in PLAIN:
        ggml.dequantize(stored, weight.label, out)
    elif weight.offset:
        out.copy_(stored.float() - weight.offset)
    else:
        out.copy_(stored)


def _tells(weight: GgufWeight) -> bool:
    from lora_tools.linalg import ggml

    return weight.label in PLAIN or ggml.tells_rounding(weight.label)


def _rounding(weight: GgufWeight, parts: Parts) -> float:
    """Floats are rounded as their dtype says, which is no matter of the format."""
    from lora_tools.linalg import ggml

    return 0.0 if weight.label in PLAIN else ggml.rounding(parts[""], weight.label)


GGUF = Scheme("gguf", "GGUF", _find, _decode, rounding=_rounding, tells=_tells)
