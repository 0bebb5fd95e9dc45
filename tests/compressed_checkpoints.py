"""Little checkpoints of the forms of ``forms_compressed``, and their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.quantized.compressed_find import find_compressed
from lora_tools.formats.quantized.compressed_tensors import CompressedWeight
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from tests.forms_compressed import FORMS, WIDE_FORMS, Tensors
from tests.iotools import checkpoint, weights

Q = "model.layers.0.q_proj.weight"
UP = "model.layers.0.up_proj.weight"
STEM = Q.removesuffix("weight")
ALL = {**FORMS, **WIDE_FORMS}


def made(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of these tensors and entries of config.json."""
    checkpoint(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    text = json.dumps({"model_type": "llama", **config})
    (folder / "config.json").write_text(text)
    return folder


def form(kind: str) -> tuple[Tensors, dict[str, Any], Tensors]:
    """What a form stores of a little decoder, its config.json, and the plain tensors."""
    return ALL[kind](weights(layers=1, width=32 if kind in WIDE_FORMS else 16))


def opened(folder: Path) -> Dequantized[Any]:
    view = open_checkpoint(folder)
    assert isinstance(view, Dequantized)
    return view


def found(
    stored: Tensors, config: dict[str, Any], beside: Tensors | None = None
) -> tuple[CompressedWeight, Tensors]:
    """The weight of a module "m", and its parts; the weight of another may lie beside it."""
    named = {f"m.{part}": tensor for part, tensor in stored.items()}
    named |= {f"n.{part}": tensor for part, tensor in (beside or {}).items()}
    specs = {n: TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in named.items()}
    weight = find_compressed(specs, config, lambda name: named[name].tolist())["m.weight"]
    return weight, {part: named[spec.name] for part, spec in weight.specs.items()}


def decoded(row: Any, weight: Any, parts: Tensors, first: int = 0, n: int = -1) -> torch.Tensor:
    """Rows of the weight in float32."""
    *lead, cols = weight.plain.shape
    rows = torch.Size(lead).numel() if n < 0 else n
    out = torch.empty(rows, cols)
    row.decode(weight, parts, out, first)
    return out
