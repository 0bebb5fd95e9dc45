"""gpt-oss's experts in MXFP4: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.mxfp4 import BLOCKS, GROUP, SCALES, find_mxfp4
from lora_tools.formats.quantized.packed import Packed
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, Packed]:
    return find_mxfp4(stored.specs, stored.config)


def _experts(weight: Packed, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where rows [first, stop) of (experts · in, out) lie: an expert, and inputs from and to."""
    inputs = weight.plain.shape[1]
    while first < stop:
        expert, start = divmod(first, inputs)
        end = min(inputs, start + stop - first)
        yield expert, start, end
        first += end - start


def _decode(weight: Packed, parts: Parts, out: torch.Tensor, first: int) -> None:
    """As transformers' ``convert_moe_packed_tensors``: a number of two bits times a power of two,
    so each is exact in float32."""
    import torch

    from lora_tools.linalg import e2m1

    at = 0
    for expert, start, end in _experts(weight, first, first + len(out)):
        low, high = start // GROUP, -(end // -GROUP)
        numbers = e2m1.unpack_e2m1(parts[BLOCKS][expert, :, low:high])  # (out, groups, 32)
        scales = parts[SCALES][expert, :, low:high].view(torch.uint8)
        numbers *= e2m1.powers(scales)[..., None]
        rows = numbers.flatten(1).T[start - low * GROUP : end - low * GROUP]
        out[at : at + len(rows)].copy_(rows)
        at += len(rows)


def _encode(weight: Packed, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """With the scales that compressed-tensors finds for MXFP4 (``generate_mx_scales``): OpenAI has
    not published how it chose its own."""
    import torch

    from lora_tools.linalg import e2m1

    if not bool(torch.isfinite(x).all()):
        name = weight.plain.name
        raise NonFiniteError(f"{name}: holds an inf or a NaN, which MXFP4 cannot store")
    blocks = torch.empty(weight.specs[BLOCKS].shape, dtype=torch.uint8)
    scales = torch.empty(weight.specs[SCALES].shape, dtype=torch.uint8)
    for i, expert in enumerate(x):
        groups = expert.float().T.unflatten(1, (-1, GROUP))  # (out, groups, 32)
        scales[i] = e2m1.shared_exponents(groups.abs().amax(-1))
        codes = e2m1.nearest_e2m1(groups / e2m1.powers(scales[i])[..., None])
        blocks[i] = e2m1.pack_e2m1(codes)
    return {BLOCKS: blocks, SCALES: scales.view(torch_dtype(weight.specs[SCALES].dtype))}


def _rounding(weight: Packed, parts: Parts) -> float:
    import torch

    from lora_tools.linalg import e2m1, noise

    table, total = noise.errors_by_code(e2m1.values()).float(), 0.0
    for blocks, scales in zip(parts[BLOCKS], parts[SCALES], strict=True):
        costs = e2m1.unpack_e2m1(blocks, table).sum(-1, dtype=torch.float64)
        total += float((costs * e2m1.powers(scales.view(torch.uint8)).double().square()).sum())
    return total


MXFP4 = Scheme("mxfp4", "MXFP4", _find, _decode, encode=_encode, rounding=_rounding)
