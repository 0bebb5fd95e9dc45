"""A part of the campaign (tests/campaign), and each kind of fault that it found."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, CheckpointError, LoraToolsError
from lora_tools.formats.inert_pickle import read_pickle
from lora_tools.formats.json_file import parse
from lora_tools.formats.sidecar import NAME
from lora_tools.onnx.initializers import load
from lora_tools.sources.checkpoints import open_checkpoint

from .campaign import bombs, moments, resumption, sound
from .campaign.damage import joined, signed, split
from .campaign.doors import DOORS, Use
from .campaign.fuzz import DONE, REFUSED, WRONG, Bench
from .campaign.targets import CORPUS, TARGETS, Ground
from .campaign.workers import Pool

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound.make(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def bench(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    before = Path.cwd()
    yield Bench(whole, tmp_path_factory.mktemp("bench"))
    os.chdir(before)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_damaged_is_read_or_refused(door: str, bench: Bench, full: bool) -> None:
    """By an error of the tree; nothing is left on the disk; and what is made of it is what other
    libraries make of it."""
    for number in range(500 if full else 1 if DOORS[door].share < 10 else 3):
        outcome = bench.meet(door, f"ci {door} {number}")
        assert set(outcome.kinds) <= {REFUSED, DONE}, f"ci {door} {number}: {outcome.said}"


_WHOLE = ("adapter", "adapter.gguf", "nf4, config.json", "mlx", "sidecar", "loralib.pt")
_OTHERS = [pytest.param(door, marks=pytest.mark.sweep(20)) for door in DOORS if door not in _WHOLE]


@pytest.mark.parametrize("door", [*_WHOLE, *_OTHERS])
def test_what_is_whole_is_done_and_checked(door: str, bench: Bench) -> None:
    for use in DOORS[door].uses:
        bench.passes(use)


def test_a_campaign_that_is_told_to_end_tells_what_there_was(whole: Path, tmp_path: Path) -> None:
    """Its workers end after the input that each has begun, and none is held against them."""
    ending, inputs = threading.Event(), [("config.json", f"end {n}") for n in range(10_000)]
    pool = Pool(whole, tmp_path, inputs, 2)

    def tell() -> None:
        while not any(log.stat().st_size for log in tmp_path.glob("*.log")):
            time.sleep(0.01)
        ending.set()

    threading.Thread(target=tell).start()
    tally = pool.run(ending=ending)["config.json"]
    assert 0 < tally.inputs < len(inputs)
    assert tally.faults == []


@pytest.mark.parametrize("name", TARGETS)
def test_what_led_to_new_lines_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """The corpus of coverage-guided fuzzing; and what is whole is read."""
    place, files = Ground(name, tmp_path), sorted((CORPUS / name).iterdir())
    assert place.meet(place.whole)
    assert {place.meet(file.read_bytes()) for file in files} == {True, False}


def test_a_block_size_that_is_no_whole_number_is_refused(tmp_path: Path) -> None:
    """As coverage-guided fuzzing found: 64.0 is 64, and no index."""
    place = Ground("nf4-state", tmp_path)
    assert not place.meet(place.whole.replace(b'"blocksize": 64', b'"blocksize": 64.0'))


BOMBS = list(bombs.bombs())


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=pytest.mark.sweep(20)) for i in range(len(BOMBS))]
)
def test_a_bomb_is_refused(number: int, whole: Path, tmp_path: Path) -> None:
    assert len(BOMBS) >= 40
    assert bombs.meet(BOMBS[number], whole, tmp_path / "here") == []


def test_other_content_is_seen(bench: Bench) -> None:
    """A check that cannot fail would say nothing."""

    def spoilt(use: Use) -> Use:
        def check(top: Path, out: Path) -> None:
            file = sorted(out.glob("*.safetensors"))[-1]
            tensors = load_file(file)
            next(iter(tensors.values())).view(-1)[0] += 0.1
            save_file(tensors, file)
            assert use.check is not None
            use.check(top, out)

        return Use(use.line, check)

    doors = ("shard", "one file", "sharded pickles", "distributed checkpoint", "kohya.safetensors")
    for door in (*doors, "mlx", "adapter.gguf", "sidecar", "cache", "nf4, config.json"):
        words = ("merge ", "dequantize ", "cache ")
        use = next(u for u in DOORS[door].uses if u.check and any(w in u.line for w in words))
        assert WRONG in bench.run(spoilt(use)).kinds, door
        bench.clear()


# ------------------------------------------------------------------------------- kinds of faults


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '["\\uDFFF x"]', '{"\ud83d": 1}'])
def test_json_that_is_not_unicode_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="half a surrogate pair"):
        parse(text)
    assert parse('"\\ud83d\\ude00"') == "😀"
    assert parse(b'{"a": "\\\\ud800"}') == {"a": "\\ud800"}  # a backslash and letters


def test_a_whole_number_that_no_float_holds_is_refused(whole: Path, tmp_path: Path) -> None:
    assert parse(f'["{"1" * 400}", {10**299}, 1e400]') == ["1" * 400, 10**299, float("inf")]
    shutil.copytree(whole / "mlx", tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    given = json.loads(path.read_text())
    given["lora_parameters"]["scale"] = 10**400
    path.write_text(json.dumps(given))
    with pytest.raises(
        AdapterError, match=r"config\.json: not JSON \(a whole number of 401 digits"
    ):
        lora_tools.inspect(tmp_path / "a")


@pytest.mark.parametrize("said", ["[" * 10**5, f'[{{"digest": "x", "weight": {10**400}}}]'])
def test_a_sidecar_whose_adapters_are_no_list_of_them_is_damaged(
    said: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "merged", tmp_path / "m")
    header, body = split((tmp_path / "m" / NAME).read_bytes())
    header["__metadata__"]["adapters"] = said
    (tmp_path / "m" / NAME).write_bytes(joined(header, body))
    with pytest.raises(CheckpointError, match="the sidecar is damaged"):
        lora_tools.unmerge(tmp_path / "m", [whole / "adapter"], tmp_path / "out")


def test_an_index_of_names_that_are_not_unicode_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "base", tmp_path / "m")
    path = tmp_path / "m/model.safetensors.index.json"
    text = path.read_text()
    path.write_text(text.replace("model-00001-of", "model-\\ud800"))
    with pytest.raises(CheckpointError, match=r"index\.json: not JSON .*half a surrogate"):
        lora_tools.inspect(tmp_path / "m")


def test_an_index_that_is_a_link_to_nothing_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "base", tmp_path / "m")
    path = tmp_path / "m/model.safetensors.index.json"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"index\.json: a link to nowhere"):
        lora_tools.inspect(tmp_path / "m")


@pytest.mark.parametrize("part", [b"model.norm.weight", b"Identity", b"main", b"loratools"])
def test_a_graph_whose_text_is_not_unicode_is_refused(
    part: bytes, whole: Path, tmp_path: Path
) -> None:
    data = (whole / "graph/model.onnx").read_bytes()
    for at in {data.find(part), data.rfind(part)}:
        path = tmp_path / "x.onnx"
        path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r"x\.onnx: .*(not an ONNX|is not UTF-8)"):
            load(path)
    assert isinstance(load(whole / "graph/model.onnx"), onnx.ModelProto)


def test_an_adapter_file_that_is_a_hole_is_not_read(whole: Path, tmp_path: Path) -> None:
    """ONNX Runtime reads all of it into memory."""
    shutil.copy(whole / "ort.onnx_adapter", tmp_path)
    with (tmp_path / "ort.onnx_adapter").open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(CheckpointError, match=r"more than half of its 8,589,934,592 bytes"):
        lora_tools.inspect(tmp_path / "ort.onnx_adapter")


@pytest.mark.parametrize("bomb", [b"\x80\x02]r\xff\xff\xff\x7f.", b"(lp2147483647\n."])
def test_a_pickle_that_numbers_what_it_keeps_beyond_its_length_is_refused(bomb: bytes) -> None:
    """Python's own would make a list of two thousand million places for it."""
    with pytest.raises(CheckpointError, match=r"numbers an object 2,147,483,647 in a pickle of"):
        read_pickle(bomb)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_any_protocol_is_scanned_to_its_end(protocol: int) -> None:
    last = b"b" if protocol > 2 else "b"  # before, bytes are a call
    data = {"x" * n: [n, -n, 2.5, (1 << n,), last * n, "é", None] for n in range(400)}
    assert read_pickle(pickle.dumps(data, protocol)) == data
    bomb = pickle.dumps(data, protocol)[:-1] + b"r\xff\xff\xff\x7f."
    with pytest.raises(CheckpointError, match="numbers an object"):
        read_pickle(bomb)


