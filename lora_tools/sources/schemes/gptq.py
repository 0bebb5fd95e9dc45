"""GPTQ: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized import gptq
from lora_tools.formats.quantized.packed import ORIGINAL
from lora_tools.formats.quantized.qweights import G_IDX, QWEIGHT, QZEROS, SCALES, QWeight
from lora_tools.formats.quantized.settings import settings_of
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, QWeight]:
    settings = settings_of(stored, gptq.METHODS, gptq.FILES)
    return {} if settings is None else gptq.find_gptq(stored.specs, stored.config, settings)


def _decode(weight: QWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """As GPTQModel's ``convert_gptq_file`` computes, in float32; its kernels and AutoGPTQ's round
    the same products to float16."""
    import torch

    from lora_tools.linalg.bits import stream
    from lora_tools.linalg.scaled import times_indexed_scales, times_scales

    last, outs, inputs = first + len(out), parts[SCALES].shape[1], _inputs(weight)
    rows, cols = ((0, outs), (first, last)) if weight.transposed else ((first, last), (0, inputs))
    across = slice(*rows)
    codes = stream(parts[QWEIGHT][:, across].T, weight.bits, *cols)
    groups = _groups(weight, parts)[slice(*cols)]
    scales = parts[SCALES][:, across].T
    zeros = _zeros(weight, stream(parts[QZEROS], weight.bits, *rows)).T
    into = torch.empty(codes.shape, dtype=out.dtype) if weight.transposed else out
    size = int((groups == 0).sum())
    if size and torch.equal(groups, torch.arange(len(groups)) // size):  # side by side: faster
        times_scales(codes, scales, (1, size), into, 0, zeros)
    else:
        times_indexed_scales(codes, scales, groups, into, zeros)
    if weight.transposed:
        out.copy_(into.T)


def _inputs(weight: QWeight) -> int:
    return weight.plain.shape[0 if weight.transposed else 1]


def _zeros(weight: QWeight, stored: torch.Tensor) -> torch.Tensor:
    """Raises CheckpointError for a zero point that libraries read in two ways: v1 stores 0 as −1,
    of which a code holds the lowest bits."""
    import torch

    largest = (1 << weight.bits) - 1
    if weight.offset and bool((stored == largest).any()):
        raise CheckpointError(
            f"{weight.specs[QZEROS].name}: holds the zero point {largest} + 1, which GPTQ's first "
            f"format cannot store (some libraries read 0, others {largest + 1}); save it as "
            f"gptq_v2 with the library that made it, or {ORIGINAL}"
        )
    return stored.to(torch.int16) + weight.offset


def _groups(weight: QWeight, parts: Parts) -> torch.Tensor:
    """(in,) the group of each input. Raises CheckpointError for one that there is not, and where
    all inputs are in the first of several: some libraries read such indexes, others do not."""
    import torch

    if G_IDX not in parts:
        return torch.arange(_inputs(weight)) // weight.group
    groups, count, name = parts[G_IDX].long(), len(parts[SCALES]), weight.specs[G_IDX].name
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise CheckpointError(f"{name}: has groups {low} to {high}, but there are only {count}")
    if count > 1 and high == 0:
        raise CheckpointError(
            f"{name}: puts all inputs into the first of {count} groups, which is probably wrong; "
            f"{ORIGINAL}"
        )
    return groups


def _rounding(weight: QWeight, parts: Parts) -> float:
    import torch

    from lora_tools.linalg.noise import uniform_noise

    counts = torch.bincount(_groups(weight, parts), minlength=len(parts[SCALES]))
    return uniform_noise(parts[SCALES], counts[:, None])


GPTQ = Scheme("gptq", "GPTQ", _find, _decode, rounding=_rounding, files=gptq.FILES)
