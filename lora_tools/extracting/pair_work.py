"""The middle of ``extract``: pair by pair, what changed and the factors of it. In one pass, or
where a shared policy chooses ranks for all modules at once, in two with spectra kept between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from lora_tools.errors import CheckpointError, MismatchError, NonFiniteError
from lora_tools.extracting.change import measured
from lora_tools.extracting.decompose import (
    Decomposition,
    Fitted,
    Found,
    Sides,
    decompose,
    find,
    fit,
    restore,
)
from lora_tools.extracting.pairs import Pair
from lora_tools.extracting.shared_ranks import (
    allot,
    cached,
    cost_of,
    first_depth,
    for_factors,
    region_names,
)
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.options import Size
from lora_tools.records import Action, ModuleResult, ProgressCallback

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.spectra import Spectra, StoredSpectrum

T = TypeVar("T")
_LARGE = 32 << 20


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


class PairWork:
    """Works on pairs; ``spectra`` keeps decompositions, where they are to be kept."""

    def __init__(
        self,
        sides: Sides,
        options: Decomposition,
        spectra: Spectra | None,
        jobs: int | None,
        progress: ProgressCallback | None,
    ) -> None:
        from lora_tools.engine import threads

        self._sides, self._options, self._spectra = sides, options, spectra
        self._jobs, self._progress = jobs, progress
        self._buffers = threads.Buffers()

    def outcomes(self, pairs: Sequence[Pair], size: Size | None) -> Iterator[Outcome]:
        """What each pair came to; what may be refused goes first, so that it is refused at once."""
        pairs = sorted(pairs, key=lambda pair: pair.action == "decompose")
        if size is None:
            yield from self._keep(self._run(pairs, self._outcome))
            return
        whole = [pair for pair in pairs if pair.action == "decompose"]
        self._options = dataclasses.replace(
            self._options, depth=max(first_depth(whole, size, self._options), self._options.depth)
        )
        waiting: list[Outcome] = []
        saved: list[Pair] = []
        for outcome in self._keep(self._run(pairs, self._outcome)):
            if outcome.action == Action.DECOMPOSED:
                waiting.append(outcome)
                continue
            if outcome.action == Action.SAVED_WHOLE:
                saved.append(outcome.pair)
            yield outcome
        yield from self._second(waiting, saved, size)

    def _run(self, pairs: Sequence[Pair], work: Callable[[Pair], T]) -> Iterator[T]:
        from lora_tools.engine import threads

        return threads.run(
            pairs,
            work,
            jobs=self._jobs,
            nbytes=lambda pair: 4 * pair.spec.numel if pair.action == "decompose" else 0,
            label=lambda pair: pair.name,
            progress=self._progress,
        )

    def _keep(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        for outcome in outcomes:
            for name, stored in outcome.stored.items():
                assert self._spectra is not None
                self._spectra.put(name, stored)
            outcome.stored = {}
            yield outcome

    def _outcome(self, pair: Pair) -> Outcome:
        """Read one pair and, if it changed and is to be decomposed, decompose it."""
        base, tuned = self._sides
        assert pair.tuned is not None
        tuned_hash = hash_of(tuned, pair.tuned.name)
        base_hash = hash_of(base, pair.base.name) if pair.base is not None else ""
        outcome = Outcome(pair, Action.UNCHANGED, base_hash, tuned_hash)
        if pair.base is None:
            self._leave_whole(outcome)
            return outcome
        if outcome.base_hash == tuned_hash and dataclasses.replace(pair.base, name="") == (
            dataclasses.replace(pair.spec, name="")
        ):
            let_go(pair, self._sides)
            return outcome
        if pair.action == "decompose":
            self._decompose(outcome)
        else:
            self._leave_whole(outcome)
        return outcome

    def _leave_whole(self, outcome: Outcome) -> None:
        """Of a tensor that is not decomposed, how much it changed, and what becomes of it.

        Raises:
            MismatchError: it may neither be saved whole nor left out.
            NonFiniteError: it is to be saved whole, and its change holds an inf or a NaN.
        """
        pair = outcome.pair
        base, tuned = self._sides
        outcome.change, _ = measured((base, pair.base), (tuned, pair.tuned))
        let_go(pair, self._sides)
        if not outcome.change and pair.base is not None:  # the same values in another dtype
            return
        if pair.action == "refuse":
            raise MismatchError(
                f"{pair.name}: changed, and it has no low-rank form; --rest save keeps it whole, "
                "--rest skip leaves it out"
            )
        outcome.action = Action.SKIPPED if pair.action == "skip" else Action.SAVED_WHOLE
        if outcome.action == Action.SAVED_WHOLE and math.isinf(outcome.change):
            raise NonFiniteError(
                f"{pair.name}: is to be saved whole, and one side holds an inf or a NaN; "
                "--exclude leaves it out"
            )

    def _decompose(self, outcome: Outcome) -> None:
        pair, options = outcome.pair, self._options
        if self._spectra is None:
            fitted = decompose(pair, self._sides, options, self._buffers)
            if fitted is not None:
                self._take(outcome, fitted)
            return
        key = options.key(outcome.base_hash, outcome.tuned_hash)
        names = region_names(pair)
        for name in names:
            self._refuse_other(name, key)
        kept = [cached(self._spectra, name, key, options) for name in names]
        known = [entry for entry in kept if entry is not None]
        if len(known) < len(names):
            found = find(pair, self._sides, options, self._buffers)
            for name, one in zip(names, found, strict=True):
                if one.svd is not None:
                    outcome.stored[name] = one.stored(key)
                else:
                    outcome.unchanged[name] = one
            if not outcome.stored:
                return
            known = [(one, _rank(one, options)) for one in found]
        if options.rule.shared:
            let_go(pair, self._sides)
            outcome.action = Action.DECOMPOSED
        else:
            self._take(outcome, self._fit(pair, *zip(*known, strict=True)))

    def _refuse_other(self, name: str, key: str) -> None:
        """A file of another pair's decompositions is not to be overwritten unasked."""
        assert self._spectra is not None
        other = self._spectra.key(name)
        if other is not None and _weights_of(other) != _weights_of(key):
            raise CheckpointError(
                f"{self._spectra.earlier}: {name} was decomposed from other weights than these; "
                "give --spectrum-cache another file, or remove this one"
            )

    def _fit(self, pair: Pair, found: Sequence[Found], ranks: Sequence[int]) -> Fitted:
        fitted = fit(pair, self._sides, found, ranks, self._options)
        assert fitted is not None
        return fitted

    def _take(self, outcome: Outcome, fitted: Fitted) -> None:
        outcome.result, outcome.lora, outcome.r = fitted.result, fitted.lora, fitted.r
        if fitted.lora is not None:
            outcome.parameters = fitted.lora[0].numel() + fitted.lora[1].numel()
        outcome.action = Action.DECOMPOSED if fitted.lora is not None else Action.SKIPPED
        outcome.reason = "" if fitted.lora is not None else self._options.left_out

    def _second(
        self, waiting: Sequence[Outcome], saved: Sequence[Pair], size: Size
    ) -> Iterator[Outcome]:
        """Ranks for all at once, and the factors."""
        options, spectra = self._options, self._spectra
        assert spectra is not None
        pairs = [outcome.pair for outcome in waiting]
        keys = {o.pair: options.key(o.base_hash, o.tuned_hash) for o in waiting}

        def deepen(short: Sequence[Pair], depths: Sequence[int]) -> None:
            deeper = dict(zip(short, depths, strict=True))

            def look(pair: Pair) -> dict[str, StoredSpectrum]:
                wanted = dataclasses.replace(options, depth=deeper[pair])
                found = find(pair, self._sides, wanted, self._buffers)
                return {
                    name: one.stored(keys[pair])
                    for name, one in zip(region_names(pair), found, strict=True)
                    if one.svd is not None
                }

            for stored in self._run(short, look):
                for name, one in stored.items():
                    spectra.put(name, one)

        ranks = allot(
            pairs,
            list(keys.values()),
            spectra,
            options.rule,
            [cost_of(pair, size, options) for pair in pairs],
            for_factors(size, pairs, saved),
            deepen,
        )
        chosen = {o.pair: (o, rank) for o, rank in zip(waiting, ranks, strict=True)}

        def work(pair: Pair) -> Outcome:
            outcome, rank = chosen[pair]
            found = []
            for name in region_names(pair):
                stored = spectra.get(name, keys[pair])
                found.append(outcome.unchanged[name] if stored is None else restore(stored))
            self._take(outcome, self._fit(pair, found, [min(rank, one.rank) for one in found]))
            return outcome

        yield from self._run(pairs, work)


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
