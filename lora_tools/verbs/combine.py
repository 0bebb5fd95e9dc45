"""``combine``: several adapters into one, by the true change that each makes to the weights."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_tools.errors import MismatchError, UnsupportedAdapter, UsageError
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.verbs.combine_module import LOW_RANK, Options, Term, combine_module
from lora_tools.verbs.common import command_of, rank_rule, resized_totals, tool_version
from lora_tools.verbs.merge_plan import adapter_digest
from lora_tools.verbs.weighted import Weighted, digests_and_weights, open_weighted

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
    bases = _bases(weighted)
    if len(bases) > 1 and not allow_other_base:
        (one, first), (other, second) = list(bases.items())[:2]
        raise MismatchError(
            f"{first} was made for the base with the digest {one}, and {second} for {other}: their "
            "changes do not add up on either; pass --allow-other-base to add them all the same"
        )
    terms, copied = stackable(weighted)
    options = _with_default_rank(options, terms)
    fates = [_fate(name, mine) for name, mine in terms.items()]
    fates += [Fate(name, "copy", f"saved whole by {w.path}") for name, (w, _) in copied.items()]
    report = Report(
        "combine",
        tool_version(),
        tuple(Input("adapter", _shown(w)) for w in weighted),
        str(out),
        dry_run,
        tuple(fates),
        notes=tuple(_notes(options, weighted)),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [w.adapter.path for w in weighted], force)
        check_space(destination, 3 * sum(w.adapter.nbytes for w in weighted))
        with staged(destination) as staging:
            report = _combine(
                report, weighted, terms, copied, options, staging / "out", jobs, progress
            )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _bases(weighted: Sequence[Weighted]) -> dict[str, str]:
    """The digests of bases that the adapters' metadata names, each with the first path to do so."""
    found: dict[str, str] = {}
    for each in weighted:
        digest = each.adapter.file.metadata.get("base_digest")
        if digest:
            found.setdefault(digest, each.path)
    return found


def _made(weighted: Sequence[Weighted], digests: Sequence[str], command: str) -> dict[str, str]:
    """Metadata. A step of another verb has no command, and is for whatever base that verb has."""
    made = {"loratools": tool_version()}
    if command:
        bases = list(_bases(weighted))
        made |= {"command": command, "adapter_digests": digests_and_weights(digests, weighted)}
        made |= {"base_digest": bases[0]} if len(bases) == 1 else {}
    return made


def stack(weighted: Sequence[Weighted], folder: Path, jobs: int | None) -> None:
    """``cat`` in float32, into a folder to be made. Raises what ``combine`` raises."""
    terms, copied = stackable(weighted)
    options = Options("cat", None, 1.0, 0, "total", None, "F32")
    report = Report(
        "combine",
        tool_version(),
        tuple(Input("adapter", _shown(w)) for w in weighted),
        "",
        False,
        (),
    )
    _combine(report, weighted, terms, copied, options, folder, jobs, None)


def stackable(
    weighted: Sequence[Weighted],
) -> tuple[dict[str, list[Term]], dict[str, tuple[Weighted, str]]]:
    """What each module gets from which adapter, and tensors saved whole. Raises UnsupportedAdapter
    or MismatchError for adapters that cannot be added to one another."""
    for each in weighted:
        _refuse(each)
    return _by_module(weighted), _saved(weighted)


def _options(
    method: str,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    density: float | None,
    seed: int,
    sign: str,
    dtype: str | None,
) -> Options:
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
    return Options(
        method,
        rank_rule({"rank": rank, "energy": energy}, max_rank),
        density or 1.0,
        seed,
        sign,  # type: ignore[arg-type]
        None,
        parse_float_dtype(dtype) if dtype else None,
    )


def _refuse(weighted: Weighted) -> None:
    weighted.adapter.need_lora("low-rank change to add to another's")
    if weighted.adapter.use_dora:
        raise UnsupportedAdapter(
            f"{weighted.path}: a DoRA adapter cannot be combined: its magnitudes fix the norm of "
            "each output, so that its change is no sum of changes; merge the adapters into the "
            "base one by one instead"
        )


def _shown(weighted: Weighted) -> str:
    return weighted.path if weighted.weight == 1 else f"{weighted.path}={weighted.weight:g}"


