"""The names of a model at a path: a checkpoint, or a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

from lora_tools.errors import AdapterError, CheckpointError
from lora_tools.formats.adapters.base_names import BaseNames, names_of
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.counterparts.table import Part
from lora_tools.formats.folders import meant
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.weights import Weights
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint

PIPELINE = "model_index.json"


def base_names(
    source: BaseNames | Checkpoint | str | Path, allow_pickle: bool = False
) -> BaseNames:
    """Names of a checkpoint, or of a diffusers pipeline: then ``component.module``.

    Headers only are read.
    """
    if isinstance(source, BaseNames):
        return source
    if isinstance(source, Checkpoint):
        return names_of(source.path, source.weights, source.config)
    folder = meant(Path(source), CheckpointError)
    if is_there(folder / PIPELINE):
        return _pipeline(folder, allow_pickle)
    checkpoint = open_checkpoint(source, allow_pickle)
    return names_of(checkpoint.path, checkpoint.weights, checkpoint.config)


def checkpoint_or_pipeline(
    source: str | Path | None, allow_pickle: bool
) -> Checkpoint | Path | None:
    """What lies there, opened where it is a checkpoint; a diffusers pipeline stays a path."""
    if source is None or is_there(Path(source) / PIPELINE):
        return None if source is None else Path(source)
    return open_checkpoint(source, allow_pickle)


def _pipeline(folder: Path, allow_pickle: bool) -> BaseNames:
    weights: dict[str, TensorSpec] = {}
    layouts: dict[str, str | None] = {}
    others: dict[str, TensorSpec] = {}
    parts: tuple[Part, ...] = ()
    alone = frozenset[str]()
    for part in sorted(folder.iterdir()):
        if part.is_dir() and any(part.glob("*.safetensors")):
            checkpoint = open_checkpoint(part, allow_pickle)
            # A component's config.json is not the pipeline's: its names alone tell.
            mine = names_of(part, Weights(checkpoint.specs, {}), {}, f"{part.name}.")
            weights.update(mine.weights)
            layouts.update(mine.layouts)
            others.update(mine.others)
            parts += mine.parts
            alone |= mine.alone
    if not weights:
        raise AdapterError(f"{folder}: a diffusers pipeline without a .safetensors file in it")
    return BaseNames(
        folder, weights, {}, "", layouts, pipeline=True, others=others, parts=parts, alone=alone
    )
