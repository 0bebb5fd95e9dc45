"""torch's distributed checkpoints: a folder of ``.metadata`` (a pickle that says where everything
is) and ``*.distcp`` (tensors as ``torch.save`` writes them, one after another).

Read as ``torch.distributed.checkpoint`` (2.13) writes them, which accelerate, torchtitan, Lightning
and composer use; nothing in them is run. Optimizers' state and what else a training keeps is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats.assembled import Assembled, Part, check_parts
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.inert_pickle import Record, kind_of, read_pickle
from lora_tools.formats.lfs import refuse_pointer
from lora_tools.formats.regular_files import MOST, is_there, read_file
from lora_tools.formats.shards import is_plain_name
from lora_tools.formats.torch_zip import read_saved, saved_tensor
from lora_tools.records import TensorSpec, counted

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
TITLE = "a torch distributed checkpoint"
_PACKAGE = "torch.distributed.checkpoint."
# What trainers call things beside the model, on the way to a tensor.
_TRAINING = re.compile(
    r"(optim|(lr_)?scheduler|train_state|trainer|dataloader|dataset|rng|random|scaler|callback"
    r"|loop|timestamp|metric).*"
)
_OPTIMIZER = re.compile(r"optim[a-z]*(_\w+)?\.")  # of names that are not taken apart
_BYTES = _PACKAGE + "metadata.BytesStorageMetadata"
_WRAPPERS = ("model", "module", "app", "state", "state_dict")
_Path = tuple[str, ...]
_Places = dict[tuple[str, tuple[int, ...]], dict[str, Any]]


class DistributedCheckpoint(Assembled):
    """The model of one, by the names that its own state dict had.

    Args:
        path: its ``.metadata``.

    Raises:
        CheckpointError: it is none, it is not all there, or which of its tensors are the model's
            cannot be told.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = read_file(path, most=10 * MOST)
            refuse_pointer(path, data)
            said = _fields(read_pickle(data), "metadata.Metadata")
            entries = said.get("state_dict_metadata")
            if type(entries) is not dict or not all(type(name) is str for name in entries):
                raise CheckpointError("its metadata names no tensors")
            others = [name for name, entry in entries.items() if kind_of(entry) == _BYTES]
            tensors = {
                name: _fields(entry, "metadata.TensorStorageMetadata")
                for name, entry in entries.items()
                if kind_of(entry) != _BYTES
            }
            names, left = model_names(tensors, said.get("planner_data"))
            places = _places(said.get("storage_data"))
            specs, parts = {}, {}
            for own, name in names.items():
                specs[name] = _spec(name, tensors[own])
                found = _parts(path.parent, own, tensors[own], places)
                parts[name] = check_parts(own, specs[name].shape, found)
            super().__init__(path, specs, parts)
            for name, mine in self.parts.items():
                for part in mine:
                    self._check_extent(name, part)
        except CheckpointError as error:
            raise _at(path, error) from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        self.notes = left_out([*left, *others])

    def _check_extent(self, name: str, part: Part) -> None:
        size = self.mapped(part.file).size
        if part.end > size:
            raise CheckpointError(
                f"{name}: its part lies at bytes {part.begin} to {part.end} of {part.file.name}, "
                f"which has {size}; is it truncated?"
            )

    def part(self, name: str, part: Part) -> torch.Tensor:
        """A part as it is stored. Raises CheckpointError, by the tensor's name."""
        data = self.mapped(part.file).view[part.begin : part.end]
        try:
            found = saved_tensor(read_saved(data))
            if found is None:
                raise CheckpointError("a plain, dense tensor is expected there")
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.path}: {name}: at byte {part.begin} of {part.file.name}: {error}"
            ) from None
        wanted = self.specs[name].dtype, part.sizes
        if (found.dtype, found.shape) != wanted:
            raise CheckpointError(
                f"{self.path}: {name}: at byte {part.begin} of {part.file.name} lies {found.dtype} "
                f"{list(found.shape)}, and {wanted[0]} {list(wanted[1])} is expected"
            )
        return found.view(data)


def _at(path: Path, error: CheckpointError) -> CheckpointError:
    """The same error, of the same kind, with the path that it is about."""
    return error if str(error).startswith(str(path.parent)) else type(error)(f"{path}: {error}")


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """What an object of torch's package is set to. Raises CheckpointError for any other."""
    if not isinstance(value, Record) or value.kind != _PACKAGE + kind:
        found = kind_of(value) or type(value).__name__
        raise CheckpointError(f"not written by torch: a {found} is there instead of a {kind}")
    return value.fields


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise CheckpointError(f"{what} is not a list of sizes: {value!r:.80}")
    return value


