"""Rounding errors fed forward, by statistics of the layers' inputs: which weights of a plan have
them, and the work on one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_tools.errors import CheckpointError
from lora_tools.formats.activations import Activations
from lora_tools.formats.checkpoint_writer import Shard
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.bitsandbytes import QuantizedTensor, QuantState
from lora_tools.linalg.runs import FED_BYTES, FED_ROWS
from lora_tools.quantizing.plan import Feeding, Item, QuantizePlan
from lora_tools.records import Report, TensorResult, counted
from lora_tools.sources.schemes.row import Scheme
from lora_tools.totals import QuantizeTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.error_feedback import Errors, Factor
    from lora_tools.linalg.nf4 import Quantized
    from lora_tools.sources.schemes.row import Parts

T = TypeVar("T")
_BY_ITSELF = ", rounded by itself: "


def activations_of(path: str | Path | None) -> Activations | None:
    """The statistics that are given."""
    return None if path is None else Activations(Path(path))


def with_input(report: Report[T], known: Activations | None) -> Report[T]:
    """The report with the statistics among its inputs."""
    if known is None:
        return report
    return dataclasses.replace(report, inputs=(*report.inputs, known.as_input()))


def made_by(shards: list[Shard], known: Activations | None) -> list[Shard]:
    """The files with the digest of the statistics in their metadata."""
    if known is None:
        return shards
    said = {"activations_digest": known.digest}
    return [dataclasses.replace(s, metadata={**s.metadata, **said}) for s in shards]


def plan_feeding(
    plan: QuantizePlan, known: Activations, merged: bool = False
) -> tuple[QuantizePlan, list[str]]:
    """The plan with each weight fed whose inputs are known; and notes on what is not.

    Args:
        merged: of those alone that an adapter acts on.

    Raises:
        MismatchError: the statistics are of another model.
    """

    def rounded(item: Item) -> bool:
        return item.packed is not None and bool(item.target.parts or not merged)

    known.match([split_tensor(item.name)[0] for item in plan.items if item.packed is not None])
    items = tuple(_fed(item, known) if rounded(item) else item for item in plan.items)
    return dataclasses.replace(plan, items=items), _notes(list(filter(rounded, items)), known)


def _fed(item: Item, known: Activations) -> Item:
    module, width = split_tensor(item.name)[0], width_of(item)
    if module not in known:
        return dataclasses.replace(item, rounding=f"{_BY_ITSELF}no statistics of its inputs")
    known.check(module, width)
    if not _has_grid(item):
        assert item.scheme is not None
        why = f"{_BY_ITSELF}{item.scheme.title} has no error feedback"
        return dataclasses.replace(item, rounding=why)
    if not known.is_full(module):
        why = f"{_BY_ITSELF}only a diagonal of its inputs is known"
        return dataclasses.replace(item, rounding=why)
    return dataclasses.replace(item, feeding=Feeding(known, module), rounding=", error-fed")


def width_of(item: Item) -> int:
    """How many inputs the layer has."""
    return item.spec.shape[0 if item.transposed else -1]


def _has_grid(item: Item) -> bool:
    scheme = item.scheme
    if isinstance(item.packed, QuantizedTensor):
        return True
    return scheme is not None and scheme.coded is not None and len(item.spec.shape) == 2


def _notes(packed: Sequence[Item], known: Activations) -> list[str]:
    left = [item for item in packed if item.feeding is None]
    notes = []
    if left:
        whys = sorted({item.rounding.removeprefix(_BY_ITSELF) for item in left})
        notes.append(
            f"rounded without error feedback: {len(left)} of {counted(len(packed), 'weight')} "
            f"({left[0].name}{', …' if left[1:] else ''}): {' or '.join(whys)}; collect-stats "
            "--kind full collects what is needed"
        )
    widest = max((width_of(item) for item in packed if item.feeding), default=0)
    if known.tokens is not None and known.tokens < widest:
        notes.append(
            f"{known.path}: made from {counted(known.tokens, 'token')}, but some layers have "
            f"{widest} inputs: more text gives better results"
        )
    return notes


def working_bytes(item: Item) -> int:
    """Working memory of what is fed beside the weight and its codes."""
    width = width_of(item)
    rows = item.spec.numel // max(width, 1)
    each = 14 if isinstance(item.packed, QuantizedTensor) else 22
    return FED_BYTES * width * width + each * min(rows, FED_ROWS) * width + rows * width // 2


def factor_of(feeding: Feeding, width: int) -> Factor | None:
    """The factor of what is known of the inputs; None where they are nothing but zeros.

    Raises:
        CheckpointError: it is no second moment.
    """
    from lora_tools.linalg.error_feedback import factor

    moment = feeding.activations.moment(feeding.module, width)
    if not moment.any():
        return None
    by = factor(moment)
    if by is None:
        raise CheckpointError(
            f"{feeding.activations.path}: {feeding.module}: not a second moment, because it has "
            "negative eigenvalues; collect the statistics again"
        )
    return by


def with_factor(item: Item) -> Item:
    """The item with the factor of its inputs' second moment, where that is known, made once."""
    if item.feeding is None:
        return item
    by = factor_of(item.feeding, width_of(item))
    return dataclasses.replace(item, feeding=dataclasses.replace(item.feeding, by=by))


