"""Four bits as bitsandbytes stores them: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized import bitsandbytes
from lora_tools.formats.quantized.loaded_in_four_bits import config_faults
from lora_tools.records import TensorSpec
from lora_tools.sources.four_bit_layers import four_bit_layers
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.codebooks import Array


def _find(stored: Checkpoint) -> Mapping[str, bitsandbytes.QuantizedTensor]:
    return bitsandbytes.find_quantized(stored.specs, stored.raw, stored.config)


def four_bit_scales(weight: bitsandbytes.QuantizedTensor, parts: Parts) -> Array:
    """(blocks,) float32, out of eight bits where they are stored so."""
    from lora_tools.linalg import nf4

    nested = None
    if weight.state.nested_offset is not None:
        inner, table = parts[bitsandbytes.NESTED_ABSMAX], parts[bitsandbytes.NESTED_MAP]
        nested = inner, table, weight.state.nested_offset
    return nf4.stored_scales(parts[bitsandbytes.ABSMAX], nested)


def _decode_four_bits(
    weight: bitsandbytes.QuantizedTensor, parts: Parts, out: torch.Tensor, first: int
) -> None:
    import torch

    from lora_tools.linalg import nf4

    def fill(into: torch.Tensor, start: int) -> None:
        packed = parts[""].reshape(-1).view(torch.uint8)
        scales = four_bit_scales(weight, parts)
        table, blocksize = parts[bitsandbytes.QUANT_MAP], weight.state.blocksize
        nf4.dequantize_stored(packed, scales, table, blocksize, into.view(-1), start)

    if not weight.transposed:
        fill(out, first * out.shape[1])
        return
    whole = torch.empty(weight.state.shape, dtype=out.dtype)  # codes are of (out, in)
    fill(whole, 0)
    out.copy_(whole.T[first : first + out.shape[0]])


def _rounding(weight: bitsandbytes.QuantizedTensor, parts: Parts) -> float:
    import torch

    from lora_tools.linalg import noise

    packed = parts[""].reshape(-1).view(torch.uint8)
    scales = torch.from_numpy(four_bit_scales(weight, parts))
    values = parts[bitsandbytes.QUANT_MAP].float()
    return noise.nibbles_noise(packed, values, scales, weight.state.blocksize)


def _four_bit_faults(
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, bitsandbytes.QuantizedTensor],
) -> Sequence[str]:
    found = four_bit_layers(config, specs)
    layers = None
    if found is not None:
        layers = {n: m for n, m in found.modules.items() if n not in found.kept or n in weights}
    return config_faults(config, specs, weights, layers)


BITSANDBYTES = Scheme(
    "bitsandbytes",
    "four bits (bitsandbytes)",
    _find,
    _decode_four_bits,
    bitsandbytes.facts,
    _four_bit_faults,
    rounding=_rounding,
)
