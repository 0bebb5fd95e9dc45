"""``export``: a checkpoint, or a base and its adapters merged in the same pass, as ONNX graphs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.errors import CheckpointError, QualityGateError, UsageError
from lora_tools.exporting.quantized import plan_quantization
from lora_tools.exporting.runtime_adapters import SUFFIX, plan_runtime_adapters
from lora_tools.formats.checkpoint import Checkpoint, with_theta
from lora_tools.formats.output import (
    check_destination,
    check_space,
    copy_synced,
    staged,
    write_synced,
)
from lora_tools.onnx import genai
from lora_tools.onnx.tasks import Task, task_of
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, ProgressCallback, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.verbs.dequantize import dequantize
from lora_tools.verbs.merge import merge
from lora_tools.verbs.quantize import quantize

if TYPE_CHECKING:
    from lora_tools.onnx.check import Check
    from lora_tools.onnx.graphs import Built

_MADE = (".onnx", ".onnx_data", SUFFIX)  # what an export leaves in a folder
_NEEDED = ("onnx", "onnxscript", "onnxruntime", "transformers", "accelerate")


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    runtime_adapters: bool = False,
    task: str = "auto",
    no_cache: bool = False,
    dtype: str | None = None,
    weights: Literal["shared", "bundled"] | None = None,
    nf4: bool = False,
    int8: bool = False,
    int4: bool = False,
    eval_text: str | Path | None = None,
    graph: str | Path | None = None,
    opset: int = 20,
    atol: float = 1e-5,
    rtol: float = 3e-4,
    no_verify: bool = False,
    keep_failed: bool = False,
    trust_remote_code: bool = False,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` a folder with the checkpoint's files and the ONNX graphs that run it.

    Args:
        checkpoint: a checkpoint folder or a hub id; with ``out`` the same folder only the graphs
            are added to it.
        adapters: to merge first, as for ``merge``.
        runtime_adapters: do not merge them: write each as an ``.onnx_adapter`` file that ONNX
            Runtime activates for a request, with inputs of the graph for its factors.
        task: ``auto`` goes by the architecture that ``config.json`` names.
        no_cache: export a decoder without its key/value cache.
        dtype: in which the weights are stored; the graph computes in float32 in any case.
        weights: ``shared`` points into the safetensors files of ``out``; ``bundled`` writes one
            external-data file in their place, as ``int8`` and ``int4`` do by default.
        nf4: linear layers in four bits, over the bytes that ``quantize`` writes, or over those of
            ``checkpoint`` where it is in four bits already.
        int8, int4: linear layers in eight or four bits by ONNX Runtime's quantizer.
        eval_text: a UTF-8 file on which a decoder's perplexity, and its divergence from that of
            the weights before they were quantized, are measured.
        graph: a graph (or its folder) exported from another checkpoint of the same architecture,
            to be used again instead of tracing.
        opset: of ONNX.
        atol, rtol: outputs may differ from torch's by atol + rtol times their largest element.
        no_verify: do not run the graphs.
        keep_failed: leave an output that differs too much, under the name ``out`` + ``.failed``.
        trust_remote_code: run code that comes with the checkpoint.
        allow_other_base: merge an adapter whose metadata names another base.
        dry_run: return the plan; read headers only and write nothing.

    Raises:
        QualityGateError: the outputs differ by more than allowed, or generate other tokens.
        LoraToolsError: any other of the tree; the destination is untouched then.
    """
    command = command_of(export, locals())
    started = time.perf_counter()
    source = open_checkpoint(checkpoint, allow_pickle)
    if not source.is_folder or not source.config:
        raise CheckpointError(f"{source.path}: a folder with a config.json is needed to export")
    chosen = task_of(source.config, task)
    _check_call(opset, atol, rtol)
    destination = Path(out)
    in_place = destination.exists() and destination.resolve() == source.path.resolve()
    runtime = None
    if runtime_adapters:
        runtime = plan_runtime_adapters(adapters, source, allow_pickle, allow_unmatched)
    to_merge = () if runtime_adapters else adapters
    merging = bool(to_merge or dtype)
    quantization = plan_quantization(
        source,
        chosen,
        {"nf4": nf4, "int8": int8, "int4": int4},
        eval_text,
        verify=not no_verify,
        merging=merging,
        runtime=runtime_adapters,
    )
    changing = merging or quantization.packs
    if in_place and changing:
        raise UsageError("--adapter, --dtype and --nf4 change the weights: choose another output")
    placing = quantization.weights(weights, in_place)
    if placing not in ("shared", "bundled"):
        raise UsageError(f"--weights {weights!r}: shared or bundled is needed")

    def merged(where: Path, dry: bool) -> Report:
        return merge(
            checkpoint,
            to_merge,
            where,
            dtype=dtype,
            allow_unmatched=allow_unmatched,
            jobs=jobs,
            allow_other_base=allow_other_base,
            allow_pickle=allow_pickle,
            dry_run=dry,
            progress=progress,
        )

    def made(where: Path, dry: bool) -> Report:
        if not quantization.packs:
            return merged(where, dry)
        return quantize(
            checkpoint,
            where,
            adapters=to_merge,
            dtype=dtype,
            allow_unmatched=allow_unmatched,
            allow_other_base=allow_other_base,
            jobs=jobs,
            allow_pickle=allow_pickle,
            dry_run=dry,
            progress=progress,
        )

    def plain(folder: Path, where: Path, dry: bool) -> Report | None:
        """The weights of a folder with none quantized, where those lie nowhere yet."""
        if quantization.stored:
            return dequantize(folder, where, jobs=jobs, dry_run=dry)
        return merged(where, dry) if quantization.packs and merging else None

    plan = made(destination, True) if changing else _copying(source, checkpoint, out, in_place)
    report = _as_export(quantization.planned(plan, source), chosen, dry_run)
    report = dataclasses.replace(report, command=command)
    if runtime and dry_run:
        report = runtime.planned(report)
    if dry_run:
        return dataclasses.replace(report, seconds=time.perf_counter() - started)
    _check_installed()
    rows = quantization.rows(source)

    def work(folder: Path) -> Report:
        from lora_tools.onnx import graphs

        whole = source.path if quantization.packs else folder
        if plain(folder, folder.with_name("plain"), False):
            whole = folder.with_name("plain")
        if runtime:
            if not allow_other_base:
                runtime.check_base(report.inputs[0].digest)
            runtime.write(folder, jobs)
        built = graphs.build(
            folder,
            chosen,
            cache=not no_cache,
            weights=placing,
            graph=Path(graph) if graph else None,
            opset=opset,
            trust_remote_code=trust_remote_code,
            made=_made(report, folder),
            branches=runtime.branches() if runtime else (),
            replacements=runtime.replacements() if runtime else (),
            scheme=quantization.scheme,
            plain=whole,
        )
        for file in chosen.files():
            graphs.check_model(folder / file, linked=in_place)
        check = None
        lost: dict[str, Any] = {}
        if not no_verify:
            from lora_tools.engine.threads import one_torch_thread

            with one_torch_thread():
                if quantization.scheme or rows is not None:
                    from lora_tools.onnx.quality import examine

                    check, lost = examine(
                        folder,
                        chosen,
                        built.cache,
                        plain=whole,
                        quantized=bool(quantization.scheme),
                        original=not quantization.stored,
                        rows=rows,
                        atol=atol,
                        rtol=rtol,
                        trust_remote_code=trust_remote_code,
                    )
                else:
                    from lora_tools.onnx.check import compare

                    check = compare(
                        folder,
                        chosen,
                        built.cache,
                        atol=atol,
                        rtol=rtol,
                        trust_remote_code=trust_remote_code,
                    )
        found = quantization.measured(
            _measured(report, built, check, lost), built, placing == "bundled"
        )
        if runtime:
            found = runtime.measured(
                found,
                folder,
                chosen,
                built,
                jobs=jobs,
                atol=atol,
                rtol=rtol,
                trust_remote_code=trust_remote_code,
            )
        return found

    if not changing:
        report = _with_digest(report, source)
    if in_place:
        report = _add_to(
            destination,
            (*chosen.files(), *(runtime.files() if runtime else ())),
            force,
            (atol, rtol),
            work,
        )
    else:
        given = [source.path, *(Path(str(a[0] if isinstance(a, tuple) else a)) for a in adapters)]
        given += [Path(graph)] if graph else []
        check_destination(destination, given, force)
        failed = destination.with_name(destination.name + ".failed")
        if keep_failed:
            check_destination(failed, given, force)
        needed = plan.totals.get("bytes") or plan.totals["expected_bytes_at_most"]
        needed *= 2 if placing == "bundled" or quantization.affine else 1
        beside = plain(source.path, destination, True)
        needed += beside.totals["bytes"] if beside else 0
        check_space(destination, needed + (runtime.space(not no_verify) if runtime else 0))
        with staged(destination) as staging:
            folder = staging / "out"
            if changing:
                report = _with_digests(report, made(folder, False))
            else:
                _copy(source, folder)
            _name_theta(folder / "config.json")
            report = work(folder)
            if placing == "bundled":
                _drop_weights(folder)
            try:
                _gate(report, atol, rtol)
            except QualityGateError:
                if keep_failed:
                    folder.rename(failed)
                raise
    inputs = (*report.inputs, *quantization.inputs(eval_text))
    return dataclasses.replace(report, inputs=inputs, seconds=time.perf_counter() - started)


