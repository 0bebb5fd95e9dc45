"""Decompositions kept for later: the spectrum cache, and the scratch space of a shared rank policy.

A safetensors file with, for each module, ``squared/<module>``, all squared singular values that are
known (float64), and ``right/<module>``, the leading right singular vectors as rows (float32, or
float64 for a float64 checkpoint). The metadata holds one JSON object a module: what it was made
from (``key``) and plain numbers; and a digest of all that, which tells damage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError
from lora_tools.formats import digest as hashing
from lora_tools.formats.dtypes import dtype_name, torch_dtype
from lora_tools.formats.safetensors_file import SafetensorsFile, strict_json
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

_VERSION = "2"
MARK = "loratools_spectra"
# The kind of its own digest, whatever others are: who changes the file can write that anew, too.
_DAMAGE: hashing.Kind = "xxh3"


@dataclasses.dataclass(frozen=True)
class StoredSpectrum:
    """One module's decomposition as far as it went.

    Attributes:
        key: what it was made from, and how: another key, another decomposition.
        squared: squared singular values, descending, float64.
        right: (depth, cols), the leading right singular vectors.
        facts: plain numbers and strings to go with them.
    """

    key: str
    squared: torch.Tensor
    right: torch.Tensor
    facts: Mapping[str, Any]


class Spectra:
    """Decompositions by module, on disk while they are collected. ``pickle`` sends what is there
    at the time, to be read.

    Args:
        folder: where a scratch file may lie.
        earlier: a file written before; its entries are found too.
    """

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self._spool = SafetensorsSpool(folder, shared=True)
        self._facts: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, str] = {}
        self._earlier: SafetensorsFile | None = None
        self.changed = False
        self.earlier = earlier
        if earlier is not None:
            self._earlier, self._facts, self._hashes = _open(earlier)

    def get(self, module: str, key: str, vectors: bool = True) -> StoredSpectrum | None:
        """The decomposition under that key, or None; from any thread. Without ``vectors`` only
        their number is right, and ``right`` is (depth, 0)."""
        facts = self._facts.get(module)
        if facts is None or facts["key"] != key:
            return None
        squared, right = self._tensor(f"squared/{module}"), f"right/{module}"
        if vectors:
            return StoredSpectrum(key, squared, self._tensor(right), facts["facts"])
        return StoredSpectrum(
            key, squared, squared.new_empty(self._spec(right).shape[0], 0), facts["facts"]
        )

    def key(self, module: str) -> str | None:
        """What the module's decomposition was made from, where there is one."""
        return self._facts[module]["key"] if module in self._facts else None

    def put(self, module: str, stored: StoredSpectrum) -> None:
        """Keep a decomposition in place of what was there. Not for use from several threads."""
        for part in ("squared", "right"):
            tensor = getattr(stored, part)
            spec = TensorSpec(f"{part}/{module}", dtype_name(tensor.dtype), tuple(tensor.shape))
            data = as_bytes(tensor)
            self._spool.add(spec, data, replace=True)
            self._hashes[spec.name] = _hash(data)
        self._facts[module] = {"key": stored.key, "facts": dict(stored.facts)}
        self.changed = True

    def _spec(self, name: str) -> TensorSpec:
        if name in self._spool:
            return self._spool.spec(name)
        assert self._earlier is not None
        return self._earlier.specs[name]

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        if name in self._spool:
            spec, data = self._spool.read(name)
            if not data:
                return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).view(spec.shape)
        assert self._earlier is not None
        return self._earlier.tensor(name)

    def finish(self, path: Path, version: str) -> None:
        """Write all entries, those of the earlier file too."""
        for module in self._facts:
            for part in ("squared", "right"):
                name = f"{part}/{module}"
                if name not in self._spool:
                    assert self._earlier is not None
                    self._spool.add(self._earlier.specs[name], self._earlier.raw(name))
        modules = json.dumps(self._facts, sort_keys=True)
        said = {"loratools": version, MARK: _VERSION, "modules": modules}
        said["digest"] = _digest(self._spool.specs, self._hashes, modules)
        self._spool.finish(path, said)

    def close(self) -> None:
        """Drop the scratch space, whether finished or not."""
        self._spool.close()


def _digest(specs: Iterable[TensorSpec], hashes: Mapping[str, str], modules: str) -> str:
    """Of the tensors, and of what is said of them."""
    with hashing.using(_DAMAGE):
        return hashing.sealed(f"{hashing.digest(specs, hashes)} {modules}")


def _hash(data: memoryview) -> str:
    with hashing.using(_DAMAGE):
        return hashing.tensor_hash(data)


def _open(path: Path) -> tuple[SafetensorsFile, dict[str, dict[str, Any]], dict[str, str]]:
    file = SafetensorsFile(path)
    wrong = CheckpointError(
        f"{path}: not a spectrum cache that this version can read; name another file"
    )
    if file.metadata.get(MARK) != _VERSION:
        raise wrong
    modules = strict_json(file.metadata.get("modules", ""))
    if not isinstance(modules, dict):
        raise wrong
    for module, entry in modules.items():
        squared, right = (file.specs.get(f"{part}/{module}") for part in ("squared", "right"))
        sound = (
            isinstance(entry, dict)
            and isinstance(entry.get("key"), str)
            and isinstance(entry.get("facts"), dict)
            and squared is not None
            and right is not None
            and squared.dtype == "F64"
            and right.dtype in ("F32", "F64")
            and len(squared.shape) == 1
            and len(right.shape) == 2
            and right.shape[0] <= squared.shape[0]
        )
        if not sound:
            raise wrong
    hashes = {}
    for name in file.specs:
        hashes[name] = _hash(file.raw(name))
        file.release(name)
    if file.metadata.get("digest") != _digest(
        file.specs.values(), hashes, file.metadata["modules"]
    ):
        raise CheckpointError(
            f"{path}: the spectrum cache is damaged; delete it, and the decompositions are made "
            "again"
        )
    return file, modules, hashes