def feed(
    feeding: Feeding, x: torch.Tensor, made: Quantized, state: QuantState, buffers: Buffers
) -> Errors:
    """Put codes whose errors make up for one another into ``made`` where that lessens the error of
    the layer's outputs, and say what it came to.

    Raises:
        CheckpointError: what is known of the inputs is no second moment.
    """
    import torch

    from lora_tools.linalg import codebooks, error_feedback

    width = state.shape[-1]
    by = feeding.by or factor_of(feeding, width)
    if by is None:
        return error_feedback.Errors(0.0, 0.0, 0.0)  # its outputs are its bias: any codes will do
    book = codebooks.CODEBOOKS[state.quant_type]
    with buffers.lend((len(made.packed),), torch.uint8) as room:
        errors = error_feedback.feed(
            x.view(-1, width), made.packed, made.scales, book, state.blocksize, by, room.numpy()
        )
        if errors.fed < errors.plain:
            made.packed[:] = room.numpy()
            return errors
    return errors.unfed()


class Feeder:
    """Feeds the errors of a weight whose row has a grid, some rows at a time.

    Attributes:
        rows: how many at a time are best: each of them takes as many steps as there are columns.
        errors: what it came to, of all rows so far.
    """

    def __init__(self, item: Item) -> None:
        """Raises CheckpointError: what is known of the inputs is no second moment."""
        from lora_tools.linalg.error_feedback import Errors

        assert item.feeding is not None
        assert item.scheme is not None
        assert item.packed is not None
        self._scheme: Scheme[Any] = item.scheme
        self._packed, self._dtype = item.packed, torch_dtype(item.spec.dtype)
        self._by = item.feeding.by or factor_of(item.feeding, width_of(item))
        self.rows, self.errors = FED_ROWS, Errors(0.0, 0.0, 0.0)

    def feed(self, x: torch.Tensor, parts: Parts) -> Parts:
        """What is stored of rows x (m, n) float32: ``parts``, or with codes whose errors make up
        for one another, where that lessens the error of the layer's outputs."""
        import torch

        from lora_tools.linalg import scaled_feedback

        grid = self._scheme.grid(self._packed, parts)
        if self._by is None or grid is None:  # its outputs are its bias: any codes will do
            return parts
        assert self._scheme.coded is not None
        back = torch.empty(x.shape, dtype=self._dtype)
        self._scheme.decode(self._packed, parts, back, 0)
        values = torch.empty(x.shape)
        errors = scaled_feedback.feed(x, back, grid, self._by, values)
        if errors.fed >= errors.plain:
            self.errors += errors.unfed()
            return parts
        self.errors += errors
        codes = next(iter(self._packed.specs))
        return {**parts, codes: self._scheme.coded(self._packed, values)}


def weights_of(feeding: Feeding | None, state: QuantState) -> torch.Tensor | None:
    """What scales are searched by, if inputs are known: the root mean square of each. Its square
    would be right for errors that are not fed; where they are, this is a little better."""
    if feeding is None:
        return None
    moment = feeding.activations.moment(feeding.module, state.shape[-1])
    root: torch.Tensor = moment.diagonal().clamp(min=0).sqrt()
    top = float(root.max())
    return root / top if top > 0 else None


def with_outputs(result: TensorResult, errors: Errors) -> TensorResult:
    """The result with the relative error of the layer's outputs."""
    energy = errors.energy or 1.0
    return dataclasses.replace(
        result,
        output_error=math.sqrt(errors.fed / energy),
        output_error_unfed=math.sqrt(errors.plain / energy),
        output_norm=math.sqrt(errors.energy),
    )


def totals_of_outputs(results: Sequence[TensorResult]) -> QuantizeTotals:
    """Figures over all weights that were fed, errors weighted by the energy of their outputs."""
    fed = [r for r in results if r.output_norm is not None]
    energy = math.fsum(r.output_norm**2 for r in fed if r.output_norm) or 1.0

    def total(errors: Sequence[float | None]) -> float:
        norms = [r.output_norm or 0.0 for r in fed]
        pairs = zip(errors, norms, strict=True)
        return math.sqrt(math.fsum(((e or 0.0) * norm) ** 2 for e, norm in pairs) / energy)

    if not fed:
        return {}
    totals: QuantizeTotals = {
        "output_error": total([r.output_error for r in fed]),
        "output_error_unfed": total([r.output_error_unfed for r in fed]),
        "tensors_fed": len(fed),
    }
    if any(r.compensated_output_error is not None for r in fed):
        totals["compensated_output_error"] = total([r.compensated_output_error for r in fed])
    return totals
