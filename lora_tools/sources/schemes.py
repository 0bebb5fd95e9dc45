"""The table of stored number formats: how each is found in a checkpoint, and read as plain numbers.

A new one is a file in ``formats/quantized`` that says which tensors belong to a weight, its
arithmetic in ``linalg``, and a row here: then every verb reads it. What no row claims is refused by
``sources.checkpoints``, by the signs of ``formats.quantized.signs``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized import bitsandbytes
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.formats.quantized.signs import without_entries
from lora_tools.records import TensorSpec
from lora_tools.sources.four_bit_layers import four_bit_layers

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.codebooks import Array

P = TypeVar("P", bound=PackedWeight)
Parts = Mapping[str, "torch.Tensor"]


def _facts(weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
    """How many weights, of which kinds, read back in which dtypes, and their size."""
    numbers = sum(weight.plain.numel for weight in weights.values())
    nbytes = sum(spec.nbytes for weight in weights.values() for spec in weight.specs.values())
    return {
        "weights": len(weights),
        "schemes": dict(Counter(weight.label for weight in weights.values())),
        "dtypes": dict(Counter(weight.plain.dtype for weight in weights.values())),
        "numbers": numbers,
        "bits_per_parameter": 8 * nbytes / max(numbers, 1),
    }


def _no_faults(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], weights: Mapping[str, PackedWeight]
) -> Sequence[str]:
    return ()


@dataclasses.dataclass(frozen=True)
class Scheme(Generic[P]):
    """A stored number format.

    Attributes:
        name: a short one.
        title: as people call it, after "a checkpoint in".
        find: its weights in a checkpoint as it is stored, by the plain ones' names; none where it
            is not in this format. Reads headers, and what is as small. Raises CheckpointError for
            one that is broken.
        decode: (weight, its stored tensors, out, first): fills ``out`` (n, cols), of any float
            dtype, with rows [first, first + n) of the plain weight as a matrix of its last
            dimension (of a vector: cols is 1), computed in float32 and rounded once.
        facts: what ``inspect`` tells of such weights: what ``_facts`` does, at least.
        faults: (config.json, stored tensors, weights): what keeps the format's own library from
            loading them, in sentences.
        plain_config: config.json without what it says of the format.
        files: small files that say something of the format, and do not go with plain numbers.
    """

    name: str
    title: str
    find: Callable[[Checkpoint], Mapping[str, P]]
    decode: Callable[[P, Parts, torch.Tensor, int], None]
    facts: Callable[[Mapping[str, P]], dict[str, Any]] = _facts
    faults: Callable[
        [Mapping[str, Any], Mapping[str, TensorSpec], Mapping[str, P]], Sequence[str]
    ] = _no_faults
    plain_config: Callable[[Mapping[str, Any]], dict[str, Any]] = without_entries
    files: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Scheme[Any]], tuple[str]]:
        return scheme_named, (self.name,)


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


def _four_bit_faults(
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, bitsandbytes.QuantizedTensor],
) -> Sequence[str]:
    found = four_bit_layers(config, specs)
    layers = None
    if found is not None:
        layers = {n: m for n, m in found.modules.items() if n not in found.kept or n in weights}
    return bitsandbytes.config_faults(config, specs, weights, layers)


BITSANDBYTES = Scheme(
    "bitsandbytes",
    "four bits (bitsandbytes)",
    lambda stored: bitsandbytes.find_quantized(stored.specs, stored.raw, stored.config),
    _decode_four_bits,
    bitsandbytes.facts,
    _four_bit_faults,
)
SCHEMES: tuple[Scheme[Any], ...] = (BITSANDBYTES,)


def scheme_of(stored: Checkpoint) -> tuple[Scheme[Any], Mapping[str, PackedWeight]] | None:
    """The row that a checkpoint's weights are stored in, and those weights; None where none is."""
    for scheme in SCHEMES:
        weights = scheme.find(stored)
        if weights:
            return scheme, weights
    return None


def scheme_named(name: str) -> Scheme[Any]:
    """A row of the table."""
    return next(scheme for scheme in SCHEMES if scheme.name == name)
