"""What two programs gave, held against each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_tools.errors import CheckpointError
from lora_tools.onnx.runs import Played, Run
from lora_tools.onnx.tolerance import Tolerance
from lora_tools.totals import OutputsTotals


@dataclasses.dataclass
class Check:
    """What was found.

    Attributes:
        absolute, relative: the greatest difference, of the output named ``worst`` (of those that
            differ by more than allowed, where some do), and the greatest in units of the output's
            largest element.
        allowed: what the worst output may differ by, in units of its largest element.
        conditioning: how far torch is from itself in float64, in the same units; note: why that is
            not known.
        compared: how many outputs; beyond: whether one differs by more than allowed.
        tokens: how many tokens were generated greedily, and how many of them were the same.
        half: of a graph in half precision, what it is run as it is; above, it is in float32.
        exact: of a graph with inputs for adapters, whether without one it gives the bits that it
            gives without those inputs; else None.
    """

    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""
    allowed: float = 0.0
    conditioning: float | None = None
    note: str = ""
    compared: int = 0
    beyond: bool = False
    failed: bool = False
    tokens: int = 0
    same_tokens: int = 0
    exact: bool | None = None
    half: Check | None = None

    def totals(self) -> OutputsTotals:
        """As a report has them."""
        tokens: OutputsTotals = {"tokens_generated": self.tokens, "tokens_same": self.same_tokens}
        return {
            "verified": not self.failed,
            "outputs_compared": self.compared,
            "max_difference": self.absolute,
            "max_relative_difference": self.relative,
            "worst_output": self.worst,
            "allowed_relative_difference": self.allowed,
            **({} if self.conditioning is None else {"conditioning": self.conditioning}),
            **(tokens if self.tokens else {}),
            **(self.half._as_half() if self.half else {}),
            **({} if self.exact is None else {"base_exact": self.exact}),
        }

    def _as_half(self) -> OutputsTotals:
        totals: OutputsTotals = {
            "half_relative_difference": self.relative,
            "half_allowed_relative_difference": self.allowed,
            "half_conditioning": self.conditioning or 0.0,
            "half_worst_output": self.worst,
        }
        return {**totals, **({"half_tokens_same": self.same_tokens} if self.tokens else {})}

    def add(self, name: str, found: Any, wanted: Any, atol: float, rtol: float) -> None:
        """Compare two arrays of equal shape."""
        if found.shape != wanted.shape:
            raise CheckpointError(f"{name}: {found.shape} in ONNX Runtime, {wanted.shape} in torch")
        self.compared += 1
        if not found.size:
            return
        difference = float(np.abs(found.astype(np.float64) - wanted).max())
        difference = difference if math.isfinite(difference) else math.inf
        largest = float(np.abs(wanted).max())
        beyond = difference == math.inf or difference > atol + rtol * largest
        if (beyond, difference) > (self.beyond, self.absolute) or not self.worst:
            self.beyond, self.absolute, self.worst = beyond, difference, name
            self.allowed = rtol + (atol / largest if largest else 0.0)
        self.failed |= beyond
        self.relative = max(self.relative, difference / largest if largest else difference)

    def hold(self, run: Run, found: Played, wanted: Played, allowed: Tolerance) -> None:
        """Compare all that a run gave, and the tokens it generated."""
        for step, (mine, theirs) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
            for name, value in theirs.items():
                label = f"{name} ({run.name}, step {step})"
                if name in mine:
                    pair = run.visible(step, mine[name], value)
                    self.add(label, *pair, allowed.atol, allowed.share(name))
        self.tokens += len(wanted.tokens)
        for step, (a, b) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
            self.same_tokens += a == b
            self.failed |= a != b and not _tie(wanted.outputs, step, a, b, allowed)


def _tie(outputs: Sequence[Any], step: int, found: int, wanted: int, allowed: Tolerance) -> bool:
    """Whether two tokens are as likely as each other within what is allowed."""
    logits = outputs[step]["logits"][0, -1].astype(np.float64) if step < len(outputs) else None
    if logits is None:
        return False
    room = allowed.atol + allowed.share("logits") * float(np.abs(outputs[step]["logits"]).max())
    return float(logits[wanted] - logits[found]) <= 2 * room
