"""Writing a checkpoint as a planned stream: shards laid out first, tensors in any order after."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from lora_tools.errors import UnsafeInput, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.digest import PROVENANCE
from lora_tools.formats.kept import shared_place
from lora_tools.formats.recorded import Recording, Taken
from lora_tools.formats.regular_files import read_file
from lora_tools.formats.safetensors_writer import SafetensorsWriter, Written, encode_header, machine
from lora_tools.formats.shards import INDEX_SUFFIX, is_plain_name
from lora_tools.formats.synced import copy_synced, write_synced
from lora_tools.formats.variants import plain, safetensors_name
from lora_tools.records import TensorSpec

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


_MOST = 2**63  # what a file system counts up to
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the output: its name, tensors in order, and metadata.

    Attributes:
        header: the exact JSON to write, where it must be reproduced.
        prefix: what stands before the names of its tensors, and not in the file: of a pipeline's
            models the folder's name, which is in ``name``, too.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    header: bytes | None = None
    prefix: str = ""

    @property
    def own_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors as the file has them."""
        if not self.prefix:
            return self.specs
        start = len(self.prefix)
        return tuple(dataclasses.replace(spec, name=spec.name[start:]) for spec in self.specs)

    @property
    def folder(self) -> str:
        """Where it lies in the output."""
        return self.prefix.removesuffix(".")

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return encode_header(self.own_specs, self.metadata, self.header)[2]


