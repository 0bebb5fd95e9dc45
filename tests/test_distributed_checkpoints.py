"""Models in parts: torch's distributed checkpoints, and a file of each process. What torch itself
reads of them is the oracle; nothing that they hold is run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint import metadata as said
from torch.distributed.tensor import Partial, Replicate, Shard

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, LoraToolsError, UnsafeInput
from lora_tools.formats.assembled import Part, check_parts
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.distributed_checkpoint import model_names
from lora_tools.formats.tensors import as_bytes
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint
from tests import distributed
from tests.iotools import adapter, checkpoint, linear_shapes, weights

Q = "model.layers.0.q_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def opened(path: Path, decoded: bool = True) -> Checkpoint:
    return open_checkpoint(path, allow_pickle=True, decoded=decoded)


def same(found: Checkpoint, wanted: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, and no other names."""
    return found.specs.keys() == wanted.keys() and all(
        found.tensor(name).dtype == tensor.dtype
        and found.tensor(name).shape == tensor.shape
        and bytes(found.raw(name)) == bytes(as_bytes(tensor))
        for name, tensor in wanted.items()
    )


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


# ------------------------------------------------------------------------- distributed checkpoints


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=3)))
    cuts = [draw(st.lists(st.integers(1, 6), max_size=3)) for _ in shape]
    return numbers(shape, draw(st.sampled_from(DTYPES))), cuts


@settings(max_examples=25, deadline=None)
@given(st.lists(cut_tensors(), min_size=1, max_size=3), st.integers(1, 3))
def test_parts_of_any_shape(tmp_path_factory, drawn, files):
    folder = tmp_path_factory.mktemp("cut") / "x"
    tensors = {f"t{i}.weight": tensor for i, (tensor, _) in enumerate(drawn)}
    tensors["whole"] = torch.ones(3)
    cuts = {f"t{i}.weight": cut for i, (_, cut) in enumerate(drawn)} | {"whole": [[]]}
    distributed.cut_up(folder, tensors, cuts, files)
    empty = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    oracle = distributed.load(empty, folder)
    found = opened(folder, decoded=False)
    assert same(found, {name.removeprefix("model."): read for name, read in oracle.items()})
    assert same(found, tensors)


STATES: dict[str, Callable[[dict[str, Any], Any], dict[str, Any]]] = {
    "flat": lambda model, optim: model,
    "torchtitan": lambda model, optim: {
        **model,
        "optimizer": optim,
        "train_state": {"step": torch.tensor(3)},
        "lr_scheduler": {"last_epoch": 2},
    },
    "accelerate": lambda model, optim: {"model": model},
    "app": lambda model, optim: {"app": {"model": model, "optim": optim}},
    "composer": lambda model, optim: {
        "state": {"model": model, "optimizers": {"Adam": optim}, "rng": [{"cpu": torch.ones(3)}]}
    },
    "lightning": lambda model, optim: {"model": model, "optimizer_0": optim, "loops": {"n": 1}},
    "two models": lambda model, optim: {"model": model, "ema": {"w": torch.ones(1)}, "step": 1},
}


@pytest.mark.parametrize("kind", STATES)
def test_only_the_model_is_taken(kind: str, tmp_path: Path) -> None:
    model = weights(layers=1)
    optim = {
        "state": {k: {"exp_avg": v + 1} for k, v in model.items()},
        "param_groups": [{"lr": 1}],
    }
    distributed.save(STATES[kind](model, optim), tmp_path / "x")
    found = opened(tmp_path / "x")
    assert same(found, model)
    left = [note for note in found.notes if "not read" in note]
    assert bool(left) == (kind not in ("flat", "accelerate"))


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        ({"a.w": ("a", "w"), "b.w": ("b", "w")}, "which of them is the model"),
        ({"a.w": ("a", "w")}, "which of them is the model"),
        ({"w": ("w",), "a.w": ("a", "w")}, "a.w: nested beside"),
        ({"optimizer.w": ("optimizer", "w")}, "no tensors of a model"),
    ],
)
def test_what_may_be_the_model_is_not_guessed(paths: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        model_names(paths, paths)


def test_names_without_a_way_to_them_stay() -> None:
    names, left = model_names(["model.a", "optimizer.state.a"], None)
    assert names == {"model.a": "model.a"}
    assert left == ["optimizer.state.a"]


def test_it_opens_without_torch_and_without_reading(tmp_path: Path) -> None:
    """A dry run reads headers: what lies there is looked at when it is asked for."""
    distributed.save({"model": {"a": torch.ones(4)}}, tmp_path / "x")
    [file] = (tmp_path / "x").glob("*.distcp")
    file.write_bytes(b"\0" * file.stat().st_size)
    look = (
        "import sys; from lora_tools.sources.checkpoints import open_checkpoint; "
        f"assert open_checkpoint({str(tmp_path / 'x')!r}, True).specs['a'].shape == (4,); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", look], check=True)
    found = opened(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"a: at byte \d+ of __0_0.distcp: not a file that"):
        found.tensor("a")


