"""``combine``: several adapters into one, by the true change that each makes to the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_tools.adapting.combine_module import Combination, Term
from lora_tools.adapting.other_layout import in_layout
from lora_tools.adapting.stack import (
    bases_named,
    combine_adapters,
    combine_jobs,
    refuse_unstackable,
    stackable,
)
from lora_tools.adapting.write import uncovered, written_as
from lora_tools.errors import AdapterError, MismatchError, UsageError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import Prepared
from lora_tools.linalg.combine import LOW_RANK
from lora_tools.linalg.ranks import RankRule
from lora_tools.options import AdapterForm, Combining, Matching, Origin, Ranks
from lora_tools.options.ranks import rank_rule
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.auto_class import identified, refuse_base_name
from lora_tools.sources.base_names import model_at
from lora_tools.sources.weighted import Weighted, input_bytes, open_weighted
from lora_tools.totals import CombineTotals
from lora_tools.verbs.frame import Call, verb

_NAME = "base_model_name_or_path"


@verb
def combine(
    call: Call,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    combining: Combining,
    matching: Matching,
    ranks: Ranks,
    origin: Origin,
    adapter_form: AdapterForm,
) -> Prepared:
    """Write to ``out`` one adapter out of several, each with its weight: in their format where it
    is one, else in PEFT's, or in the format ``to``.

    With Δ_i = s_i · B_i·A_i the true change that adapter i makes to a weight, s_i its scaling with
    rsLoRA and patterns applied:

    - ``cat``: Σ w_i Δ_i with the factors side by side; exact, the rank is the sum of the ranks.
      With ``rank`` or ``energy`` it is cut, by an exact SVD that never forms the product.
    - ``linear``: the same sum, without the directions that are zero to rounding.
    - ``svd``: the same sum, cut to ``rank``; by default the largest rank of the adapters.
    - ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: see ``linalg.combine``; they
      form the change of one weight at a time and decompose it, by default to the largest rank of
      the adapters.

    Each module and adapter has its own stream of random choices.

    Args:
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``.

    Raises:
        UnsupportedAdapter: DoRA or IA³ among them, or tensors saved whole that cannot be added.
        MismatchError: two adapters change one module in different shapes, or were made for
            different bases.
    """
    options = _options(combining, ranks, adapter_form.dtype)
    _, names = model_at(origin.base, call.running.allow_pickle)
    weighted = open_weighted(adapters, call.running.allow_pickle, names, as_stored=names is None)
    form = _form(weighted, adapter_form.to).at(call.out)
    if combining.normalize:
        options = dataclasses.replace(options, normalize=sum(w.weight for w in weighted))
        if abs(options.normalize or 0) < 1e-8:
            raise UsageError("--normalize divides by the sum of the weights, which is 0")
    if not matching.allow_other_base:
        _check_bases(weighted)
    refuse_base_name(form, adapter_form.base_name)
    if form.name == "peft":
        _identify(weighted, names, adapter_form.base_name)
    given = stackable([_in_layout(w, form, names) for w in weighted])
    options = _with_default_rank(options, given.terms)
    fates = [_fate(name, mine) for name, mine in given.terms.items()]
    saved = given.copied.items()
    fates += [Fate(name, Action.COPY, f"saved whole by {w.path}") for name, (w, _) in saved]
    report = call.report(
        [Input("adapter", w.as_given) for w in weighted],
        fates,
        notes=(
            *_notes(options, weighted, form),
            *(uncovered(given.copied) if options.rule else []),
        ),
    )
    jobs, progress = call.running.jobs, call.running.progress

    def write(out: Path) -> Report[CombineTotals]:
        if form.name == "peft":
            return combine_adapters(report, given, options, out, jobs, progress)
        folder = out.with_name("peft")
        done = combine_adapters(report, given, options, folder, jobs, progress)
        new = open_adapter(folder)
        return written_as(done, new, form, names, out, _blocks(weighted), options.dtype, jobs)

    read = tuple(w.adapter.path for w in weighted)
    nbytes = 3 * sum(w.adapter.nbytes for w in weighted)
    read_bytes = input_bytes(weighted)
    return Prepared(
        report,
        read,
        nbytes,
        read_bytes,
        write,
        is_folder=form.is_folder,
        jobs=lambda: combine_jobs(given, options, form.file_name, fates),
    )


def _form(weighted: Sequence[Weighted], to: str | None) -> Format:
    """The format to write. Raises AdapterError for names that it cannot have as they are."""
    formats = {w.adapter.format for w in weighted}
    form = FORMATS[to or (formats.pop() if len(formats) == 1 else "peft")]
    for each in weighted:
        if each.adapter.unresolved and not form.keeps_names:
            raise AdapterError(
                f"{each.path}: {each.adapter.unresolved}; to write {form.title}, give the model it "
                "was trained on with --base"
            )
    return form


def _in_layout(weighted: Weighted, form: Format, names: BaseNames | None) -> Weighted:
    """With the modules that the format's readers look for."""
    refuse_unstackable(weighted)
    return dataclasses.replace(weighted, adapter=in_layout(weighted.adapter, form, names)[0])