def _check_call(opset: int, atol: float, rtol: float) -> None:
    if not 18 <= opset <= 22:
        raise UsageError(f"--opset {opset}: 18 to 22 is needed")
    if not (atol >= 0 and rtol >= 0):
        raise UsageError("--atol and --rtol: numbers from 0 on are needed")


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"export needs {', '.join(missing)}: install them with pip install 'loratools[onnx]'"
        )


def _copying(source: Checkpoint, given: str | Path, out: str | Path, in_place: bool) -> Report:
    """The plan where no weight changes."""
    action = Action.KEEP if in_place else Action.COPY
    return Report(
        "export",
        tool_version(),
        (Input("base", str(given)),),
        str(out),
        True,
        tuple(Fate(s.name, action, "", s.nbytes) for s in source.specs.values()),
        totals={"bytes": 0 if in_place else sum(f.path.stat().st_size for f in source.files)},
    )


def _as_export(plan: Report, task: Task, dry_run: bool) -> Report:
    graphs = tuple(Fate(file, Action.GRAPH, task.name) for file in task.files())
    return dataclasses.replace(
        plan,
        verb="export",
        plan=(*plan.plan, *graphs),
        dry_run=dry_run,
        seconds=0.0,
        inputs=_as_bases(plan.inputs),
    )