def broken(change: Callable[[said.Metadata], Any]) -> Callable[[Path], None]:
    """A checkpoint of one matrix in two parts, with metadata that lies."""

    def make(folder: Path) -> None:
        metadata = distributed.cut_up(folder, {"a": numbers((6, 4))}, {"a": [[3], []]})
        change(metadata)
        distributed.write(folder, metadata)

    return make


def entry(metadata: said.Metadata) -> Any:
    return metadata.state_dict_metadata["model.a"]


def info(metadata: said.Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> said.ChunkStorageMetadata:
    return said.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


LIES: dict[str, tuple[Callable[[said.Metadata], Any], str]] = {
    "beyond the file": (lambda m: setattr(info(m), "offset", 10**9), "truncated"),
    "a negative place": (lambda m: setattr(info(m), "offset", -1), "the place of a part"),
    "a hole": (lambda m: entry(m).chunks.pop(), r"hold 12 of the 24 numbers"),
    "an overlap": (
        lambda m: entry(m).chunks.__setitem__(0, chunk((0, 0), (4, 4))),
        "two parts overlap",
    ),
    "outside": (
        lambda m: entry(m).chunks.__setitem__(0, chunk((0, 0), (3, 5))),
        r"a part of \[3, 5\] at \[0, 0\]",
    ),
    "nowhere": (lambda m: m.storage_data.clear(), "its metadata does not say where the"),
    "no places": (lambda m: setattr(m, "storage_data", None), "does not say where"),
    "another folder": (
        lambda m: setattr(info(m), "relative_path", "../x.distcp"),
        "outside the folder",
    ),
    "a missing file": (lambda m: setattr(info(m), "relative_path", "z.distcp"), "missing"),
    "compressed": (lambda m: setattr(info(m), "transform_descriptors", ["zstd"]), "zstd"),
    "a huge tensor": (
        lambda m: setattr(entry(m), "size", torch.Size((2**40, 2**40))),
        r"its parts hold .* of the .* numbers of",
    ),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", {}), "no tensors of a model"),
    "no metadata of tensors": (lambda m: setattr(m, "state_dict_metadata", 3), "names no tensors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    change, match = LIES[lie]
    broken(change)(tmp_path / "x")
    with pytest.raises(LoraToolsError, match=match) as error:
        opened(tmp_path / "x")
    assert str(error.value).startswith(str(tmp_path / "x"))


def test_a_part_of_another_shape_is_refused(tmp_path: Path) -> None:
    broken(lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, info(m))))(tmp_path / "x")
    whole = opened(tmp_path / "x")
    assert whole.tensor("a").shape == (6, 4)  # the same part twice is what this says
    broken(lambda m: setattr(entry(m).properties, "dtype", torch.float64))(tmp_path / "y")
    with pytest.raises(CheckpointError, match=r"a: .* lies F32 \[3, 4\], and F64 \[3, 4\]"):
        opened(tmp_path / "y").tensor("a")


class Evil:
    def __init__(self, how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


EVIL = {
    "os": lambda mark: (os.system, (f"touch {mark}",)),
    "eval": lambda mark: (eval, (f"open({str(mark)!r}, 'w')",)),
    "torch": lambda mark: (torch.save, ({}, str(mark))),  # taken as a name
    "getattr": lambda mark: (getattr, (Path, "touch")),
    "path": lambda mark: (Path.touch, (Path(mark),)),
}


@pytest.mark.parametrize("how", EVIL)
@pytest.mark.parametrize("where", ["instead", "within", "part", "rank"])
def test_nothing_is_run(how: str, where: str, tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "x"
    metadata = distributed.cut_up(folder, {"a": torch.ones(2)}, {"a": [[]]}, 1)
    evil = Evil(EVIL[how](mark))
    if where == "instead":
        distributed.write(folder, evil)
    elif where == "within":
        metadata.planner_data = {"model.a": evil}
        distributed.write(folder, metadata)
    elif where == "part":
        torch.save(evil, folder / "__0_0.distcp")
        info(metadata).length = (folder / "__0_0.distcp").stat().st_size
        distributed.write(folder, metadata)
    else:
        (folder / ".metadata").unlink()
        torch.save({"a": evil}, folder / "model_world_size_1_rank_0.pt")
    with contextlib.suppress(CheckpointError):
        opened(folder).tensor("a")
    assert not mark.exists()


@pytest.mark.parametrize("length", [0, 1, 50, 300])
def test_truncated_metadata(length: int, tmp_path: Path) -> None:
    distributed.save({"model": {"a": torch.ones(4)}}, tmp_path / "x")
    path = tmp_path / "x" / ".metadata"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        opened(tmp_path / "x")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_metadata_of_noise(tmp_path_factory, data):
    """Whatever bytes are there: read, or refused."""
    folder = tmp_path_factory.mktemp("noise") / "x"
    distributed.cut_up(folder, {"a": numbers((3, 2))}, {"a": [[1], []]})
    path = folder / data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        held[data.draw(st.integers(0, len(held) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(held)
    with contextlib.suppress(LoraToolsError):
        found = opened(folder)
        for name in found.specs:
            found.tensor(name)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_parts_cover_once(data):
    """Blocks of a grid are a tensor; without one of them, or with one moved, they are not."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = [data.draw(st.lists(st.integers(1, 5), max_size=3)) for _ in shape]
    blocks = [Part(o, n, Path("f"), 0, 1) for o, n in distributed.grid(shape, cuts)]
    blocks = data.draw(st.permutations(blocks))
    assert set(check_parts("a", shape, [*blocks, blocks[0]])) == set(blocks)
    with pytest.raises(CheckpointError, match=r"its parts hold .* of the .* numbers of"):
        check_parts("a", shape, blocks[1:])
    if len(blocks) > 1:
        moved = dataclasses.replace(blocks[0], offsets=blocks[1].offsets)
        with pytest.raises(CheckpointError, match=r"a part of|overlap|its parts hold"):
            check_parts("a", shape, [moved, *blocks[1:]])


# ------------------------------------------------------------------------------ a file of each rank

MESHES: dict[tuple[int, ...], list[tuple[Any, ...]]] = {
    (1,): [(Shard(0),)],
    (3,): [(Shard(0),), (Shard(1),), (Replicate(),)],
    (2, 2): [
        (Replicate(), Shard(0)),
        (Shard(0), Shard(0)),
        (Shard(1), Shard(0)),
        (Replicate(), Replicate()),
    ],
}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_dtensors_of_any_placement(mesh, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tensors, placements = {"buffer": torch.arange(5)}, {}
    for i, placement in enumerate(MESHES[mesh]):
        shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 5)))
        tensors[f"t{i}"] = numbers(shape, data.draw(st.sampled_from(DTYPES)))
        placements[f"t{i}"] = placement
    distributed.save_ranks(folder, tensors, mesh, placements)
    assert same(opened(folder, decoded=False), tensors)


def test_verl_s_folder(tmp_path: Path) -> None:
    """Its config and tokenizer lie in a folder of their own."""
    model = weights(layers=1)
    cut = {name: (Shard(0),) for name in model}
    step = tmp_path / "global_step_5"
    step.mkdir()
    torch.save({}, step / "data.pt")  # the dataloader's state
    actor = distributed.save_ranks(step / "actor", model, (3,), cut)
    for rank in range(3):
        torch.save({}, actor / f"optim_world_size_3_rank_{rank}.pt")
        torch.save({}, actor / f"extra_state_world_size_3_rank_{rank}.pt")
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text('{"model_type": "llama"}')
    (actor / "huggingface" / "tokenizer.json").write_text("{}")
    lora_tools.dequantize(step, tmp_path / "out", allow_pickle=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert same(open_checkpoint(tmp_path / "out"), model)
    with pytest.raises(CheckpointError, match=r"one part of a sharded model.*give its folder"):
        opened(actor / "model_world_size_3_rank_0.pt")
    (actor / "model_world_size_3_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match="of rank 2 is missing"):
        opened(actor)


def test_sharded_tensors(tmp_path: Path) -> None:
    """As FSDP without a mesh saves them, and accelerate into a file of each process."""
    full, (rows, cols) = numbers((7, 5)), (4, 3)
    shards = [ShardMetadata([0, 0], [rows, 5], "rank:0/cpu")]
    shards.append(ShardMetadata([4, 0], [cols, 5], "rank:1/cpu"))
    for rank, mine in enumerate(shards):
        with distributed.process(rank, 2):
            begin = mine.shard_offsets[0]
            local = TensorShard(full[begin : begin + mine.shard_sizes[0]].clone(), mine)
            metadata = ShardedTensorMetadata(shards, torch.Size((7, 5)))
            whole = ShardedTensor._init_from_local_shards_and_global_metadata([local], metadata)
            torch.save({"a": whole}, tmp_path / f"pytorch_model_fsdp_0_rank{rank}.bin")
    assert same(opened(tmp_path), {"a": full})
    (tmp_path / "pytorch_model_fsdp_0_rank1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a: its parts hold 20 of the 35"):
        opened(tmp_path)


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing tensor": (
        lambda d: torch.save({}, d / "model_world_size_2_rank_1.pt"),
        "rank_1.pt lacks it",
    ),
    "other shapes": (
        lambda d: torch.save({"b": torch.ones(3)}, d / "model_world_size_2_rank_1.pt"),
        "has different shapes",
    ),
    "a list": (lambda d: torch.save([1], d / "model_world_size_2_rank_1.pt"), "named tensors"),
    "two models": (
        lambda d: torch.save({}, d / "pytorch_model_fsdp_0_rank0.bin"),
        "several sharded models",
    ),
    "one rank more": (
        lambda d: torch.save({}, d / "model_world_size_2_rank_2.pt"),
        "there are more",
    ),
    "noise": (
        lambda d: (d / "model_world_size_2_rank_1.pt").write_bytes(b"noise"),
        "not a file that torch.save writes",
    ),
    "a pointer": (
        lambda d: (d / "model_world_size_2_rank_1.pt").write_bytes(POINTER),
        "a git-LFS pointer, not the file itself,",
    ),
    "other bytes": (
        lambda d: torch.save({"b": torch.zeros(2)}, d / "model_world_size_2_rank_1.pt"),
        r"b: a plain.*model_world_size_2_rank_1.pt",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_ranks_that_do_not_fit(what: str, tmp_path: Path) -> None:
    distributed.save_ranks(tmp_path / "x", {"b": torch.ones(2)}, (2,), {})
    ODD[what][0](tmp_path / "x")
    with pytest.raises(CheckpointError, match=ODD[what][1]):
        opened(tmp_path / "x").tensor("b")


def test_sums_are_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, init_device_mesh

    for rank in range(2):
        with distributed.process(rank, 2):
            mesh = init_device_mesh("cpu", (2,))
            part = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
            torch.save({"a": part}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(CheckpointError, match=r"a: placed by Partial, which cannot be read"):
        opened(tmp_path)


# -------------------------------------------------------------------------------- through the door


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = distributed.save({"model": weights(layers=1)}, tmp_path / "stored")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_without_leave_the_format_is_named(stored: Path, capsys: Any) -> None:
    with pytest.raises(UnsafeInput, match=r"a torch distributed checkpoint.*--allow-pickle"):
        open_checkpoint(stored)
    assert run(["inspect", str(stored), "--allow-pickle", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["tensors"] == len(weights(layers=1))
    assert "a torch distributed checkpoint" in report["notes"][0]


def test_every_verb_reads_it(stored: Path, tmp_path: Path) -> None:
    model = weights(layers=1)
    checkpoint(tmp_path / "plain", model)
    factors = adapter(tmp_path / "adapter", linear_shapes(model))
    for base, out in ((stored, "a"), (tmp_path / "plain", "b")):
        lora_tools.merge(base, [factors], tmp_path / out, allow_pickle=True)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    report = lora_tools.diff(tmp_path / "plain", stored, allow_pickle=True)
    assert {str(fate.action) for fate in report.plan} == {"unchanged"}
    given = opened(stored)
    again = pickle.loads(pickle.dumps(given))
    assert same(again, model)
    [file] = stored.glob("*.distcp")
    sent = pickle.dumps(given)
    os.utime(file, ns=(0, 1))
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        pickle.loads(sent)


def test_accelerate_s_folders(tmp_path: Path) -> None:
    run_folder, model = tmp_path / "checkpoint-7", weights(layers=1)
    run_folder.mkdir()
    distributed.save({"model": model}, run_folder / "pytorch_model_fsdp_0")
    distributed.save({"optimizer": {"state": {Q: model[Q]}}}, run_folder / "optimizer_0")
    (run_folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({}, run_folder / "scheduler.pt")
    for path in (tmp_path, run_folder, run_folder / "pytorch_model_fsdp_0"):
        found = opened(path)
        assert same(found, model)
        assert found.config == {"model_type": "llama"}
    travel, left = opened(run_folder).companions()
    assert [str(path) for path in travel] == ["config.json"]
    assert sorted(map(str, left)) == ["optimizer_0/__0_0.distcp", "scheduler.pt"]
    with pytest.raises(CheckpointError, match="holds no tensors of a model, only"):
        opened(run_folder / "optimizer_0")


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    folder, model = tmp_path / "x", weights(layers=1)
    folder.mkdir()
    torch.save(model, folder / "pytorch_model_fsdp.bin")
    lora_tools.dequantize(folder, tmp_path / "out", allow_pickle=True)
    assert same(open_checkpoint(tmp_path / "out"), model)
    with pytest.raises(LoraToolsError, match="plain already"):
        lora_tools.dequantize(tmp_path / "out", tmp_path / "again")


def test_safetensors_of_one_process_each(tmp_path: Path) -> None:
    """What torch's writer for Hugging Face leaves: whole tensors are read, slices are not."""
    from torch.distributed import checkpoint as dcp

    model = {"a": numbers((4, 3))}
    with distributed.quietly():
        whole = HuggingFaceStorageWriter(str(tmp_path / "whole"))
        dcp.save(dict(model), storage_writer=whole, no_dist=True)
        slices = HuggingFaceStorageWriter(str(tmp_path / "slices"), save_distributed=True)
        dcp.save(dict(model), storage_writer=slices, no_dist=True)
    assert same(open_checkpoint(tmp_path / "whole"), model)
    [file] = (tmp_path / "slices").glob("*.safetensors")
    for path in (tmp_path / "slices", file):
        with pytest.raises(CheckpointError, match="slices of tensors"):
            open_checkpoint(path)
    place = json.dumps({"a": {"saved_offsets": [2, 0]}})
    save_file(model, tmp_path / "x.safetensors", {"DCP_SHARDING_INFO": place})
    with pytest.raises(CheckpointError, match="slices of tensors"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("where", ["bare", "step", "run"])
def test_deepspeed_s_partitions(where: str, tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step20"
    step.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step20")
    file = step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(b"x")
    path = {"bare": file, "step": step, "run": tmp_path / "run"}[where]
    with pytest.raises(CheckpointError, match=r"DeepSpeed's ZeRO.*zero_to_fp32\.py"):
        open_checkpoint(path)


# ---------------------------------------------------------------------------------- what is broken


@pytest.mark.parametrize(
    "name",
    ["m.safetensors", "m.bin", "m.pt", "m.gguf", "config.json", "model.safetensors.index.json"],
)
def test_a_pointer_is_named(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", weights(layers=1), 2)
    (folder / name).write_bytes(POINTER)
    path = folder / name if name.startswith("m.") else folder
    with pytest.raises(CheckpointError, match=rf"{name}: a git-LFS pointer.*git lfs pull"):
        open_checkpoint(path)
    if path != folder:
        with pytest.raises(LoraToolsError, match="a git-LFS pointer, not the file itself,"):
            open_adapter(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_an_adapter_is_named(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "x", linear_shapes(weights(layers=1)))
    (folder / name).write_bytes(POINTER)
    with pytest.raises(LoraToolsError, match=rf"{name}: a git-LFS pointer"):
        open_adapter(folder)


def test_pointers_in_a_distributed_checkpoint(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "y")
    (stored / ".metadata").write_bytes(POINTER)
    [file] = (tmp_path / "y").glob("*.distcp")
    file.write_bytes(POINTER)
    for folder in (stored, tmp_path / "y"):
        with pytest.raises(CheckpointError, match="a git-LFS pointer, not the file itself,"):
            opened(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_empty_weights_are_named(suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"m{suffix}", {name: torch.zeros(0) for name in weights(layers=1)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"empty, of shape \[0\], because DeepSpeed's ZeRO-3"):
        opened(path)
    factors = adapter(tmp_path / "x", linear_shapes(weights(layers=1)))
    names = load_file(factors / "adapter_model.safetensors")
    save_file({name: torch.zeros(0) for name in names}, factors / "adapter_model.safetensors")
    with pytest.raises(LoraToolsError, match=r"empty, of shape \[0\], because DeepSpeed's ZeRO-3"):
        open_adapter(factors)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("layer", ["q_proj.base_layer", "q_proj"])
def test_a_model_with_its_adapter_is_named(layer: str, prefix: str, tmp_path: Path) -> None:
    state = {
        name.replace("q_proj", layer) if name == Q else name: w
        for name, w in weights(layers=1).items()
    }
    module = Q.removesuffix(".weight")
    state[f"{module}.lora_A.default.weight"] = torch.ones(2, 16)
    state[f"{module}.lora_B.default.weight"] = torch.ones(16, 2)
    state = {prefix + name: w for name, w in state.items()}
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.bin")
    for path in (tmp_path / "m.safetensors", tmp_path / "m.bin"):
        for door in (opened, lambda path: open_adapter(path, True)):
            with pytest.raises(LoraToolsError, match="a model saved together with"):
                door(path)
