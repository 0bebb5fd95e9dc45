"""Tensors and small files of a merged checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.regular_files import read_file
from lora_tools.merging.plan import MergePlan
from lora_tools.records import TensorSpec


def out_specs(plan: MergePlan, wanted: str | None) -> dict[str, TensorSpec]:
    """The output's tensors by name, floats in the dtype wanted."""
    specs = {}
    for target in (*plan.targets, *plan.untied):
        spec = target.spec
        if wanted and spec.is_float:
            spec = dataclasses.replace(spec, dtype=wanted)
        specs[spec.name] = spec
    return specs


def changed_files(
    base: Checkpoint, plan: MergePlan, specs: Mapping[str, TensorSpec]
) -> dict[str, bytes]:
    """Small files of the output whose contents differ from the base's."""
    if not base.models:
        return _changed(base, plan.config or base.config, specs)
    return {
        f"{folder}/{name}": data
        for folder, part in base.models.items()
        for name, data in _changed(part, part.config, _of_part(folder, specs)).items()
    }


def _of_part(folder: str, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of one model of a pipeline, by their names in it."""
    head = f"{folder}."
    return {name.removeprefix(head): s for name, s in specs.items() if name.startswith(head)}


def _changed(
    base: Checkpoint, wanted: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> dict[str, bytes]:
    replaced = {name: read_file(path) for name, path in base.replaced_files.items()}
    files = {**base.made_files, **replaced}
    if not base.stored.config:
        return files
    config: dict[str, Any] = json.loads(json.dumps(wanted))
    dtypes = {
        spec.dtype
        for name, spec in specs.items()
        if spec.is_float and name in base.specs and base.specs[name].dtype != spec.dtype
    }
    for key in ("torch_dtype", "dtype"):
        if dtypes and key in config:
            config[key] = str(torch_dtype(next(iter(dtypes)))).removeprefix("torch.")
    if config == base.stored.config:  # of a decoded one that says how it was stored
        return files
    return {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
