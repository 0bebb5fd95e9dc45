"""Sharded models that each process saved its part of with ``torch.save``: verl's
``model_world_size_N_rank_I.pt``, accelerate's ``pytorch_model_fsdp_0_rankI.bin``.

A tensor in them is a DTensor, which says by its placements and the place of its process in the mesh
which block it is (``torch.distributed.tensor``, 2.13, and as it was from 2.4 on); a ShardedTensor,
which gives its offsets; or a plain one, which all processes have. No process group is needed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.assembled import Assembled, Part, check_parts, map_file
from lora_tools.formats.distributed_checkpoint import left_out
from lora_tools.formats.inert_pickle import Record
from lora_tools.formats.placements import blocks
from lora_tools.formats.tensors import as_bytes
from lora_tools.formats.torch_zip import SavedTensor, read_saved
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

TITLE = "a sharded model, one file a process"
_NAMES = (
    re.compile(r"(?P<stem>model_world_size_(?P<count>\d+)_rank_)(?P<rank>\d+)\.pt"),
    re.compile(r"(?P<stem>pytorch_model_fsdp(?:_\d+)?_rank)(?P<rank>\d+)\.bin"),
)


def is_rank_file(path: Path) -> bool:
    """Whether a file is one process's part, by its name."""
    return any(pattern.fullmatch(path.name) for pattern in _NAMES)


def rank_files(folder: Path) -> list[Path]:
    """The files of a sharded model in a folder, in the order of their ranks; none where there are
    none.

    Raises:
        CheckpointError: there are several models' or one is missing.
    """
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        match = next((m for pattern in _NAMES if (m := pattern.fullmatch(path.name))), None)
        if match is not None:
            ranks = found.setdefault(match["stem"], {})
            ranks[int(match["rank"])] = path
            counts[match["stem"]] = int(match.groupdict().get("count") or max(ranks) + 1)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds parts of several sharded models "
            f"({', '.join(f'{s}*' for s in found)}); keep one of them there"
        )
    for stem, ranks in found.items():
        missing = [rank for rank in range(counts[stem]) if rank not in ranks]
        if missing or len(ranks) != counts[stem]:
            said = f"the file of rank {missing[0]} is missing" if missing else "there are more"
            raise CheckpointError(
                f"{folder}: {len(ranks)} files {stem}* of a model sharded over {counts[stem]} "
                f"processes; {said}"
            )
        return [ranks[rank] for rank in sorted(ranks)]
    return []


class RankFiles(Assembled):
    """A sharded model of all its processes' files.

    Args:
        path: the file of rank 0; the others lie beside.

    Raises:
        CheckpointError: files, or parts of a tensor, are missing or do not fit; a tensor is of a
            kind that is not read.
    """

    def __init__(self, path: Path) -> None:
        files = rank_files(path.parent)
        maps = {file: map_file(file) for file in files}
        states = [_state(file, maps[file].view) for file in files]
        self._saved: dict[tuple[str, Part], SavedTensor] = {}
        self._copies: dict[str, list[Part]] = {}
        specs, parts, left = {}, {}, []
        for name in dict.fromkeys(name for state in states for name in state):
            try:
                found = self._found(name, [state.get(name) for state in states], files)
            except CheckpointError as error:
                raise CheckpointError(f"{path.parent}: {name}: {error}") from None
            if found is None:
                left.append(name)
            else:
                specs[name], parts[name] = found
        super().__init__(path, specs, parts, files)
        self._maps, self.notes = maps, left_out(left)

    def _found(
        self, name: str, values: list[Any], files: list[Path]
    ) -> tuple[TensorSpec, tuple[Part, ...]] | None:
        """A tensor of what each file says of it; None where it is none. Raises CheckpointError."""
        if not any(isinstance(value, Record) for value in values):
            return None
        for file, value in zip(files, values, strict=True):
            if value is None:
                raise CheckpointError(f"{file.name} lacks it; other files have it")
        if name.endswith("flat_param"):
            raise CheckpointError(
                "one tensor holds several, as in FSDP's LOCAL_STATE_DICT; save SHARDED_STATE_DICT "
                "or FULL_STATE_DICT"
            )
        held, is_plain = blocks(values)
        parts = []
        for file, mine in zip(files, held, strict=True):
            for block in mine:
                saved = block.saved
                part = Part(block.offsets, saved.shape, file, saved.begin, saved.end)
                self._saved[name, part] = saved
                parts.append(part)
        every = [block for mine in held for block in mine]
        if len({(block.shape, block.saved.dtype) for block in every}) != 1:
            raise CheckpointError("has different shapes or dtypes in different files")
        spec = TensorSpec(name, every[0].saved.dtype, every[0].shape)
        if is_plain:
            self._copies[name] = parts[1:]
        return spec, check_parts(name, spec.shape, [p for p in parts if math.prod(p.sizes)])

    def part(self, name: str, part: Part) -> torch.Tensor:
        """A part as it is stored."""
        return self._saved[name, part].view(self.mapped(part.file).view)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it.

        Raises:
            CheckpointError: a plain one is not the same in all files.
        """
        tensor = super().tensor(name)
        for copy in self._copies.get(name, ()):
            if as_bytes(self.part(name, copy)) != as_bytes(tensor):
                raise CheckpointError(
                    f"{self.path.parent}: {name}: a plain tensor that differs between "
                    f"{copy.file.name} and {self.path.name}, and the files do not say which part "
                    "each process has"
                )
            self.mapped(copy.file).release(copy.begin, copy.end)
        return tensor


def _state(file: Path, data: memoryview) -> dict[str, Any]:
    """What a file names. Raises CheckpointError."""
    try:
        state = read_saved(data)
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise CheckpointError("holds something other than named tensors")
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return state