def _blocks(weighted: Sequence[Weighted]) -> dict[str, tuple[bool, ...]]:
    """Of modules that are MergedLinears in loralib. Raises MismatchError."""
    found: dict[str, tuple[bool, ...]] = {}
    for each in weighted:
        for module, blocks in each.adapter.blocks.items():
            if found.setdefault(module, blocks) != blocks:
                raise MismatchError(
                    f"{module}: {each.path} changes other blocks of it than the others do; use "
                    "--to peft"
                )
    return found


def _identify(weighted: Sequence[Weighted], names: BaseNames | None, wanted: str | None) -> None:
    """Have the first adapter's config, which is written, say which base all are for."""
    first = weighted[0].adapter
    said = next((c for w in weighted if (c := w.adapter.config).get(_NAME)), {})
    config = {**first.config, **{key: said[key] for key in (_NAME, "revision") if key in said}}
    given = [w.adapter for w in weighted]
    modules, saved = [m for a in given for m in a.modules], [t for a in given for t in a.whole]
    first.config = identified(config, names, wanted, modules, saved)


def _options(combining: Combining, ranks: Ranks, dtype: str | None) -> Combination:
    """How to combine. Raises UsageError for options that contradict each other."""
    method, density = combining.method, combining.density
    if method in LOW_RANK and density is not None:
        raise UsageError(f"--density is for methods that prune, and {method} does not")
    if method not in LOW_RANK and density is None:
        raise UsageError(f"--method {method} needs --density, the share of elements to keep")
    return Combination(
        method,
        rank_rule(ranks),
        density or 1.0,
        combining.seed,
        combining.majority_sign,
        None,
        parse_float_dtype(dtype) if dtype else None,
    )


def _check_bases(weighted: Sequence[Weighted]) -> None:
    """Raises MismatchError for adapters made for different bases."""
    bases = bases_named(weighted)
    if len(bases) > 1:
        (one, first), (other, second) = list(bases.items())[:2]
        why = "their changes do not add up on either base"
        if one.partition(":")[0] != other.partition(":")[0]:
            why = "the digests are of two kinds, so they cannot be compared"
        raise MismatchError(
            f"{first} was made for the base with the digest {one}, and {second} for {other}: "
            f"{why}; pass --allow-other-base to add them anyway"
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


def _notes(options: Combination, weighted: Sequence[Weighted], form: Format) -> list[str]:
    notes = [note for w in weighted for note in w.adapter.notes]
    if {form.name, *(w.adapter.format for w in weighted)} != {"peft"}:
        notes.append(f"written in the format {form.title}; choose another with --to")
    if options.method not in LOW_RANK:
        assert options.rule is not None
        notes.append(
            "after pruning the change is not low-rank: the errors come from decomposing the result"
        )
    names = {str(w.adapter.config.get("base_model_name_or_path") or "") for w in weighted} - {""}
    if len(names) > 1:
        notes.append(f"the adapters name different bases: {', '.join(sorted(names))}")
    return notes
