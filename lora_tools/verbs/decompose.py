"""What ``extract`` does with one pair of tensors: compare, and decompose what changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError, NonFiniteError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.consumers import Consumer
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.linalg.layouts import Region
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import ModuleResult
from lora_tools.verbs.pairing import Pair

if TYPE_CHECKING:
    import torch

    from lora_tools.engine import Buffers
    from lora_tools.linalg.delta import Delta, Energies
    from lora_tools.linalg.svd import TruncatedSVD

_LARGE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """How to decompose."""

    rule: RankRule
    alpha: float | None
    rslora: bool
    dtype: str | None
    exact: bool
    tolerance: float
    seed: int
    device: str
    half: torch.dtype | None  # what products are several times faster in, if the device has it
    consumer: Consumer


@dataclasses.dataclass
class Outcome:
    """What one pair came to: its fate, and what of it goes into the adapter."""

    pair: Pair
    action: str
    base_hash: str = ""
    tuned_hash: str = ""
    result: ModuleResult | None = None
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None
    r: int = 0
    parameters: int = 0


def work_on(
    pair: Pair, sides: tuple[Checkpoint, Checkpoint], options: Options, buffers: Buffers
) -> Outcome:
    """Read one pair and, if it changed and is to be decomposed, decompose it."""
    base, tuned = sides
    tuned_hash = _hash(tuned, _tuned_name(pair))
    if pair.base is None:
        return Outcome(pair, "saved whole" if pair.action == "save" else "skipped", "", tuned_hash)
    outcome = Outcome(pair, "unchanged", _hash(base, pair.base.name), tuned_hash)
    if outcome.base_hash == tuned_hash and dataclasses.replace(pair.base, name="") == (
        dataclasses.replace(pair.spec, name="")
    ):
        return outcome
    if pair.action == "refuse":
        raise MismatchError(
            f"{pair.name}: changed, and it has no low-rank form; --rest save keeps it whole, "
            "--rest skip leaves it out"
        )
    if pair.action == "decompose":
        _decompose(outcome, sides, options, buffers)
    else:
        outcome.action = "skipped" if pair.action == "skip" else "saved whole"
    return outcome


def _hash(side: Checkpoint, name: str) -> str:
    value = hashing.tensor_hash(side.raw(name))
    if side.specs[name].nbytes > _LARGE:
        side.release(name)  # it is read again, but must not stay beside its delta
    return value


def _tuned_name(pair: Pair) -> str:
    assert pair.tuned is not None
    return pair.tuned.name


def _delta(pair: Pair, sides: tuple[Checkpoint, Checkpoint], at: Region) -> Delta:
    """tuned − base in one region, giving pages back as they are read."""
    from lora_tools.linalg.delta import Delta

    assert pair.base is not None
    assert pair.tuned is not None
    assert pair.layout is not None
    (base, ours), (tuned, theirs) = (sides[0], pair.base), (sides[1], pair.tuned)
    matrix = pair.layout.matrix(pair.spec.shape)

    def done(start: int, stop: int) -> None:
        for side, spec in ((base, ours), (tuned, theirs)):
            row = spec.nbytes // matrix[0]
            side.release(spec.name, (at.row + start) * row, (at.row + stop) * row)

    cut = (slice(at.row, at.row + at.rows), slice(at.col, at.col + at.cols))
    ours_at, theirs_at = (
        side.tensor(spec.name).reshape(matrix)[cut]
        for side, spec in ((base, ours), (tuned, theirs))
    )
    return Delta(theirs_at, ours_at, done)


def _decompose(
    outcome: Outcome,
    sides: tuple[Checkpoint, Checkpoint],
    options: Options,
    buffers: Buffers,
) -> None:
    """Decompose a pair's delta, by way of half precision where that is faster and good enough."""
    import torch

    from lora_tools.linalg.svd import HALF_LOSS, iterates

    pair = outcome.pair
    assert pair.layout is not None
    regions = pair.layout.regions(pair.spec.shape)
    deltas = [_delta(pair, sides, at) for at in regions]
    half = options.half
    if (
        half is not None
        and deltas[0].dtype == torch.float32
        and options.tolerance > 4 * HALF_LOSS
        and any(iterates(delta.shape, options.rule, options.exact) for delta in deltas)
        and _factorise(outcome, deltas, sides, options, buffers, half)
    ):
        return
    _factorise(outcome, deltas, sides, options, buffers, deltas[0].dtype)


