"""sentence-transformers: a folder whose ``modules.json`` names modules that run one after another.

A transformer, pooling, dense layers: each lies in a folder of its own; the first may be the root.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lora_tools.formats.digest import file_sha256
from lora_tools.formats.json_file import parse, read_object
from lora_tools.formats.regular_files import is_there, read_file

NAME = "modules.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        folder: its own; path: the same, by the root ("" for the root itself).
        type: the dotted name of its class, or "".
    """

    folder: Path
    path: str
    type: str

    @property
    def kind(self) -> str:
        """The name of its class, wherever a release of sentence-transformers keeps it."""
        return self.type.rpartition(".")[2]

    @property
    def name(self) -> str:
        """Before the names of its tensors, where it is not the first."""
        return self.path.replace("/", ".")

    def contents(self) -> list[tuple[str, str]]:
        """Names and hashes of its files of weights."""
        return [(path.name, file_sha256(path)) for path in weight_files(self.folder)]

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """What a file of its folder sets. Raises CheckpointError."""
        path = self.folder / name
        return read_object(path) if is_there(path) else {}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A folder of modules.

    Attributes:
        main: the first of them, whose weights are those of the folder's checkpoint.
        others: those after it.
    """

    root: Path
    main: Module
    others: tuple[Module, ...]

    @classmethod
    def at(cls, root: Path) -> Pipeline | None:
        """The pipeline of a folder; None where it is none, whatever its ``modules.json`` says."""
        path = root / NAME
        if not is_there(path):
            return None
        try:
            given = parse(read_file(path))
            modules = [_module(root, each) for each in given]
            return cls(root, modules[0], tuple(modules[1:]))
        except (ValueError, RecursionError, TypeError, LookupError):
            return None

    @property
    def is_deeper(self) -> bool:
        """Whether the first module, too, has a folder below the root."""
        return self.main.folder != self.root

    @property
    def folders(self) -> set[str]:
        """Folders in the root that belong to modules."""
        paths = [PurePosixPath(each.path) for each in (self.main, *self.others)]
        return {path.parts[0] for path in paths if path.parts}

    def held(self) -> Iterator[tuple[str, Path]]:
        """Folders with weights of the modules after the first, each with what comes before the
        names of its tensors. A module such as Router has some for each of its own modules."""
        seen = {self.root, self.main.folder}
        for module in self.others:
            inside = [path for path in module.folder.rglob("*") if path.is_dir()]
            for folder in sorted({module.folder, *inside}):
                if folder not in seen and weight_files(folder):
                    seen.add(folder)
                    yield ".".join(folder.relative_to(self.root).parts), folder

    def files(self) -> list[Path]:
        """Those weights' files."""
        return [path for _, folder in self.held() for path in weight_files(folder)]


def weight_files(folder: Path) -> list[Path]:
    """Files of tensors that lie in a folder itself; none where it is not there."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        path for path in files if path.suffix in _WEIGHTS and not path.is_dir() and is_there(path)
    )


def _module(root: Path, given: Any) -> Module:
    """An entry of ``modules.json``. Raises ValueError, TypeError, LookupError for what is none."""
    path = PurePosixPath(given["path"])
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{path} leads out of the folder")
    return Module(
        root / path, "" if path == PurePosixPath() else str(path), str(given.get("type", ""))
    )
