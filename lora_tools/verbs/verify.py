"""``verify``: is this file what it is said to be?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_tools.errors import QualityGateError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.fit import fit_base
from lora_tools.onnx.files import graphs_at
from lora_tools.options import Check, Comparison, Graphs, Running
from lora_tools.quantizing.pack import way_of
from lora_tools.records import Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.pipelines import open_whole
from lora_tools.sources.weighted import Weighted, open_weighted
from lora_tools.totals import VerifyTotals
from lora_tools.verbs.frame import Call, Look, verb
from lora_tools.verifying.adapter import verify_adapter
from lora_tools.verifying.findings import Findings
from lora_tools.verifying.merged import verify_merged
from lora_tools.verifying.onnx_model import GraphRun, verify_onnx
from lora_tools.verifying.quantized import verify_quantized


@verb
def verify(
    call: Call, path: str | Path, comparison: Comparison, graphs: Graphs, check: Check
) -> Look:
    """Check a merged checkpoint, an adapter, a quantized checkpoint or an ONNX model against what
    it was made of.

    Args:
        path: with ``base`` and ``adapters``, a checkpoint that should be ``base`` with these
            merged; with ``base`` and ``tuned``, an adapter that should turn ``base`` into it; with
            ``against``, that checkpoint in a stored number format or as ONNX, ``adapters``
            merged.

    Returns:
        the report; its ``totals["verdict"]`` is a sentence.

    Raises:
        QualityGateError: it is not, with the report and the worst offender named.
        UsageError: it is not said what to compare with.
    """
    _check_call(comparison)
    run = None
    if not comparison.weights_only:
        run = GraphRun(graphs.task, check.atol, check.rtol, graphs.trust_remote_code)
    if comparison.base is not None and comparison.tuned is not None:
        inputs, work, roles = _adapter(path, comparison, call.running)
    else:
        inputs, work, roles = _checkpoint(path, comparison, run, call.running)

    def look() -> Report[VerifyTotals]:
        found = work()
        named = zip(found.inputs, roles, strict=True)
        report = call.report(
            [dataclasses.replace(i, role=role, path=str(at)) for i, (role, at) in named],
            found.fates,
            modules=found.modules,
            totals={**found.totals, "verdict": found.verdict, "same": not found.offence},
            notes=found.notes,
            tensors=found.tensors,
        )
        if found.offence:
            raise QualityGateError(found.offence, report)
        return report

    return Look(inputs, look)


# All that is read, the work, and what the report calls each input.
_Comparing = tuple[tuple[Path, ...], Callable[[], Findings], list[tuple[str, str | Path]]]


def _adapter(path: str | Path, comparison: Comparison, running: Running) -> _Comparing:
    """Whether an adapter turns the base into the fine-tuned copy."""
    assert comparison.base is not None
    assert comparison.tuned is not None
    base = open_whole(comparison.base, running.allow_pickle)
    tuned = open_whole(comparison.tuned, running.allow_pickle)
    [adapter] = open_weighted([(path, 1.0)], running.allow_pickle, base)
    roles = [("adapter", path), ("base", comparison.base), ("tuned", comparison.tuned)]
    return (
        (base.path, tuned.path, adapter.adapter.path),
        lambda: verify_adapter(
            adapter, base, tuned, comparison.max_error, running.jobs, running.progress
        ),
        roles,
    )


def _checkpoint(
    path: str | Path, comparison: Comparison, run: GraphRun | None, running: Running
) -> _Comparing:
    """Whether a checkpoint is another, in some form, or base + adapter."""
    given = comparison.against or comparison.base or ""
    if comparison.against is not None and graphs_at(path):
        source = open_whole(given, running.allow_pickle)
    else:
        pipelines = comparison.base is not None
        source = open_checkpoint(given, running.allow_pickle, pipelines=pipelines)
    weighted: list[Weighted] = []
    if comparison.adapters:
        weighted = open_weighted(comparison.adapters, running.allow_pickle, source)
        source = fit_base(source, weighted)
    read: list[Path] = [source.path, *(w.adapter.path for w in weighted)]
    roles: list[tuple[str, str | Path]]
    if comparison.base is not None:
        merged = open_checkpoint(path, running.allow_pickle, pipelines=True)
        if merged.scheme is not None:
            instead = (
                "give --against instead of --base"
                if isinstance(merged, Dequantized) and way_of(merged.scheme) is not None
                else "it is not known what it was rounded from; run `loratools dequantize` on it, "
                "and verify the result"
            )
            raise UsageError(f"{path}: is in {merged.scheme.title}; {instead}")
        read.append(merged.path)
        roles = [("merged", path), ("base", comparison.base)]

        def work() -> Findings:
            return verify_merged(
                merged, source, weighted, running.allow_pickle, running.jobs, running.progress
            )
    else:
        roles = [("checkpoint", path), ("against", comparison.against or "")]

        def work() -> Findings:
            return _against(path, source, weighted, comparison.max_error, run, running)

    return tuple(read), work, roles + [("adapter", w.path) for w in weighted]


def _check_call(asked: Comparison) -> None:
    if (asked.base is None) == (asked.against is None):
        raise UsageError(
            "verify needs --base with --adapter (a merged checkpoint) or --tuned (an "
            "adapter), or --against (a quantized checkpoint or ONNX)"
        )
    if asked.against is not None and asked.tuned is not None:
        raise UsageError("--tuned needs --base")
    if asked.base is not None and bool(asked.adapters) == (asked.tuned is not None):
        raise UsageError(
            "with --base give --adapter to verify a merged checkpoint, or --tuned to "
            "verify an adapter"
        )
    if asked.max_error is not None and asked.tuned is None and asked.against is None:
        raise UsageError("--max-error needs --tuned or --against")


def _against(
    path: str | Path,
    source: Checkpoint,
    weighted: Sequence[Weighted],
    max_error: float | None,
    run: GraphRun | None,
    running: Running,
) -> Findings:
    allow_pickle, jobs, progress = running.allow_pickle, running.jobs, running.progress
    graphs = graphs_at(path)
    if graphs:
        if max_error is not None:
            raise UsageError(
                "--max-error is for quantized weights; an ONNX model has --atol and --rtol"
            )
        return verify_onnx(graphs, source, weighted, run, allow_pickle, jobs, progress)
    view = open_checkpoint(path, allow_pickle)
    if not isinstance(view, Dequantized):
        raise UsageError(
            f"{path}: is neither quantized nor an ONNX model; for a merged checkpoint give --base "
            "and --adapter"
        )
    if way_of(view.scheme) is None:
        raise UsageError(
            f"{path}: is in {view.scheme.title}, which can be read but not written, so it cannot "
            "be quantized again for comparison; use `loratools diff` to see how far it is from "
            "another checkpoint"
        )
    return verify_quantized(view, source, weighted, max_error, allow_pickle, jobs, progress)
