"""Folders that stand for what lies in them: several adapters of PEFT, a run's checkpoints, shards,
repositories of the hub's cache. One meaning is opened; of several the right path is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import AdapterError, CheckpointError, LoraToolsError, UnsafeInput
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint

MODULES = ("a.q_proj", "b.q_proj", "c.q_proj")
TRAINER = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth")


def adapter(folder: Path, scale: float = 1.0) -> Path:
    """Factors of three modules, all of one rank."""
    folder.mkdir(parents=True)
    noise = torch.Generator().manual_seed(1)
    tensors = {}
    for module in MODULES:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 8, generator=noise)
        made = scale * torch.randn(8, 2, generator=noise)
        tensors[f"base_model.model.{module}.lora_B.weight"] = made
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    noise = torch.Generator().manual_seed(2)
    tensors = {f"{m}.weight": torch.randn(8, 8, generator=noise) for m in MODULES}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def left_by_trainer(folder: Path) -> None:
    for name in TRAINER:
        (folder / name).write_bytes(b"x")


def shard(folder: Path, index: bool = True, suffix: str = ".safetensors") -> Path:
    """The adapter's file cut into three."""
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    where = {}
    for number, module in enumerate(MODULES, 1):
        name = f"adapter_model-0000{number}-of-00003{suffix}"
        mine = {k: v for k, v in tensors.items() if module in k}
        if suffix == ".bin":
            torch.save(mine, folder / name)
        else:
            save_file(mine, folder / name, {"base_digest": "of the base"})
        where |= dict.fromkeys(mine, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / f"adapter_model{suffix}.index.json").write_text(text)
    return folder


def same(found: Path, wanted: Path) -> bool:
    mine, theirs = open_adapter(found).file, open_adapter(wanted).file
    assert mine.specs.keys() == theirs.specs.keys()
    return all(torch.equal(mine.tensor(name), theirs.tensor(name)) for name in mine.specs)