def _factorise(
    outcome: Outcome,
    deltas: Sequence[Delta],
    sides: tuple[Checkpoint, Checkpoint],
    options: Options,
    buffers: Buffers,
    dtype: torch.dtype,
) -> bool:
    """Decompose by a copy of each region's delta in ``dtype``. False if half precision does not do:
    an iteration did not converge, or what is left out is as small as its rounding."""
    from lora_tools.linalg import lora
    from lora_tools.linalg.svd import HALF_LOSS

    pair, layout = outcome.pair, outcome.pair.layout
    assert layout is not None
    assert pair.base is not None
    half = dtype != deltas[0].dtype
    shape = pair.spec.shape
    found = []
    for delta in deltas:
        svd, energies = _decomposed(pair, delta, options, buffers, dtype)
        if svd is None and energies.delta:
            return False
        found.append((svd, energies))
    changed = [svd for svd, _ in found if svd is not None]
    rest = [_delta(pair, sides, at).measure() for at in layout.rest(shape)]
    total = math.fsum(energies.delta for energies in (*(e for _, e in found), *rest))
    if not math.isfinite(total):
        raise NonFiniteError(f"{pair.name}: a block that --layout leaves out holds an inf or a NaN")
    if not changed:
        if any(energies.delta for energies in rest):
            raise MismatchError(
                f"{pair.name}: changed, and only in blocks that --layout leaves out; name the "
                "blocks that changed"
            )
        return True  # other dtypes, the same values
    r = layout.r([svd.rank if svd is not None else 0 for svd, _ in found])
    alpha = options.alpha if options.alpha is not None else float(r)
    scale = lora.scaling(alpha, r, options.rslora)
    written = torch_dtype(options.dtype or pair.base.dtype)
    products, error, gain = [], math.fsum(energies.delta for energies in rest), 0.0
    for delta, (svd, energies) in zip(deltas, found, strict=True):
        if svd is None:
            products.append(lora.no_factors(delta.shape, written))
            continue
        left, right, fit = lora.balanced_factors(svd, delta, scale, written)
        if not math.isfinite(fit.error):
            raise NonFiniteError(
                f"{pair.name}: its factors overflow {written}; choose a wider one with --dtype"
            )
        if half and energies.delta - fit.captured < 64 * HALF_LOSS * energies.delta:
            return False
        products.append((left.cpu(), right.cpu()))
        error += max(fit.error, 0.0)
        # The fit holds what the decomposition found, and a little more or, from rounding, less.
        gain += svd.gain if half else max(svd.captured + svd.gain - fit.captured, 0.0)
    lora_A, lora_B = layout.factors(products, shape)
    base_energy = math.fsum(energies.base for energies in (*(e for _, e in found), *rest))
    outcome.action = "decomposed"
    outcome.lora, outcome.r = (lora_A, lora_B, alpha), r
    outcome.parameters = lora_A.numel() + lora_B.numel()
    outcome.result = ModuleResult(
        module=pair.target, layout=layout.name, shape=shape, rank=r,
        relative_error=math.sqrt(error / total), energy=1 - error / total, gain_bound=gain / total,
        delta_norm=math.sqrt(total),
        relative_change=math.sqrt(total / base_energy) if base_energy else math.inf,
        method="+".join(sorted({svd.method for svd in changed})),
    )  # fmt: skip
    return True


def _decomposed(
    pair: Pair, delta: Delta, options: Options, buffers: Buffers, dtype: torch.dtype
) -> tuple[TruncatedSVD | None, Energies]:
    """The SVD of one region's delta; None where it is zero, or half precision did not converge."""
    from lora_tools.linalg.svd import sketched, truncated

    with buffers.lend(delta.shape, dtype) as buffer:
        energies = delta.fill(buffer)
        total = energies.delta
        if not math.isfinite(total):
            side = "tuned" if math.isfinite(energies.base) else "base"
            raise NonFiniteError(f"{pair.name}: the {side} side holds an inf or a NaN")
        if total == 0:
            return None, energies
        matrix = buffer.to(options.device)
        known = {"total": total, "tolerance": options.tolerance, "noise": energies.noise}
        if dtype != delta.dtype:
            return sketched(matrix, options.rule, **known, seed=options.seed), energies
        svd = truncated(matrix, options.rule, **known, seed=options.seed, exact=options.exact)
        return svd, energies
