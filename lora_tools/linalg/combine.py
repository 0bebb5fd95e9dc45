"""Several deltas into one: the methods that act on elements, and so need the deltas dense.

Every method takes true deltas w · s · B·A of one weight, never the factors: PEFT 0.21's own methods
of the same names prune and add the factors themselves, whose product is then no sum of deltas.
Deltas are asked for as often as needed and never held together, so that memory is a few times one
weight however many adapters there are.

- trimming by magnitude, sign election and disjoint merge: TIES, Yadav et al. 2023, arXiv 2306.01708
- random dropping with rescaling: DARE, Yu et al. 2023, arXiv 2311.03099
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# The i-th adapter's delta, without its weight, in float32 or better; a new tensor each time.
Deltas = Callable[[int], "torch.Tensor"]
Sign = Literal["total", "frequency", "weighted"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to combine deltas.

    Attributes:
        prune: "magnitude" keeps the largest elements, "random" keeps elements by chance and divides
            by the density, so that the expectation stays. None: it only adds up, for which factors
            side by side will do, and never forms a delta.
        elects: elects a sign for each element and takes the mean of those that agree (TIES); else
            the weighted deltas are added up.
    """

    name: str
    prune: Literal["magnitude", "random"] | None = None
    elects: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cat"),
        Method("linear"),
        Method("svd"),
        Method("ties", "magnitude", elects=True),
        Method("dare_linear", "random"),
        Method("dare_ties", "random", elects=True),
        Method("magnitude_prune", "magnitude"),
    )
}
LOW_RANK = tuple(name for name, method in METHODS.items() if method.prune is None)


def keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The ⌊density · n⌋ elements of largest magnitude, zeros elsewhere; in place."""
    import torch

    flat = delta.view(-1)
    count = int(density * flat.numel())
    if count >= flat.numel():
        return delta
    kept = torch.topk(flat.abs(), count).indices
    values = flat[kept].clone()
    flat.zero_()[kept] = values
    return delta


def keep_by_chance(delta: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Each element with probability ``density``, divided by it; in place."""
    import torch

    if density >= 1:
        return delta
    noise = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=noise, dtype=torch.float32) < density
    return delta.mul_(kept).div_(density)


def combine_dense(
    method: Method,
    deltas: Deltas,
    weights: Sequence[float],
    density: float,
    seeds: Sequence[int],
    sign: Sign,
    normalize: float | None,
) -> torch.Tensor:
    """The combined delta.

    Args:
        seeds: of each adapter's random choice.
        sign: elected by the sum of the deltas as pruned ("total"), by their count ("frequency"), or
            by the sum with the weights ("weighted", as mergekit does). A tie is positive.
        normalize: the sum of all weights, to divide by it; where signs are elected the sum of those
            that agree takes its place. None: the elected are divided by their number, as in the
            paper and in PEFT.
    """
    import torch

    def pruned(i: int) -> torch.Tensor:
        if method.prune == "magnitude":
            return keep_largest(deltas(i), density)
        return keep_by_chance(deltas(i), density, seeds[i])

    if not method.elects:
        total = pruned(0).mul_(weights[0])
        for i in range(1, len(weights)):
            total.add_(pruned(i), alpha=weights[i])
        return total if normalize is None else total.div_(normalize)
    vote = torch.zeros(())
    for i, weight in enumerate(weights):
        ballot = pruned(i)
        if sign == "frequency":
            ballot = ballot.sign_()
        elif sign == "weighted":
            ballot = ballot.mul_(weight)
        vote = ballot if i == 0 else vote.add_(ballot)
    elected = torch.where(vote >= 0, 1.0, -1.0).to(vote.dtype)
    total, counted = torch.zeros_like(vote), torch.zeros_like(vote)
    for i, weight in enumerate(weights):
        ballot = pruned(i)
        cast = ballot * weight if sign == "weighted" else ballot
        agrees = (cast.sign() == elected).to(vote.dtype)
        total.addcmul_(ballot, agrees, value=weight)
        counted.add_(agrees, alpha=1.0 if normalize is None else weight)
    return total.div_(torch.where(counted.abs() < 1e-8, 1.0, counted))
