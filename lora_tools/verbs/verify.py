"""``verify``: is this file what it is said to be?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import QualityGateError, UsageError
from lora_tools.formats.checkpoint import open_checkpoint
from lora_tools.records import ProgressCallback, Report
from lora_tools.verbs.common import tool_version
from lora_tools.verbs.verify_adapter import verify_adapter
from lora_tools.verbs.verify_merged import verify_merged
from lora_tools.verbs.weighted import open_weighted


def verify(
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    tuned: str | Path | None = None,
    max_error: float | None = None,
    jobs: int | None = None,
    allow_pickle: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Check a merged checkpoint against its base and adapters, or an adapter against the two
    checkpoints it was extracted from.

    Args:
        path: with ``adapters``, a checkpoint that should be ``base`` with these merged; with
            ``tuned``, an adapter that should turn ``base`` into it.
        adapters: PEFT adapters: ``path``, ``"path=weight"`` or ``(path, weight)``.
        max_error: of an adapter: the relative error that no module, nor all together, may exceed.

    Returns:
        the report; its ``totals["verdict"]`` is a sentence.

    Raises:
        QualityGateError: it is not, with the report and the worst offender named.
        UsageError: it is not said what to compare with.
    """
    started = time.perf_counter()
    if base is None:
        raise UsageError("verify needs --base, and --adapter (a merged checkpoint) or --tuned "
                         "(an adapter)")  # fmt: skip
    if bool(adapters) == (tuned is not None):
        raise UsageError("give --adapter to verify a merged checkpoint, or --tuned to verify an "
                         "adapter")  # fmt: skip
    if max_error is not None and tuned is None:
        raise UsageError("--max-error goes with --tuned")
    origin = open_checkpoint(base, allow_pickle)
    named: list[tuple[str, str | Path]]
    shared: dict[str, Any] = {"jobs": jobs, "progress": progress}
    if tuned is not None:
        [adapter] = open_weighted([(path, 1.0)], allow_pickle, origin)
        found = verify_adapter(
            adapter, origin, open_checkpoint(tuned, allow_pickle), max_error, **shared
        )
        named = [("adapter", path), ("base", base), ("tuned", tuned)]
    else:
        merged = open_checkpoint(path, allow_pickle)
        weighted = open_weighted(adapters, allow_pickle, origin)
        found = verify_merged(merged, origin, weighted, **shared)
        named = [("merged", path), ("base", base), *(("adapter", w.path) for w in weighted)]
    inputs = tuple(
        dataclasses.replace(i, role=role, path=str(given))
        for i, (role, given) in zip(found.inputs, named, strict=True)
    )
    report = Report(
        "verify", tool_version(), inputs, "", False, found.fates, found.modules,
        totals={**found.totals, "verdict": found.verdict, "same": not found.offence},
        notes=found.notes, seconds=time.perf_counter() - started,
    )  # fmt: skip
    if found.offence:
        raise QualityGateError(found.offence, report)
    return report
