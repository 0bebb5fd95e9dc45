"""The work of ``quantize`` on one tensor."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import xxhash

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.tensor import merge_tensor
from lora_tools.quantizing.compensate import Compensation, ErrorFactors
from lora_tools.quantizing.compensate import compensate as compensated
from lora_tools.quantizing.pack import pack
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult

if TYPE_CHECKING:
    from lora_tools.engine.threads import Buffers


def working_memory(item: Item, how: Compensation | None) -> int:
    """A merged or transposed tensor is held whole, and so are its codes; its error, and what is
    read back of it, too."""
    codes = item.spec.numel // 2 if item.packed else 0
    if how and item.packed:
        codes += 4 * item.spec.numel + item.spec.nbytes
    whole = item.spec.nbytes * (2 if item.transposed else bool(item.target.parts))
    return max(whole + codes, item.target.spec.nbytes)


@dataclasses.dataclass
class QuantizedItem:
    """The hash of a base tensor, what quantizing it came to, and factors for what it lost."""

    base_hash: str
    result: TensorResult | None = None
    factors: ErrorFactors | None = None


def work_on(
    item: Item, base: Checkpoint, writer: Sink, buffers: Buffers, how: Compensation | None = None
) -> QuantizedItem:
    """Merge one tensor, quantize it where it is to be, and write it."""
    if item.packed is None:
        done = merge_tensor(item.target, base, item.spec, writer.write)
        return QuantizedItem(done.base_hash)
    import torch

    stored = base.specs[item.target.base_name]
    plain = not (item.target.parts or item.transposed or stored.dtype != item.spec.dtype)
    if plain and item.name == item.target.base_name:
        x, name = base.tensor(item.name), item.name
        state = xxhash.xxh3_128()
        raw, width = base.raw(name), x.element_size()

        def read(start: int, stop: int) -> None:
            base.release(name, start * width, stop * width)

        for start in range(0, raw.nbytes, 1 << 23):
            state.update(raw[start : start + (1 << 23)])
        if how:
            made = compensated(item, x, how, writer, buffers)
            base.release(name)
            return QuantizedItem(state.hexdigest(), *made)
        return QuantizedItem(state.hexdigest(), pack(item, x.reshape(-1), writer, buffers, read))
    dtype = torch_dtype(item.spec.dtype)
    with buffers.lend(item.spec.shape, dtype) as merged:
        into = merged.view(torch.uint8).reshape(-1).numpy().data

        def keep(name: str, data: memoryview, offset: int) -> None:
            into[offset : offset + data.nbytes] = data

        base_hash = merge_tensor(item.target, base, item.spec, keep).base_hash
        with contextlib.ExitStack() as stack:
            ready = merged
            if item.transposed:
                ready = stack.enter_context(buffers.lend(item.spec.shape[::-1], dtype))
                ready.copy_(merged.T)
            if how:
                return QuantizedItem(base_hash, *compensated(item, ready, how, writer, buffers))
            return QuantizedItem(base_hash, pack(item, ready.reshape(-1), writer, buffers))