def parse_size(text: str) -> int:
    """``5GB``, ``500MiB``, ``1000000`` → bytes, at least one and fewer than 2^63.

    Raises:
        UsageError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I":
        raise UsageError(f"{text[:60]!r} is not a size such as 5GB or 500MiB")
    nbytes = float(match[1]) * _UNITS[match[2]]
    if not 1 <= nbytes < _MOST:
        raise UsageError(
            f"{text[:60]!r} is not a size of at least 1 byte and less than 2^63, such as 5GB"
        )
    return int(nbytes)


def lay_out(
    source: Checkpoint, specs: Mapping[str, TensorSpec], shard_size: int | None
) -> list[Shard]:
    """Files for ``specs``, each by itself (see ``lay_out_units``)."""
    return lay_out_units(source, {name: (spec,) for name, spec in specs.items()}, shard_size)


def lay_out_units(
    source: Checkpoint, units: Mapping[str, Sequence[TensorSpec]], shard_size: int | None
) -> list[Shard]:
    """Files for tensors: those of ``source`` again, or by size.

    Args:
        units: what belongs together, by the name of the tensor that it lies where; what ``source``
            does not hold goes into the last file.
        shard_size: each file holds up to that many bytes of tensors (more only where what belongs
            together is larger).
    """
    given = [_passed_on(file.metadata) for file in source.files]
    metadata = {"format": "pt", **given[0]}
    groups: list[list[TensorSpec]]
    if shard_size is None:
        place = {name: i for i, file in enumerate(source.files) for name in file.specs}
        groups = [[] for _ in source.files]
        for name, unit in units.items():
            groups[place.get(name, -1)] += unit
        names = source.file_names or [safetensors_name(file.path) for file in source.files]
        metadatas: Sequence[Mapping[str, str]] = [each or metadata for each in given]
        prefixes = source.prefixes or [""] * len(names)
        return [
            Shard(name, tuple(group), meta, prefix=prefix)
            for name, group, meta, prefix in zip(names, groups, metadatas, prefixes, strict=True)
        ]
    groups = [[]]
    filled = 0
    for unit in units.values():
        nbytes = sum(spec.nbytes for spec in unit)
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]), metadata)]
    return [
        Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group), metadata)
        for i, group in enumerate(groups, 1)
    ]


def _passed_on(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in PROVENANCE}


class TensorSink(Protocol):
    """Takes tensors, in pieces: a writer, memory, or what compares them with others."""

    def write(self, name: str, data: memoryview, offset: int = 0) -> None: ...


class Sink(TensorSink, Protocol):
    """Takes those, too, whose size is known only once they are made."""

    def write_last(self, name: str, data: bytes) -> None: ...


class CheckpointWriter:
    """Makes every shard at once, so that all space is reserved before any work.

    It is pickled as ``SafetensorsWriter`` is, with the same parts for the owner and for others.

    Args:
        out: the folder to make, or for a bare file its path.
        owner: the machine of the process that makes the files, in another one.
    """

    def __init__(
        self, out: Path, shards: Sequence[Shard], is_folder: bool, *, owner: str | None = None
    ) -> None:
        is_owner = owner is None
        shared = shared_place(out) if is_owner else None
        out = shared or out
        self._out, self._shards, self._is_folder = out, shards, is_folder
        _refuse_paths((shard.name for shard in shards), self._folders)
        self._home: dict[str, tuple[SafetensorsWriter, int]] = {}
        self._writers: list[SafetensorsWriter] = []
        if shared is not None:
            shared.parent.mkdir(parents=True, exist_ok=True)
        if is_folder and is_owner:
            out.mkdir(exist_ok=shared is not None)
            for folder in sorted(self._folders):
                (out / folder).mkdir(exist_ok=shared is not None)
        try:
            for shard in shards:
                path = out / shard.name if is_folder else out
                writer = SafetensorsWriter(
                    path,
                    shard.own_specs,
                    shard.metadata,
                    shard.header,
                    is_owner=is_owner,
                    shared=shared is not None,
                    through=shared is not None or owner not in (None, machine()),
                )
                self._writers.append(writer)
                place = writer, len(shard.prefix)
                self._home.update((spec.name, place) for spec in shard.specs)
        except BaseException:
            self._abandon()
            raise

    def __reduce__(self) -> tuple[Callable[..., CheckpointWriter], tuple[Any, ...]]:
        again = functools.partial(CheckpointWriter, owner=machine())
        return again, (self._out.absolute(), self._shards, self._is_folder)

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Bytes of one tensor from ``offset`` on; from any thread."""
        writer, start = self._home[name]
        writer.write(name[start:], data, offset)

    def write_last(self, name: str, data: bytes) -> None:
        """A tensor of bytes whose size is known only now (see ``SafetensorsWriter``)."""
        writer, start = self._home[name]
        writer.write_last(name[start:], data)

    def hand_over(self) -> Written:
        """What was written here since the last call, for the owner to know of."""
        nbytes: dict[str, int] = {}
        last: dict[str, bytes] = {}
        for writer, shard in zip(self._writers, self._shards, strict=True):
            part = writer.hand_over()
            nbytes |= {shard.prefix + name: n for name, n in part.nbytes.items()}
            last |= {shard.prefix + name: data for name, data in part.last.items()}
        return Written(nbytes, last)

    def credit(self, written: Written) -> None:
        """Take what another writer of these files has done for done."""
        for name, nbytes in written.nbytes.items():
            writer, start = self._home[name]
            writer.credit(Written({name[start:]: nbytes}, {}))
        for name, data in written.last.items():
            writer, start = self._home[name]
            writer.credit(Written({}, {name[start:]: data}))

    def memo_key(self) -> tuple[Sequence[Shard], bool]:
        """What is written, wherever that is."""
        return self._shards, self._is_folder

    def recording(self) -> Recording:
        """The same for one task, and what it wrote can be told afterwards."""
        return Recording(self)

    def confirm(self, taken: Taken) -> bool:
        """Whether all of it is there, byte for byte, as an earlier run has left it: then it is
        taken for done."""
        there = all(self._has(*extent) for extent in taken.extents)
        if there := there and taken.last.keys() <= self._home.keys():
            self.take(taken)
        return there

    def _has(self, name: str, start: int, nbytes: int, digest: bytes) -> bool:
        if name not in self._home:
            return False
        writer, prefix = self._home[name]
        return writer.has(name[prefix:], start, nbytes, digest)

    def take(self, taken: Taken) -> None:
        """Take what was written of these files elsewhere for done."""
        for name, _, nbytes, _ in taken.extents:  # a tensor may have several
            self.credit(Written({name: nbytes}, {}))
        self.credit(Written({}, taken.last))

    @property
    def nbytes(self) -> int:
        """Bytes of the files, once finished."""
        return sum(writer.size for writer in self._writers)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Fill in metadata that was not known at the start and takes the same room."""
        for writer, shard in zip(self._writers, self._shards, strict=True):
            writer.seal({**shard.metadata, **metadata})

    def finish(
        self,
        source: Checkpoint,
        index_name: str | None,
        replaced: Mapping[str, bytes],
        leave: Sequence[str] = (),
    ) -> list[Path]:
        """Sync the shards; write the index and the small files that travel along.

        ``replaced`` holds files whose contents differ from the source's; files named in ``leave``
        do not travel. Returns weight-like files of the source that were left behind.
        """
        _refuse_paths(replaced, self._folders)
        for writer in self._writers:
            writer.close()
        if not self._is_folder:
            return []
        for folder, part in source.models.items():
            self._write_index(folder, part, part.index_name, replaced)
        if not source.models:
            self._write_index("", source, index_name, replaced)
        travel, left = source.companions()
        for relative in travel:
            if relative.as_posix() not in (*replaced, *leave):
                copy_synced(source.path / relative, self._out / relative)
        for relative_name, data in replaced.items():
            write_synced(self._out / relative_name, data)
        return left

    @property
    def _folders(self) -> frozenset[str]:
        return frozenset(shard.folder for shard in self._shards if shard.prefix)

    def _write_index(
        self, folder: str, source: Checkpoint, given: str | None, replaced: Mapping[str, bytes]
    ) -> None:
        """The index of the files of one folder, where it has one or needs it."""
        name = plain(given).replace(".bin.", ".safetensors.") if given else _INDEX
        name = name.removeprefix("pytorch_")
        if not name.endswith(f".safetensors{INDEX_SUFFIX}"):  # of parts
            name = _INDEX
        pairs = zip(self._writers, self._shards, strict=True)
        mine = [writer for writer, shard in pairs if shard.folder == folder]
        if (len(mine) > 1 or given) and name not in replaced:
            specs = [(spec, w.path.name) for w in mine for spec in w.specs]
            write_synced(self._out / folder / name, _index(source, specs))

    def _abandon(self) -> None:
        for writer in self._writers:
            writer.abandon()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandon()


def _refuse_paths(names: Iterable[str], folders: Collection[str] = ()) -> None:
    """Names may come out of a sidecar, which is input: none may lead out of the output, or into
    another of its folders."""
    for name in names:
        folder, slash, last = name.rpartition("/")
        known = folder in folders and is_plain_name(folder)
        if not is_plain_name(last) or (slash and not known):
            raise UnsafeInput(f"{name!r} is not the name of a file beside the weights")


def _index(source: Checkpoint, specs: Sequence[tuple[TensorSpec, str]]) -> bytes:
    """A shard index; what metadata the source's index has is kept, sizes are counted anew."""
    metadata: dict[str, Any] = {}
    if source.index_name:
        given = json.loads(read_file(source.path / source.index_name)).get("metadata")
        metadata = given if isinstance(given, dict) else {}
    metadata["total_size"] = sum(spec.nbytes for spec, _ in specs)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(spec.numel for spec, _ in specs)
    weight_map = {spec.name: name for spec, name in sorted(specs, key=lambda s: s[0].name)}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    return (text + "\n").encode()
