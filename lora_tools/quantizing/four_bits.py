"""A weight in bitsandbytes' four bits, written run by run: its way to write in ``quantizing.pack``.

Codes and scales are those of ``linalg.nf4``, which needs no copy of the weight in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.quantized.bitsandbytes import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    STATE,
    QuantizedTensor,
    quantized_tensor,
)
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.quantizing.feeding import feed, weights_of, with_outputs
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult, TensorSpec
from lora_tools.sources.schemes.bitsandbytes import four_bit_scales

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.sources.schemes.row import Parts


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None],
    read: Callable[[torch.Tensor], None] | None,
    ready: Callable[[int], None],
) -> TensorResult:
    """Quantize a flat tensor and write all that is stored of it, as ``quantizing.pack.Way`` says;
    all of it has to be there."""
    import torch

    from lora_tools.formats.tensors import as_bytes
    from lora_tools.linalg import codebooks, nf4
    from lora_tools.linalg.nf4_search import quantize_searched

    assert isinstance(item.packed, QuantizedTensor)
    state, name, errors = item.packed.state, item.name, None
    book = codebooks.CODEBOOKS[state.quant_type]
    n = x.numel()
    ready(n)
    with (
        buffers.lend((nf4.SCRATCH_BYTES,), torch.uint8) as store,
        buffers.lend((nf4.packed_size(n),), torch.uint8) as room,
    ):
        scratch = nf4.Scratch(store)
        given = x, book, state.blocksize, state.nested, room, scratch
        if item.searched:
            made = quantize_searched(*given, weights_of(item.feeding, state))
        else:
            made = nf4.quantize_whole(*given)
        if not made.is_finite:
            raise NonFiniteError(
                f"{name}: holds an inf or a NaN, or numbers so large that their scales overflow in "
                "double quantization"
            )
        if item.feeding is not None:
            errors = feed(item.feeding, x, made, state, buffers)
        if writer is not None:
            writer.write(name, as_bytes(room))
        error, energy = nf4.measure(
            x, made.packed, made.scales, book, state.blocksize, scratch, done, read
        )
    stored = dict(zip((ABSMAX, NESTED_ABSMAX), made.tensors(), strict=False))
    stored[QUANT_MAP] = torch.from_numpy(book.table)
    if made.nested is not None:
        stored[NESTED_MAP] = torch.from_numpy(codebooks.dynamic_map())
        state = dataclasses.replace(state, nested_offset=float(made.nested.offset))
    text = state.to_json()
    if writer is not None:
        for end, tensor in stored.items():
            writer.write(name + end, as_bytes(tensor))
        writer.write_last(name + STATE + state.quant_type, text)
    nbytes = item.nbytes - item.packed.state.most_json + len(text)
    relative = math.sqrt(error / energy) if energy else 0.0
    result = TensorResult(name, item.spec.shape, 8 * nbytes / n, relative, math.sqrt(energy))
    return result if errors is None else with_outputs(result, errors)


def anew(packed: PackedWeight, spec: TensorSpec) -> PackedWeight:
    """What is stored of the weight with other numbers, which are of ``spec``'s dtype."""
    assert isinstance(packed, QuantizedTensor)
    state = dataclasses.replace(packed.state, dtype=spec.dtype)
    made = quantized_tensor(spec.name, state, packed.specs[""].dtype)
    return dataclasses.replace(made, transposed=packed.transposed)


def ways(item: Item, parts: Parts) -> Sequence[Item]:
    """Scales searched for, and not. Only those that were can be negative: then that comes first."""
    assert isinstance(item.packed, QuantizedTensor)
    negative = bool((four_bit_scales(item.packed, parts) < 0).any())
    return [dataclasses.replace(item, searched=way) for way in (negative, not negative)]


def block(packed: PackedWeight) -> int:
    """How many numbers share a scale."""
    assert isinstance(packed, QuantizedTensor)
    return packed.state.blocksize
