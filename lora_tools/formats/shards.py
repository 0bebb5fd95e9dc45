"""Tensors that are spread over several files, and the index that says which file has which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, TensorNotFound, UnsafeInput
from lora_tools.formats.lfs import refuse_pointer
from lora_tools.formats.regular_files import is_there, read_file
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".index.json"


class Shards:
    """Several files of tensors with the face of one ``TensorFile``.

    Attributes:
        files: in the order given.
        specs: every tensor's name, dtype and shape, in file order; home: the file it is in.

    Raises:
        CheckpointError: a tensor is in two of them.
    """

    def __init__(self, path: Path, files: Iterable[TensorFile]) -> None:
        self.path, self.header, self.files = path, b"", tuple(files)
        self.metadata = {k: v for file in reversed(self.files) for k, v in file.metadata.items()}
        self.home: dict[str, TensorFile] = {}
        self.specs: dict[str, TensorSpec] = {}
        for file in self.files:
            for name, spec in file.specs.items():
                if name in self.home:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in {self.home[name].path.name} and in "
                        f"{file.path.name}"
                    )
                self.home[name], self.specs[name] = file, spec

    def _file(self, name: str) -> TensorFile:
        if name not in self.home:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}")
        return self.home[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped. Never write to it."""
        return self._file(name).tensor(name)

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        return self._file(name).raw(name)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of a tensor's bytes [start, stop) back to the system."""
        self._file(name).release(name, start, stop)


def shards_named(folder: Path, stem: str, suffix: str) -> tuple[Path, list[Path]] | None:
    """The index, or else the first shard, and all shards of ``STEM.SUFFIX`` that a folder holds;
    None where it holds none.

    Raises:
        CheckpointError: one of them is missing, or the index is none.
        UnsafeInput: the index names a file outside the folder.
    """
    index = folder / f"{stem}{suffix}{INDEX_SUFFIX}"
    if is_there(index):
        return index, [folder / name for name in sorted(set(read_index(index).values()))]
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+){re.escape(suffix)}")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        return None
    numbers = [match for path in found if (match := pattern.fullmatch(path.name))]
    there, count = {int(m[1]) for m in numbers}, max(int(m[2]) for m in numbers)
    if len(found) != count or there != set(range(1, count + 1)):
        raise CheckpointError(
            f"{folder}: {len(found)} of {count} shards of {stem}{suffix}; is the download complete?"
        )
    return found[0], found


def read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of a shard index: tensor → file beside it.

    Raises:
        CheckpointError: it is none, or a file is missing.
        UnsafeInput: it names a file outside its folder.
    """
    data = read_file(path)
    refuse_pointer(path, data)
    try:
        index = strict_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not (names and isinstance(names, dict) and all(type(v) is str for v in names.values())):
        raise CheckpointError(f"{path}: not a shard index (no weight_map of names to files)")
    for file in set(names.values()):
        if not is_plain_name(file):
            raise UnsafeInput(f"{path}: refers to a file outside its folder: {file!r}")
        if not is_there(path.parent / file):
            raise CheckpointError(f"{path}: shard {file} is missing; is the download complete?")
    return dict(names)


def check_index(home: Mapping[str, TensorFile], index: Path, names: Mapping[str, str]) -> None:
    """Raises CheckpointError where an index says other than the files that it names hold.

    Args:
        home: each tensor's file.
        names: the index's ``weight_map``.
    """
    for name, file in names.items():
        if name not in home:
            raise CheckpointError(f"{index}: says that tensor {name!r} is in {file}, but it is not")
        actual = home[name].path.name
        if actual != file:
            raise CheckpointError(
                f"{index}: says that tensor {name!r} is in {file}, but it is in {actual}"
            )
    extra = [name for name in home if name not in names]
    if extra:
        where = home[extra[0]].path.name
        raise CheckpointError(f"{index}: tensor {extra[0]!r} is in {where} and not in the index")


def is_plain_name(name: str) -> bool:
    """Whether a name taken from a file is that of a file beside it, and leads nowhere else."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")
