"""``quantize --budget``: the smallest blocks that fit, and what is left of the size for layers that
stay as they are: those that four bits would cost most for each byte.

No layer is worse off than with the same four bits everywhere, whatever the errors are worth. To
take bits from one layer for another by them lowers their sum further, and lost on SmolLM2.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import parse_size
from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.bitsandbytes import BLOCKSIZES, QuantizedTensor, quantized_tensor
from lora_tools.formats.quantized.forms import Form
from lora_tools.linalg.allocation import allocate
from lora_tools.merging.plan import MergePlan
from lora_tools.options import Running
from lora_tools.quantizing.pack import pack
from lora_tools.quantizing.plan import Item, QuantizePlan, plan_quantize
from lora_tools.quantizing.tensor import QuantizeItem, merged_for
from lora_tools.records import TensorSpec, counted

if TYPE_CHECKING:
    from lora_tools.engine.buffers import Buffers

_HEADER_GROWS = 64  # bytes, by other sizes and places of one layer's tensors
_STAYS = "not quantized: four bits cost most here for each byte (--budget)"


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bits for each number of the layers that can be in four bits, or bytes of all files."""

    text: str
    most: float
    in_bits: bool

    def room(self, plan: QuantizePlan, nbytes: int) -> Room:
        """What the plan, which comes to ``nbytes``, leaves.

        Raises:
            UsageError: too little for the plan as it is, or enough to quantize nothing.
        """
        items = _packed(plan)
        numbers = sum(item.spec.numel for item in items)
        taken = sum(item.nbytes for item in items)
        if self.in_bits:
            spare = int(self.most * numbers / 8) - taken
        else:
            spare = int(self.most) - nbytes - _HEADER_GROWS * len(items)
        if spare < 0:
            more = f"{-8 * spare / numbers:.3f} bits" if self.in_bits else counted(-spare, "byte")
            raise UsageError(
                f"--budget {self.text}: even with every layer in four bits, {more} more are "
                "needed; allow them, or give a larger --blocksize"
            )
        if spare >= sum(item.spec.nbytes for item in items) - taken:
            raise UsageError(
                f"--budget {self.text}: the model fits without quantization, so there is nothing "
                "to do"
            )
        sizes = {b: sum(_in_blocks(item, b).nbytes for item in items) for b in sorted(BLOCKSIZES)}
        block = next(b for b, size in sizes.items() if size - taken <= spare)
        return Room(block, spare + taken - sizes[block], spare)


@dataclasses.dataclass(frozen=True)
class Room:
    """The smallest blocks that all layers can have.

    Attributes:
        spare: bytes that are left then, for layers that stay.
        grows: bytes beyond the plan that was asked.
    """

    blocksize: int
    spare: int
    grows: int


