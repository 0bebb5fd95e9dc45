"""The names of a model at a path: a checkpoint, or a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

from lora_tools.formats.adapters.base_names import BaseNames, names_of
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.counterparts.table import Part
from lora_tools.formats.weights import Weights
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint


def base_names(
    source: BaseNames | Checkpoint | str | Path, allow_pickle: bool = False
) -> BaseNames:
    """Names of a checkpoint, or of a diffusers pipeline: then ``component.module``.

    Headers only are read.
    """
    if isinstance(source, BaseNames):
        return source
    if isinstance(source, Checkpoint):
        if source.models:
            return _pipeline(source)
        return names_of(source.path, source.weights, source.config)
    return base_names(open_checkpoint(source, allow_pickle, pipelines=True))


def model_at(
    source: str | Path | None, allow_pickle: bool
) -> tuple[Checkpoint | None, BaseNames | None]:
    """What lies there, and its names; of a diffusers pipeline the names alone."""
    if source is None:
        return None, None
    base = open_checkpoint(source, allow_pickle, pipelines=True)
    return None if base.models else base, base_names(base)


def _pipeline(pipeline: Checkpoint) -> BaseNames:
    weights: dict[str, TensorSpec] = {}
    layouts: dict[str, str | None] = {}
    others: dict[str, TensorSpec] = {}
    same: dict[str, str] = {}
    parts: tuple[Part, ...] = ()
    alone = frozenset[str]()
    for name, part in pipeline.models.items():
        # A component's config.json is not the pipeline's: its names alone tell.
        mine = names_of(part.path, Weights(part.specs, {}), {}, f"{name}.")
        weights.update(mine.weights)
        layouts.update(mine.layouts)
        others.update(mine.others)
        same.update(mine.same)
        parts += mine.parts
        alone |= mine.alone
    return BaseNames(
        pipeline.path,
        weights,
        {},
        "",
        layouts,
        pipeline=True,
        others=others,
        same=same,
        parts=parts,
        alone=alone,
    )
