"""Models in parts, as torch's own classes save them: distributed checkpoints, and a file of each
process. Processes are played one after another in a group that sends nothing."""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as said
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

Cuts = Sequence[Sequence[int]]  # for each dimension the places where it is cut


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(state: Mapping[str, Any], folder: Path) -> Path:
    """A distributed checkpoint of one process, by torch itself."""
    with quietly():
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What torch itself reads into tensors of the same names."""
    with quietly():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def spans(length: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, size) of the pieces of a dimension."""
    edges = sorted({0, length, *(c for c in cuts if 0 < c < length)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)] if length else [(0, 0)]


def grid(shape: Sequence[int], cuts: Cuts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the blocks of a tensor that is cut so."""
    places = itertools.product(*(spans(n, c) for n, c in zip(shape, cuts, strict=True)))
    return [(tuple(p[0] for p in place), tuple(p[1] for p in place)) for place in places]


def cut_up(
    folder: Path, tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Cuts], files: int = 2
) -> said.Metadata:
    """A distributed checkpoint whose tensors are cut, ``{"model": tensors}``; its metadata."""
    folder.mkdir()
    names = [f"__{i}_0.distcp" for i in range(files)]
    entries: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    turn = itertools.count()
    for own, tensor in tensors.items():
        name, chunks = f"model.{own}", []
        for i, (offsets, sizes) in enumerate(grid(tensor.shape, cuts[own])):
            file = names[next(turn) % files]
            with (folder / file).open("ab") as out:
                begin = out.tell()
                block = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                torch.save(block.clone(), out)
                info = _StorageInfo(file, begin, out.tell() - begin)
            size = torch.Size(sizes)
            chunks.append(said.ChunkStorageMetadata(torch.Size(offsets), size))
            places[said.MetadataIndex(name, torch.Size(offsets), i)] = info
        properties = said.TensorProperties.create_from_tensor(tensor)
        entries[name] = said.TensorStorageMetadata(properties, tensor.size(), chunks)
        paths[name] = ("model", own)
    metadata = said.Metadata(entries, paths, places)
    write(folder, metadata)
    return metadata


def write(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@contextlib.contextmanager
def process(rank: int, count: int) -> Iterator[None]:
    """One of so many processes, alone."""
    with quietly():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        try:
            yield
        finally:
            dist.destroy_process_group()


def part_of(tensor: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> DTensor:
    """A process's DTensor; which block it holds is torch's own word."""
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def save_ranks(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    mesh: Sequence[int],
    placements: Mapping[str, Sequence[Any]],
    name: str = "model_world_size_{count}_rank_{rank}.pt",
) -> Path:
    """A file of each process; tensors without placements are plain."""
    folder.mkdir(exist_ok=True)
    count = math.prod(mesh)
    for rank in range(count):
        with process(rank, count):
            names = tuple(f"d{i}" for i in range(len(mesh)))
            devices = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=names)
            state = {
                key: part_of(tensor, devices, placements[key]) if key in placements else tensor
                for key, tensor in tensors.items()
            }
            torch.save(state, folder / name.format(count=count, rank=rank))
    return folder
