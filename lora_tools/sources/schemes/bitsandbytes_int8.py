"""Eight bits as bitsandbytes stores them: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.bitsandbytes_int8 import CODES, FORMAT, SCB, Int8Weight, find_int8
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, Int8Weight]:
    return find_int8(stored.specs, stored.raw, stored.config)


def _decode(weight: Int8Weight, parts: Parts, out: torch.Tensor, first: int) -> None:
    import torch

    from lora_tools.linalg.int8 import dequantize_rows

    last = first + len(out)
    if not weight.transposed:
        dequantize_rows(parts[CODES][first:last], parts[SCB][first:last], out)
        return
    turned = torch.empty(out.shape[::-1], dtype=out.dtype)
    out.copy_(dequantize_rows(parts[CODES][:, first:last], parts[SCB], turned).T)


def _encode(weight: Int8Weight, x: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    from lora_tools.linalg.int8 import quantize_rows

    try:
        codes, absmax = quantize_rows(x.T if weight.transposed else x)
    except NonFiniteError as error:
        raise NonFiniteError(f"{weight.plain.name}: {error}") from None
    parts = {CODES: codes.contiguous(), SCB: absmax}
    if FORMAT in weight.specs:
        parts[FORMAT] = torch.zeros(weight.specs[FORMAT].shape, dtype=torch.uint8)
    return parts


def _unit(weight: Int8Weight) -> int:
    return int(not weight.transposed)


def _rounding(weight: Int8Weight, parts: Parts) -> float:
    from lora_tools.linalg.int8 import LARGEST
    from lora_tools.linalg.noise import uniform_noise

    return uniform_noise(parts[SCB] / LARGEST, weight.specs[CODES].shape[1])


BITSANDBYTES_INT8 = Scheme(
    "bitsandbytes-int8",
    "eight bits (bitsandbytes)",
    _find,
    _decode,
    encode=_encode,
    rounding=_rounding,
    unit=_unit,
)
