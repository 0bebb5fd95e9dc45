"""``export --runtime-adapters``: adapters beside a graph of their base, active on request."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.adapting.write import features, write_modules
from lora_tools.errors import UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.format import FEATURES
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.alignment import align
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.plan import adapter_digest, plan_merge
from lora_tools.merging.prepare import merge_for_now
from lora_tools.onnx.tasks import Task
from lora_tools.options import Running
from lora_tools.provenance import check_bases
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.base_names import base_names
from lora_tools.sources.weighted import Weighted, open_weighted
from lora_tools.totals import ExportTotals, RuntimeAdapterTotals

if TYPE_CHECKING:
    from lora_tools.formats.adapters.base_names import BaseNames
    from lora_tools.onnx.graphs import Built
    from lora_tools.onnx.runtime_adapters import Branch, Replacement

SUFFIX = ".onnx_adapter"
_FORMAT = FORMATS["onnxruntime"]


@dataclasses.dataclass(frozen=True)
class RuntimeAdapter:
    """One adapter of the output.

    Attributes:
        file: its name there.
        modules, saved: the adapter's names for the modules that it has factors for, and for the
            tensors that it brings whole → the base's.
    """

    weighted: Weighted
    file: str
    modules: Mapping[str, str]
    saved: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class RuntimeAdapters:
    """The adapters of an export, and the names of their base."""

    each: tuple[RuntimeAdapter, ...]
    base: Checkpoint
    names: BaseNames
    unmatched: tuple[Fate, ...] = ()
    notes: tuple[str, ...] = ()

    def files(self) -> tuple[str, ...]:
        """Their names in the output."""
        return tuple(adapter.file for adapter in self.each)

    def _inputs(self, digests: bool) -> tuple[Input, ...]:
        return tuple(
            Input(
                "adapter",
                a.weighted.as_given,
                adapter_digest(a.weighted.adapter) if digests else "",
            )
            for a in self.each
        )

    def _fates(self) -> tuple[Fate, ...]:
        """Of every module and tensor of every adapter."""
        fates = []
        for adapter in self.each:
            for name, module in adapter.modules.items():
                lora = adapter.weighted.adapter.modules[name]
                reason = f"{adapter.file}: rank {lora.r}, alpha {lora.alpha:g}"
                fates.append(Fate(module, Action.BRANCH, reason))
            fates += [
                Fate(tensor, Action.REPLACE, adapter.file) for tensor in adapter.saved.values()
            ]
        return (*fates, *self.unmatched)

    def planned(self, report: Report[ExportTotals], digests: bool = False) -> Report[ExportTotals]:
        """The report of an export with these adapters in it."""
        return dataclasses.replace(
            report,
            inputs=(*report.inputs, *self._inputs(digests)),
            plan=(*report.plan, *self._fates()),
            notes=(*report.notes, *self.notes),
        )

    def space(self, verify: bool) -> int:
        """Bytes of the files, and of what is written to verify them and then removed."""
        files = sum(
            4 * spec.numel for a in self.each for spec in a.weighted.adapter.file.specs.values()
        )
        return files + (sum(4 * spec.numel for spec in self.base.specs.values()) if verify else 0)

    def branches(self) -> list[Branch]:
        """What the graph must have, each module once."""
        from lora_tools.onnx.runtime_adapters import Branch

        found = {}
        for adapter in self.each:
            for name, module in adapter.modules.items():
                given = adapter.weighted.adapter
                lora, weight = given.modules[name], self.names.weights[module].name
                sizes = given.shape(lora.A)[1], given.shape(lora.B)[0]
                found[module] = Branch(module, weight, sizes, lora.form == "embedding")
        return [found[module] for module in sorted(found)]

    def replacements(self) -> list[Replacement]:
        """The tensors that an adapter brings whole, each once."""
        from lora_tools.onnx.runtime_adapters import Replacement

        tensors = {tensor for adapter in self.each for tensor in adapter.saved.values()}
        return [Replacement(name, self.base.specs[name].shape) for name in sorted(tensors)]

    def check_base(self, digest: str, base: Checkpoint) -> None:
        """Raises MismatchError for an adapter whose metadata names another base than this one, of
        which that is the digest."""
        given = ((a.weighted.path, a.weighted.adapter.file.metadata) for a in self.each)
        check_bases(given, digest, base)

    def write(self, folder: Path, jobs: int | None) -> None:
        """Each as a file that ONNX Runtime loads."""
        for adapter in self.each:
            path = folder / adapter.file
            path.unlink(missing_ok=True)  # one that came with the checkpoint's other files
            write_modules(
                adapter.weighted.adapter,
                tuple(adapter.modules),
                path,
                _FORMAT,
                self.names,
                saved=tuple(adapter.saved),
                weight=adapter.weighted.weight,
                jobs=jobs,
            )

    def measured(
        self,
        report: Report[ExportTotals],
        folder: Path,
        task: Task,
        built: Built,
        *,
        jobs: int | None,
        **options: Any,
    ) -> Report[ExportTotals]:
        """The report with each adapter in it, and where the graph was run, how it did with each.

        Torch runs the base with the adapter merged in float32, as the graph adds it, whatever dtype
        the base is stored in.

        Args:
            options: of ``onnx.check.compare``.
        """
        from lora_tools.engine.threads import one_torch_thread
        from lora_tools.onnx.check import compare

        totals = report.totals.copy()
        figures: dict[str, RuntimeAdapterTotals] = {}
        for adapter in self.each:
            figures[adapter.file] = {
                "bytes": (folder / adapter.file).stat().st_size,
                "modules": len(adapter.modules),
            }
            if "verified" not in totals:
                continue
            merged = folder.parent / "merged"
            merge_for_now(
                folder,
                [(adapter.weighted.adapter.path, adapter.weighted.weight)],
                merged,
                "float32",
                Running(jobs=jobs),
                allow_unmatched=bool(self.unmatched),
            )
            with one_torch_thread():
                check = compare(
                    folder, task, built.cache, adapter=(folder / adapter.file, merged), **options
                )
            shutil.rmtree(merged)
            figures[adapter.file] = {**figures[adapter.file], **check.totals()}
            if check.failed and totals["verified"]:
                worst = f"{adapter.file}: {check.worst}"
                totals = {**totals, **check.totals(), "worst_output": worst}
        totals["runtime_adapters"] = figures
        notes = report.notes
        if built.unused:
            notes = (
                *notes,
                "no graph of this task uses these, so they have no effect: "
                f"{', '.join(built.unused)}",
            )
        return self.planned(dataclasses.replace(report, totals=totals, notes=notes), digests=True)


def plan_runtime_adapters(
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    base: Checkpoint,
    allow_pickle: bool,
    allow_unmatched: bool,
) -> RuntimeAdapters:
    """Match every module of every adapter to one of the base. Headers only are read.

    Raises:
        UnsupportedAdapter: a part of an adapter that no input of a graph stands for.
        AdapterError, MismatchError: a module that the base has not, or not in that shape.
        UsageError: no adapter, or two that would be one file.
    """
    if not adapters:
        raise UsageError("--runtime-adapters: at least one --adapter is needed")
    names = base_names(base)
    each: list[RuntimeAdapter] = []
    unmatched: list[Fate] = []
    notes: list[str] = []
    for weighted in open_weighted(adapters, allow_pickle, names, allow_unmatched):
        _refuse(weighted, names)
        plan = plan_merge(base, [weighted], allow_unmatched)
        unmatched += plan.unmatched
        adapter = weighted.adapter
        ours = {f"{module}.weight": module for module in names.weights}
        theirs = {f"{module}.weight": module for module in adapter.modules}
        mapping, sentence = align([*theirs, *adapter.whole], [*ours, *base.specs])
        notes += [f"{weighted.path}: {sentence} to match the base"] if sentence else []
        modules = {theirs[name]: ours[mapping[name]] for name in theirs if mapping[name] in ours}
        known = {*ours, *base.specs}
        saved = {name: mapping[name] for name in adapter.whole if mapping[name] in known}
        _refuse_saved(weighted, saved, base)
        each.append(RuntimeAdapter(weighted, _file_name(weighted.path), modules, saved))
    files = [adapter.file for adapter in each]
    for file in files:
        if files.count(file) > 1:
            given = [a.weighted.path for a in each if a.file == file]
            raise UsageError(f"{' and '.join(given)} would both be {file}; rename one of them")
    return RuntimeAdapters(tuple(each), base, names, tuple(unmatched), tuple(notes))


def _refuse(weighted: Weighted, names: BaseNames) -> None:
    """What is neither factors of a linear layer or an embedding, nor a tensor saved whole."""
    adapter, path = weighted.adapter, weighted.path
    adapter.need_lora("factors that could be inputs of a graph")
    lacks = {f: w for f, w in features(adapter, names).items() if f not in _FORMAT.keeps}
    if lacks:
        parts = " or ".join(f"{FEATURES[f]} ({min(where)})" for f, where in lacks.items())
        drop = " ".join(f"--drop {feature}" for feature in lacks)
        raise UnsupportedAdapter(
            f"{path}: a runtime adapter cannot hold {parts}; merge the adapter (leave "
            f"--runtime-adapters out), or leave them out: loratools convert {path} -o OUT --to "
            f"peft {drop}"
        )
    embeddings = [m.name for m in adapter.modules.values() if m.form == "embedding"]
    if names.tied and embeddings and adapter.config.get("ensure_weight_tying"):
        known, _ = align(list(adapter.modules), list(names.weights))
        if names.tied not in known.values():
            raise UnsupportedAdapter(
                f"{path}: has ensure_weight_tying, but no factors for {names.tied}, which should "
                f"follow {embeddings[0]}; merge the adapter: leave --runtime-adapters out"
            )


def _refuse_saved(weighted: Weighted, saved: Mapping[str, str], base: Checkpoint) -> None:
    """Tensors saved whole that are neither a vector (norms, biases) nor of a linear layer."""
    adapter, path = weighted.adapter, weighted.path
    for name, tensor in saved.items():
        found, spec = adapter.shape(adapter.whole[name]), base.specs.get(tensor)
        weight = base.weights.get(tensor)
        if weight is not None and (weight.is_head or weight.is_embedding):
            why = "a whole vocabulary"
        elif len(found) > 2:
            why = "of no linear layer"
        elif spec is None or found != spec.shape:
            why = f"{list(found)}, and the base's is {list(spec.shape) if spec else 'not there'}"
        elif weighted.weight != 1:
            why = f"saved whole, so the weight {weighted.weight:g} cannot be applied"
        else:
            continue
        raise UnsupportedAdapter(
            f"{path}: a runtime adapter cannot hold {tensor}: it is {why}; merge the adapter "
            "(leave --runtime-adapters out), or leave out all tensors saved whole: loratools "
            f"convert {path} -o OUT --to peft --drop saved"
        )


def _file_name(path: str) -> str:
    """``adapters/style``, ``style.gguf`` and ``org/style@main`` → ``style.onnx_adapter``."""
    given = Path(path)
    name = given.stem if given.is_file() else given.name.partition("@")[0]
    return (given.resolve().name if name in ("", "..") else name) + SUFFIX
