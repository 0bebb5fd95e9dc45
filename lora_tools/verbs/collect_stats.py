"""``collect-stats``: what a model's layers are given, on text of the user's."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.output import Prepared
from lora_tools.formats.pickle_file import refuse_compressed
from lora_tools.options import Running, Sampling, Search, Storage
from lora_tools.options.parse import read_text
from lora_tools.provenance import command_of, text_digest
from lora_tools.quantizing import statistics
from lora_tools.quantizing.prepare import prepare_dequantize
from lora_tools.records import Action, Input, Report
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
    ``extract(activations=...)`` weighs its errors by. Needs transformers.

    A diagonal is far smaller than the whole matrix, and less exact. ``jobs`` are torch's threads.
    Of a model in a stored number format the plain one that it stands for is run, which lies beside
    ``out`` for that time.

    Args:
        model: a folder that transformers loads, with its tokenizer, or a hub id.
        text: a UTF-8 file.

    Raises:
        LoraToolsError: any of the tree, with nothing written.
    """
    from lora_tools import calibration

    length, most = sampling.length, sampling.max_tokens
    if length < 1 or (most is not None and most < length):
        raise UsageError("--length must be at least 1, and --max-tokens at least one sequence")
    calibration.check_library()
    checkpoint = open_checkpoint(model, call.running.allow_pickle)
    if not checkpoint.path.is_dir():
        raise CheckpointError(
            f"{model}: is a file, but a folder that transformers loads is "
            f"needed{from_file(checkpoint)}"
        )
    refuse_compressed(file.path for file in checkpoint.files)
    content = read_text(Path(text))
    fates = statistics.fates_of(checkpoint, sampling.kind)
    nbytes = sum(fate.nbytes for fate in fates)
    plain = None
    notes: tuple[str, ...] = ()
    if checkpoint.scheme is not None:
        plain = prepare_dequantize(model, Storage(), call.running, command_of("dequantize"))
        notes = (
            f"{checkpoint.path}: is in {checkpoint.scheme.title}; its dequantized numbers are used",
        )
    report = call.report(
        (Input("model", str(model)), Input("text", str(text))),
        fates,
        totals={"expected_bytes": nbytes},
        notes=notes,
    )
    return Prepared(
        report,
        (checkpoint.path,),
        nbytes + (plain.nbytes if plain else 0),
        checkpoint.stored.nbytes,
        lambda out: _collect(
            report, checkpoint, plain, content, sampling, search.device, call.running, out
        ),
    )


def _collect(
    report: Report[CollectStatsTotals],
    checkpoint: Checkpoint,
    plain: Prepared | None,
    content: str,
    sampling: Sampling,
    device: str,
    running: Running,
    out: Path,
) -> Report[CollectStatsTotals]:
    folder = checkpoint.path
    if plain is not None:
        folder = out.with_name("plain")
        plain.write(folder)
    rows = _rows(folder, content, sampling)
    digests = (checkpoint.digest({}), text_digest(content))
    metadata = {
        "loratools": report.version,
        "command": report.command,
        "kind": sampling.kind,
        "tokens": str(rows.numel()),
        "length": str(sampling.length),
        "model_digest": digests[0],
        "text_digest": digests[1],
    }
    collected = statistics.collect(folder, rows, sampling.kind, device, running, out, metadata)
    if plain is not None:
        shutil.rmtree(folder)
    totals: CollectStatsTotals = {
        "modules": len(collected.modules),
        "tokens": rows.numel(),
        "sequences": len(rows),
        "bytes": out.stat().st_size,
    }
    return dataclasses.replace(
        report,
        totals=totals,
        notes=(*report.notes, *collected.notes),
        plan=tuple(
            f if f.tensor in collected.modules else dataclasses.replace(f, action=Action.UNUSED)
            for f in report.plan
        ),
        inputs=tuple(
            dataclasses.replace(i, digest=d) for i, d in zip(report.inputs, digests, strict=True)
        ),
    )


def _rows(folder: Path, content: str, sampling: Sampling) -> torch.Tensor:
    """The text in sequences of tokens (n, length)."""
    from lora_tools import calibration

    rows = calibration.sequences(folder, content, sampling.length)
    if sampling.max_tokens is not None:
        rows = rows[: sampling.max_tokens // sampling.length]
    return rows
