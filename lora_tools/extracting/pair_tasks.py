"""The middle of ``extract``: of one pair, what changed and the factors of it, as tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, MismatchError, NonFiniteError
from lora_tools.extracting.change import measured
from lora_tools.extracting.decompose import (
    Decomposition,
    Found,
    Sides,
    delta_of,
    find,
    regions_of,
    restore,
)
from lora_tools.extracting.fit import Fitted, find_and_fit, fit
from lora_tools.extracting.pairs import Pair
from lora_tools.extracting.shared_ranks import cached, region_names
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.records import Action, ModuleResult

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.formats.spectra import Spectra, StoredSpectrum

_LARGE = 32 << 20
_SAME = 1e-5  # sums of float32 squares by other processors


@dataclasses.dataclass
class Outcome:
    """What one pair came to: its fate, and what of it goes into the adapter. ``change`` is ‖Δ‖²_F
    of what is not decomposed (``change.measured``); a module's ``result`` has its own."""

    pair: Pair
    action: Action
    base_hash: str = ""
    tuned_hash: str = ""
    result: ModuleResult | None = None
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None
    r: int = 0
    change: float = 0.0
    parameters: int = 0
    reason: str = ""
    # Decompositions that are to be kept, by region; where nothing changed there is none.
    stored: dict[str, StoredSpectrum] = dataclasses.field(default_factory=dict)
    unchanged: dict[str, Found] = dataclasses.field(default_factory=dict)

    def take(self, fitted: Fitted, options: Decomposition) -> None:
        """Have the factors, or the reason why there are none."""
        self.result, self.lora, self.r = fitted.result, fitted.lora, fitted.r
        if fitted.lora is not None:
            self.parameters = fitted.lora[0].numel() + fitted.lora[1].numel()
        self.action = Action.DECOMPOSED if fitted.lora is not None else Action.SKIPPED
        self.reason = "" if fitted.lora is not None else options.left_out


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What all pairs are worked on with; ``spectra`` keeps decompositions, where they are to be
    kept."""

    sides: Sides
    options: Decomposition
    spectra: Spectra | None


@dataclasses.dataclass(frozen=True)
class PairTask:
    """What tasks on one pair have in common."""

    pair: Pair

    @property
    def label(self) -> str:
        return self.pair.name

    @property
    def nbytes(self) -> int:
        """That of a delta in float32."""
        return 4 * self.pair.spec.numel if self.pair.action == "decompose" else 0


@dataclasses.dataclass(frozen=True)
class ExtractPair(PairTask):
    """A task: read one pair and, if it changed and is to be decomposed, decompose it. Where ranks
    are chosen for all pairs at once, its factors come later."""

    def run(self, using: Extraction, _: None, buffers: Buffers) -> Outcome:
        """What the pair came to. Raises MismatchError, NonFiniteError."""
        pair, (base, tuned) = self.pair, using.sides
        assert pair.tuned is not None
        tuned_hash = hash_of(tuned, pair.tuned.name)
        base_hash = hash_of(base, pair.base.name) if pair.base is not None else ""
        outcome = Outcome(pair, Action.UNCHANGED, base_hash, tuned_hash)
        if pair.base is None:
            self._leave_whole(outcome, using.sides)
            return outcome
        if outcome.base_hash == tuned_hash and dataclasses.replace(pair.base, name="") == (
            dataclasses.replace(pair.spec, name="")
        ):
            let_go(pair, using.sides)
            return outcome
        if pair.action == "decompose":
            self._decompose(outcome, using, buffers)
        else:
            self._leave_whole(outcome, using.sides)
        return outcome

    def _leave_whole(self, outcome: Outcome, sides: Sides) -> None:
        """Of a tensor that is not decomposed, how much it changed, and what becomes of it.

        Raises:
            MismatchError: it may neither be saved whole nor left out.
            NonFiniteError: it is to be saved whole, and its change holds an inf or a NaN.
        """
        pair, (base, tuned) = self.pair, sides
        outcome.change, _ = measured((base, pair.base), (tuned, pair.tuned))
        let_go(pair, sides)
        if not outcome.change and pair.base is not None:  # the same values in another dtype
            return
        if pair.action == "refuse" and pair.outside:
            raise MismatchError(
                f"{pair.name}: changed, but is outside the transformer, where PEFT has no "
                "adapters; --rest skip leaves it out (and counts it). Copy its folder from TUNED "
                "into the merged model"
            )
        if pair.action == "refuse":
            raise MismatchError(
                f"{pair.name}: changed, and it has no low-rank form; --rest save keeps it whole, "
                "--rest skip leaves it out"
            )
        outcome.action = Action.SKIPPED if pair.action == "skip" else Action.SAVED_WHOLE
        if outcome.action == Action.SAVED_WHOLE and _is_codes(pair):
            raise MismatchError(
                f"{pair.name}: {pair.spec.dtype} {list(pair.spec.shape)} changed, but does not "
                "hold floats (it may hold codes of an unknown format); give the plain checkpoint, "
                "or leave it out with --exclude"
            )
        if outcome.action == Action.SAVED_WHOLE and math.isinf(outcome.change):
            raise NonFiniteError(
                f"{pair.name}: cannot be saved whole, because one side holds an inf or a NaN; "
                "--exclude leaves it out"
            )

    def _decompose(self, outcome: Outcome, using: Extraction, buffers: Buffers) -> None:
        pair, sides, options = self.pair, using.sides, using.options
        if using.spectra is None:
            fitted = find_and_fit(pair, sides, options, buffers)
            if fitted is not None:
                outcome.take(fitted, options)
            return
        key = options.key(outcome.base_hash, outcome.tuned_hash)
        names = region_names(pair)
        for name in names:
            _refuse_other(using.spectra, name, key)
        kept = [cached(using.spectra, name, key, options) for name in names]
        known = [entry for entry in kept if entry is not None]
        if len(known) < len(names):
            found = find(pair, sides, options, buffers)
            for name, one in zip(names, found, strict=True):
                if one.svd is not None:
                    outcome.stored[name] = one.stored(key)
                else:
                    outcome.unchanged[name] = one
            if not outcome.stored:
                return
            known = [(one, _rank(one, options)) for one in found]
        else:
            _check_kept(using.spectra, pair, sides, [one for one, _ in known])
        if options.rule.shared:
            let_go(pair, sides)
            outcome.action = Action.DECOMPOSED
        else:
            regions, ranks = zip(*known, strict=True)
            outcome.take(_fit(pair, sides, regions, ranks, options), options)


@dataclasses.dataclass(frozen=True)
class FindDeeper(PairTask):
    """A task: decompose a pair to a greater depth, under the key of its spectrum."""

    key: str
    depth: int

    def run(self, using: Extraction, _: None, buffers: Buffers) -> dict[str, StoredSpectrum]:
        """The decompositions of its regions; none of those where nothing changed."""
        options = dataclasses.replace(using.options, depth=self.depth)
        found = find(self.pair, using.sides, options, buffers)
        return {
            name: one.stored(self.key)
            for name, one in zip(region_names(self.pair), found, strict=True)
            if one.svd is not None
        }


@dataclasses.dataclass(frozen=True)
class FitPair(PairTask):
    """A task: the factors of one pair at the rank that was chosen for it.

    Attributes:
        key: of its decompositions among the kept ones.
        unchanged: those of its regions that have none, since nothing changed there.
    """

    key: str
    rank: int
    unchanged: Mapping[str, Found]

    def run(self, using: Extraction, *_: object) -> Fitted:
        """The factors and their measure."""
        assert using.spectra is not None
        found = []
        for name in region_names(self.pair):
            stored = using.spectra.get(name, self.key)
            found.append(self.unchanged[name] if stored is None else restore(stored))
        ranks = [min(self.rank, one.rank) for one in found]
        return _fit(self.pair, using.sides, found, ranks, using.options)


def extract_tasks(pairs: Sequence[Pair]) -> list[ExtractPair]:
    """What is to be done on each pair; what may be refused goes first, so that it is refused at
    once."""
    return [ExtractPair(p) for p in sorted(pairs, key=lambda pair: pair.action == "decompose")]


def _fit(
    pair: Pair, sides: Sides, found: Sequence[Found], ranks: Sequence[int], options: Decomposition
) -> Fitted:
    fitted = fit(pair, sides, found, ranks, options)
    assert fitted is not None
    return fitted


def _is_codes(pair: Pair) -> bool:
    """Whether a tensor is of whole numbers, and no counter: a training changes no others, and PEFT
    saves none."""
    specs = [spec for spec in (pair.base, pair.tuned) if spec is not None]
    return any(spec.dtype[0] in "IU" and spec.numel > 1 for spec in specs)


def _refuse_other(spectra: Spectra, name: str, key: str) -> None:
    """A file of another pair's decompositions is not to be overwritten unasked."""
    other = spectra.key(name)
    if other is None or _weights_of(other) == _weights_of(key):
        return
    why = "was decomposed from other weights than these"
    if len(_weights_of(other)) != len(_weights_of(key)):  # a hash of another length
        why = "was kept under another kind of digest, and is found only with that --digest"
    raise CheckpointError(
        f"{spectra.earlier}: {name} {why}; give --spectrum-cache another file, or remove this one"
    )


