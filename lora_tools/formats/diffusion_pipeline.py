"""A diffusers pipeline as one checkpoint: the weights of all its models, by the folder that each
lies in and their own names (``unet.conv_in.weight``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint, Decoder
from lora_tools.formats.json_file import read_object
from lora_tools.formats.quantized.packed import StoredFormat
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.shards import Shards, is_plain_name
from lora_tools.formats.variants import safetensors_name
from lora_tools.formats.weights import Weight, Weights
from lora_tools.formats.wrapped_names import Renamed
from lora_tools.jobs import Lying
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is one."""
    return folder.is_dir() and is_there(folder / INDEX)


def folders_of(folder: Path) -> list[str]:
    """The folders of a pipeline that its index names and that hold weights.

    Raises:
        CheckpointError: there is none, or the index leads out of the folder.
    """
    found = []
    for name, said in read_object(folder / INDEX).items():
        if not (isinstance(said, list) and len(said) == 2 and all(map(bool, said))):
            continue
        if not is_plain_name(name):
            raise CheckpointError(
                f"{folder / INDEX}: {name!r} is not the name of a folder beside it"
            )
        part = folder / name
        if part.is_dir() and any(path.suffix in _WEIGHTS for path in part.iterdir()):
            found.append(name)
    if not found:
        raise CheckpointError(
            f"{folder}: a diffusers pipeline, but none of the folders in its {INDEX} holds "
            "weights; is the download complete?"
        )
    return sorted(found)


class DiffusionPipeline(Checkpoint):
    """The models of a pipeline.

    Attributes:
        models: each by the name of its folder.
        prefixes: what stands before the names of each file's tensors, in the order of ``files``.
    """

    def __init__(self, path: Path, parts: Mapping[str, Checkpoint]) -> None:
        files, names, prefixes = [], [], []
        for part, held in parts.items():
            own = held.file_names or [safetensors_name(file.path) for file in held.files]
            for file, name in zip(held.files, own, strict=True):
                files.append(Renamed(file, {each: f"{part}.{each}" for each in file.specs}))
                names.append(f"{part}/{name}")
                prefixes.append(f"{part}.")
        Shards.__init__(self, path, files)
        self.models, self.prefixes, self.file_names = dict(parts), tuple(prefixes), tuple(names)
        self.is_folder, self.index_name, self.config = True, None, {}
        self.notes = tuple(dict.fromkeys(note for part in parts.values() for note in part.notes))

    def seen_as(self, parts: Mapping[str, Checkpoint]) -> DiffusionPipeline:
        """The pipeline with its models seen as something else."""
        return DiffusionPipeline(self.path, parts)

    def _part(self, name: str) -> tuple[Checkpoint, str]:
        """The model that a tensor is of, and its name there."""
        self._file(name)
        part, _, own = name.partition(".")
        return self.models[part], own

    @property
    def scheme(self) -> StoredFormat | None:
        """That of the first model that was decoded."""
        return next((part.scheme for part in self.models.values() if part.scheme is not None), None)

    @property
    def stored(self) -> Checkpoint:
        """The pipeline as it lies there."""
        return self.seen_as({name: part.stored for name, part in self.models.items()})

    @functools.cached_property
    def weights(self) -> Weights:
        """What each tensor is to its model, by name."""
        return _Weights(self.specs, {name: part.weights for name, part in self.models.items()})

    def lies(self, name: str) -> tuple[Lying, ...]:
        """The model's."""
        part, own = self._part(name)
        return part.lies(own)

    def decoded_bytes(self, name: str) -> int:
        """The model's."""
        part, own = self._part(name)
        return part.decoded_bytes(own)

    def quantization_noise(self, name: str) -> float:
        """The model's."""
        part, own = self._part(name)
        return part.quantization_noise(own)

    def noise_unknown(self) -> list[str]:
        """Those of all models."""
        return [f"{k}.{name}" for k, part in self.models.items() for name in part.noise_unknown()]

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Only these rows are read."""
        part, own = self._part(name)
        return part.rows(own, matrix, start, stop)

    def decoder(self, name: str, matrix: tuple[int, int]) -> Decoder | None:
        """The model's."""
        part, own = self._part(name)
        return part.decoder(own, matrix)

    def hash(self, name: str) -> str:
        """Hash of the tensor's bytes."""
        part, own = self._part(name)
        return part.hash(own)

    def digest(self, known: Mapping[str, str]) -> str:
        """That of what is stored; where some of it is codes, of the digests of all models."""
        mine: dict[str, dict[str, str]] = {name: {} for name in self.models}
        for whole, value in known.items():
            name, _, own = whole.partition(".")
            mine[name][own] = value
        if self.scheme is not None:
            digests = (f"{name} {part.digest(mine[name])}" for name, part in self.models.items())
            return hashing.sealed("\n".join(digests))
        stored = {
            f"{name}.{own}": value
            for name, part in self.models.items()
            for own, value in part.of_stored(mine[name]).items()
        }
        return Checkpoint.digest(self.stored, stored)

    def companions(self) -> tuple[list[Path], list[Path]]:
        """Files that travel, and those left behind; not what is made anew, or belongs to codes."""
        travel, left = super().companions()
        made: set[Path] = set()
        for name, part in self.models.items():
            known = part.scheme.files if part.scheme is not None else ()
            made |= {Path(name, each) for each in (*known, part.index_name or "")}
        return [p for p in travel if p not in made], [p for p in left if p not in made]


class _Weights(Weights):
    """Those of several models, each asked by itself."""

    def __init__(self, specs: Mapping[str, TensorSpec], parts: Mapping[str, Weights]) -> None:
        super().__init__(specs, {})
        self._parts = parts

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """All models'."""
        held = self._parts.items()
        return tuple(tuple(f"{part}.{n}" for n in g) for part, w in held for g in w.groups)

    @functools.cached_property
    def heads(self) -> tuple[str, ...]:
        """All models'."""
        return tuple(f"{part}.{name}" for part, w in self._parts.items() for name in w.heads)

    def is_conv1d(self, module: str) -> bool | None:
        """As the model's class says."""
        part, _, own = module.partition(".")
        return self._parts[part].is_conv1d(own) if part in self._parts else None

    def of(self, spec: TensorSpec) -> Weight:
        """What a tensor of that name is."""
        part, _, own = spec.name.partition(".")
        if part not in self._parts:
            return super().of(spec)
        weight = self._parts[part].of(dataclasses.replace(spec, name=own))
        return dataclasses.replace(weight, spec=spec, stored=spec.name in self.specs, _beside=self)
