"""``verify``: is this file what it is said to be?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import QualityGateError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.onnx.files import graphs_at
from lora_tools.provenance import tool_version
from lora_tools.records import ProgressCallback, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.schemes import BITSANDBYTES
from lora_tools.sources.weighted import Weighted, open_weighted
from lora_tools.verifying.adapter import verify_adapter
from lora_tools.verifying.findings import Findings
from lora_tools.verifying.merged import verify_merged
from lora_tools.verifying.onnx_model import GraphRun, verify_onnx
from lora_tools.verifying.quantized import verify_nf4


def verify(
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    tuned: str | Path | None = None,
    against: str | Path | None = None,
    max_error: float | None = None,
    weights_only: bool = False,
    task: str = "auto",
    atol: float = 1e-5,
    rtol: float = 3e-4,
    trust_remote_code: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Check a merged checkpoint, an adapter, a four-bit checkpoint or an ONNX model against what it
    was made of.

    Args:
        path: with ``base`` and ``adapters``, a checkpoint that should be ``base`` with these
            merged; with ``base`` and ``tuned``, an adapter that should turn ``base`` into it; with
            ``against``, that checkpoint in four bits (bitsandbytes) or as ONNX, ``adapters``
            merged.
        base: one in four bits is compared as it is dequantized.
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``.
        max_error: of an adapter: the relative error that no module, nor all together, may exceed;
            of a four-bit checkpoint: that of a weight. Without it a four-bit weight has to be as
            near as quantizing gets, number by number.
        weights_only: of an ONNX model: compare its weights, and do not run it.
        task, trust_remote_code: of the run, as for ``export``.
        atol, rtol: outputs may differ from torch's by atol + rtol times their largest element.

    Returns:
        the report; its ``totals["verdict"]`` is a sentence.

    Raises:
        QualityGateError: it is not, with the report and the worst offender named.
        UsageError: it is not said what to compare with.
    """
    started = time.perf_counter()
    _check_call(base, adapters, tuned, against, max_error)
    run = None if weights_only else GraphRun(task, atol, rtol, trust_remote_code)
    shared: dict[str, Any] = {"jobs": jobs, "progress": progress}
    roles: list[tuple[str, str | Path]]
    if base is not None and tuned is not None:
        origin = open_checkpoint(base, allow_pickle)
        [adapter] = open_weighted([(path, 1.0)], allow_pickle, origin)
        found = verify_adapter(
            adapter, origin, open_checkpoint(tuned, allow_pickle), max_error, **shared
        )
        roles = [("adapter", path), ("base", base), ("tuned", tuned)]
    else:
        source = open_checkpoint(against or base or "", allow_pickle)
        weighted = open_weighted(adapters, allow_pickle, source) if adapters else []
        if base is not None:
            merged = open_checkpoint(path, allow_pickle)
            if merged.scheme is not None:
                raise UsageError(
                    f"{path}: is in {merged.scheme.title}; give --against instead of --base"
                )
            found = verify_merged(merged, source, weighted, **shared)
            roles = [("merged", path), ("base", base)]
        else:
            found = _against(path, source, weighted, max_error, run, allow_pickle, **shared)
            roles = [("checkpoint", path), ("against", against or "")]
        roles += [("adapter", w.path) for w in weighted]
    inputs = tuple(
        dataclasses.replace(i, role=role, path=str(given))
        for i, (role, given) in zip(found.inputs, roles, strict=True)
    )
    report = Report(
        "verify",
        tool_version(),
        inputs,
        "",
        False,
        found.fates,
        found.modules,
        totals={**found.totals, "verdict": found.verdict, "same": not found.offence},
        notes=found.notes,
        tensors=found.tensors,
        seconds=time.perf_counter() - started,
    )
    if found.offence:
        raise QualityGateError(found.offence, report)
    return report


def _check_call(
    base: object,
    adapters: Sequence[object],
    tuned: object,
    against: object,
    max_error: float | None,
) -> None:
    if (base is None) == (against is None):
        raise UsageError(
            "verify needs --base with --adapter (a merged checkpoint) or --tuned (an "
            "adapter), or --against (four bits or ONNX)"
        )
    if against is not None and tuned is not None:
        raise UsageError("--tuned goes with --base")
    if base is not None and bool(adapters) == (tuned is not None):
        raise UsageError(
            "with --base give --adapter to verify a merged checkpoint, or --tuned to "
            "verify an adapter"
        )
    if max_error is not None and tuned is None and against is None:
        raise UsageError("--max-error goes with --tuned, or with --against")


def _against(
    path: str | Path,
    source: Checkpoint,
    weighted: Sequence[Weighted],
    max_error: float | None,
    run: GraphRun | None,
    allow_pickle: bool,
    **shared: Any,
) -> Findings:
    graphs = graphs_at(path)
    if graphs:
        if max_error is not None:
            raise UsageError("--max-error is for four bits; an ONNX model has --atol and --rtol")
        return verify_onnx(graphs, source, weighted, run, allow_pickle, **shared)
    view = open_checkpoint(path, allow_pickle)
    if not (isinstance(view, Dequantized) and view.scheme is BITSANDBYTES):
        raise UsageError(
            f"{path}: is neither in four bits nor an ONNX model; give --base and --adapter for a "
            "merged checkpoint"
        )
    return verify_nf4(view, source, weighted, max_error, **shared)
