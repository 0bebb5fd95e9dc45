"""How much of a merge is left in the outputs of a layer whose rounding errors were fed forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.tensor import MergedRuns, survival_totals
from lora_tools.quantizing.plan import Item
from lora_tools.quantizing.tensor import QuantizedItem
from lora_tools.totals import MergeTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.error_feedback import Factor
    from lora_tools.linalg.merge import Survival


def in_outputs(
    written: Sequence[torch.Tensor], item: Item, source: Checkpoint, by: Factor
) -> list[Survival]:
    """``Survival`` of outputs instead of weights, of inputs whose second moment ``by`` is of.

    Args:
        written: (out, in) each, what a reader makes of the weight in one way to round it.
    """
    import torch

    from lora_tools.linalg.merge import Survival

    runs = MergedRuns(item.target, source, item.spec)
    exact, delta = torch.empty(runs.shape), torch.empty(runs.shape)
    for run in runs:
        rows = slice(run.start, run.stop)
        exact[rows] = run.exact
        delta[rows] = run.exact - runs.read(run.start, run.stop)
    source.release(item.target.base_name)
    if item.transposed:
        exact, delta = exact.T, delta.T.contiguous()
    given = delta.clone()
    by.apply(delta)
    found = []
    for each in written:
        off = each.float() - exact
        plain, weighted = Survival(), Survival()
        plain.sum(given, off)
        weighted.sum(delta, by.apply(off))
        found.append(weighted.less(plain, by.damping))
    return found


def totals_of_outputs(done: Sequence[QuantizedItem]) -> MergeTotals:
    """Over all weights that were fed."""
    both = [each.in_outputs for each in done if each.in_outputs is not None]
    fed, unfed = (survival_totals([pair[i] for pair in both]) for i in (0, 1))
    if not fed:
        return {}
    return {
        "output_delta_kept": fed["delta_kept"],
        "output_delta_kept_unfed": unfed["delta_kept"],
        "output_delta_error": fed["delta_error"],
        "output_delta_error_unfed": unfed["delta_error"],
    }
