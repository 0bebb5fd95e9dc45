"""The adapter that makes up for a quantization: LoftQ's alternation (arXiv 2310.08659).

For each weight W that is quantized, Q = quant(W − B·A) and B·A = SVD_r(W − dequant(Q)) in turn,
beginning with B·A = 0, so that with one iteration Q is the plain quantization of W. The factors lie
in a folder of the output, under the name that LoftQ's own checkpoints have it.

Where statistics of the layer's inputs are given, Q is error-fed, and B·A the best for its outputs:
SVD_r((W − dequant(Q))·S)·S⁻¹ with S Sᵀ the inputs' second moment (QERA's exact form, arXiv
2410.06040; EoRA, arXiv 2410.21271), damped as it is for the feeding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.adapting.stack import stack, stackable
from lora_tools.errors import MismatchError, NonFiniteError, UsageError
from lora_tools.formats.adapters.peft_folder import open_peft
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.names import split_tensor
from lora_tools.linalg.ranks import RankRule
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.targets import Part
from lora_tools.provenance import tool_version
from lora_tools.quantizing.feeding import with_factor
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.records import DTYPE_BITS, Action, Fate, TensorResult, counted
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.formats.adapters.peft_writer import PeftWriter
    from lora_tools.formats.checkpoint_writer import Sink

FOLDER = "loftq_init"
# The error of rounding has a flat spectrum: its leading directions are close to one another, and to
# find them to more than this share of their energy takes many times as long and gains nothing.
_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Compensation:
    """How to compensate, and adapters to stack on top, which are not merged then."""

    rank: int
    iterations: int
    adapters: tuple[Weighted, ...]

    @property
    def fit(self) -> ErrorFit:
        """What of it concerns one weight: what others are stacked on is float32, as they are."""
        return ErrorFit(self.rank, self.iterations, bool(self.adapters))

    def fates(self, plan: QuantizePlan) -> tuple[Fate, ...]:
        """The adapter's, with the most bytes that it can have."""
        items = [item for item in plan.items if item.packed]
        bits = sum(
            self.rank
            * sum(item.spec.shape)
            * (32 if self.adapters else DTYPE_BITS[item.spec.dtype])
            for item in items
        )
        more = "".join(f" + {w.path}" for w in self.adapters)
        reason = f"rank {self.rank} for the error of {counted(len(items), 'weight')}"
        fed = sum(item.feeding is not None for item in items)
        if fed:
            reason += f", {'all' if fed == len(items) else fed} by their outputs"
        reason += more
        nbytes = bits // 8 + 2 * sum(w.adapter.nbytes for w in self.adapters)
        return (Fate(FOLDER, Action.ADD, reason, nbytes),)


def plan_compensation(
    base: Checkpoint, rank: int | None, iterations: int | None, adapters: Sequence[Weighted]
) -> Compensation | None:
    """Check what was asked for; None without a rank.

    Raises:
        UsageError: numbers out of range, or a bare file, which has no room for a folder.
        AdapterError, MismatchError: an adapter does not fit the base.
        UnsupportedAdapter: an adapter that cannot be added to another.
    """
    if rank is None:
        if iterations is not None:
            raise UsageError("--compensate-iterations needs --compensate")
        return None
    iterations = 1 if iterations is None else iterations
    if rank < 1:
        raise UsageError(f"--compensate {rank}: a rank of at least 1 is needed")
    if iterations < 1:
        raise UsageError(f"--compensate-iterations {iterations}: at least 1 is needed")
    if not base.is_folder:
        raise UsageError("--compensate needs a folder; a bare file cannot hold an adapter")
    if adapters:
        stackable(adapters)
        for target in plan_merge(base, adapters).targets:
            for part in target.parts:
                _refuse_other_names(part, target.spec.name)
    return Compensation(rank, iterations, tuple(adapters))


def _refuse_other_names(part: Part, name: str) -> None:
    """One adapter has one set of names: the base's, which its factors for the error go by."""
    theirs = getattr(part.source, "module", None)
    if theirs is not None and theirs != split_tensor(name)[0]:
        raise MismatchError(
            f"{part.weighted.path}: calls {theirs} what the base calls {name}, so one adapter "
            "cannot hold both; leave --adapter out, and load the two adapters one by one"
        )