def _check_kept(spectra: Spectra, pair: Pair, sides: Sides, found: Sequence[Found]) -> None:
    """What figures are relative to is that of the weights as they are read now, whatever was kept.
    Raises CheckpointError where it differs."""
    for name, at, one in zip(region_names(pair), regions_of(pair), found, strict=True):
        energies = delta_of(pair, sides, at).measure()
        both = ((energies.delta, one.total), (energies.base, one.base))
        if not all(math.isclose(now, kept, rel_tol=_SAME) for now, kept in both):
            raise CheckpointError(
                f"{spectra.earlier}: {name} is there with a change of energy {one.total:.6g}, but "
                f"the weights' change has {energies.delta:.6g}; remove the file, and the "
                "decompositions are made again"
            )


def _rank(found: Found, options: Decomposition) -> int:
    """What the rule chooses for a decomposition that may be deeper; all, where it decides later."""
    if found.svd is None or options.rule.shared:
        return found.rank
    rank = options.rule(found.svd.known)
    return found.rank if rank is None else rank


def _weights_of(key: str) -> str:
    """The part of a key that names both sides."""
    return key.partition(" exact ")[0]


def let_go(pair: Pair, sides: Sides) -> None:
    """Give back the pages of both tensors, once nothing more is read of them for now."""
    for side, spec in zip(sides, (pair.base, pair.tuned), strict=True):
        if spec is not None:
            side.release(spec.name)


def hash_of(side: Checkpoint, name: str) -> str:
    """A tensor's hash; a large one's pages are given back."""
    value = side.hash(name)
    if side.specs[name].nbytes > _LARGE:
        side.release(name)  # it is read again, but must not stay beside its delta
    return value


def digests_of(outcomes: Sequence[Outcome], sides: Sides) -> tuple[str, str]:
    """Content digests of both sides; tensors outside every pair are hashed here."""
    hashes: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for outcome in outcomes:
        if outcome.pair.base is not None:
            hashes[0][outcome.pair.base.name] = outcome.base_hash
        if outcome.pair.tuned is not None:
            hashes[1][outcome.pair.tuned.name] = outcome.tuned_hash
    return sides[0].digest(hashes[0]), sides[1].digest(hashes[1])
