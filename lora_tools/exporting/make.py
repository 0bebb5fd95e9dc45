"""What an export puts into one folder: weights, the graphs over them, and the check of both."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import QualityGateError, need
from lora_tools.exporting.quantized import Quantization
from lora_tools.exporting.runtime_adapters import SUFFIX, RuntimeAdapters
from lora_tools.formats.checkpoint import Checkpoint, with_theta
from lora_tools.formats.output import Prepared
from lora_tools.formats.regular_files import read_file
from lora_tools.formats.synced import copy_synced, write_synced
from lora_tools.merging.prepare import copied_modules
from lora_tools.onnx import genai
from lora_tools.onnx.tasks import Task
from lora_tools.options import Check, Graphs, Running
from lora_tools.provenance import tool_version
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sentences import offence
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import input_bytes
from lora_tools.totals import ExportTotals, LossTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.onnx.graphs import Built
    from lora_tools.onnx.outputs import Check as Checked

_MADE = (".onnx", ".onnx_data", SUFFIX)  # what an export leaves in a folder
FAILED = ".failed"


@dataclasses.dataclass(frozen=True)
class Export:
    """One export, planned.

    Attributes:
        given: the checkpoint as it was named.
        placing: "shared" or "bundled", see ``Graphs.weights``; cast: bundled in the dtype that
            the graph computes in.
        weights: where they change, what writes them; None: they are copied, or stay.
        plain: writes the weights with none quantized, where those lie nowhere yet.
        runtime: adapters that are inputs of the graph.
        keep: where an output that differs too much is left.
        said: notes on what the graph is.
    """

    source: Checkpoint
    given: str
    task: Task
    graphs: Graphs
    check: Check
    running: Running
    quantization: Quantization
    placing: str
    cast: bool
    weights: Prepared | None
    plain: Prepared | None
    runtime: RuntimeAdapters | None
    allow_other_base: bool
    in_place: bool
    force: bool
    keep: Path | None
    said: tuple[str, ...]

    def files(self) -> tuple[str, ...]:
        """What is added to the checkpoint's files, a graph first."""
        return (*self.task.files(), *(self.runtime.files() if self.runtime else ()))

    def planned(self, command: str) -> Report[ExportTotals]:
        """The report of the plan, runtime adapters aside."""
        plan = self.weights.report if self.weights else self._copying()
        plan = self.quantization.planned(plan, self.source)
        graphs = tuple(Fate(file, Action.GRAPH, self.task.name) for file in self.task.files())
        return dataclasses.replace(
            plan,
            verb="export",
            plan=(*plan.plan, *graphs),
            inputs=_as_bases(plan.inputs),
            command=command,
            notes=(*plan.notes, *self.said),
        )

    def _copying(self) -> Report[ExportTotals]:
        """The plan where no weight changes."""
        action = Action.KEEP if self.in_place else Action.COPY
        nbytes = 0 if self.in_place else sum(f.path.stat().st_size for f in self.source.files)
        fates = (Fate(s.name, action, "", s.nbytes) for s in self.source.stored.specs.values())
        modules = () if self.in_place else copied_modules(self.source)
        inputs = (Input("base", self.given),)
        totals: ExportTotals = {"bytes": nbytes}
        plan = (*fates, *modules)
        return Report("export", tool_version(), inputs, "", False, plan, totals=totals)

    def space(self) -> int:
        """Bytes that are needed while it is made; the graphs are small."""
        if self.in_place:
            return 0
        weights = self.weights.nbytes if self.weights else self._copying().totals["bytes"]
        bundle = 0
        if self.cast:
            size = 4 if self.graphs.compute_dtype == "float32" else 2
            bundle = sum(spec.numel for spec in self.source.specs.values()) * size
        elif self.placing == "bundled" or self.quantization.affine:
            bundle = weights
        beside = self.plain.nbytes if self.plain else 0
        adapters = self.runtime.space(not self.check.no_verify) if self.runtime else 0
        return int(weights + bundle + beside + adapters)

    def input_bytes(self) -> int:
        """Of the tensors that are read."""
        adapters = input_bytes(a.weighted for a in self.runtime.each) if self.runtime else 0
        return adapters + (self.weights.input_bytes if self.weights else self.source.stored.nbytes)

    def write(self, report: Report[ExportTotals], out: Path) -> Report[ExportTotals]:
        """Make it at ``out``: the folder, or in place the first of ``files``.

        Raises:
            QualityGateError: the outputs differ by more than allowed.
        """
        check_installed()
        rows = self.quantization.rows(self.source, self.graphs.trust_remote_code)
        if self.weights is None:
            report = _with_digest(report, self.source)
        made = self._add(report, out, rows) if self.in_place else self._make(report, out, rows)
        text = self.quantization.inputs(self.check.eval_text)
        return dataclasses.replace(made, inputs=(*made.inputs, *text))

    def _make(
        self, report: Report[ExportTotals], folder: Path, rows: torch.Tensor | None
    ) -> Report[ExportTotals]:
        """A new folder."""
        if self.weights:
            report = _with_digests(report, self.weights.write(folder), self.said)
        else:
            _copy(self.source, folder)
        _name_theta(folder / "config.json")
        report = self._work(report, folder, rows)
        if self.placing == "bundled":
            _drop_weights(folder)
        try:
            gate(report)
        except QualityGateError:
            if self.keep is not None:
                folder.rename(self.keep)
            raise
        return report

    def _add(
        self, report: Report[ExportTotals], main: Path, rows: torch.Tensor | None
    ) -> Report[ExportTotals]:
        """Files put into the checkpoint's own folder; nothing else in it changes.

        They are made and checked in a hidden folder inside, where hard links stand for the weights.
        """
        destination, folder = main.parent.parent, main.with_name("work")
        folder.mkdir()
        for path in destination.iterdir():
            made_before = path.suffix in _MADE or (self.force and path.name == genai.NAME)
            if path.is_file() and not made_before:
                os.link(path.resolve(), folder / path.name)
        before = {path.name for path in folder.iterdir()}
        report = self._work(report, folder, rows)
        gate(report)
        for name in before:  # onnx's checker refuses weights of which there is a second link
            (folder / name).unlink(missing_ok=True)
        (folder / self.files()[0]).rename(main)
        for kind in ("beside", "parts"):
            main.with_name(kind).mkdir()
        for path in folder.iterdir():  # what is no part of the plan is of the graph alone
            kind = "beside" if path.name in self.files() else "parts"
            path.rename(main.with_name(kind) / path.name)
        return self._with_left(report, destination)

    def _with_left(self, report: Report[ExportTotals], folder: Path) -> Report[ExportTotals]:
        """A note on adapters that lie there and were not made now: this graph may have no inputs
        for their factors, or other ones."""
        left = sorted(p.name for p in folder.glob(f"*{SUFFIX}") if p.name not in self.files())
        if not left:
            return report
        said = (
            f"{', '.join(left)} is from an earlier export and may not fit this graph; remove it, "
            "or export it again with --runtime-adapters"
        )
        return dataclasses.replace(report, notes=(*report.notes, said))

    def _work(
        self, report: Report[ExportTotals], folder: Path, rows: torch.Tensor | None
    ) -> Report[ExportTotals]:
        """The graphs over the weights in a folder, and the report of them."""
        from lora_tools.onnx import graphs

        whole = self._plain(folder)
        if self.runtime:
            if not self.allow_other_base:
                self.runtime.check_base(report.inputs[0].digest, self.source)
            self.runtime.write(folder, self.running.jobs)
        built = graphs.Build(
            folder,
            self.task,
            cache=not self.graphs.no_cache,
            weights=self.placing,
            cast=self.cast,
            graph=Path(self.graphs.graph) if self.graphs.graph else None,
            opset=self.graphs.opset,
            trust_remote_code=self.graphs.trust_remote_code,
            made=_made(report, folder),
            branches=self.runtime.branches() if self.runtime else (),
            replacements=self.runtime.replacements() if self.runtime else (),
            scheme=self.quantization.scheme,
            plain=whole,
            factor=self.quantization.factor,
            fuse=not self.graphs.no_fuse,
            dtype=self.graphs.compute_dtype,
            half_io=self.graphs.half_io,
        ).write()
        for file in self.task.files():
            graphs.check_model(folder / file, linked=self.in_place)
        check, lost = self._run(folder, whole, built, rows)
        found = _measured(report, built, check, lost)
        found = self.quantization.measured(found, built, self.placing == "bundled")
        if self.runtime is None:
            return found
        return self.runtime.measured(
            found, folder, self.task, built, jobs=self.running.jobs, **self._allowed()
        )

    def _plain(self, folder: Path) -> Path:
        """Where the weights lie with none quantized."""
        if self.plain is None:
            return self.source.path if self.quantization.packs else folder
        self.plain.write(folder.with_name("plain"))
        return folder.with_name("plain")

    def _run(
        self, folder: Path, whole: Path, built: Built, rows: torch.Tensor | None
    ) -> tuple[Checked | None, LossTotals]:
        """The graphs beside torch, and what quantizing lost."""
        if self.check.no_verify:
            return None, {}
        from lora_tools.engine.threads import one_torch_thread
        from lora_tools.onnx.check import compare
        from lora_tools.onnx.quality import examine

        with one_torch_thread():
            if not self.quantization.scheme and rows is None:
                return compare(folder, self.task, built.cache, **self._allowed()), {}
            return examine(
                folder,
                self.task,
                built.cache,
                plain=whole,
                quantized=bool(self.quantization.scheme),
                original=not self.quantization.stored,
                rows=rows,
                **self._allowed(),
            )

    def _allowed(self) -> dict[str, Any]:
        return {
            "atol": self.check.atol,
            "rtol": self.check.rtol,
            "trust_remote_code": self.graphs.trust_remote_code,
        }


