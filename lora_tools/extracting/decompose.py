"""The decomposition of one pair's delta: its leading singular directions, region by region."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lora_tools.errors import NonFiniteError
from lora_tools.extracting.pairs import Pair
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.linalg.layouts import Region
from lora_tools.linalg.ranks import RankRule, Rounding, Spectrum

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.formats.activations import Activations
    from lora_tools.formats.spectra import StoredSpectrum
    from lora_tools.linalg.delta import Delta
    from lora_tools.linalg.truncation import TruncatedSVD
    from lora_tools.linalg.weighting import Weighting

Sides = tuple[Checkpoint, Checkpoint]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """How modules are decomposed, and how their factors are written."""

    rule: RankRule
    alpha: float | None
    rslora: bool
    dtype: str | None
    exact: bool
    tolerance: float
    seed: int
    device: str
    consumer: Consumer
    half: torch.dtype | None = None  # what products are several times faster in, if anything
    activations: Activations | None = None
    depth: int = 0  # directions to find at least, for later use
    measured: bool = False  # whether to measure what rounding can have added
    base_name: str | None = None  # what the adapter's config is to call the base

    def on_device(self) -> Decomposition:
        """With what the device can do. Raises UsageError where it is not usable."""
        from lora_tools.engine import threads

        device = threads.pick_device(self.device)
        return dataclasses.replace(self, half=threads.half_products(device))

    @property
    def left_out(self) -> str:
        """Why a module of rank 0 is not in the adapter."""
        return f"--{self.rule.policy.replace('_', '-')} gives it rank 0"

    def key(self, base_hash: str, tuned_hash: str) -> str:
        """What a decomposition depends on, the depth aside."""
        moments = self.activations.digest if self.activations is not None else "none"
        return (
            f"base {base_hash} tuned {tuned_hash} exact {self.exact} tolerance {self.tolerance!r} "
            f"seed {self.seed} activations {moments}"
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """One region's decomposition with what is known of it: ‖Δ‖²_F, ‖W_base‖²_F, and what both
    sides are expected to have lost by being stored in few bits; no ``svd`` where nothing changed.
    Where activations weigh it, the decomposition's own total is that of the weighted delta."""

    svd: TruncatedSVD | None
    total: float
    base: float
    quantization: float = 0.0

    @property
    def rank(self) -> int:
        return self.svd.rank if self.svd is not None else 0

    def stored(self, key: str) -> StoredSpectrum:
        """As the spectrum cache keeps it."""
        from lora_tools.formats.spectra import StoredSpectrum

        assert self.svd is not None
        known = self.svd.known
        facts: dict[str, Any] = {
            "total": self.total,
            "base": self.base,
            "quantization": self.quantization,
            "gain": self.svd.gain,
            "weighted": self.svd.total,
            "method": self.svd.method,
            "complete": known.complete,
            "shape": list(known.shape),
        }
        if known.rounding is not None:
            facts |= {"rounding": known.rounding.energy, "edge": known.rounding.edge}
        return StoredSpectrum(key, known.squared, self.svd.Vh.contiguous().cpu(), facts)


def restore(stored: StoredSpectrum) -> Found:
    """A decomposition out of the cache, without its left vectors, which the fit makes anew."""
    import torch

    from lora_tools.linalg.truncation import TruncatedSVD

    facts, depth = stored.facts, stored.right.shape[0]
    S = stored.squared[:depth].sqrt()
    rows, cols = facts["shape"]
    rounding = Rounding(facts["rounding"], facts["edge"]) if "edge" in facts else None
    known = Spectrum(stored.squared, facts["weighted"], facts["complete"], (rows, cols), rounding)
    svd = TruncatedSVD(
        torch.empty(rows, 0),
        S,
        stored.right,
        facts["weighted"],
        float((S * S).sum()),
        facts["gain"],
        facts["method"],
        known,
    )
    return Found(svd, facts["total"], facts["base"], facts.get("quantization", 0.0))


def regions_of(pair: Pair) -> tuple[Region, ...]:
    """The regions of the weight that are a product each."""
    assert pair.layout is not None
    return pair.layout.regions(pair.spec.shape)


def delta_of(pair: Pair, sides: Sides, at: Region) -> Delta:
    """tuned − base in one region, giving pages back as they are read."""
    from lora_tools.linalg.delta import Delta

    assert pair.base is not None
    assert pair.tuned is not None
    assert pair.layout is not None
    (base, ours), (tuned, theirs) = (sides[0], pair.base), (sides[1], pair.tuned)
    matrix = pair.layout.matrix(pair.spec.shape)

    stripes = at.stripes

    def done(start: int, stop: int) -> None:
        first, last = at.row + start, at.row + stop
        if len(stripes) > 1:  # copied already
            first, last = (at.row, stripes[-1][1]) if stop == at.rows else (0, 0)
        for side, spec in ((base, ours), (tuned, theirs)):
            row = spec.nbytes // matrix[0]
            side.release(spec.name, first * row, last * row)

    def read(side: Checkpoint, name: str) -> torch.Tensor:
        import torch

        runs = [side.rows(name, matrix, start, stop) for start, stop in stripes]
        rows = runs[0] if len(runs) == 1 else torch.cat(runs)
        return rows[:, at.col : at.col + at.cols]

    ours_at, theirs_at = read(base, ours.name), read(tuned, theirs.name)
    return Delta(theirs_at, ours_at, done)


