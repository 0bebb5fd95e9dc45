"""A size shared out over many places by what each next step there gains: ranks over modules, bits
over layers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def allocate(
    prices: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], size: int
) -> list[int]:
    """How many of its steps each place takes, so that they cost ``size`` at most.

    Greedy: always the step that gains most for its cost, which is optimal for the size it comes to
    where the prices of a place fall; what is left of the size goes to the best that still fits.

    Args:
        prices: of each place, what its steps gain, each divided by its cost, falling.
        costs: of each place, what its steps cost.
    """
    heap = [(-known[0], i) for i, known in enumerate(prices) if known]
    heapq.heapify(heap)
    taken, left = [0] * len(prices), size
    while heap:
        _, i = heapq.heappop(heap)
        cost = costs[i][taken[i]]
        if cost > left:
            continue  # nor are the next ones of this place taken
        taken[i], left = taken[i] + 1, left - cost
        if taken[i] < len(prices[i]):
            heapq.heappush(heap, (-prices[i][taken[i]], i))
    return taken
