"""MLX's affine groups: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized import mlx
from lora_tools.formats.quantized.mlx import BIASES, CODES, SCALES, MlxWeight
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, MlxWeight]:
    settings = mlx.settings_of(stored.config)
    return {} if settings is None else mlx.find_mlx(stored.specs, settings)


def _decode(weight: MlxWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """What ``mx.dequantize`` gives for scales in float32, to the bit. In fewer bits that rounds the
    product and then the sum, by which half of its numbers differ from these: its error is three
    times that of rounding once, as is done here."""
    from lora_tools.linalg.bits import stream
    from lora_tools.linalg.scaled import times_scales

    last, cols = first + len(out), out.shape[1]
    words, scales, biases = (
        parts[part].flatten(0, -2)[first:last] for part in (CODES, SCALES, BIASES)
    )
    codes = stream(words, weight.bits, 0, cols)
    times_scales(codes, scales, (1, weight.group), out, biases=biases)


def _rounding(weight: MlxWeight, parts: Parts) -> float:
    from lora_tools.linalg.noise import uniform_noise

    return uniform_noise(parts[SCALES], weight.group)


MLX = Scheme("mlx", "MLX", _find, _decode, rounding=_rounding, renames=True)
