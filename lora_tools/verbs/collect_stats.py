"""``collect-stats``: what a model's layers are given, on text of the user's."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any, Literal

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats.activations import MARK, VERSION
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import layout_name, split_tensor
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.safetensors_file import SafetensorsWriter
from lora_tools.formats.tensors import as_bytes
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.options import read_text
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, Progress, ProgressCallback, Report, TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint


def collect_stats(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    kind: Literal["full", "diagonal"] = "full",
    length: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the second moment E[xxᵀ] of each linear layer's input on this text, which
    ``extract(activations=...)`` weighs its errors by. Needs transformers, and memory for the model.

    Args:
        model: a folder that transformers loads, with its tokenizer, or a hub id.
        text: a UTF-8 file.
        kind: the whole matrix, or its diagonal only (far smaller, and less exact).
        length: tokens a sequence.
        max_tokens: of the text, at most.
        jobs: torch's threads.

    Raises:
        LoraToolsError: any of the tree, with nothing written.
    """
    command = command_of(collect_stats, locals())
    from lora_tools import calibration

    started = time.perf_counter()
    if length < 1 or (max_tokens is not None and max_tokens < length):
        raise UsageError("--length: at least 1 is needed, and --max-tokens at least one sequence")
    calibration.check_library()
    checkpoint = open_checkpoint(model, allow_pickle)
    if not checkpoint.is_folder:
        raise CheckpointError(f"{model}: a bare file; a folder that transformers loads is needed")
    source, destination = Path(text), Path(out)
    content = read_text(source)
    fates = _plan(checkpoint, kind)
    inputs = (Input("model", str(model)), Input("text", str(text)))
    nbytes = sum(fate.nbytes for fate in fates)
    report = Report(
        "collect-stats",
        tool_version(),
        inputs,
        str(out),
        dry_run,
        fates,
        totals={"expected_bytes": nbytes},
        command=command,
    )
    if not dry_run:
        check_destination(destination, [checkpoint.path, source], force)
        check_space(destination, nbytes)
        report = _collect(
            report,
            checkpoint,
            content,
            kind,
            length,
            max_tokens,
            device,
            jobs,
            allow_pickle,
            progress,
        )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _plan(checkpoint: Checkpoint, kind: str) -> tuple[Fate, ...]:
    fates = []
    for spec in checkpoint.specs.values():
        layout = layout_name(spec, checkpoint.config)
        if layout in ("linear", "conv1d", "embedding"):
            (_, width), _ = LAYOUTS[layout].shapes(spec.shape, 1)
            whole = kind == "full" and layout != "embedding"
            nbytes = 4 * width * (width if whole else 1)
            fates.append(Fate(split_tensor(spec.name)[0], Action.MEASURE, layout, nbytes))
    return tuple(fates)


def _collect(
    report: Report,
    checkpoint: Checkpoint,
    content: str,
    kind: Literal["full", "diagonal"],
    length: int,
    max_tokens: int | None,
    device: str,
    jobs: int | None,
    allow_pickle: bool,
    progress: ProgressCallback | None,
) -> Report:
    from lora_tools import calibration
    from lora_tools.engine import threads

    device = threads.pick_device(device)
    rows = calibration.sequences(checkpoint.path, content, length)
    rows = rows[: max_tokens // length] if max_tokens is not None else rows

    def done(count: int) -> None:
        if progress is not None:
            progress(Progress(count, len(rows), "sequences"))

    with threads.torch_threads(threads.default_jobs() if jobs is None else jobs):
        found = calibration.moments(checkpoint.path, rows, kind, device, allow_pickle, done)
    specs = [TensorSpec(name, "F32", tuple(found[name].shape)) for name in sorted(found)]
    hashes = {name: hashing.tensor_hash(checkpoint.raw(name)) for name in checkpoint.specs}
    digests = (
        hashing.digest(checkpoint.specs.values(), hashes),
        "sha256:" + hashlib.sha256(content.encode()).hexdigest(),
    )
    metadata = {
        "loratools": report.version,
        "command": report.command,
        MARK: VERSION,
        "kind": kind,
        "tokens": str(rows.numel()),
        "length": str(length),
        "model_digest": digests[0],
        "text_digest": digests[1],
    }
    destination = Path(report.output)
    with (
        staged(destination) as staging,
        SafetensorsWriter(staging / "out", specs, metadata) as writer,
    ):
        for spec in specs:
            writer.write(spec.name, as_bytes(found[spec.name]))
    measured = set(found)
    totals: dict[str, Any] = {
        "modules": len(specs),
        "tokens": rows.numel(),
        "sequences": len(rows),
        "bytes": destination.stat().st_size,
    }
    return dataclasses.replace(
        report,
        totals=totals,
        plan=tuple(
            f if f.tensor in measured else dataclasses.replace(f, action=Action.UNUSED)
            for f in report.plan
        ),
        inputs=tuple(
            dataclasses.replace(i, digest=d) for i, d in zip(report.inputs, digests, strict=True)
        ),
    )
