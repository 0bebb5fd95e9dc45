"""``diff``: what a fine-tune changed, where, and how low-rank it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.extracting.change import measured
from lora_tools.extracting.decompose import Decomposition, Sides, spectra_of
from lora_tools.extracting.pair_tasks import PairTask, hash_of, let_go
from lora_tools.extracting.pairs import Pair, Plan, make_plan
from lora_tools.extracting.totals import unknown_noise
from lora_tools.figures import Total, left_out_totals, no_floats
from lora_tools.formats.adapters.consumers import CONSUMERS
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.inspecting.spectrum import DEPTH, check_plot, drawn, recommended, shown, summary
from lora_tools.linalg.ranks import RankRule
from lora_tools.options import Search, Tensors, View
from lora_tools.options.parse import NameFilter
from lora_tools.records import Action, Fate, Input, ModuleSpectrum, ProgressCallback, Report
from lora_tools.sources.pipelines import open_whole
from lora_tools.totals import DiffTotals
from lora_tools.verbs.frame import Call, Look, verb

if TYPE_CHECKING:
    from lora_tools.engine.buffers import Buffers

_ORDERS = {"change": lambda s: -s.relative_change, "norm": lambda s: -s.norm, "name": lambda s: 0}


@dataclasses.dataclass(frozen=True)
class _Seen:
    pair: Pair
    fate: Fate
    spectrum: ModuleSpectrum | None = None
    hashes: tuple[str, str] = ("", "")
    change: float = 0.0  # ‖Δ‖²; NaN of what is no float
    base: float = 0.0  # ‖W_base‖²


_RELATIVE = "relative change: ‖tuned − base‖ / ‖base‖; in the title over all float tensors"


@verb
def diff(
    call: Call, base: str | Path, tuned: str | Path, tensors: Tensors, view: View, search: Search
) -> Look:
    """Say what changed from ``base`` to ``tuned``: in the report's ``spectra`` one entry for each
    changed module with a low-rank form, in its ``plan`` the fate of every tensor.

    Args:
        base, tuned: checkpoint folders, safetensors files or hub ids.

    Raises:
        MismatchError: nothing in common, or shapes that do not fit.
        LoraToolsError: any other of the tree.
    """
    chosen = NameFilter(tensors.include, tensors.exclude)
    target = check_plot(view.plot)
    allow_pickle = call.running.allow_pickle
    sides = open_whole(base, allow_pickle), open_whole(tuned, allow_pickle)
    chosen.refuse_idle(w.module for side in sides for w in side.weights.values())
    plan = make_plan(
        *sides, chosen=chosen, embeddings="skip" if _resized(*sides) else "lora", rest="skip"
    )

    def run() -> Report[DiffTotals]:
        options = _options(search)
        seen = _look(plan, sides, options, call.running.jobs, call.running.progress)
        report = _found(call, (base, tuned), sides, plan, seen, view.sort)
        if target is None:
            return report
        moved = f"relative change {report.totals['relative_change']:.2%}"
        return drawn(report, f"{shown(base)} → {shown(tuned)}, {moved}", _RELATIVE, target)

    return Look(tuple(side.path for side in sides), run)


def _options(search: Search) -> Decomposition:
    return Decomposition(
        RankRule("rank", DEPTH),
        None,
        False,
        None,
        False,
        1e-3,
        search.seed,
        search.device,
        CONSUMERS["peft"],
        measured=True,
    )


def _found(
    call: Call,
    given: tuple[str | Path, str | Path],
    sides: Sides,
    plan: Plan,
    seen: Sequence[_Seen],
    order: str,
) -> Report[DiffTotals]:
    """The report of what was seen of each pair."""
    spectra = sorted((s.spectrum for s in seen if s.spectrum is not None), key=_ORDERS[order])
    inputs = [
        Input(role, str(path), digest)
        for role, path, digest in zip(("base", "tuned"), given, _digests(seen, sides), strict=True)
    ]
    total = Total.of((s.base, s.change) for s in seen if not math.isnan(s.change))
    left = [(s.pair.name, s.change) for s in seen if s.fate.action == Action.SKIPPED]
    fates = (*(s.fate for s in seen), *plan.settled)
    counts = [fate.action for fate in fates]
    notes = [
        f"{side.path}: is in {side.scheme.title}; its dequantized numbers are used"
        + unknown_noise(side)
        for side in sides
        if side.scheme is not None
    ]
    notes += no_floats("changed", [s.pair.name for s in seen if math.isnan(s.change)])
    totals: DiffTotals = {
        "relative_change": total.relative_error,
        "changed": counts.count(Action.CHANGED),
        "unchanged": counts.count(Action.UNCHANGED),
        "one_sided": counts.count(Action.ONLY_IN_BASE) + counts.count(Action.ONLY_IN_TUNED),
        **left_out_totals(left, Total(total.missing, 0.0)),
    }
    if sides[0].models:
        totals["models"] = [*sides[0].models]
    notes = [*plan.notes, *notes]
    return call.report(inputs, fates, spectra=tuple(spectra), notes=tuple(notes), totals=totals)


def _resized(base: Checkpoint, tuned: Checkpoint) -> bool:
    return any(
        name in base.specs and base.specs[name].shape != spec.shape
        for name, spec in tuned.specs.items()
    )


def _look(
    plan: Plan,
    sides: Sides,
    options: Decomposition,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> list[_Seen]:
    from lora_tools.engine import threads

    sources = sides, options.on_device()
    unknown = [set(side.noise_unknown()) for side in sides]
    tasks = [
        _SeePair(
            pair,
            all(
                spec is None or spec.name not in names
                for spec, names in zip((pair.base, pair.tuned), unknown, strict=True)
            ),
        )
        for pair in plan.pairs
    ]
    return list(threads.run(tasks, sources, None, jobs=jobs, progress=progress))


@dataclasses.dataclass(frozen=True)
class _SeePair(PairTask):
    """A task: see what changed in one pair.

    Attributes:
        measured: whether what rounding can have added is known of both sides.
    """

    measured: bool

    def run(self, sources: tuple[Sides, Decomposition], _: None, buffers: Buffers) -> _Seen:
        """The pair's fate and, where it has one, its spectrum."""
        sides, options = sources
        options = dataclasses.replace(options, measured=self.measured)
        return _see(self.pair, sides, options, buffers)


