"""gpt-oss's experts in MXFP4: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.mxfp4 import BLOCKS, GROUP, SCALES, find_mxfp4
from lora_tools.formats.quantized.packed import Packed
from lora_tools.sources.schemes.row import Parts, Scheme, refuse_non_finite

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

    from lora_tools.linalg import e2m1, scaled
    from lora_tools.linalg.runs import row_runs

    refuse_non_finite(weight, x)
    blocks = torch.empty(weight.specs[BLOCKS].shape, dtype=torch.uint8)
    scales = torch.empty(weight.specs[SCALES].shape, dtype=torch.uint8)
    for i, expert in enumerate(x):
        turned = expert.T.contiguous()
        for start, stop in row_runs(*turned.shape):
            run = turned[start:stop]
            exponents = e2m1.shared_exponents(scaled.absmax(run, (1, GROUP)))
            over = scaled.over_scales(run, e2m1.powers(exponents), (1, GROUP))
            packed = e2m1.pack_e2m1(e2m1.nearest_e2m1(over))
            scales[i, start:stop] = exponents
            blocks[i, start:stop] = packed.view(blocks[i, start:stop].shape)
    return {BLOCKS: blocks, SCALES: scales.view(torch_dtype(weight.specs[SCALES].dtype))}


def _rounding(weight: Packed, parts: Parts) -> float:
    import torch

    from lora_tools.linalg import e2m1

    total = 0.0
    for blocks, scales in zip(parts[BLOCKS], parts[SCALES], strict=True):
        powers = e2m1.powers(scales.view(torch.uint8))
        total += e2m1.e2m1_noise(blocks.flatten(1), powers, GROUP)
    return total


MXFP4 = Scheme("mxfp4", "MXFP4", _find, _decode, encode=_encode, rounding=_rounding)
