"""The sidecar of a reversible merge: what turns the merged checkpoint back into its base.

A safetensors file (its name ends otherwise, so that no loader takes it for weights) holding, for
each changed tensor, what subtraction leaves open (the parts of ``linalg.reversible.Coded``, each of
all runs together and zstd-compressed), a table of their lengths by run, and DoRA norms; the headers
of the base's own files; and in its metadata the base's digest, which checks the result, the
adapters' digests, which tell a wrong adapter from the right one, and its own digest, which tells
damage.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.json_file import parse
from lora_tools.formats.regular_files import MOST
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.jobs import Lying
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

NAME = "loratools-unmerge.sidecar"
# The first version has listings alone, made for estimates in the merge's working dtype.
_VERSIONS = {"1": ("gaps", "distances"), "2": ("gaps", "distances", "excess", "within")}
_VERSION = "2"
_LEVEL = 3  # of zstd
# Bytes that the parts may unfold to for each element.
_MOST = {"gaps": 2, "distances": 8, "excess": 1, "within": 8}
_CARD = "card/README.md"
# What small files of it may unfold to in all: so much, or so many times its size.
_UNFOLDED = 64 << 20
_RATIO = 100


@dataclasses.dataclass(frozen=True)
class Listing:
    """One tensor's parts of ``linalg.reversible.Coded``, run by run, and its DoRA norms."""

    runs: tuple[tuple[bytes, ...], ...]
    norms: tuple[torch.Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Packed:
    """The same as the file has it: a third of it, or less, and so what a result holds.

    Attributes:
        lengths: of the parts (columns) of the runs (rows).
        parts: of all runs together, compressed.
    """

    lengths: torch.Tensor
    parts: tuple[bytes, ...]
    norms: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, listing: Listing) -> Packed:
        """From any thread."""
        import torch

        packer = zstandard.ZstdCompressor(level=_LEVEL)
        count = len(_VERSIONS[_VERSION])
        lengths = torch.tensor([[len(part) for part in run] for run in listing.runs])
        parts = [packer.compress(b"".join(run[i] for run in listing.runs)) for i in range(count)]
        return cls(lengths.to(torch.int64).view(-1, count), tuple(parts), listing.norms)


def sidecar_path(merged: Path) -> Path:
    """Where the sidecar of a merged folder or file lies."""
    return merged / NAME if merged.is_dir() else merged.with_name(merged.name + ".sidecar")


class SidecarWriter:
    """Collects listings as they are made, in any order, and writes them sorted."""

    def __init__(self, folder: Path) -> None:
        self._spool = SafetensorsSpool(folder)
        self._hashes: dict[str, str] = {}
        self._packer = zstandard.ZstdCompressor(level=_LEVEL)

    def _add(self, name: str, data: bytes) -> None:
        self._add_spec(TensorSpec(name, "U8", (len(data),)), memoryview(data))

    def _add_spec(self, spec: TensorSpec, data: memoryview) -> None:
        self._hashes[spec.name] = hashing.tensor_hash(data)
        self._spool.add(spec, data)

    def add_header(self, file: str, header: bytes) -> None:
        """The JSON header of one of the base's files."""
        self._add(f"header/{file}", self._packer.compress(header))

    def add_file(self, name: str, data: bytes) -> None:
        """A small file of the base that the merged checkpoint lacks or has changed."""
        self._add(f"file/{name}", self._packer.compress(data))

    def add_card(self, data: bytes) -> None:
        """The base's own model card, in whose place the merged checkpoint has another."""
        self._add(_CARD, self._packer.compress(data))

    def add(self, tensor: str, listing: Packed) -> None:
        """The listing of one tensor."""
        from lora_tools.formats.dtypes import dtype_name
        from lora_tools.formats.tensors import as_bytes

        spec = TensorSpec(f"lengths/{tensor}", "I64", tuple(listing.lengths.shape))
        self._add_spec(spec, as_bytes(listing.lengths))
        for part, data in zip(_VERSIONS[_VERSION], listing.parts, strict=True):
            self._add(f"{part}/{tensor}", data)
        for i, norm in enumerate(listing.norms):
            spec = TensorSpec(f"norm{i}/{tensor}", dtype_name(norm.dtype), tuple(norm.shape))
            self._add_spec(spec, as_bytes(norm))

    def finish(self, path: Path, base_digest: str, adapters: Sequence[dict[str, Any]]) -> None:
        """Write the file, synced."""
        metadata = {
            "loratools_sidecar": _VERSION,
            "base_digest": base_digest,
            "digest": hashing.digest(self._spool.specs, self._hashes),
            "adapters": json.dumps(list(adapters), sort_keys=True),
        }
        self._spool.finish(path, metadata)

    def close(self) -> None:
        """Drop the scratch space, whether finished or not."""
        self._spool.close()


