"""``combine``: several adapters into one, by the true change that each makes to the weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lora_tools.adapting.combine_module import LOW_RANK, Combination, Term
from lora_tools.adapting.stack import bases_named, combine_adapters, stackable
from lora_tools.adapting.write import uncovered
from lora_tools.errors import MismatchError, UsageError
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.linalg.ranks import RankRule
from lora_tools.options import rank_rule
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, ProgressCallback, Report
from lora_tools.sources.weighted import Weighted, open_weighted

if TYPE_CHECKING:
    pass

Kind = Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


def combine(
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    method: Kind = "cat",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    majority_sign: Literal["total", "frequency", "weighted"] = "total",
    normalize: bool = False,
    base: str | Path | None = None,
    allow_other_base: bool = False,
    dtype: str | None = None,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` one PEFT adapter out of several, each with its weight.

    With Δ_i = s_i · B_i·A_i the true change that adapter i makes to a weight, s_i its scaling with
    rsLoRA and patterns applied:

    - ``cat``: Σ w_i Δ_i with the factors side by side; exact, the rank is the sum of the ranks.
      With ``rank`` or ``energy`` it is cut, by an exact SVD that never forms the product.
    - ``linear``: the same sum, without the directions that are zero to rounding.
    - ``svd``: the same sum, cut to ``rank``; by default the largest rank of the adapters.
    - ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: see ``linalg.combine``; they
      form the change of one weight at a time and decompose it, by default to the largest rank of
      the adapters.

    Args:
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``.
        density: the share of elements that the pruning methods keep.
        seed: of the random choice of ``dare_*``; each module and adapter has its own stream.
        majority_sign: how ``ties`` and ``dare_ties`` elect a sign.
        normalize: divide by the sum of the weights.
        base: has the names that some formats are resolved by.
        allow_other_base: combine adapters whose metadata names different bases.

    Raises:
        UnsupportedAdapter: DoRA or IA³ among them, or tensors saved whole that cannot be added.
        MismatchError: two adapters change one module in different shapes, or were made for
            different bases.
    """
    command = command_of(combine, locals())
    started = time.perf_counter()
    options = _options(method, rank, energy, max_rank, density, seed, majority_sign, dtype)
    weighted = open_weighted(adapters, allow_pickle, base)
    if normalize:
        options = dataclasses.replace(options, normalize=sum(w.weight for w in weighted))
        if abs(options.normalize or 0) < 1e-8:
            raise UsageError("--normalize divides by the sum of the weights, which is 0")
    bases = bases_named(weighted)
    if len(bases) > 1 and not allow_other_base:
        (one, first), (other, second) = list(bases.items())[:2]
        raise MismatchError(
            f"{first} was made for the base with the digest {one}, and {second} for {other}: their "
            "changes do not add up on either; pass --allow-other-base to add them all the same"
        )
    terms, copied = stackable(weighted)
    options = _with_default_rank(options, terms)
    fates = [_fate(name, mine) for name, mine in terms.items()]
    fates += [
        Fate(name, Action.COPY, f"saved whole by {w.path}") for name, (w, _) in copied.items()
    ]
    report = Report(
        "combine",
        tool_version(),
        tuple(Input("adapter", w.as_given) for w in weighted),
        str(out),
        dry_run,
        tuple(fates),
        notes=(*_notes(options, weighted), *(uncovered(copied) if options.rule else [])),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [w.adapter.path for w in weighted], force)
        check_space(destination, 3 * sum(w.adapter.nbytes for w in weighted))
        with staged(destination) as staging:
            report = combine_adapters(
                report, weighted, terms, copied, options, staging / "out", jobs, progress
            )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _options(
    method: str,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    density: float | None,
    seed: int,
    sign: str,
    dtype: str | None,
) -> Combination:
    if method not in get_args(Kind):
        raise UsageError(f"--method {method!r}: one of {', '.join(get_args(Kind))} is needed")
    if sign not in ("total", "frequency", "weighted"):
        raise UsageError(f"--majority-sign {sign!r}: total, frequency or weighted is needed")
    if method in LOW_RANK and density is not None:
        raise UsageError(f"--density goes with a method that prunes, and {method} does not")
    if method not in LOW_RANK and density is None:
        raise UsageError(f"--method {method} needs --density, the share of elements it keeps")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density {density}: a share above 0 and up to 1 is needed")
    return Combination(
        method,
        rank_rule({"rank": rank, "energy": energy}, max_rank),
        density or 1.0,
        seed,
        sign,  # type: ignore[arg-type]
        None,
        parse_float_dtype(dtype) if dtype else None,
    )


def _with_default_rank(options: Combination, terms: Mapping[str, list[Term]]) -> Combination:
    if options.rule is not None or options.method in ("cat", "linear"):
        return options
    top = max(t.module.r for mine in terms.values() for t in mine)
    return dataclasses.replace(options, rule=RankRule("rank", top))


def _fate(name: str, terms: Sequence[Term]) -> Fate:
    ranks = " + ".join(str(t.module.r) for t in terms)
    return Fate(
        name, Action.COMBINE, f"ranks {ranks}" if len(terms) > 1 else f"rank {ranks}, alone"
    )


def _notes(options: Combination, weighted: Sequence[Weighted]) -> list[str]:
    notes = []
    if options.method not in LOW_RANK:
        assert options.rule is not None
        notes.append(
            "pruning leaves no low rank behind: the errors are those of decomposing the result"
        )
    names = {str(w.adapter.config.get("base_model_name_or_path") or "") for w in weighted} - {""}
    if len(names) > 1:
        notes.append(f"the adapters name different bases: {', '.join(sorted(names))}")
    return notes
