"""The work of ``quantize`` on one tensor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.in_memory import largest_in, merge_into
from lora_tools.merging.tensor import MergeTensor
from lora_tools.quantizing.compensate import ErrorFactors, ErrorFit
from lora_tools.quantizing.feeding import working_bytes
from lora_tools.quantizing.pack import pack, way_of
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.merge import Survival


@dataclasses.dataclass(frozen=True)
class QuantizedItem:
    """The hash of a base tensor, what quantizing it came to, factors for what it lost, and how much
    of a merge is left in it; and in the layer's outputs, error-fed and rounded by itself."""

    base_hash: str
    result: TensorResult | None = None
    factors: ErrorFactors | None = None
    survival: Survival | None = None
    in_outputs: tuple[Survival, Survival] | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeItem:
    """A task: merge one tensor of a checkpoint, quantize it where it is to be, and write it.

    Attributes:
        fit: how to factorise what quantizing loses, where that is wanted.
        decoded: memory that the checkpoint's tensor takes, where it has to be decoded.
    """

    item: Item
    fit: ErrorFit | None = None
    decoded: int = 0

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        """A merged or transposed tensor is held whole, and so are its codes; its error, and what is
        read back of it, too."""
        item, codes = self.item, 0
        way = way_of(item.scheme) if item.scheme is not None else None
        if way is not None:
            codes = next(iter(item.specs)).nbytes + way.bytes_each * item.spec.numel
        if self.fit and item.packed:
            codes += 4 * item.spec.numel + item.spec.nbytes
            codes += 4 * item.spec.numel * (item.feeding is not None)  # its columns in order
        if item.feeding is not None:
            codes += working_bytes(item)
        formed = bool(item.target.parts or self.decoded)
        whole = item.spec.nbytes * (2 if item.transposed else formed)
        return max(whole + codes + self.decoded, item.target.spec.nbytes)

    def run(self, base: Checkpoint, sink: Sink, buffers: Buffers) -> QuantizedItem:
        """Write all that is stored of the tensor. Raises NonFiniteError."""
        item = with_shared_scale(self.item, base, buffers)
        stored = base.specs[item.target.base_name]
        if item.packed is None:
            done = MergeTensor(item.target, item.spec).run(base, sink)
            return QuantizedItem(done.base_hash)
        same = item.name == item.target.base_name and stored.dtype == item.spec.dtype
        lies = same and base.scheme is None  # else it may have to be decoded and rounded first
        if lies and not (item.target.parts or item.transposed):
            return self._as_it_lies(item, base, sink, buffers)
        with merged_for(item, base, buffers) as (x, base_hash):
            if self.fit is not None:
                return QuantizedItem(base_hash, *self.fit.compensate(item, x, sink, buffers))
            return QuantizedItem(base_hash, pack(item, x.reshape(-1), sink, buffers))

    def _as_it_lies(
        self, item: Item, base: Checkpoint, sink: Sink, buffers: Buffers
    ) -> QuantizedItem:
        """A tensor that nothing is done to beforehand, giving pages back as they are read."""
        name = item.name
        x, base_hash = base.tensor(name), base.hash(name)
        width = x.element_size()
        if self.fit is not None:
            made = self.fit.compensate(item, x, sink, buffers)
            base.release(name)
            return QuantizedItem(base_hash, *made)

        def read(start: int, stop: int) -> None:
            base.release(name, start * width, stop * width)

        result = pack(item, x.reshape(-1), sink, buffers, read)
        return QuantizedItem(base_hash, result)


def with_shared_scale(item: Item, base: Checkpoint, buffers: Buffers) -> Item:
    """The item with the scale that it has in common with others, if it has."""
    if len(item.joined) < 2 or item.scheme is None or item.packed is None:
        return item

    def find() -> float:
        return max(largest_in(target, base, spec) for target, spec in item.joined)

    largest = buffers.once(("largest", *(spec.name for _, spec in item.joined)), find)
    return with_scale(item, item.scheme.shared_for(item.packed, largest))


def with_scale(item: Item, shared: float | None) -> Item:
    """The item, to be encoded with that scale."""
    if shared is None:
        return item
    packed: Any = item.packed
    return dataclasses.replace(item, packed=dataclasses.replace(packed, shared=shared), joined=())


@contextlib.contextmanager
def merged_for(
    item: Item, source: Checkpoint, buffers: Buffers
) -> Iterator[tuple[torch.Tensor, str]]:
    """The merged tensor as it is quantized, contiguous and (out, in) where it is a matrix, and the
    hash of the one it was made of. Raises NonFiniteError."""
    dtype = torch_dtype(item.spec.dtype)
    with contextlib.ExitStack() as stack:
        x = stack.enter_context(buffers.lend(item.spec.shape, dtype))
        source_hash = merge_into(x, item.target, source, item.spec)
        if item.transposed:
            turned = stack.enter_context(buffers.lend(item.spec.shape[::-1], dtype))
            x = turned.copy_(x.T)
        yield x, source_hash