def test_a_named_adapter_and_the_choice_of_several(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one" / "style")
    (tmp_path / "one" / "README.md").write_text("…")
    assert open_adapter(tmp_path / "one").path == one
    adapter(tmp_path / "two" / "facts")
    adapter(tmp_path / "two" / "style")
    with pytest.raises(AdapterError, match=r"2 folders in it do: facts, style; .*two/style$"):
        open_adapter(tmp_path / "two")


def test_the_default_adapter_beside_others_is_opened_and_they_are_named(tmp_path: Path) -> None:
    root = adapter(tmp_path / "root")
    adapter(root / "style", 2.0)
    base = checkpoint(tmp_path / "base")
    report = lora_tools.merge(base, [root], tmp_path / "merged")
    [note] = report.notes
    assert "not read: style" in note
    assert str(root / "style") in note
    lora_tools.merge(base, [adapter(tmp_path / "alone")], tmp_path / "wanted")
    made, wanted = (load_file(tmp_path / m / "model.safetensors") for m in ("merged", "wanted"))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("open_it", [open_adapter, open_checkpoint])
def test_a_run_of_training(open_it: Callable[[Path], object], tmp_path: Path) -> None:
    """The last by its number, not by its name; none where it has weights of its own."""
    make = adapter if open_it is open_adapter else checkpoint
    run = tmp_path / "run"
    steps = [make(run / f"checkpoint-{step}") for step in (500,)]
    left_by_trainer(run)
    left_by_trainer(steps[0])
    (run / "runs").mkdir()
    assert open_it(run).path == steps[0]  # type: ignore[attr-defined]
    for step in (90, 1000):
        make(run / f"checkpoint-{step}")
    (run / "checkpoint-2000").mkdir()
    left_by_trainer(run / "checkpoint-2000")  # a step that was not saved whole
    with pytest.raises(LoraToolsError) as caught:
        open_it(run)
    said = str(caught.value)
    assert "checkpoint-90, checkpoint-500, checkpoint-1000; give one" in said
    assert f"such as {run / 'checkpoint-1000'} (the last)" in said
    own = make(tmp_path / "own")
    shutil.copytree(run, own, dirs_exist_ok=True)
    assert open_it(own).path == own  # type: ignore[attr-defined]


def test_inspect_and_rescale_take_such_folders(tmp_path: Path) -> None:
    inner = shard(adapter(tmp_path / "run" / "checkpoint-5" / "style"))
    report = lora_tools.inspect(tmp_path / "run")
    assert report.totals["kind"] == "adapter"
    assert report.totals["modules"] == len(MODULES)
    assert {t.file for t in report.stored} == {p.name for p in inner.glob("*.safetensors")}
    lora_tools.rescale(tmp_path / "run", tmp_path / "whole", scale=1.0)
    assert same(tmp_path / "whole", inner)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_adapter(index: bool, tmp_path: Path) -> None:
    whole, cut = adapter(tmp_path / "whole"), shard(adapter(tmp_path / "cut"), index)
    assert same(cut, whole)
    assert open_adapter(cut).file.metadata["base_digest"] == "of the base"
    first = min(cut.glob("*.safetensors"))
    assert same(first, whole), "a shard beside the config stands for its adapter"
    with pytest.raises(CheckpointError, match="this is an adapter"):
        open_checkpoint(cut)


def test_shards_of_pickles_need_leave(tmp_path: Path) -> None:
    cut = shard(adapter(tmp_path / "cut"), suffix=".bin")
    with pytest.raises(UnsafeInput, match="--allow-pickle"):
        open_adapter(cut)
    assert open_adapter(cut, allow_pickle=True).modules.keys() == set(MODULES)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(index: bool, tmp_path: Path) -> None:
    cut = shard(adapter(tmp_path / "cut"), index)
    max(cut.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is the download complete"):
        open_adapter(cut)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda map: map.popitem(), "is in .* and not in the index"),
        (lambda map: map.update(extra=next(iter(map.values()))), "but it is not"),
        (lambda map: map.update(dict.fromkeys(map, "../secret")), "outside its folder"),
    ],
)
def test_an_index_that_lies(
    change: Callable[[dict[str, str]], object], error: str, tmp_path: Path
) -> None:
    cut = shard(adapter(tmp_path / "cut"))
    index = cut / "adapter_model.safetensors.index.json"
    said = json.loads(index.read_text())
    change(said["weight_map"])
    index.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=error):
        open_adapter(cut)


def repository(cache: Path, name: str = "models--org--name") -> Path:
    """A repository of the hub's cache with two snapshots, the first of them ``main``."""
    folder = cache / name
    checkpoint(folder / "blobs")
    for revision in ("aaa", "bbb"):
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for blob in (folder / "blobs").iterdir():
            (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa\n")
    return folder


def test_a_repository_of_the_cache_is_its_main_snapshot(tmp_path: Path) -> None:
    folder = repository(tmp_path / "hub")
    main = folder / "snapshots" / "aaa"
    for place in (folder, folder / "snapshots", tmp_path / "hub"):
        assert open_checkpoint(place).path == main
    lora_tools.merge(folder, [adapter(tmp_path / "a")], tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors").is_symlink()
    (folder / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"aaa, bbb; give one of them, such as .*bbb$"):
        open_checkpoint(folder)
    shutil.rmtree(folder / "snapshots" / "bbb")
    assert open_checkpoint(folder).path == main
    shutil.rmtree(folder / "snapshots")
    with pytest.raises(CheckpointError, match=r"without a snapshot.*`hf download org/name`"):
        open_checkpoint(folder)


def test_a_cache_of_several_repositories_names_them(tmp_path: Path) -> None:
    repository(tmp_path / "hub")
    repository(tmp_path / "hub", "models--org--other")
    with pytest.raises(CheckpointError, match="models--org--name, models--org--other"):
        open_checkpoint(tmp_path / "hub")


def test_a_folder_with_nothing_in_it_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)
    with pytest.raises(AdapterError, match="is it an adapter folder"):
        open_adapter(tmp_path)
