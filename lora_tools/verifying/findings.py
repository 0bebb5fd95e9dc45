"""What a comparison of two checkpoints found."""

from __future__ import annotations

import dataclasses

from lora_tools.records import Action, Fate, Input, ModuleResult, TensorResult
from lora_tools.totals import VerifyTotals

NEAR = 0.05  # a coefficient this near to a number is that number; so little may be unexplained


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a verification came to; ``offence`` is empty where all is well."""

    inputs: tuple[Input, ...]
    fates: tuple[Fate, ...]
    verdict: str
    offence: str
    totals: VerifyTotals
    notes: tuple[str, ...] = ()
    modules: tuple[ModuleResult, ...] = ()
    tensors: tuple[TensorResult, ...] = ()


FINE = (Action.SAME, Action.ROUNDED, Action.COPIED)


def applied(coefficient: float) -> str:
    """By which factor an adapter was applied, in words."""
    for number, word in (
        (2, "applied twice"),
        (-1, "applied with the wrong sign"),
        (0, "not applied"),
    ):
        if abs(coefficient - number) < NEAR:
            return word
    return f"applied at {coefficient:.4g} times its scale"