def _places(data: Any) -> _Places:
    """Where each part lies, by its tensor and offsets. Raises CheckpointError."""
    if type(data) is not dict:
        raise CheckpointError("its metadata does not say where tensors lie (no storage_data)")
    places: _Places = {}
    for index, info in data.items():
        key = _fields(index, "metadata.MetadataIndex")
        if key.get("offset") is not None:
            name = str(key.get("fqn"))
            places[name, _numbers(key["offset"], f"{name}: the offset")] = _fields(
                info, "filesystem._StorageInfo"
            )
    return places


def _spec(name: str, said: Mapping[str, Any]) -> TensorSpec:
    """A tensor's spec. Raises CheckpointError, by its name."""
    properties = said.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    if type(state) is not tuple or not state:
        raise CheckpointError(f"{name}: its metadata does not give a dtype")
    try:
        dtype = dtype_name(kind_of(state[0]))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    return TensorSpec(name, dtype, _numbers(said.get("size"), f"{name}: the size"))


def _parts(folder: Path, name: str, said: Mapping[str, Any], places: _Places) -> Iterator[Part]:
    """Raises CheckpointError, UnsafeInput, by the tensor's name."""
    chunks = said.get("chunks")
    for chunk in chunks if type(chunks) is list else ():
        fields = _fields(chunk, "metadata.ChunkStorageMetadata")
        offsets = _numbers(fields.get("offsets"), f"{name}: the offsets of a part")
        sizes = _numbers(fields.get("sizes"), f"{name}: the sizes of a part")
        info = places.get((name, offsets))
        if info is None:
            raise CheckpointError(
                f"{name}: its metadata does not say where the part at {list(offsets)} is"
            )
        file, begin, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        begin, length = _numbers((begin, length), f"{name}: the place of a part")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{name}: stored with {info['transform_descriptors']}, which cannot be read; load "
                "it with torch.distributed.checkpoint, and save it without"
            )
        if type(file) is not str or not is_plain_name(file):
            raise UnsafeInput(f"{name}: lies in a file outside the folder: {file!r}")
        if not is_there(folder / file):
            raise CheckpointError(f"{name}: lies in {file}, which is missing; are all files there?")
        yield Part(offsets, sizes, folder / file, begin, begin + length)


def model_names(names: Iterable[str], planner_data: Any) -> tuple[dict[str, str], list[str]]:
    """The names of the model's tensors → those that its own state dict had; and the others.

    What was saved may be nested, as ``{"model": …, "optimizer": …}`` is; ``planner_data`` gives the
    way to each tensor.

    Raises:
        CheckpointError: several nested ones may be the model, or none of them.
    """
    paths: dict[str, _Path] = {}
    for name in names:
        path = planner_data.get(name) if type(planner_data) is dict else None
        paths[name] = tuple(map(str, path)) if type(path) in (tuple, list) and path else (name,)
    kept = {own: path for own, path in paths.items() if not _is_of_training(path)}
    while kept:
        heads = {path[0] for path in kept.values() if len(path) > 1}
        nested = "model" if "model" in heads else next(iter(heads), "")
        if not heads or ("model" not in heads and any(len(p) == 1 for p in kept.values())):
            break
        if nested != "model" and (len(heads) > 1 or nested not in _WRAPPERS):
            raise CheckpointError(
                f"holds {', '.join(sorted(heads)[:8])}, and it is not clear which of them is the "
                'model; save {"model": model.state_dict()}'
            )
        inside = {own: p for own, p in kept.items() if len(p) > 1 and p[0] == nested}
        kept = {own: path[1:] for own, path in inside.items()}
    deeper = [own for own, path in kept.items() if len(path) > 1]
    if deeper:
        raise CheckpointError(
            f"{deeper[0]}: nested beside the model's tensors, and it is not clear whether it is "
            'one of them; save {"model": model.state_dict()}'
        )
    if not kept:
        raise CheckpointError(
            "holds no tensors of a model, only the state of a training; is the model in a folder "
            "beside it?"
        )
    return {own: path[0] for own, path in kept.items()}, [n for n in paths if n not in kept]


def _is_of_training(path: _Path) -> bool:
    within = path[:-1] or (path[:1] if _OPTIMIZER.match(path[0]) else ())
    return any(_TRAINING.fullmatch(part) for part in within)


def left_out(names: list[str]) -> tuple[str, ...]:
    """A sentence on entries that are not read, if there are any."""
    if not names:
        return ()
    more = ", …" if names[3:] else ""
    return (
        f"not part of the model, and not read: {counted(len(names), 'value')} "
        f"({', '.join(names[:3])}{more})",
    )