def parse_budget(text: str | None) -> Budget | None:
    """``4.5bits`` or ``80MB``. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", text.lower())
    if match is not None:
        return Budget(text, float(match[1]), True)
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]?I?B\s*", text.upper()):
        raise UsageError(
            f"--budget {text[:60]!r}: bits for each number of the layers, such as 4.5bits, or a "
            "size of all files, such as 80MB, is needed"
        )
    return Budget(text, parse_size(text), False)


@dataclasses.dataclass(frozen=True)
class Shares:
    """What came of a budget: whether each layer is in four bits, by the weight's name, in blocks of
    which size, and a note for the report."""

    quantized: Mapping[str, bool]
    blocksize: int
    note: str


def plan_within(
    shares: Shares,
    base: Checkpoint,
    merge: MergePlan,
    specs: Mapping[str, TensorSpec],
    form: Form,
    chosen: Callable[[str], bool],
    head: bool,
    search: bool,
) -> QuantizePlan:
    """``plan_quantize`` without the layers that are to stay.

    Raises:
        CheckpointError: a loader cannot leave one layer plain without another.
    """
    staying = {split_tensor(name)[0] for name, four in shares.quantized.items() if not four}

    def both(module: str) -> bool:
        return chosen(module) and module not in staying

    def told(item: Item) -> Item:
        four = shares.quantized.get(item.name)
        if four and item.packed is None:
            raise CheckpointError(
                f"--budget: {item.name} and another layer have such similar names that a config "
                "cannot list only one of them; leave both out with --exclude"
            )
        return item if four is not False else dataclasses.replace(item, reason=_STAYS)

    plan = plan_quantize(base, merge, specs, form, both, head, search)
    return dataclasses.replace(plan, items=tuple(map(told, plan.items)))


def share_out(
    budget: Budget, room: Room, plan: QuantizePlan, source: Checkpoint, running: Running
) -> Shares:
    """Measure what four bits cost each layer, and let those stay that it costs most for each byte,
    as many as there is room for.

    The errors are those of what would be written: of the outputs, fed, where the plan has
    statistics, of the weights otherwise. A layer without statistics where others have them takes no
    part, since its error is another one.

    Raises:
        UsageError: statistics are given, and of no layer in full.
    """
    from lora_tools.engine import threads

    items = [_in_blocks(item, room.blocksize) for item in _packed(plan)]
    known = any(item.feeding is not None for item in items)
    if not known and any(item.rounding for item in items):
        raise UsageError(
            "--budget: the statistics hold only diagonals; collect them with `loratools "
            "collect-stats --kind full`, or leave --activations out to use the errors of the "
            "weights"
        )
    free = [item for item in items if item.feeding is not None or not known]
    tasks = [Measure(item, source.decoded_bytes(item.target.base_name)) for item in free]
    errors = list(threads.run(tasks, source, None, jobs=running.jobs, progress=running.progress))
    costs = [max(item.spec.nbytes - item.nbytes, 1) for item in free]
    prices = [[error / cost] for error, cost in zip(errors, costs, strict=True)]
    stays = allocate(prices, [[cost] for cost in costs], room.spare)
    quantized = {item.name: True for item in items}
    quantized |= {item.name: not stay for item, stay in zip(free, stays, strict=True)}
    left = sum(e for e, stay in zip(errors, stays, strict=True) if not stay) / (sum(errors) or 1.0)
    of_what = "layers' outputs" if known else "weights (no statistics of inputs are given)"
    note = (
        f"--budget {budget.text}: blocks of {room.blocksize}, and {sum(stays)} of "
        f"{counted(len(items), 'layer')} not quantized; the squared error of the {of_what} is "
        f"{left:.1%} of what it would be"
    )
    return Shares(quantized, room.blocksize, note)


def note_on(budget: Budget, room: Room) -> str:
    """What a plan says that was made before anything is measured."""
    return (
        f"--budget {budget.text}: blocks of {room.blocksize}, and {room.spare:,} bytes for layers "
        "that are not quantized; which layers these are depends on the weights, so this plan has "
        "none of them"
    )


@dataclasses.dataclass(frozen=True)
class Measure:
    """A task: the squared error that a weight would have, nothing written."""

    item: Item
    decoded: int

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        return QuantizeItem(self.item, None, self.decoded).nbytes + self.item.spec.nbytes

    def run(self, base: Checkpoint, sink: object, buffers: Buffers) -> float:
        """Raises NonFiniteError."""
        with merged_for(self.item, base, buffers) as (x, _):
            result = pack(self.item, x.reshape(-1), None, buffers)
        if result.output_error is None or result.output_norm is None:
            return (result.relative_error * result.norm) ** 2
        return (result.output_error * result.output_norm) ** 2


def _packed(plan: QuantizePlan) -> list[Item]:
    return [item for item in plan.items if item.packed is not None]


def _in_blocks(item: Item, blocksize: int) -> Item:
    packed = item.packed
    assert isinstance(packed, QuantizedTensor)
    state = dataclasses.replace(packed.state, blocksize=blocksize)
    made = quantized_tensor(packed.name, state, packed.specs[""].dtype)
    return dataclasses.replace(item, packed=dataclasses.replace(made, transposed=packed.transposed))
