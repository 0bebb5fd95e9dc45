"""Several adapters made one: the work of ``combine``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.adapting.combine_module import Combination, Combined, Term, combine_module
from lora_tools.adapting.convert_module import factor_bytes
from lora_tools.adapting.jobs import copying_jobs, factors_nbytes, keys_of
from lora_tools.engine.tasks import Call
from lora_tools.errors import MismatchError, UnsupportedAdapter
from lora_tools.figures import resized_totals
from lora_tools.formats.adapters.training_metadata import is_of_training
from lora_tools.formats.alignment import align
from lora_tools.jobs import Job, job
from lora_tools.linalg.combine import LOW_RANK
from lora_tools.merging.jobs import lying_in
from lora_tools.merging.plan import adapter_digest
from lora_tools.provenance import tool_version
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.sources.weighted import Weighted, digests_and_weights
from lora_tools.totals import CombineTotals


def bases_named(weighted: Sequence[Weighted]) -> dict[str, str]:
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
    first, *others = (w.adapter.file.metadata for w in weighted)
    made |= {  # what trainers say, as far as all say the same
        key: text
        for key, text in first.items()
        if is_of_training(key) and all(other.get(key) == text for other in others)
    }
    if command:
        bases = list(bases_named(weighted))
        made |= {"command": command, "adapter_digests": digests_and_weights(digests, weighted)}
        made |= {"base_digest": bases[0]} if len(bases) == 1 else {}
    return made


def stack(weighted: Sequence[Weighted], folder: Path, jobs: int | None) -> None:
    """``cat`` in float32, into a folder to be made. Raises what ``combine`` raises."""
    options = Combination("cat", None, 1.0, 0, "total", None, "F32")
    report: Report[CombineTotals] = Report(
        "combine",
        tool_version(),
        tuple(Input("adapter", w.as_given) for w in weighted),
        "",
        False,
        (),
    )
    combine_adapters(report, stackable(weighted), options, folder, jobs, None)


@dataclasses.dataclass(frozen=True)
class Stackable:
    """Adapters that can be added to one another.

    Attributes:
        terms: what each module gets from which of them.
        copied: tensors saved whole, by name: whose, and the key.
    """

    weighted: Sequence[Weighted]
    terms: Mapping[str, list[Term]]
    copied: Mapping[str, tuple[Weighted, str]]


def stackable(weighted: Sequence[Weighted]) -> Stackable:
    """What of which adapter goes into which module. Raises UnsupportedAdapter or MismatchError for
    adapters that cannot be added to one another."""
    for each in weighted:
        refuse_unstackable(each)
        _refuse_other_names(weighted[0], each)
    return Stackable(weighted, _by_module(weighted), _saved(weighted))


def refuse_unstackable(weighted: Weighted) -> None:
    """Raises UnsupportedAdapter for an adapter that is no sum of low-rank changes."""
    weighted.adapter.need_lora("low-rank change to add to another's")
    if weighted.adapter.use_dora:
        raise UnsupportedAdapter(
            f"{weighted.path}: a DoRA adapter cannot be combined, because its magnitudes fix the "
            "norm of each output; merge the adapters into the base one by one instead"
        )


def _refuse_other_names(first: Weighted, other: Weighted) -> None:
    """Raises MismatchError for an adapter that has other prefixes before the same modules: side by
    side, one half of the factors would be for modules that no model has."""
    mine, theirs = first.adapter.modules, other.adapter.modules
    _, sentence = align(list(theirs), list(mine)) if mine.keys().isdisjoint(theirs) else ({}, "")
    if sentence:
        raise MismatchError(
            f"{first.path} has {min(mine)} and {other.path} has {min(theirs)}, which may be two "
            f"names of one module (if {sentence}, they agree); merge the adapters into the base "
            "instead, which finds the right names"
        )


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
                    f"{each.path} has {list(mine)} and {list(yours)}; were they trained on the "
                    "same base?"
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
                    + "; without the base, such a change cannot be weighted or added. Merge the "
                    "adapters into the base instead"
                )
            found[name] = each, key
        before = set(each.adapter.saved_keys) - set(each.adapter.whole.values())
        found.update({key: (each, key) for key in sorted(before)})
    return found


def combine_tasks(given: Stackable, options: Combination) -> list[Call[Combined]]:
    """What is to be done on each module."""
    return [
        Call(combine_module, (mine,), name, _working_bytes(mine, options))
        for name, mine in given.terms.items()
    ]


def combine_jobs(
    given: Stackable, options: Combination, output: str, fates: Sequence[Fate]
) -> Iterator[Job]:
    """One for each module, and for each tensor that is copied into the file ``output``."""
    known = {fate.tensor: fate for fate in fates}
    for task, mine in zip(combine_tasks(given, options), given.terms.values(), strict=True):
        reads = [r for t in mine for r in lying_in(t.weighted.adapter, keys_of(t.module))]
        numbers = sum(math.prod(shape) for t in mine for shape in t.shapes)
        nbytes = _written_bytes(mine, options)
        yield job(task, known[task.label], reads, output, (), numbers, nbytes)
    for name, (each, key) in given.copied.items():
        yield from copying_jobs(each.adapter, {name: key}, output, fates)


def combine_adapters(
    report: Report[CombineTotals],
    given: Stackable,
    options: Combination,
    folder: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report[CombineTotals]:
    """Write it to ``folder``, which must not exist; the report then has its figures."""
    from lora_tools.engine import threads
    from lora_tools.formats.adapters.peft_writer import PeftWriter

    weighted, terms = given.weighted, given.terms
    folder.mkdir()
    tasks = combine_tasks(given, options)
    writer, results = PeftWriter(folder), []
    try:
        for mine, combined in zip(
            terms.values(),
            threads.run(tasks, (options,), None, jobs=jobs, progress=progress),
            strict=True,
        ):
            module = mine[0].module
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
        for each, key in given.copied.values():
            writer.add_raw(key, each.adapter.tensor(key))
        digests = [adapter_digest(w.adapter.original) for w in weighted]
        made = _made(weighted, digests, report.command)
        writer.finish(_config(weighted, terms), None, made)
    finally:
        writer.close()
    totals: CombineTotals = {
        "modules": len(terms),
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
        **resized_totals(results),
    }
    inputs = tuple(
        dataclasses.replace(i, digest=digest)
        for i, digest in zip(report.inputs, digests, strict=True)
    )
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)


def _working_bytes(terms: Sequence[Term], options: Combination) -> int:
    factors = 2 * sum(factor_bytes(t.module, t.weighted.adapter) for t in terms)
    a, b = terms[0].shapes
    return factors + (0 if options.method in LOW_RANK else 24 * b[0] * math.prod(a[1:]))


def _written_bytes(terms: Sequence[Term], options: Combination) -> int:
    """Of one module's factors, at most."""

    def factors(term: Term, rank: int) -> int:
        return factors_nbytes(term.module, term.weighted.adapter, rank, options.dtype)

    whole = sum(factors(t, t.module.r) for t in terms)
    if options.rule is None:
        return whole
    a, b = terms[0].shapes
    return max(factors(t, options.rule.ceiling(b[0], math.prod(a[1:]))) for t in terms)


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
