"""Figures of an extraction: over all that changed, in the adapter or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.figures import Total, left_out_totals, module_total, no_floats
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.records import Action
from lora_tools.totals import ExtractTotals

if TYPE_CHECKING:
    from lora_tools.extracting.pair_tasks import Outcome


def extract_totals(outcomes: Sequence[Outcome], folder: Path) -> ExtractTotals:
    """Errors weighted by energy: what is saved whole has none, what is left out has nothing else.

    A module of rank 0 is left out; its figures stand among the modules' all the same. What is no
    float has no energy, and is in no figure but a number of tensors (``uncovered`` says which).
    """
    modules = [o.result for o in outcomes if o.result is not None]
    held = [m for m in modules if m.rank]
    whole = Total.of(
        (o.change, 0.0) for o in outcomes if o.action == Action.SAVED_WHOLE and _known(o)
    )
    left = Total.of((_change(o), _change(o)) for o in left_out(outcomes) if _known(o))
    total = module_total(held) + whole + left
    gain = math.fsum(m.gain_bound * m.delta_norm**2 for m in held)
    ranks = sorted(m.rank for m in modules)
    noise = math.fsum(m.quantization_noise * m.delta_norm**2 for m in modules)
    quantized: ExtractTotals = {} if noise == 0 else {"quantization_noise": noise / total.energy}
    return {
        "modules": len(held),
        "relative_error": total.relative_error,
        "energy": 1 - total.missing_share,
        "gain_bound": gain / total.energy,
        **left_out_totals([(o.pair.name, _change(o)) for o in left_out(outcomes)], total),
        "saved_whole_energy": whole.share_of(total),
        "rank_min": ranks[0],
        "rank_max": ranks[-1],
        "parameters": sum(o.parameters for o in outcomes),
        "parameters_replaced": sum(math.prod(m.shape) for m in held),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        **quantized,
    }


def noise_note(totals: ExtractTotals, sides: Sequence[Checkpoint]) -> list[str]:
    """How much of the change is the rounding of sides that are stored in few bits."""
    share = totals.get("quantization_noise")
    if share is None or math.isnan(share):
        return []
    schemes = " and ".join(dict.fromkeys(s.scheme.title for s in sides if s.scheme is not None))
    return [
        f"about {min(share, 1):.1%} of the change's energy comes from rounding to {schemes}, not "
        "from training; --noise-floor leaves it out"
    ]


def unknown_noise(side: Checkpoint) -> str:
    """What to say of a side whose rounding is not known; "" where it is."""
    names = side.noise_unknown()
    if not names:
        return ""
    more = f" and {len(names) - 1:,} more" if names[1:] else ""
    return f"; the error of its rounding is not known for {names[0]}{more}"


def left_out(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What changed and is not in the adapter."""
    return [o for o in outcomes if o.action == Action.SKIPPED]


def uncovered(outcomes: Sequence[Outcome]) -> list[str]:
    """A note on what is left out and has no energy to be counted."""
    names = [o.pair.name for o in left_out(outcomes) if not _known(o)]
    return no_floats("changed, left out", names)


def _change(outcome: Outcome) -> float:
    return outcome.change if outcome.result is None else outcome.result.delta_norm**2


def _known(outcome: Outcome) -> bool:
    return not math.isnan(outcome.change)