class Sidecar:
    """A sidecar, read lazily. Raises CheckpointError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, SafetensorsFile(path)
        version = self.file.metadata.get("loratools_sidecar", "")
        if version not in _VERSIONS:
            raise CheckpointError(f"{path}: not a sidecar that this version can read")
        self._parts = _VERSIONS[version]
        self.is_first = version == "1"
        try:
            self.base_digest = self.file.metadata["base_digest"]
            whole = self._digest(self.file.metadata["digest"]) == self.file.metadata["digest"]
            self.adapters = [
                (str(used["digest"]), float(used["weight"]))
                for used in parse(self.file.metadata["adapters"])
            ]
        except (KeyError, TypeError, ValueError, RecursionError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: the sidecar is damaged; copy or download it again")

    def _digest(self, recorded: str) -> str:
        """Of the file, of the kind of the recorded one. Raises CheckpointError for an unknown."""
        try:
            kinds = [hashing.kind_of(each) for each in (recorded, self.base_digest)]
        except MismatchError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        with hashing.using(kinds[0]):
            hashes = {name: hashing.tensor_hash(self.file.raw(name)) for name in self.file.specs}
            return hashing.digest(self.file.specs.values(), hashes)

    def __contains__(self, tensor: str) -> bool:
        return f"lengths/{tensor}" in self.file.specs

    def _unpack(self, name: str, most: int) -> bytes:
        """An entry. Raises CheckpointError where it would unfold to more than ``most`` bytes."""
        raw = self.file.raw(name)
        try:
            if zstandard.frame_content_size(raw) > most:
                raise CheckpointError(
                    f"{self.path}: {name} would decompress to "
                    f"{zstandard.frame_content_size(raw):,} bytes, but at most {most:,} are read; "
                    "the sidecar is damaged, or hostile"
                )
            return zstandard.ZstdDecompressor().decompress(raw, max_output_size=max(most, 1))
        except zstandard.ZstdError as error:
            raise CheckpointError(f"{self.path}: {name} is damaged ({error})") from None

    def headers(self) -> dict[str, bytes]:
        """The base's weight files and their JSON headers."""
        return self._all("header/")

    def files(self) -> dict[str, bytes]:
        """Small files of the base that the merged checkpoint lacks or has changed."""
        return self._all("file/")

    def card(self) -> bytes | None:
        """The base's own model card; None where it had none."""
        return self._all("card/").get(_CARD.removeprefix("card/"))

    def _all(self, prefix: str) -> dict[str, bytes]:
        left = max(_UNFOLDED, _RATIO * self.file.stamp.nbytes)
        found = {}
        for name in self.file.specs:
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = self._unpack(name, min(left, MOST))
                left -= len(found[name.removeprefix(prefix)])
        return found

    def lies(self, tensor: str) -> tuple[Lying, ...]:
        """What is kept of one tensor, and where that lies."""
        names = [f"{part}/{tensor}" for part in ("lengths", *self._parts)]
        specs = [self.file.specs[name] for name in names if name in self.file.specs]
        return tuple(Lying(str(self.path), spec.name, spec.nbytes) for spec in specs)

    def listing(self, tensor: str, numel: int) -> Listing:
        """What is kept of one tensor, which has so many elements.

        Raises:
            CheckpointError: its table of lengths is none, or its parts are longer than such a
                tensor's or not of those lengths.
        """
        lengths = self.file.tensor(f"lengths/{tensor}").tolist()
        spec = self.file.specs[f"lengths/{tensor}"]
        is_table = spec.dtype == "I64" and spec.shape[1:] == (len(self._parts),)
        if numel and not (is_table and all(n >= 0 for run in lengths for n in run)):
            raise CheckpointError(
                f"{self.path}: lengths/{tensor} does not say where its data is; the sidecar is "
                "damaged, or hostile"
            )
        parts = []
        for i, part in enumerate(self._parts):
            data = self._unpack(f"{part}/{tensor}", _MOST[part] * numel)
            ends = list(itertools.accumulate((run[i] for run in lengths), initial=0))
            if ends[-1] != len(data):
                raise CheckpointError(f"{self.path}: {part}/{tensor} is damaged: cut off")
            parts.append([data[a:b] for a, b in itertools.pairwise(ends)])
        runs = zip(*parts, strict=True)
        norms: list[torch.Tensor] = []
        while f"norm{len(norms)}/{tensor}" in self.file.specs:
            norms.append(self.file.tensor(f"norm{len(norms)}/{tensor}"))
        return Listing(tuple(runs), tuple(norms))
