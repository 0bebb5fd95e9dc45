"""Extraction in two passes: first every module's spectrum, kept on disk, then the factors at ranks
that were chosen for all modules at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lora_tools.extracting.decompose import Decomposition, Found, regions_of, restore
from lora_tools.extracting.pairs import Pair, one_direction
from lora_tools.formats.spectra import Spectra
from lora_tools.linalg.ranks import SHARED, RankRule, Spectrum
from lora_tools.options.ranks import Size

FIRST_LOOK = 16


def cost_of(pair: Pair, size: Size, options: Decomposition) -> int:
    """What one more direction of a module takes, in what the size counts."""
    return one_direction(pair, options.dtype if size.in_bytes else None, size.in_bytes)


def for_factors(size: Size, pairs: Sequence[Pair], saved: Iterable[Pair]) -> int:
    """What is left for factors, once other tensors and the header have theirs.

    Raises:
        UsageError: nothing.
    """
    others = list(saved)
    names = [p.name for p in others]
    names += [p.name for p in pairs for _ in range(2 + 2 * len(p.followed_by))]
    return size.left([p.spec.nbytes for p in others], names)


def first_depth(pairs: Sequence[Pair], size: Size, options: Decomposition) -> int:
    """How deep to look first: twice the uniform rank of that size."""
    whole = sum(cost_of(pair, size, options) for pair in pairs)
    return max(2 * size.most // max(whole, 1), FIRST_LOOK)


def allot(
    pairs: Sequence[Pair],
    keys: Sequence[str],
    spectra: Spectra,
    rule: RankRule,
    costs: Sequence[int],
    size: int,
    deepen: Callable[[Sequence[Pair], Sequence[int]], None],
) -> list[int]:
    """Ranks for all modules. ``deepen`` puts deeper decompositions of some into ``spectra``, where
    the ranks chosen reach the end of what is known."""
    while True:
        known = [_together(spectra, p, key) for p, key in zip(pairs, keys, strict=True)]
        ranks = SHARED[rule.policy]([rule.capped(s) for s, _ in known], costs, size)
        short = [
            (pair, 2 * depth if rank is None else rank)
            for pair, (_, depth), rank in zip(pairs, known, ranks, strict=True)
            if rank is None or rank > depth
        ]
        if not short:
            return [rank for rank in ranks if rank is not None]
        deepen([pair for pair, _ in short], [depth for _, depth in short])


def region_names(pair: Pair) -> list[str]:
    """The names under which the decompositions of a module's regions are kept."""
    count = len(regions_of(pair))
    return [pair.target] if count == 1 else [f"{pair.target}#{i}" for i in range(count)]


def _together(spectra: Spectra, pair: Pair, key: str) -> tuple[Spectrum, int]:
    """The spectrum of a module's regions, which share one rank: the k-th values of all make one;
    and how many directions are at hand."""
    import torch

    entries = [spectra.get(name, key, vectors=False) for name in region_names(pair)]
    parts = [(restore(e).svd, e) for e in entries if e is not None]
    known = [svd.known for svd, _ in parts if svd is not None]
    if len(known) == 1:
        return known[0], parts[0][1].right.shape[0]
    # As far as all are known; one that is complete has zeros behind.
    ends = [len(s.squared) for s in known if not s.complete]
    count = min(ends) if ends else max(len(s.squared) for s in known)
    squared = torch.zeros(count, dtype=torch.float64)
    for s in known:
        squared[: len(s.squared)] += s.squared[:count]
    whole = [
        s.complete and len(s.squared) <= e.right.shape[0]
        for s, (_, e) in zip(known, parts, strict=True)
    ]
    depths = [
        e.right.shape[0] for (_, e), all_there in zip(parts, whole, strict=True) if not all_there
    ]
    total = sum(s.total for s in known)
    return Spectrum(squared, total, not ends), min(depths, default=count)


def cached(
    spectra: Spectra, name: str, key: str, options: Decomposition
) -> tuple[Found, int] | None:
    """A kept decomposition that is deep enough for the rule, and the rank that it chooses."""
    stored = spectra.get(name, key)
    if stored is None or (options.measured and "edge" not in stored.facts):
        return None
    found = restore(stored)
    assert found.svd is not None
    known = found.svd.known
    if options.rule.shared:
        return (found, 0) if found.rank >= options.depth or known.complete else None
    decides = known.complete or options.rule.counts or not options.rule.whole
    rank = options.rule(known) if decides else None
    return (found, rank) if rank is not None and rank <= found.rank else None