def _by_module(weighted: Sequence[Weighted]) -> dict[str, list[Term]]:
    """Every module of any adapter with what acts on it. Raises MismatchError."""
    terms: dict[str, list[Term]] = {}
    for index, each in enumerate(weighted):
        for name, module in each.adapter.modules.items():
            term = Term(index, each, module)
            first = terms.setdefault(name, [term])[0]
            if first is term:
                continue
            terms[name].append(term)
            (a, b), (mine, yours) = first.shapes, term.shapes
            alike = first.module.form == module.form and first.layout == term.layout
            if not (alike and a[1:] == mine[1:] and b[0] == yours[0]):
                raise MismatchError(
                    f"{name}: {first.weighted.path} has lora_A {list(a)} and lora_B {list(b)}, "
                    f"{each.path} has {list(mine)} and {list(yours)}; were they trained on one "
                    "base?"
                )
    if not terms:
        raise UnsupportedAdapter("the adapters have no low-rank factors to combine")
    return dict(sorted(terms.items()))


def _saved(weighted: Sequence[Weighted]) -> dict[str, tuple[Weighted, str]]:
    """Tensors saved whole: they replace the base's, and are copied where just one adapter, with
    weight 1, has them. Raises UnsupportedAdapter."""
    found: dict[str, tuple[Weighted, str]] = {}
    for each in weighted:
        mine = {**each.adapter.whole, **{n: t.key for n, t in each.adapter.tokens.items()}}
        for name, key in mine.items():
            if name in found or each.weight != 1 or (len(weighted) > 1 and each.adapter.tokens):
                raise UnsupportedAdapter(
                    f"{name}: {each.path} replaces it whole"
                    + (f", and so does {found[name][0].path}" if name in found else "")
                    + "; that is no change which could be weighted or added without the base. "
                    "Merge the adapters into the base instead"
                )
            found[name] = each, key
    return found


def _with_default_rank(options: Options, terms: Mapping[str, list[Term]]) -> Options:
    if options.rule is not None or options.method in ("cat", "linear"):
        return options
    top = max(t.module.r for mine in terms.values() for t in mine)
    return dataclasses.replace(options, rule=RankRule("rank", top))


def _fate(name: str, terms: Sequence[Term]) -> Fate:
    ranks = " + ".join(str(t.module.r) for t in terms)
    return Fate(name, "combine", f"ranks {ranks}" if len(terms) > 1 else f"rank {ranks}, alone")


def _notes(options: Options, weighted: Sequence[Weighted]) -> list[str]:
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


def _combine(
    report: Report,
    weighted: Sequence[Weighted],
    terms: Mapping[str, list[Term]],
    copied: Mapping[str, tuple[Weighted, str]],
    options: Options,
    folder: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    from lora_tools import engine
    from lora_tools.formats.peft_writer import PeftWriter

    folder.mkdir()
    writer, results = PeftWriter(folder), []
    try:
        for combined in engine.run(
            list(terms.values()),
            lambda mine: combine_module(mine, options),
            jobs=jobs,
            nbytes=lambda mine: _working_bytes(mine, options),
            label=lambda mine: mine[0].module.name,
            progress=progress,
        ):
            module = combined.terms[0].module
            writer.add_lora(
                module.module,
                combined.lora_A,
                combined.lora_B,
                float(combined.r),
                form=module.form,
                parameter=module.parameter,
                r=combined.r,
                bias=combined.bias,
            )
            if combined.result is not None:
                results.append(combined.result)
        for each, key in copied.values():
            writer.add_raw(key, each.adapter.tensor(key))
        digests = [adapter_digest(w.adapter) for w in weighted]
        made = _made(weighted, digests, report.command)
        writer.finish(_config(weighted, terms), None, made)
    finally:
        writer.close()
    totals: dict[str, Any] = {
        "modules": len(terms),
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
        **resized_totals(results),
    }
    inputs = tuple(
        dataclasses.replace(i, digest=digest)
        for i, digest in zip(report.inputs, digests, strict=True)
    )
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)


def _working_bytes(terms: Sequence[Term], options: Options) -> int:
    sizes = [(b[0], math.prod(a[1:])) for a, b in (t.shapes for t in terms)]
    factors = 16 * sum(t.module.r * sum(size) for t, size in zip(terms, sizes, strict=True))
    return factors + (0 if options.method in LOW_RANK else 24 * math.prod(sizes[0]))


def _config(weighted: Sequence[Weighted], terms: Mapping[str, list[Term]]) -> dict[str, Any]:
    """The first adapter's config, with the modules of all of them by their full names."""
    config = {**weighted[0].adapter.config, "use_rslora": False, "init_lora_weights": True}
    modules = [mine[0].module for mine in terms.values()]
    config["target_modules"] = sorted(m.module for m in modules if m.form != "experts")
    for field in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        config[field] = None
    config["lora_bias"] = any(t.module.bias for mine in terms.values() for t in mine)
    saved = [s for w in weighted for s in w.adapter.config.get("modules_to_save") or []]
    config["modules_to_save"] = sorted(set(saved)) or None
    return config
