"""Figures over many tensors: each weighs by its energy ‖·‖²_F, and a total covers everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from lora_tools.records import ModuleResult, counted
from lora_tools.totals import ErrorTotals, LeftOutTotals, ResizedTotals


@dataclasses.dataclass(frozen=True, slots=True)
class Total:
    """What several tensors come to.

    Attributes:
        energy: Σ‖X‖²_F of what was to be held.
        missing: Σ‖X − X̂‖²_F, X̂ what is held instead.
    """

    energy: float
    missing: float

    @classmethod
    def of(cls, parts: Iterable[tuple[float, float]]) -> Total:
        """Of (‖X‖², ‖X − X̂‖²) of each tensor."""
        both = list(parts)
        return cls(math.fsum(energy for energy, _ in both), math.fsum(lost for _, lost in both))

    @classmethod
    def of_errors(cls, parts: Iterable[tuple[float, float]]) -> Total:
        """Of (‖X‖, ‖X − X̂‖ / ‖X‖) of each tensor."""
        return cls.of((norm**2, (error * norm) ** 2) for norm, error in parts)

    def __add__(self, other: Total) -> Total:
        return Total(self.energy + other.energy, self.missing + other.missing)

    @property
    def missing_share(self) -> float:
        """missing / energy. 0 where nothing was to be held and infinite where something is held all
        the same; 1 where what is missing is infinite, as is the energy then."""
        if math.isinf(self.missing) and math.isinf(self.energy):
            return 1.0
        if not self.energy:
            return math.inf if self.missing else 0.0
        return self.missing / self.energy

    @property
    def relative_error(self) -> float:
        """√(missing / energy)."""
        return math.sqrt(max(self.missing_share, 0.0))

    def share_of(self, whole: Total) -> float:
        """The part of another's energy that this one's is."""
        return Total(whole.energy, self.energy).missing_share


def module_total(modules: Iterable[ModuleResult]) -> Total:
    """Of the changes of modules, and of what their factors lack of them."""
    return Total.of_errors((m.delta_norm, m.relative_error) for m in modules)


@overload
def resized_totals(results: Sequence[ModuleResult]) -> ErrorTotals: ...


@overload
def resized_totals(
    results: Sequence[ModuleResult], dropped: Sequence[tuple[str, float]]
) -> ResizedTotals: ...


def resized_totals(
    results: Sequence[ModuleResult], dropped: Sequence[tuple[str, float]] = ()
) -> ResizedTotals:
    """The report's figures over modules whose rank was chosen anew, and over those that were
    ``dropped``, of which all is missing: their names and ‖Δ‖². None where nothing has energy."""
    total = module_total(results) + Total.of((energy, energy) for _, energy in dropped)
    if not (results and total.energy):
        return {}
    return {
        "relative_error": total.relative_error,
        "energy": 1 - total.missing_share,
        **(left_out_totals(dropped, total) if dropped else {}),
        "rank_min": min(m.rank for m in results),
        "rank_max": max(m.rank for m in results),
    }


def left_out_totals(changes: Sequence[tuple[str, float]], total: Total) -> LeftOutTotals:
    """The report's figures on tensors that changed and are left out, ``changes`` being their names
    and ‖Δ‖² (NaN: not known), ``total`` that of all that changed."""
    known = [(change, name) for name, change in changes if not math.isnan(change)]
    share = Total.of((change, 0.0) for change, _ in known).share_of(total)
    most = max(known)[1] if known else ""
    return {"left_out": len(changes), "left_out_energy": share, "left_out_most": most}


def no_floats(changed: str, names: Sequence[str]) -> list[str]:
    """A note on tensors that have no energy to be counted, ``changed`` in that way."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [
        f"{changed}, and the figures do not cover them, because they are not floats: "
        f"{names[0]}{more}"
    ]


def above(
    max_error: float | None, modules: Sequence[ModuleResult], totals: Mapping[str, Any]
) -> str:
    """``exceeded`` by a module's error or that of all that changed, and by what is left out."""
    worst = max(modules, key=lambda m: m.relative_error, default=None)
    of = [] if worst is None else [(worst.module, worst.relative_error, f" at rank {worst.rank}")]
    said = exceeded(max_error, of, totals["relative_error"])
    if said and totals.get("left_out_most"):
        said += (
            f", changed and left out: {counted(totals['left_out'], 'tensor')} with "
            f"{totals['left_out_energy']:.2%} of the energy, most of it in "
            f"{totals['left_out_most']}"
        )
    return said


def exceeded(max_error: float | None, worst: Sequence[tuple[str, float, str]], total: float) -> str:
    """A sentence where the error of the worst or the total is above the limit; else "". An error
    that is not a number is above every limit.

    Args:
        worst: what has the largest error, that, and what else to say of it; empty for nothing.
    """
    if max_error is None or all(error <= max_error for error in (*(e for _, e, _ in worst), total)):
        return ""
    parts = [f"worst is {name} with {error:.4g}{more}" for name, error, more in worst]
    parts.append(f"total is {total:.4g}")
    return f"relative error above --max-error {max_error:g}: {', '.join(parts)}"