def _other_sidecar(whole: Path, folder: Path, old: str, new: str) -> None:
    """A copy of what was merged whose sidecar has an entry by another name, and is signed again."""
    shutil.copytree(whole / "merged", folder)
    header, body = split((folder / NAME).read_bytes())
    (name,) = (name for name in header if old in name)
    header = {name.replace(old, new) if k == name else k: v for k, v in header.items()}
    (folder / NAME).write_bytes(joined(signed(header, body), body))


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("header/model-00002-of-00003.safetensorsx", "is not the name of a weight"),
        ("header/model-9.safetensors", "contradicts its headers"),
    ],
)
def test_a_sidecar_that_would_file_weights_elsewhere_is_refused(
    new: str, said: str, whole: Path, tmp_path: Path
) -> None:
    _other_sidecar(whole, tmp_path / "m", "header/model-00002-of-00003.safetensors", new)
    with pytest.raises(CheckpointError, match=said):
        lora_tools.unmerge(tmp_path / "m", [whole / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _other_index(folder: Path, name: str, change: Callable[[dict[str, str]], None]) -> None:
    """Puts an index of that name into a sidecar, made of its own, and signs it again."""
    header, body = split((folder / NAME).read_bytes())
    begin, end = header["file/model.safetensors.index.json"]["data_offsets"]
    index = json.loads(zstandard.ZstdDecompressor().decompress(body[begin:end]))
    change(index["weight_map"])
    data = zstandard.ZstdCompressor().compress(json.dumps(index).encode())
    place = [len(body), len(body) + len(data)]
    if (entry := header.pop(f"file/{name}", None)) is not None:  # its bytes stay, as another file
        header["file/x"] = entry
    header[f"file/{name}"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": place}
    (folder / NAME).write_bytes(joined(signed(header, body + data), body + data))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a.safetensors.index.json", lambda where: None, "holds several indexes: "),
        ("model.safetensors.index.json", lambda where: where.popitem(), "contradicts its headers"),
        (
            "model.safetensors.index.json",
            lambda where: where.update(x="x"),
            "contradicts its headers",
        ),
    ],
)
def test_a_sidecar_whose_output_would_not_open_is_refused(
    name: str, change: Any, said: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "merged", tmp_path / "m")
    _other_index(tmp_path / "m", name, change)
    with pytest.raises(CheckpointError, match=said):
        lora_tools.unmerge(tmp_path / "m", [whole / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(whole / "merged", tmp_path / "m")
    _other_index(tmp_path / "m", "model.safetensors.index.json", lambda where: None)
    lora_tools.unmerge(tmp_path / "m", [whole / "adapter"], tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").specs == open_checkpoint(whole / "base").specs


@pytest.mark.parametrize("value", [torch.tensor([[7, 3]]), torch.tensor([[1.5, 2.0]])])
def test_a_listing_that_lies_is_refused_by_name(
    value: torch.Tensor, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "merged", tmp_path / "m")
    header, body = split((tmp_path / "m" / NAME).read_bytes())
    for name, entry in header.items():
        if name.startswith("lengths/"):
            begin, end = entry["data_offsets"]
            entry["dtype"] = "F64" if value.is_floating_point() else "I64"
            raw = bytes(value.reshape(-1).view(torch.uint8).tolist())
            body = body[:begin] + (raw * (end // len(raw)))[: end - begin] + body[end:]
    (tmp_path / "m" / NAME).write_bytes(joined(signed(header, body), body))
    with pytest.raises(LoraToolsError, match=r"sidecar: .* damaged|is not"):
        lora_tools.unmerge(tmp_path / "m", [whole / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- moments


@pytest.mark.slow
def test_kills_races_and_bounds_on_files(tmp_path: Path, full: bool) -> None:
    verbs = None if full else ("merge", "convert")
    place = moments.ground(tmp_path, verbs=verbs)
    wrong = []
    for number in range(40 if full else 2):
        for one in (moments.kill, moments.race):
            here = tmp_path / f"{one.__name__}-{number}"
            here.mkdir()
            wrong += one(place, here, random.Random(number))
            shutil.rmtree(here)
    here = tmp_path / "short"
    here.mkdir()
    for verb in place.made:
        for size in (1024, 1 << 20):
            enough, said = moments.short_file(place, here, verb, size)
            assert enough is (size > 1024)
            wrong += said
    assert wrong == []


@pytest.mark.slow
def test_work_that_is_killed_is_gone_on_with(tmp_path: Path, full: bool) -> None:
    pytest.importorskip("distributed")
    place = moments.ground(tmp_path, verbs=None if full else ("merge", "convert"))
    kinds = [resumption.caller, resumption.share, *([resumption.worker] if full else [])]
    wrong = []
    for number in range(40 if full else 2):
        for i, one in enumerate(kinds):
            here = tmp_path / f"{i}-{number}"
            here.mkdir()
            wrong += one(place, here, random.Random(number))
            shutil.rmtree(here)
    assert wrong == []


def test_the_page_has_every_option() -> None:
    from .campaign.__main__ import parser

    page = (Path(__file__).parents[1] / "docs/campaign.md").read_text()
    for action in parser()._actions:
        assert any(flag in page for flag in action.option_strings), action.option_strings