def _see(pair: Pair, sides: Sides, options: Decomposition, buffers: Buffers) -> _Seen:
    base, tuned = sides
    assert pair.tuned is not None
    theirs = hash_of(tuned, pair.tuned.name)
    if pair.base is None:
        return _Seen(
            pair,
            Fate(pair.name, Action.ONLY_IN_TUNED, str(list(pair.spec.shape))),
            hashes=("", theirs),
        )
    hashes = hash_of(base, pair.base.name), theirs
    same = dataclasses.replace(pair.base, name="") == dataclasses.replace(pair.tuned, name="")
    if same and hashes[0] == theirs:
        let_go(pair, sides)
        return _Seen(pair, Fate(pair.name, Action.UNCHANGED), hashes=hashes)
    if pair.action == "decompose":
        found = spectra_of(pair, sides, options, buffers)
        known = [one.svd.known for one in found if one.svd is not None]
        if not known:
            return _Seen(pair, Fate(pair.name, Action.UNCHANGED, "the same values"), hashes=hashes)
        assert pair.layout is not None
        total, energy = (
            math.fsum(getattr(one, part) for one in found) for part in ("total", "base")
        )
        relative = math.sqrt(total / energy) if energy else math.inf
        gain = math.fsum(one.svd.gain for one in found if one.svd is not None)
        spectrum = summary(
            known,
            total,
            relative,
            module=pair.target,
            layout=pair.layout.name,
            shape=pair.spec.shape,
            rank=recommended(known),
            gain_bound=gain / total,
        )
        fate = Fate(pair.name, Action.CHANGED, f"by {relative:.3%}")
        return _Seen(pair, fate, spectrum, hashes, total, energy)
    return _moved(pair, sides, hashes)


def _moved(pair: Pair, sides: Sides, hashes: tuple[str, str]) -> _Seen:
    """A changed tensor without a spectrum: how far it moved."""
    assert pair.base is not None
    assert pair.tuned is not None
    change, energy = measured((sides[0], pair.base), (sides[1], pair.tuned))
    left_out = pair.reason.startswith("left out")
    if math.isinf(change) and not left_out:
        side = "tuned" if math.isfinite(energy) else "base"
        raise NonFiniteError(f"{pair.name}: the {side} side holds an inf or a NaN")
    if change == 0:
        return _Seen(pair, Fate(pair.name, Action.UNCHANGED, "the same values"), hashes=hashes)
    if left_out:
        fate = Fate(pair.name, Action.SKIPPED, pair.reason)
    elif math.isnan(change):
        fate = Fate(pair.name, Action.CHANGED, f"{pair.base.dtype}, not a float")
    else:
        by = f"by {math.sqrt(change / energy):.3%}" if energy else "from zero"
        if pair.base.shape != pair.tuned.shape:
            by += f", resized: {list(pair.base.shape)} → {list(pair.tuned.shape)}"
        fate = Fate(pair.name, Action.CHANGED, by)
    return _Seen(pair, fate, None, hashes, change, energy)


def _digests(seen: Sequence[_Seen], sides: Sides) -> tuple[str, str]:
    result = []
    for i, side in enumerate(sides):
        known = {}
        for s in seen:
            spec = (s.pair.base, s.pair.tuned)[i]
            if spec is not None:
                known[spec.name] = s.hashes[i]
        result.append(side.digest(known))
    return result[0], result[1]