def _as_bases(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """``quantize`` calls a checkpoint one; here it is the base that adapters are merged into."""
    return tuple(
        dataclasses.replace(i, role="base") if i.role == "checkpoint" else i for i in inputs
    )


def _with_digests(report: Report, merged: Report) -> Report:
    return dataclasses.replace(
        report,
        inputs=_as_bases(merged.inputs),
        notes=merged.notes,
        totals=merged.totals,
        tensors=merged.tensors,
    )


def _with_digest(report: Report, source: Checkpoint) -> Report:
    """Of a checkpoint that is copied or kept, which is read for it."""
    digest = source.digest({})
    first, *rest = report.inputs
    return dataclasses.replace(report, inputs=(dataclasses.replace(first, digest=digest), *rest))


def _made(report: Report, folder: Path) -> dict[str, str]:
    """How the graphs were made; the merged weights say the same of the adapters."""
    said = open_checkpoint(folder, allow_pickle=True).files[0].metadata if report.inputs[1:] else {}
    adapters = {key: said[key] for key in ("adapter_digests",) if key in said}
    return {
        "loratools": report.version,
        "command": report.command,
        "base_digest": report.inputs[0].digest,
        **adapters,
    }


def _measured(report: Report, built: Built, check: Check | None, lost: dict[str, Any]) -> Report:
    totals: dict[str, Any] = {
        **report.totals,
        "graph_bytes": built.nbytes,
        "graph_nodes": built.nodes,
    }
    notes = report.notes
    if check is None:
        notes = (*notes, "not verified: the graph was not run")
    else:
        totals |= check.totals() | lost
    return dataclasses.replace(report, totals=totals, notes=notes)


def _gate(report: Report, atol: float, rtol: float) -> None:
    t = report.totals
    if t.get("verified", True):
        return
    if t.get("base_exact") is False:
        raise QualityGateError(
            "without an adapter the graph does not give the bits that it gives without inputs for "
            "adapters; please report this. --keep-failed leaves the output for a look at it",
            report,
        )
    tokens = ""
    if t.get("tokens_same") != t.get("tokens_generated"):
        tokens = (
            f", and {t['tokens_same']} of {t['tokens_generated']} generated tokens are the same"
        )
    raise QualityGateError(
        f"{t['worst_output']} differs from torch by {t['max_difference']:.3g} (relative "
        f"{t['max_relative_difference']:.3g}; allowed: {atol:g} + {rtol:g} of the largest element)"
        f"{tokens}. --keep-failed leaves the output for a look at it",
        report,
    )


def _copy(source: Checkpoint, folder: Path) -> None:
    """The checkpoint's files into a new folder."""
    folder.mkdir()
    travel, _ = source.companions()
    names = [file.path.relative_to(source.path) for file in source.files] + travel
    if source.index_name:
        names.append(Path(source.index_name))
    for name in names:
        copy_synced(source.path / name, folder / name)


def _name_theta(path: Path) -> None:
    """Readers before transformers 5 look for rope_theta at the top, and else take 10000."""
    config = json.loads(path.read_bytes())
    named = with_theta(config)
    if named != config:
        path.unlink()
        write_synced(path, (json.dumps(named, indent=2) + "\n").encode())


def _drop_weights(folder: Path) -> None:
    """The safetensors files that a bundle took the place of."""
    checkpoint = open_checkpoint(folder)
    for file in checkpoint.files:
        file.path.unlink()
    if checkpoint.index_name:
        (folder / checkpoint.index_name).unlink()


def _add_to(
    destination: Path,
    files: Sequence[str],
    force: bool,
    allowed: tuple[float, float],
    work: Callable[[Path], Report],
) -> Report:
    """Put ``files``, a graph first, into the checkpoint's own folder; nothing else in it changes.

    They are made and checked in a hidden folder inside, where hard links stand for the weights.
    """
    main = files[0]
    for file in files:
        check_destination(destination / file, (), force)
    with staged(destination / main) as staging:
        folder = staging / "work"
        folder.mkdir()
        for path in destination.iterdir():
            made_before = path.suffix in _MADE or (force and path.name == genai.NAME)
            if path.is_file() and not made_before:
                os.link(path.resolve(), folder / path.name)
        before = {path.name for path in folder.iterdir()}
        report = work(folder)
        _gate(report, *allowed)
        for name in before:  # onnx's checker refuses weights of which there is a second link
            (folder / name).unlink(missing_ok=True)
        made = {p.name for p in folder.iterdir()} - {main}
        for name in sorted(made):
            (folder / name).replace(destination / name)
        (folder / main).rename(staging / "out")
    return report
