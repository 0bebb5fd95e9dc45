"""A checkpoint: folders, shards, bare files, pickles and the hub's cache; what travels along."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from lora_tools.errors import CheckpointError, TensorNotFound, UnsafeInput, UsageError
from lora_tools.formats import hub
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter, Shard, lay_out, parse_size
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint

from .iotools import adapter, checkpoint, tree, weights, write_index

TENSORS = weights()


def holds(found: Checkpoint, tensors: dict[str, torch.Tensor] = TENSORS) -> bool:
    return found.specs.keys() == tensors.keys() and all(
        torch.equal(found.tensor(name), tensor)
        and bytes(found.raw(name)) == bytes(as_bytes(tensor))
        for name, tensor in tensors.items()
    )


# ------------------------------------------------------------------------------ what is opened


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_folder(shards, tmp_path):
    found = open_checkpoint(checkpoint(tmp_path / "m", TENSORS, shards))
    assert holds(found)
    assert found.is_folder
    assert found.config == {"model_type": "llama"}
    assert len(found.files) == shards
    assert found.index_name == (None if shards == 1 else "model.safetensors.index.json")
    assert found.nbytes == sum(t.nbytes for t in TENSORS.values())
    found.release("model.embed_tokens.weight")
    assert holds(found)


def test_a_bare_file(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").rename(tmp_path / "any.name")
    found = open_checkpoint(tmp_path / "any.name")
    assert holds(found)
    assert not found.is_folder
    assert found.config == {}
    assert found.companions() == ([], [])


def test_one_file_of_another_name(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").rename(folder / "pytorch_lora.safetensors")
    assert holds(open_checkpoint(folder))


def test_the_plain_name_wins_over_variants(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    save_file({"x": torch.ones(1)}, folder / "model.fp16.safetensors")
    torch.save({"y": torch.ones(1)}, folder / "pytorch_model.bin")
    found = open_checkpoint(folder)
    assert holds(found)
    assert found.companions()[1] == [Path("model.fp16.safetensors"), Path("pytorch_model.bin")]


def test_an_unknown_tensor_is_named(tmp_path):
    found = open_checkpoint(checkpoint(tmp_path / "m", TENSORS))
    for ask in (found.tensor, found.raw, found.release):
        with pytest.raises(TensorNotFound, match=r"/m: no tensor 'nope'"):
            ask("nope")


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_tied_embeddings(config, tied, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).ties_embeddings is tied


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "outside",
    [
        "../x.safetensors",
        "a/b.safetensors",
        "{top}/x.safetensors",
        "..",
        ".",
        "",
        "..\\x.safetensors",
        "./model.safetensors",
        "a\0b",
    ],
)
def test_an_index_that_leads_outside_is_unsafe(outside, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "a").mkdir()
    for there in (tmp_path / "x.safetensors", folder / "a" / "b.safetensors"):
        save_file(TENSORS, there)
    write_index(folder, dict.fromkeys(TENSORS, outside.format(top=tmp_path)))
    with pytest.raises(UnsafeInput, match=r"model\.safetensors\.index\.json.*outside"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00003.safetensors is missing"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS, 2)
    for i in (1, 2):
        save_file({"twice": torch.ones(i)}, folder / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'twice' is in model-00001.* and in model-00002"):
        open_checkpoint(folder)


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    folder = checkpoint(tmp_path / "m", {"a": torch.ones(1), "b": torch.ones(2)}, 2)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for weight_map, says in (
        ({"a": one, "b": two, "c": one}, f"'c' is in {one}, but it is not"),
        ({"a": two, "b": one}, f"'a' is in {two}, but it is in {one}"),
        ({"a": one, "c": two}, "'c' is in"),
        ({"a": one}, ""),  # the second shard is simply not part of it
    ):
        write_index(folder, weight_map)
        if says:
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(folder)
            assert says in str(caught.value)
        else:
            assert list(open_checkpoint(folder).specs) == ["a"]
    save_file({"a": torch.ones(1), "extra": torch.ones(1)}, folder / one)
    write_index(folder, {"a": one, "b": two})
    with pytest.raises(CheckpointError, match=r"'extra' is in .* not in the index"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        "\xff",
        "[" * 100_000,
        "9" * 5000,
        '{"weight_map": null}',
        '{"weight_map": {"a": "model.safetensors", "a": "b"}}',
    ],
    ids=range(13),
)
def test_an_index_that_is_none(text, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\xff", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=range(6)
)
def test_a_config_that_is_none(text, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"m/config\.json: not (a )?JSON"):
        open_checkpoint(folder)


def test_several_files_or_indexes_are_not_guessed_among(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS, 2)
    index = folder / "model.safetensors.index.json"
    other = folder / "other.safetensors.index.json"
    other.write_bytes(index.read_bytes())
    with pytest.raises(CheckpointError, match="has several indexes"):
        open_checkpoint(folder)
    index.unlink()
    other.unlink()
    with pytest.raises(CheckpointError, match=r"several weight files and no index: model-00001"):
        open_checkpoint(folder)


def test_an_adapter_is_no_checkpoint(tmp_path):
    folder = adapter(tmp_path / "a", {"m": (4, 4)})
    with pytest.raises(CheckpointError, match="this is an adapter"):
        open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="this is an adapter"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["base_model.model.q.weight", "base_model.model.norm.weight"],  # merged in its wrapper
        ["net.base_layer.weight", "net.norm.weight"],  # a module of its own that is called so
        ["net.q.weight", "net.q.lora_A", "net.q.lora_B", "net.q.bias"],  # loralib's whole model
        ["x.m"],
    ],
)
def test_a_model_with_its_adapters_is_a_checkpoint(names, tmp_path):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "m.safetensors")
    assert sorted(open_checkpoint(tmp_path / "m.safetensors").specs) == sorted(names)


@pytest.mark.parametrize(
    "name", ["absent", "./org/name", "a/b/c", "x" * 5000, "org/" + "x" * 5000, "org/name@../..@"]
)
def test_what_is_neither_here_nor_a_hub_id(name):
    with pytest.raises(CheckpointError):
        open_checkpoint(name)


def test_an_empty_folder_and_a_device(tmp_path):
    with pytest.raises(CheckpointError, match=r"no .safetensors file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        open_checkpoint("/dev/null")


# --------------------------------------------------------------------------------------- pickles


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


PICKLES = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_read_only_when_allowed(kind, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    state = OrderedDict((k, torch.nn.Parameter(v)) for k, v in TENSORS.items())
    torch.save(state, path, **PICKLES[kind])
    torch.save({"lr": 1}, folder / "training_args.bin")
    for source in (folder, path):
        with pytest.raises(UnsafeInput, match=r"pytorch_model\.bin: a pickle.*--allow-pickle"):
            open_checkpoint(source)
        assert holds(open_checkpoint(source, allow_pickle=True))


def test_a_trainer_s_pickle_and_shards(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "x.pth")
    assert holds(open_checkpoint(tmp_path / "x.pth", allow_pickle=True))
    folder = tmp_path / "m"
    folder.mkdir()
    weight_map = {k: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, k in enumerate(TENSORS)}
    for file in set(weight_map.values()):
        torch.save({k: v for k, v in TENSORS.items() if weight_map[k] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UnsafeInput, match="pickle"):
        open_checkpoint(folder)
    assert holds(open_checkpoint(folder, allow_pickle=True))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "../x.pth")}))
    with pytest.raises(UnsafeInput, match="outside"):
        open_checkpoint(folder, allow_pickle=True)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("kind", ["plain", *PICKLES])
def test_a_pickle_s_code_is_never_run(kind, allow, tmp_path):
    path, mark = tmp_path / "evil.bin", tmp_path / "mark"
    content = {"w": torch.ones(2), "x": _Bomb(mark)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, **PICKLES[kind])
    with pytest.raises(CheckpointError, match=r"evil\.bin: ") as caught:
        open_checkpoint(path, allow_pickle=allow)
    assert "weights_only" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if kind != "plain":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(path, weights_only=False)["x"].close()
        assert mark.exists()  # the bomb works


def _odd(tensor: torch.Tensor) -> dict[str, object]:
    return {"fine": torch.ones(1), "odd": tensor}


# What is wrong → (the contents, what the error says).
CONTENTS = {
    "a list": ([torch.ones(1)], "something other than named tensors"),
    "a tensor": (torch.ones(1), "something other than named tensors"),
    "a number among them": ({"a": torch.ones(1), "b": 3}, "something other"),
    "numbers for names": ({0: torch.ones(1)}, "something other"),
    "nested": ({"model": {"a": torch.ones(1)}}, "something other"),
    "sparse": (_odd(torch.eye(3).to_sparse()), "'odd' is not a plain"),
    "meta": (_odd(torch.ones(3, device="meta")), "'odd' is not a plain"),
    "complex128": (_odd(torch.ones(3, dtype=torch.complex128)), "'odd': safetensors has no name"),
    "one number, endlessly": (_odd(torch.ones(1).expand(2**40)), "'odd' should have"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_pickle_of_other_things_is_refused(what, tmp_path):
    content, says = CONTENTS[what]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "x.pt", allow_pickle=True)
    assert says in str(caught.value)
    assert str(tmp_path / "x.pt") in str(caught.value)


def test_a_pickle_of_views(tmp_path):
    whole = torch.arange(12.0)
    views = {"t": whole.view(3, 4).T, "part": whole[3:5], "stepped": whole[::3], "none": whole[:0]}
    torch.save(views, tmp_path / "x.pt")
    assert holds(open_checkpoint(tmp_path / "x.pt", allow_pickle=True), views)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -100])
def test_a_truncated_pickle_is_refused(length, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:length])
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be read"):
        open_checkpoint(tmp_path / "x.pt", allow_pickle=True)


# ---------------------------------------------------------------------------------------- the hub

SHA, OTHER = "1" * 40, "2" * 40


def cached(cache: Path, revisions: dict[str, str], snapshots: dict[str, Path]) -> None:
    """A repository org/name as huggingface_hub keeps it: blobs, refs, and snapshots of links."""
    repository = cache / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for name, sha in revisions.items():
        (repository / "refs" / name).write_text(sha)
    for sha, source in snapshots.items():
        snapshot = repository / "snapshots" / sha
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            blob = repository / "blobs" / f"{sha[:4]}{path.name.encode().hex()}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_hub_id_comes_from_the_local_cache(tmp_path, cache, capfd):
    older = weights(seed=3)
    sources = {
        SHA: checkpoint(tmp_path / "new", TENSORS, 2),
        OTHER: checkpoint(tmp_path / "old", older),
    }
    cached(cache, {"main": SHA, "v1": OTHER}, sources)
    found = open_checkpoint("org/name")
    assert holds(found)
    assert found.path == cache / "models--org--name" / "snapshots" / SHA
    assert found.companions()[0] == [Path("config.json"), Path("tokenizer.json")]
    assert holds(open_checkpoint("org/name@main"))
    assert holds(open_checkpoint("org/name@v1"), older)
    assert holds(open_checkpoint(f"org/name@{OTHER}"), older)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["org/name@v2", "org/other", f"org/name@{'3' * 40}"])
def test_what_is_not_in_the_cache_offline_is_a_clear_error(source, tmp_path, cache):
    cached(cache, {"main": SHA}, {SHA: checkpoint(tmp_path / "m", TENSORS)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "not in the hub's local cache" in message
    assert "\n" not in message


def test_a_folder_here_wins_over_the_hub(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    checkpoint(tmp_path / "org" / "name", TENSORS)
    assert holds(open_checkpoint("org/name"))


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("org/name", True),
        ("o-r.g/n_a.me", True),
        ("org/name@main", True),
        ("org/name@refs/pr/1", True),
        ("name", True),
        ("org/name/more", True),
        ("/org/name", False),
        ("../name", False),
        ("./name", False),
        ("org/..", False),
        ("org/name@", False),
        ("org/name@a b", False),
        ("", False),
    ],
)
def test_hub_ids(source, is_one):
    assert hub.looks_like_hub_id(source) is is_one


@pytest.mark.parametrize("error", [OSError(), ValueError("bad\nworse"), OSError("no route")])
def test_whatever_the_hub_raises_is_one_line(error, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^org/name: .+") as caught:
        open_checkpoint("org/name")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ companions


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_small_files_travel_and_other_weights_and_hidden_files_do_not(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS, 2)
    travel = ["README.md", "merges.txt", "code/modeling.py", "tokenizer.model", "LICENSE"]
    left = [
        "pytorch_model.bin",
        "onnx/model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "original/consolidated.00.pth",
        "m.gguf",
        "pytorch_model.bin.index.json",
    ]
    put(
        folder,
        *travel,
        *left,
        ".git/config",
        ".gitattributes",
        ".cache/x/tokenizer.json",
        "code/.hidden",
    )
    (folder / "folder").symlink_to("code")
    found = open_checkpoint(folder).companions()
    assert found[0] == sorted(Path(p) for p in (*travel, "config.json", "tokenizer.json"))
    assert found[1] == sorted(map(Path, left))


def test_folders_of_modules_json_travel_whole(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    put(
        folder,
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "other/model.safetensors",
    )
    modules = [{"idx": 0, "path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    travel, left = open_checkpoint(folder).companions()
    assert Path("2_Dense/model.safetensors") in travel
    assert Path("2_Dense/pytorch_model.bin") in travel
    assert Path("1_Pooling/config.json") in travel
    assert left == [Path("other/model.safetensors")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "{}",
        "[5]",
        '[{"path": 5}]',
        '[{"path": "."}]',
        '[{"path": "/"}]',
        "\xff",
        "[" * 100_000,
        '[{"path": "../x"}]',
    ],
    ids=range(10),
)
def test_a_modules_json_that_is_none_names_no_folder(text, tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    put(folder, "2_Dense/model.safetensors")
    (folder / "modules.json").write_bytes(text.encode("latin-1"))
    assert open_checkpoint(folder).companions()[1] == [Path("2_Dense/model.safetensors")]


# ---------------------------------------------------------------------------------------- writing


def copied(source: Checkpoint, out: Path, shard_size: int | None = None, **rest: object) -> list:
    shards = lay_out(source, source.specs, shard_size)
    with CheckpointWriter(out, shards, source.is_folder) as writer:
        for name in reversed(source.specs):
            writer.write(name, source.raw(name))
        return writer.finish(source, source.index_name, {}, **rest)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_copy_is_the_same_files(shards, tmp_path):
    source = checkpoint(tmp_path / "m", TENSORS, shards)
    put(source, "sub/notes.txt", "x.gguf", ".hidden")
    assert copied(open_checkpoint(source), tmp_path / "copy") == [Path("x.gguf")]
    wanted, found = tree(source), tree(tmp_path / "copy")
    wanted = {k: v for k, v in wanted.items() if k not in ("x.gguf", ".hidden")}
    index = "model.safetensors.index.json"
    assert {k: v for k, v in found.items() if k != index} == {
        k: v for k, v in wanted.items() if k != index
    }
    if shards > 1:
        ours, theirs = (json.loads((f / index).read_text()) for f in (tmp_path / "copy", source))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert holds(open_checkpoint(tmp_path / "copy"))


def test_shards_by_size(tmp_path):
    source = open_checkpoint(checkpoint(tmp_path / "m", TENSORS))
    largest = max(t.nbytes for t in TENSORS.values())
    for size in (1, largest, largest + 300, 10**9):
        out = tmp_path / str(size)
        copied(source, out, size)
        found = open_checkpoint(out)
        assert holds(found)
        assert list(found.specs) == list(source.specs)
        for file in found.files:
            nbytes = sum(spec.nbytes for spec in file.specs.values())
            assert nbytes <= size or len(file.specs) == 1
    assert (tmp_path / "1000000000" / "model.safetensors").is_file()


def test_a_pickle_s_copy_carries_the_names_that_loaders_look_for(tmp_path):
    folder = checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    copied(open_checkpoint(folder, True), tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    (folder / "pytorch_model.bin").unlink()
    weight_map = {k: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, k in enumerate(TENSORS)}
    for file in set(weight_map.values()):
        torch.save({k: v for k, v in TENSORS.items() if weight_map[k] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": 5, "weight_map": weight_map}))
    copied(open_checkpoint(folder, True), tmp_path / "two")
    found = open_checkpoint(tmp_path / "two")
    assert holds(found)
    assert found.index_name == "model.safetensors.index.json"
    assert [f.path.name for f in found.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ""])
def test_no_name_leads_out_of_the_output(name, tmp_path):
    source = open_checkpoint(checkpoint(tmp_path / "m", TENSORS))
    shards = [Shard(name, (TensorSpec("a", "U8", (1,)),), {})]
    with pytest.raises(UnsafeInput, match="is not the name of a file"):
        CheckpointWriter(tmp_path / "out", shards, True)
    writer = CheckpointWriter(tmp_path / "out", [], True)  # nothing was made by the other
    with pytest.raises(UnsafeInput, match="is not the name of a file"):
        writer.finish(source, None, {name: b"evil"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("there", ["another", None])
def test_another_machine_writes_through(there, tmp_path, monkeypatch):
    """What waits in its memory would be missing, or the rest of a page old, once all is renamed."""
    source, seen = open_checkpoint(checkpoint(tmp_path / "m", TENSORS)), []
    real = os.open
    with CheckpointWriter(tmp_path / "out", lay_out(source, source.specs, None), True) as writer:
        sent = pickle.dumps(writer)
        if there is not None:
            monkeypatch.setattr("lora_tools.formats.checkpoint_writer.machine", lambda: there)
        monkeypatch.setattr(os, "open", lambda p, f, *m: (seen.append(f), real(p, f, *m))[1])
        with pickle.loads(sent) as other:
            other.write(*next((name, source.raw(name)) for name in source.specs))
    assert seen
    assert {bool(flags & os.O_DSYNC) for flags in seen} == {there is not None}


def test_what_differs_replaces_and_what_is_left_stays(tmp_path):
    source = open_checkpoint(checkpoint(tmp_path / "m", TENSORS))
    with CheckpointWriter(tmp_path / "out", lay_out(source, source.specs, None), True) as writer:
        for name in source.specs:
            writer.write(name, source.raw(name))
        writer.finish(source, None, {"config.json": b"{}"}, leave=("tokenizer.json",))
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_bare_file_s_metadata_and_order_are_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"format": "pt", "trained": "yes"})
    copied(open_checkpoint(path), tmp_path / "y.safetensors")
    assert SafetensorsFile(tmp_path / "y.safetensors").metadata["trained"] == "yes"
    assert list(SafetensorsFile(tmp_path / "y.safetensors").specs) == list(
        SafetensorsFile(path).specs
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 kb", 1500),
        ("12", 12),
        (" 2T ", 2 * 10**12),
        ("3Ki", 3072),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "5XB", "1e9", "5 G B", "nan", "5iB", "0.0"]
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)
