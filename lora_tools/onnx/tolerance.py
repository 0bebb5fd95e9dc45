"""How far a graph may be from torch: a multiple of how far torch is from itself in float64.

Two sound programs in float32 differ by the order of their sums, and how much that comes to is the
model's doing: it is measured, on the tokens of the check, with several roundings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
from lora_tools.onnx.runs import Played, Run, relative_difference

if TYPE_CHECKING:
    from lora_tools.onnx.in_torch import InTorch

MULTIPLE = 10  # of what is measured; six was seen, on an ill-conditioned token
SEEDS = range(3)  # of the roundings beside torch's own, which may be close by luck
FLOOR = 1e-5  # ONNX Runtime's and torch's exp, erf and tanh differ by that
LIMIT = 1e-2  # a check that allows more tells nothing
UNMEASURED = 3e-4


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """An output may differ by ``atol`` plus a share of its largest element.

    Attributes:
        rtol: that share, where it was chosen; measured: else by the output's name.
        conditioning: how far torch's float32 is from its float64, the greatest of all outputs.
        note: why it could not be measured.
    """

    atol: float
    rtol: float | None
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    conditioning: float | None = None
    note: str = ""

    def wider(self, room: float) -> Tolerance:
        """A tolerance that is greater by a share of the largest element."""
        measured = {name: share + room for name, share in self.measured.items()}
        rtol = None if self.rtol is None else self.rtol + room
        return dataclasses.replace(self, rtol=rtol, measured=measured)

    def share(self, name: str) -> float:
        """Of the largest element of an output of that name."""
        return self.measured.get(name, UNMEASURED) if self.rtol is None else self.rtol


def tolerance(
    side: InTorch, runs: Sequence[Run], played: Sequence[Played], atol: float, rtol: float | None
) -> Tolerance:
    """The tolerance that was chosen, or with ``rtol`` None the measured one.

    Args:
        runs, played: what will be compared, and what torch's float32 gave.
    """
    if rtol is not None:
        return Tolerance(atol, rtol)
    try:
        found = conditioning(side, runs, played)
    except CheckpointError as error:  # an operator that torch has not in float64
        said = str(error).partition(";")[0]
        note = f"torch does not run it in float64 ({said}), so {UNMEASURED:g} was used for"
        return Tolerance(atol, None, note=f"{note} --rtol")
    shares = {name: min(FLOOR + MULTIPLE * off, LIMIT) for name, off in found.items()}
    return Tolerance(atol, None, shares, max(found.values(), default=0.0))


def conditioning(side: InTorch, runs: Sequence[Run], played: Sequence[Played]) -> dict[str, float]:
    """By name of an output, the greatest difference between float32 and float64 in units of the
    output's largest element: of torch's float32, and of some that round otherwise.

    All tokens of a run are given in one call: a cache changes nothing of it.

    Raises:
        CheckpointError: the model does not run so.
    """
    found: dict[str, float] = {}
    for run, each in zip(runs, played, strict=True):
        whole = run.at_once(each.tokens)
        [exact] = side.play(whole, exact=True).outputs
        for seed in (None, *SEEDS):
            [mine] = side.play(whole, seed=seed).outputs
            for name, value in exact.items():
                off = relative_difference(*whole.visible(0, mine[name], value))
                found[name] = max(found.get(name, 0.0), off)
    return found