def check_installed() -> None:
    """Raises NotInstalled where something that an export takes is missing."""
    need("export", "onnx", "onnx", "onnxscript", "onnxruntime", "transformers", "accelerate")


def _as_bases(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """``quantize`` calls a checkpoint one; here it is the base that adapters are merged into."""
    return tuple(
        dataclasses.replace(i, role="base") if i.role == "checkpoint" else i for i in inputs
    )


def _with_digests(
    report: Report[ExportTotals], merged: Report[ExportTotals], said: Sequence[str]
) -> Report[ExportTotals]:
    return dataclasses.replace(
        report,
        inputs=_as_bases(merged.inputs),
        notes=(*merged.notes, *said),
        totals=merged.totals,
        tensors=merged.tensors,
    )


def _with_digest(report: Report[ExportTotals], source: Checkpoint) -> Report[ExportTotals]:
    """Of a checkpoint that is copied or kept, which is read for it."""
    digest = source.digest({})
    first, *rest = report.inputs
    return dataclasses.replace(report, inputs=(dataclasses.replace(first, digest=digest), *rest))


def _made(report: Report[ExportTotals], folder: Path) -> dict[str, str]:
    """How the graphs were made; the merged weights say the same of the adapters."""
    said = {}
    if report.inputs[1:]:
        said = open_checkpoint(folder, allow_pickle=True, decoded=False).files[0].metadata
    adapters = {key: said[key] for key in ("adapter_digests",) if key in said}
    return {
        "loratools": report.version,
        "command": report.command,
        "base_digest": report.inputs[0].digest,
        **adapters,
    }


def _measured(
    report: Report[ExportTotals], built: Built, check: Checked | None, lost: LossTotals
) -> Report[ExportTotals]:
    totals: ExportTotals = {
        **report.totals,
        "graph_bytes": built.nbytes,
        "graph_nodes": built.nodes,
    }
    if built.fused:
        totals["fused"] = dict(built.fused)
    notes = report.notes
    if built.unfused:
        notes = (*notes, f"as torch traces it, not fused: {'; '.join(built.unfused)}")
    if check is None:
        notes = (*notes, "not verified: the graph was not run")
    else:
        totals = {**totals, **check.totals(), **lost}
        notes = (*notes, check.note) if check.note else notes
    return dataclasses.replace(report, totals=totals, notes=notes)


def gate(report: Report[ExportTotals]) -> None:
    """Raises QualityGateError where the graph does not do what torch does."""
    t = report.totals
    if t.get("verified", True):
        return
    if t.get("base_exact") is False:
        raise QualityGateError(
            "without an adapter, the graph gives other bits than the graph without inputs for "
            "adapters; please report this. --keep-failed keeps the output, so that you can look "
            "at it",
            report,
        )
    raise QualityGateError(
        f"{offence(t)}. --keep-failed keeps the output, so that you can look at it", report
    )


def _copy(source: Checkpoint, folder: Path) -> None:
    """The checkpoint's files into a new folder."""
    folder.mkdir()
    travel, _ = source.stored.companions()
    names = [file.path.relative_to(source.path) for file in source.files] + travel
    if source.index_name:
        names.append(Path(source.index_name))
    for name in names:
        copy_synced(source.path / name, folder / name)


def _name_theta(path: Path) -> None:
    """Readers before transformers 5 look for rope_theta at the top, and else take 10000."""
    config = json.loads(read_file(path))
    named = with_theta(config)
    if named != config:
        path.unlink()
        write_synced(path, (json.dumps(named, indent=2) + "\n").encode())


def _drop_weights(folder: Path) -> None:
    """The safetensors files that a bundle took the place of."""
    checkpoint = open_checkpoint(folder, decoded=False)
    for file in checkpoint.files:
        file.path.unlink()
    if checkpoint.index_name:
        (folder / checkpoint.index_name).unlink()
