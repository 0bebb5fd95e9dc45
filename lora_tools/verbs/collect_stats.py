"""``collect-stats``: what a model's layers are given, on text of the user's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats.activations import MARK, VERSION
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.formats.output import Prepared
from lora_tools.formats.pickle_file import refuse_compressed
from lora_tools.formats.safetensors_file import SafetensorsWriter
from lora_tools.formats.tensors import as_bytes
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.options import Running, Sampling, Search
from lora_tools.options.parse import read_text
from lora_tools.provenance import text_digest
from lora_tools.records import Action, Fate, Input, Progress, Report, TensorSpec
from lora_tools.sources.checkpoints import from_file, open_checkpoint
from lora_tools.totals import CollectStatsTotals
from lora_tools.verbs.frame import Call, verb

if TYPE_CHECKING:
    import torch


@verb
def collect_stats(
    call: Call, model: str | Path, text: str | Path, sampling: Sampling, search: Search
) -> Prepared:
    """Write to ``out`` the second moment E[xxᵀ] of each linear layer's input on this text, which
    ``extract(activations=...)`` weighs its errors by. Needs transformers, and memory for the model.

    A diagonal is far smaller than the whole matrix, and less exact. ``jobs`` are torch's threads.

    Args:
        model: a folder that transformers loads, with its tokenizer, or a hub id.
        text: a UTF-8 file.

    Raises:
        LoraToolsError: any of the tree, with nothing written.
    """
    from lora_tools import calibration

    length, most = sampling.length, sampling.max_tokens
    if length < 1 or (most is not None and most < length):
        raise UsageError("--length: at least 1 is needed, and --max-tokens at least one sequence")
    calibration.check_library()
    checkpoint = open_checkpoint(model, call.running.allow_pickle)
    if not checkpoint.path.is_dir():
        raise CheckpointError(
            f"{model}: a bare file; a folder that transformers loads is needed"
            f"{from_file(checkpoint)}"
        )
    refuse_compressed(file.path for file in checkpoint.files)
    content = read_text(Path(text))
    fates = _plan(checkpoint, sampling.kind)
    nbytes = sum(fate.nbytes for fate in fates)
    report = call.report(
        (Input("model", str(model)), Input("text", str(text))),
        fates,
        totals={"expected_bytes": nbytes},
    )
    return Prepared(
        report,
        (checkpoint.path,),
        nbytes,
        lambda out: _collect(
            report, checkpoint, content, sampling, search.device, call.running, out
        ),
    )


def _plan(checkpoint: Checkpoint, kind: str) -> tuple[Fate, ...]:
    fates = []
    for spec in checkpoint.specs.values():
        layout = checkpoint.weights[spec.name].layout
        if layout in ("linear", "conv1d", "embedding"):
            (_, width), _ = LAYOUTS[layout].shapes(spec.shape, 1)
            whole = kind == "full" and layout != "embedding"
            nbytes = 4 * width * (width if whole else 1)
            fates.append(Fate(split_tensor(spec.name)[0], Action.MEASURE, layout, nbytes))
    return tuple(fates)


def _collect(
    report: Report[CollectStatsTotals],
    checkpoint: Checkpoint,
    content: str,
    sampling: Sampling,
    device: str,
    running: Running,
    out: Path,
) -> Report[CollectStatsTotals]:
    rows, found = _moments(checkpoint, content, sampling, device, running)
    specs = [TensorSpec(name, "F32", tuple(found[name].shape)) for name in sorted(found)]
    digests = (checkpoint.digest({}), text_digest(content))
    metadata = {
        "loratools": report.version,
        "command": report.command,
        MARK: VERSION,
        "kind": sampling.kind,
        "tokens": str(rows.numel()),
        "length": str(sampling.length),
        "model_digest": digests[0],
        "text_digest": digests[1],
    }
    with SafetensorsWriter(out, specs, metadata) as writer:
        for spec in specs:
            writer.write(spec.name, as_bytes(found[spec.name]))
    measured = set(found)
    totals: CollectStatsTotals = {
        "modules": len(specs),
        "tokens": rows.numel(),
        "sequences": len(rows),
        "bytes": out.stat().st_size,
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


def _moments(
    checkpoint: Checkpoint, content: str, sampling: Sampling, device: str, running: Running
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The text in sequences of tokens (n, length), and the second moment of each layer's input."""
    from lora_tools import calibration
    from lora_tools.engine import threads

    device = threads.pick_device(device)
    rows = calibration.sequences(checkpoint.path, content, sampling.length)
    if sampling.max_tokens is not None:
        rows = rows[: sampling.max_tokens // sampling.length]

    def done(count: int) -> None:
        if running.progress is not None:
            running.progress(Progress(count, len(rows), "sequences"))

    with threads.torch_threads(threads.default_jobs() if running.jobs is None else running.jobs):
        moments = calibration.moments(
            checkpoint.path, rows, sampling.kind, device, running.allow_pickle, done
        )
    return rows, moments
