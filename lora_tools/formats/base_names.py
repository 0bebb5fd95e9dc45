"""The names of a model, by which short or flattened adapter names are resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats.checkpoint import Checkpoint, open_checkpoint, ties_embeddings
from lora_tools.formats.names import is_input_embedding, split_tensor, tied_head
from lora_tools.formats.view import BaseNames
from lora_tools.records import TensorSpec

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
        return names_of(source.path, source.specs, source.config)
    folder = Path(source)
    if (folder / PIPELINE).is_file():
        return _pipeline(folder, allow_pickle)
    checkpoint = open_checkpoint(source, allow_pickle)
    return names_of(checkpoint.path, checkpoint.specs, checkpoint.config)


def names_of(
    path: Path, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], prefix: str = ""
) -> BaseNames:
    """From the tensors' names."""
    weights = {}
    for name, spec in specs.items():
        module, parameter = split_tensor(name)
        if parameter == "weight" and module:
            weights[prefix + module] = spec
    tied = split_tensor(tied_head(config, specs))[0] if ties_embeddings(config) else ""
    embedding = next((spec for name, spec in specs.items() if is_input_embedding(name)), None)
    if tied and embedding is not None:
        weights.setdefault(tied, embedding)
    return BaseNames(path, weights, config, tied)


def _pipeline(folder: Path, allow_pickle: bool) -> BaseNames:
    weights: dict[str, TensorSpec] = {}
    for part in sorted(folder.iterdir()):
        if part.is_dir() and any(part.glob("*.safetensors")):
            checkpoint = open_checkpoint(part, allow_pickle)
            mine = names_of(part, checkpoint.specs, {}, f"{part.name}.")
            weights.update(mine.weights)
    if not weights:
        raise AdapterError(f"{folder}: a diffusers pipeline without a .safetensors file in it")
    return BaseNames(folder, weights, {})


@dataclasses.dataclass(frozen=True)
class Flattened:
    """Module names with every dot made an underscore, and what each stands for."""

    base: BaseNames
    whole: Mapping[str, tuple[str, ...]]
    endings: Mapping[str, tuple[str, ...]]

    def resolve(self, flat: str, components: Iterable[str] = ()) -> str:
        """The module of that flattened name: the whole name, else one that ends in it.

        Args:
            components: of a pipeline, those meant by the key; the first that has any decides.

        Raises:
            AdapterError: none is, or several are: then they are listed.
        """
        for component in (*components, ""):
            prefix = component.replace(".", "_") + "_" if component else ""
            found = self.whole.get(prefix + flat, ())
            if not found:
                found = tuple(
                    m
                    for m in self.endings.get(flat, ())
                    if not component or m.startswith(component + ".")
                )
            if len(found) > 1:
                raise AdapterError(
                    f"{flat!r} can stand for {' or '.join(sorted(found)[:8])} of {self.base.path}; "
                    "rename the key to PEFT's naming, with dots"
                )
            if found:
                return found[0]
        raise AdapterError(f"{flat!r} is no module of {self.base.path}; is this the right base?")


def flattened(base: BaseNames) -> Flattened:
    """Index a model's module names by their flattened form."""
    whole: dict[str, list[str]] = {}
    endings: dict[str, list[str]] = {}
    for module in base.weights:
        parts = module.split(".")
        whole.setdefault("_".join(parts), []).append(module)
        for start in range(1, len(parts)):
            endings.setdefault("_".join(parts[start:]), []).append(module)
    return Flattened(
        base, {k: tuple(v) for k, v in whole.items()}, {k: tuple(v) for k, v in endings.items()}
    )