def may_sketch(pair: Pair, options: Decomposition) -> bool:
    """Whether half precision is faster, and may be good enough."""
    from lora_tools.linalg.svd import HALF_LOSS, iterates

    return (
        options.half is not None
        and "F64" not in (side.dtype for side in (pair.base, pair.tuned) if side is not None)
        and options.tolerance > 4 * HALF_LOSS
        and options.activations is None
        and not options.rule.whole  # the copy's rounding would count as noise
        and any(
            iterates((at.rows, at.cols), options.rule, options.exact) for at in regions_of(pair)
        )
    )


def spectra_of(pair: Pair, sides: Sides, options: Decomposition, buffers: Buffers) -> list[Found]:
    """``find`` for the singular values' sake: by way of half precision where that is faster, with
    values and energies as the delta itself has them in what was found."""
    from lora_tools.linalg.lora import measured
    from lora_tools.linalg.svd import HALF_LOSS

    if may_sketch(pair, options):
        found = find(pair, sides, options, buffers, options.half)
        if all(f.svd is not None or not f.total for f in found):
            found = [
                f
                if f.svd is None
                else dataclasses.replace(f, svd=measured(f.svd, delta_of(pair, sides, at)))
                for f, at in zip(found, regions_of(pair), strict=True)
            ]
            # Where what is left is as small as the copy's rounding, half precision won't do.
            if all(
                f.svd is None or f.total - f.svd.captured >= 64 * HALF_LOSS * f.total for f in found
            ):
                return found
    return find(pair, sides, options, buffers)


def find(
    pair: Pair,
    sides: Sides,
    options: Decomposition,
    buffers: Buffers,
    half: torch.dtype | None = None,
) -> list[Found]:
    """The leading directions of the delta in each region, as many as the rule asks for and
    ``options.depth``. In half precision an iteration may not get there: then it has none.

    Raises:
        NonFiniteError: one side holds an inf or a NaN.
    """
    noise = quantization_noise(pair, sides) / max(pair.spec.numel, 1)
    return [
        _find(pair, delta_of(pair, sides, at), options, buffers, half, noise * at.rows * at.cols)
        for at in regions_of(pair)
    ]


def quantization_noise(pair: Pair, sides: Sides) -> float:
    """E‖E‖²_F of what both sides lost by being stored in few bits; NaN where that is not known."""
    both = zip(sides, (pair.base, pair.tuned), strict=True)
    return math.fsum(side.quantization_noise(spec.name) for side, spec in both if spec is not None)


def _find(
    pair: Pair,
    delta: Delta,
    options: Decomposition,
    buffers: Buffers,
    half: torch.dtype | None,
    quantization: float,
) -> Found:
    from lora_tools.linalg.svd import sketched, truncated
    from lora_tools.linalg.truncation import sum_of_squares

    weighting = weighting_of(pair, options)
    with buffers.lend(delta.shape, half or delta.dtype) as buffer:
        energies = delta.fill(buffer, options.measured, quantization)
        total = energies.delta
        if not math.isfinite(total):
            side = "tuned" if math.isfinite(energies.base) else "base"
            raise NonFiniteError(f"{pair.name}: the {side} side holds an inf or a NaN")
        if total == 0:
            return Found(None, 0.0, energies.base, quantization)
        matrix = buffer.to(options.device)
        if weighting is not None:
            matrix = _weighted(pair, matrix, weighting)
        if half is not None:
            svd = sketched(
                matrix,
                options.rule,
                total=total,
                tolerance=options.tolerance,
                noise=energies.noise,
                rounding=energies.rounding,
                seed=options.seed,
            )
        else:
            svd = truncated(
                matrix,
                options.rule,
                exact=options.exact,
                seed=options.seed,
                depth=options.depth,
                total=total if weighting is None else sum_of_squares(matrix),
                tolerance=options.tolerance,
                noise=0.0 if weighting is not None else energies.noise,
                rounding=energies.rounding,
            )
        del matrix
    return Found(svd, total, energies.base, quantization)


def weighting_of(pair: Pair, options: Decomposition) -> Weighting | None:
    """How the pair's inputs weigh its columns (rows, where the layout is transposed); None where
    that is not known."""
    known, layout = options.activations, pair.layout
    if known is None or layout is None or pair.module not in known:
        return None
    if layout.written not in ("matrix", "embedding") or len(regions_of(pair)) != 1:
        return None  # not one product of one input
    from lora_tools.linalg.weighting import Weighting

    (_, width), _ = layout.shapes(pair.spec.shape, 1)
    return Weighting(known.moment(pair.module, width))


def _weighted(pair: Pair, matrix: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    assert pair.layout is not None
    return weighting.apply(matrix.T).T if pair.layout.transposed else weighting.apply(matrix)
