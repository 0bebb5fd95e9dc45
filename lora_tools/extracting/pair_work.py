"""Runs the tasks of ``extract``: in one pass, or where a shared policy chooses ranks for all
modules at once, in two with spectra kept between."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from lora_tools.engine.tasks import Task
from lora_tools.extracting.decompose import Decomposition, Sides
from lora_tools.extracting.pair_tasks import Extraction, FindDeeper, FitPair, Outcome, extract_tasks
from lora_tools.extracting.pairs import Pair
from lora_tools.extracting.shared_ranks import allot, cost_of, first_depth, for_factors
from lora_tools.options.ranks import Size
from lora_tools.records import Action, ProgressCallback

if TYPE_CHECKING:
    from lora_tools.formats.spectra import Spectra, StoredSpectrum

T = TypeVar("T")


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
        self._using = Extraction(sides, options, spectra)
        self._jobs, self._progress = jobs, progress

    def outcomes(self, pairs: Sequence[Pair], size: Size | None) -> Iterator[Outcome]:
        """What each pair came to."""
        if size is not None:
            self._look_deep(pairs, size)
        waiting: list[Outcome] = []
        saved: list[Pair] = []
        for outcome in self._run(extract_tasks(pairs)):
            self._keep(outcome.stored)
            outcome.stored = {}
            if size is not None and outcome.action == Action.DECOMPOSED:
                waiting.append(outcome)
                continue
            if outcome.action == Action.SAVED_WHOLE:
                saved.append(outcome.pair)
            yield outcome
        if size is not None:
            yield from self._fitted(waiting, saved, size)

    def _run(self, tasks: Sequence[Task[Extraction, None, T]]) -> Iterator[T]:
        from lora_tools.engine import threads

        return threads.run(tasks, self._using, None, jobs=self._jobs, progress=self._progress)

    def _keep(self, found: Mapping[str, StoredSpectrum]) -> None:
        for name, stored in found.items():
            assert self._using.spectra is not None
            self._using.spectra.put(name, stored)

    def _look_deep(self, pairs: Sequence[Pair], size: Size) -> None:
        """Find as many directions at first as a size is likely to have room for."""
        options = self._using.options
        whole = [pair for pair in pairs if pair.action == "decompose"]
        depth = max(first_depth(whole, size, options), options.depth)
        options = dataclasses.replace(options, depth=depth)
        self._using = dataclasses.replace(self._using, options=options)

    def _fitted(
        self, waiting: Sequence[Outcome], saved: Sequence[Pair], size: Size
    ) -> Iterator[Outcome]:
        """Ranks for all at once, and the factors."""
        options, spectra = self._using.options, self._using.spectra
        assert spectra is not None
        pairs = [outcome.pair for outcome in waiting]
        keys = {o.pair: options.key(o.base_hash, o.tuned_hash) for o in waiting}

        def deepen(short: Sequence[Pair], depths: Sequence[int]) -> None:
            deeper = zip(short, depths, strict=True)
            for found in self._run([FindDeeper(p, keys[p], depth) for p, depth in deeper]):
                self._keep(found)

        ranks = allot(
            pairs,
            list(keys.values()),
            spectra,
            options.rule,
            [cost_of(pair, size, options) for pair in pairs],
            for_factors(size, pairs, saved),
            deepen,
        )
        tasks = [
            FitPair(o.pair, keys[o.pair], rank, o.unchanged)
            for o, rank in zip(waiting, ranks, strict=True)
        ]
        for outcome, fitted in zip(waiting, self._run(tasks), strict=True):
            outcome.take(fitted, options)
            yield outcome