@dataclasses.dataclass(frozen=True)
class ErrorFactors:
    """One weight's lora_A (r, in) and lora_B (out, r)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ErrorFit:
    """How to factorise what quantizing loses.

    Attributes:
        wide: whether the factors are float32, instead of the weight's own dtype.
    """

    rank: int
    iterations: int
    wide: bool

    def compensate(
        self, item: Item, x: torch.Tensor, sink: Sink, buffers: Buffers
    ) -> tuple[TensorResult, ErrorFactors]:
        """Quantize ``x`` (out, in), write it, and factorise what is lost. Raises NonFiniteError."""
        import torch

        from lora_tools.linalg.lora import no_factors
        from lora_tools.quantizing.pack import into, pack

        item = with_factor(item)
        left, right = no_factors(x.shape, self._dtype(x))
        results = []
        with (
            buffers.lend(tuple(x.shape), x.dtype) as back,
            buffers.lend(tuple(x.shape), torch.float32) as room,
        ):
            for i in range(1, self.iterations + 1):
                rest = x
                if left.shape[1]:
                    rest = room.copy_(x).addmm_(left.float(), right.float(), alpha=-1)
                last, read = sink if i == self.iterations else None, into(back.view(-1))
                results.append(pack(item, rest.reshape(-1), last, buffers, read=read))
                left, right, left_over = self._factorise(item, x, back, room)
        if not math.isfinite(left_over.weights):
            raise NonFiniteError(f"{item.name}: the factors of its error overflow {left.dtype}")
        # Of the first turn, which alone rounds W itself, is what plain rounding would have cost.
        return left_over.of(results[-1], _energy(x), results[0]), ErrorFactors(right, left)

    def _dtype(self, x: torch.Tensor) -> torch.dtype:
        return torch_dtype("F32") if self.wide else x.dtype

    def _factorise(
        self, item: Item, x: torch.Tensor, back: torch.Tensor, room: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LeftOver]:
        """lora_B, lora_A of ``x − back``, and what is left; ``room``, as large, is written over."""
        from lora_tools.linalg.delta import Delta
        from lora_tools.linalg.lora import balanced_factors, no_factors
        from lora_tools.linalg.svd import truncated
        from lora_tools.linalg.truncation import sum_of_squares

        delta, by = Delta(x, back), item.feeding.by if item.feeding is not None else None
        lost = delta.fill(room).delta
        weighted = lost if by is None else sum_of_squares(by.apply(room))
        svd = truncated(room, RankRule("rank", self.rank), total=weighted, tolerance=_TOLERANCE)
        left, right = no_factors(x.shape, self._dtype(x))
        error, of_outputs = 0.0, 0.0
        if svd.rank:
            left, right, fit = balanced_factors(svd, delta, 1.0, left.dtype, by, lost)
            error, of_outputs = max(fit.error, 0.0), fit.weighted
        if by is None:
            return left, right, LeftOver(lost, error)
        outputs = [max(w - by.damping * e, 0.0) for w, e in ((weighted, lost), (of_outputs, error))]
        return left, right, LeftOver(lost, error, *outputs)


@dataclasses.dataclass(frozen=True)
class LeftOver:
    """‖E‖²_F of the weights without the factors and with them, and tr(E R Eᵀ) of the outputs, where
    R is known."""

    lost: float
    weights: float
    outputs_lost: float | None = None
    outputs: float | None = None

    def of(self, result: TensorResult, energy: float, first: TensorResult) -> TensorResult:
        """The result of a weight of that energy, ‖W‖²_F; ``first`` is that of rounding W itself."""

        def relative(error: float | None, norm: float | None) -> float | None:
            if error is None or norm is None:
                return None
            return math.sqrt(error) / norm if norm else 0.0

        norm = math.sqrt(energy)
        outputs = relative(self.outputs_lost, first.output_norm)
        return dataclasses.replace(
            result,
            norm=norm,
            relative_error=relative(self.lost, norm) or 0.0,
            compensated_error=relative(self.weights, norm),
            output_error=first.output_error if outputs is None else outputs,
            output_error_unfed=first.output_error_unfed,
            compensated_output_error=relative(self.outputs, first.output_norm),
            output_norm=first.output_norm,
        )


def _energy(x: torch.Tensor) -> float:
    from lora_tools.linalg.lora import Whole
    from lora_tools.linalg.truncation import sum_of_squares

    return math.fsum(sum_of_squares(run.float()) for _, _, run in Whole(x).runs())


def finish(
    writer: PeftWriter,
    folder: Path,
    base: Checkpoint,
    how: Compensation,
    out: Path,
    jobs: int | None,
) -> int:
    """Write the adapter that ``writer`` collected in ``folder``, with the others stacked on it,
    into ``out``; returns its bytes. Raises MismatchError where there is nothing to write."""
    if not writer.ranks:
        raise MismatchError(
            "four bits hold every weight exactly, so there is nothing to compensate; leave "
            "--compensate out"
        )
    task = next((w.adapter.config.get("task_type") for w in how.adapters), None)
    config: dict[str, Any] = {"task_type": task}
    modules = {split_tensor(name)[0] for name in base.specs}
    modules |= {split_tensor(base.weights.head)[0]} - {""}
    writer.finish(config, modules, {"loratools": tool_version()})
    if how.adapters:
        mine = Weighted(open_peft(folder, folder), 1.0, FOLDER)
        stack([mine, *how.adapters], out, jobs)
    else:
        folder.rename(out)
    return sum(path.stat().st_size for path in out.iterdir())
