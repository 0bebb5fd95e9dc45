"""What is written of a sentence-transformers folder whose transformer lies in a folder below it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.output import Prepared
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.synced import copy_synced
from lora_tools.records import Report


def write_whole(prepared: Prepared, out: Path) -> Report[Any]:
    """``prepared.write``, and around what it makes the rest of the pipeline's folder."""
    pipeline = prepared.pipeline
    if pipeline is None or not pipeline.is_deeper:
        return prepared.write(out)
    made, main = out.with_name("transformer"), out / pipeline.main.path
    report = prepared.write(made)
    out.mkdir()
    travel, left = _around(pipeline)
    for relative in travel:
        copy_synced(pipeline.root / relative, out / relative)
    main.parent.mkdir(parents=True, exist_ok=True)
    made.rename(main)
    if not left:
        return report
    said = f"not copied, because they hold other weights: {', '.join(map(str, left))}"
    return dataclasses.replace(report, notes=(*report.notes, said))


def copied_files(prepared: Prepared) -> list[Path]:
    """All files that are copied into what is made. Raises what ``Checkpoint.companions`` does."""
    pipeline = prepared.pipeline
    if pipeline is None or not pipeline.is_deeper:
        return list(prepared.copied)
    return [*prepared.copied, *(pipeline.root / path for path in _around(pipeline)[0])]


def _around(pipeline: Pipeline) -> tuple[list[Path], list[Path]]:
    """Files outside the first module's folder that travel, and those that stay."""
    root = Checkpoint(pipeline.root, [], True, None)
    root.pipeline = pipeline
    travel, left = root.companions()
    inside = Path(pipeline.main.path)
    return [path for path in travel if inside not in path.parents], left
