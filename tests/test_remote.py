"""Inputs and outputs by address: read by ranges from a store and a web server, and put there."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lora_tools
from lora_tools import pretrained
from lora_tools.cli import run
from lora_tools.errors import (
    AdapterError,
    CheckpointError,
    LoraToolsError,
    OutputError,
    UnsafeInput,
    UsageError,
)
from lora_tools.formats import ledger, output, stand_ins
from lora_tools.formats.stand_ins import StandIn
from lora_tools.remote import ahead, source, stores
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import split_weight

from . import iotools
from . import stores as servers
from .stores import Answer, Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with servers.running() as found:
        yield found


@pytest.fixture(scope="module")
def files(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` in two shards, ``tuned``, ``adapter``, ``other``, ``found`` (the fine-tune's)
    and ``four`` (bits): here, and in the bucket."""
    top = tmp_path_factory.mktemp("remote")
    weights = iotools.weights(width=64, layers=3)
    iotools.checkpoint(top / "base", weights, shards=2)
    iotools.checkpoint(top / "tuned", iotools.moved(weights))
    for seed, name in enumerate(("adapter", "other")):
        iotools.adapter(top / name, iotools.linear_shapes(weights), seed=seed)
    lora_tools.quantize(top / "base", top / "four")
    lora_tools.extract(top / "base", top / "tuned", top / "found", rank=1)
    for name in ("base", "tuned", "adapter", "other", "four", "found"):
        servers.fill(top / name)
    return top


@pytest.fixture(autouse=True)
def quick(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No faults, no waiting, and an own folder."""
    server.clear()
    monkeypatch.setattr(source, "wait", 0.001)
    monkeypatch.setattr(stand_ins, "_FIRST", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    yield
    server.clear()


def data_bytes(*folders: Path) -> tuple[int, int]:
    """Of the safetensors files of folders: bytes of tensors, and of headers."""
    data = headers = 0
    for path in (p for folder in folders for p in folder.glob("*.safetensors")):
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        data, headers = data + path.stat().st_size - length, headers + length
    return data, headers


def left() -> list[str]:
    return [path.name for path in Path("temporary").iterdir()]


# ------------------------------------------------------------------------------------------ reading

VERBS: dict[str, Callable[[str], Any]] = {
    "merge": lambda at: lora_tools.merge(f"{at}base", f"{at}adapter", "out"),
    "merge from four bits": lambda at: lora_tools.merge(f"{at}four", [f"{at}adapter=0.5"], "out"),
    "quantize": lambda at: lora_tools.quantize(f"{at}base", "out"),
    "dequantize": lambda at: lora_tools.dequantize(f"{at}four", "out"),
    "extract": lambda at: lora_tools.extract(f"{at}base", f"{at}tuned", "out", rank=2),
    "combine": lambda at: lora_tools.combine([f"{at}adapter", (f"{at}other", 0.5)], "out"),
    "convert": lambda at: lora_tools.convert(
        f"{at}adapter", "out.safetensors", to="kohya", base=f"{at}base"
    ),
    "rescale": lambda at: lora_tools.rescale(f"{at}adapter", "out", rank=1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_bytes_as_of_a_copy(verb: str, files: Path, server: Server) -> None:
    """The base that an adapter names aside, which is the address, and the size of that."""
    report = VERBS[verb]("s3://bucket/")
    [made] = Path().glob("out*")
    made.rename("first")
    own = VERBS[verb](f"{files}/")
    [again] = Path().glob("out*")
    assert [each.digest for each in report.inputs] == [each.digest for each in own.inputs]
    assert all(each.path.startswith("s3://bucket/") for each in report.inputs)
    names = [p.relative_to(again) for p in again.rglob("*")] if again.is_dir() else [Path()]
    for name in names:
        one, other = (Path("first") / name).read_bytes(), (again / name).read_bytes()
        if name.name == "adapter_config.json":
            one = one.replace(b"s3://bucket/", f"{files}/".encode())
        if name.name == "README.md":
            if verb == "extract":
                continue
            one = one.replace(b"a file elsewhere", b"a local file")
        assert one == other, name
    assert left() == []
    known = [files / "base", files / "tuned", files / "adapter", files / "four", files / "other"]
    read = {name.split("/")[0] for name, _ in server.given if name.endswith(".safetensors")}
    whole = sum(sum(data_bytes(folder)) for folder in known if folder.name in read)
    assert server.read() == whole or (verb == "convert" and server.read() < whole)


def test_each_byte_is_read_once(files: Path, server: Server) -> None:
    lora_tools.merge("s3://bucket/base", "s3://bucket/adapter", "out")
    data, headers = data_bytes(files / "base", files / "adapter")
    assert server.read() == data + headers


@pytest.mark.parametrize("name", ["base", "four"])
def test_a_look_reads_headers_alone(name: str, files: Path, server: Server) -> None:
    """And so does a plan, but for the states of four-bit weights."""
    report = lora_tools.inspect(f"s3://bucket/{name}")
    data, headers = data_bytes(files / name)
    assert server.read() == headers if name == "base" else server.read() < headers + data / 8
    assert "only headers were read" in report.notes[-1]
    assert report.inputs[0].digest == ""
    assert {each.hash for each in report.stored} == {""}
    whole = lora_tools.inspect(files / name)
    assert [each.shape for each in report.stored] == [each.shape for each in whole.stored]
    assert {"kind", "tensors", "dtypes"} <= report.totals.keys()
    assert {k: v for k, v in report.totals.items() if k != "hub"} == {
        k: v for k, v in whole.totals.items() if k != "hub"
    }


def test_a_dry_run_reads_headers_alone(
    files: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = lora_tools.merge("s3://bucket/base", "s3://bucket/adapter", "out", dry_run=True)
    assert server.read() == data_bytes(files / "base", files / "adapter")[1]
    own = lora_tools.merge(files / "base", files / "adapter", "out", dry_run=True)
    assert plan.plan == own.plan
    assert not Path("out").exists()
    assert left() == []
    server.clear()
    words = ["s3://bucket/base", "s3://bucket/tuned", "-o", "s3://bucket/new", "--rank", "2"]
    assert run(["extract", *words, "--dry-run"]) == 0
    assert "loratools-" not in capsys.readouterr().out
    assert not servers.system().exists("bucket/new")


def test_what_looks_takes_addresses(files: Path, server: Server) -> None:
    at = "s3://bucket/"
    calls: list[Callable[[str], Any]] = [
        lambda at: lora_tools.verify(f"{at}found", base=f"{at}base", tuned=f"{at}tuned"),
        lambda at: lora_tools.diff(f"{at}base", f"{at}tuned"),
        lambda at: lora_tools.check(f"{at}found", base=f"{at}base", consumer="peft"),
        lambda at: lora_tools.inspect(f"{at}found"),
    ]
    for call in calls:
        found, own = call(at), call(f"{files}/")
        assert found.modules == own.modules
        assert found.totals == own.totals
    server.read()


def test_what_is_loaded_is_to_lie_here(files: Path, server: Server) -> None:
    said = r"^s3://bucket/base: .*needs local files; download it first \(aws s3"
    with stand_ins.standing_in(is_plan=False):
        made = stand_ins.stand_ins()
        assert made is not None
        folder = made.at("s3://bucket/base")
        with pytest.raises(CheckpointError, match=said):
            pretrained.model_of(None, folder, None)


def test_one_file(files: Path, server: Server) -> None:
    """Of an adapter, with the config beside it; and of a checkpoint."""
    address = servers.fill(files / "tuned" / "model.safetensors", "alone/model.safetensors")
    lora_tools.merge(address, "s3://bucket/adapter/adapter_model.safetensors", "out.safetensors")
    lora_tools.merge(files / "tuned/model.safetensors", files / "adapter", "own.safetensors")
    assert filecmp.cmp("out.safetensors", "own.safetensors", shallow=False)


def test_a_web_server(files: Path, server: Server) -> None:
    """It lists nothing: files of the usual names are asked for, and those that the index names."""
    web = f"{server.address}/bucket"
    lora_tools.merge(f"{web}/base", f"{web}/adapter", "out")
    lora_tools.merge(files / "base", files / "adapter", "own")
    found = filecmp.dircmp("out", "own")
    assert found.left_list == found.right_list
    assert filecmp.cmpfiles("out", "own", found.common_files, shallow=False)[0] == sorted(
        found.common_files
    )
    server.read()
    one = f"{web}/tuned/model.safetensors?X-Signature=a=b"
    report = lora_tools.merge(one, f"{web}/adapter?sig=1", "signed.safetensors", dry_run=True)
    assert [each.path for each in report.inputs] == [
        f"{web}/tuned/model.safetensors",
        web + "/adapter",
    ]


def test_a_server_without_ranges(server: Server, files: Path) -> None:
    server.ranges = False
    said = r"^http://127\.0\.0\.1:\d+/bucket/\w+.*does not serve ranges of bytes; download it first"
    with pytest.raises(CheckpointError, match=said):
        lora_tools.merge(f"{server.address}/bucket/base", files / "adapter", "out")
    with pytest.raises(CheckpointError, match="does not serve ranges"):
        lora_tools.merge("s3://bucket/base", files / "adapter", "out")
    assert not Path("out").exists()


def test_shards_of_a_job_know_the_same_inputs(files: Path, server: Server) -> None:
    own = lora_tools.merge(files / "base", files / "adapter", "own")
    words = ("s3://bucket/base", "s3://bucket/adapter", "parts")
    for number in (1, 2):
        lora_tools.merge(*words, shard=f"{number}/2")
    server.clear()
    report = lora_tools.merge(*words, finish=True)
    data, _ = data_bytes(files / "base")
    assert server.read() < data  # nothing was done twice
    for path in Path(own.output).glob("*.safetensors"):
        assert filecmp.cmp(path, Path("parts") / path.name, shallow=False)
    assert report.output == "parts"


def test_what_an_ended_run_did_is_not_read_again(
    files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    words = ("s3://bucket/base", "s3://bucket/adapter", "out")
    monkeypatch.setattr(ledger, "WORTH", 0)
    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "commit", fails)
        with pytest.raises(OutputError, match="Input/output"):
            lora_tools.merge(*words)
    with pytest.raises(UsageError, match="an interrupted run has left"):
        lora_tools.merge(*words)
    server.clear()
    report = lora_tools.merge(*words, resume=True)
    assert "were already done" in report.notes[-1]
    data, headers = data_bytes(files / "base", files / "adapter")
    assert server.read() < headers + data / 2, "the adapter, for its digest, and headers"
    lora_tools.merge(files / "base", files / "adapter", "own")
    for path in Path("own").glob("*.safetensors"):
        assert filecmp.cmp(path, Path("out") / path.name, shallow=False)


def test_work_is_done_anew_where_an_object_was_replaced(
    files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has the same size, and the same address."""
    shutil.copytree(files / "other", "again")
    servers.fill(Path("again"))
    monkeypatch.setattr(ledger, "WORTH", 0)
    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "commit", lambda *_: os.close(1 << 20))
        with pytest.raises(OutputError):
            lora_tools.rescale("s3://bucket/again", "out", rank=1)
    shutil.copytree(files / "adapter", "again", dirs_exist_ok=True)
    servers.fill(Path("again"))
    report = lora_tools.rescale("s3://bucket/again", "out", rank=1, resume=True)
    assert not any("found done" in note for note in report.notes)
    lora_tools.rescale(files / "adapter", "own", rank=1)
    name = "adapter_model.safetensors"
    assert filecmp.cmp(Path("own") / name, Path("out") / name, shallow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_read_by_address_themselves(files: Path, server: Server) -> None:
    pytest.importorskip("distributed")
    own = lora_tools.merge(files / "base", files / "adapter", "own")
    words = "s3://bucket/base", "s3://bucket/adapter", "there"
    there = lora_tools.merge(*words, engine="dask", workers=1)
    assert there.totals["output_digest"] == own.totals["output_digest"]
    for path in Path("own").glob("*.safetensors"):
        assert filecmp.cmp(path, Path("there") / path.name, shallow=False)
    assert left() == []


def test_a_file_is_sent_as_its_address(files: Path) -> None:
    with opened("s3://bucket/tuned/model.safetensors") as file:
        again = pickle.loads(pickle.dumps(file))
        for name in file.specs:
            assert again.raw(name) == file.raw(name)


# ------------------------------------------------------------------------------- ahead of the work


@contextlib.contextmanager
def opened(address: str) -> Iterator[StandIn]:
    with stand_ins.standing_in(is_plan=False):
        made = stand_ins.stand_ins()
        assert made is not None
        path = made.at(address)
        file = made.open(path)
        assert isinstance(file, StandIn)
        yield file


@pytest.mark.parametrize("order", ["forwards", "backwards", "twice", "held"])
def test_what_is_ahead_is_bounded(
    order: str, files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no byte comes twice, in whichever order tensors are asked for."""
    monkeypatch.setattr(ahead, "_LEAST", 1 << 14)
    monkeypatch.setattr(ahead, "_PIECE", 1 << 13)
    path = files / "tuned/model.safetensors"
    most, kept = 64 * 128 * 4, []
    with opened("s3://bucket/tuned/model.safetensors") as file, safe_open(path, "pt") as own:
        names = list(file.specs)
        for name in names[::-1] if order == "backwards" else names:
            for _ in range(2 if order == "twice" else 1):
                found = file.tensor(name)
                assert torch.equal(found, own.get_tensor(name))
            if order == "held":
                kept.append(found)
            assert file.ahead._room.unasked <= most
            assert sum(file.ahead._room._kept.values()) <= 2 * most
            asked = {other for _, other in file.ahead._room._kept}
            assert len(set(map(id, file.ahead._held.values()))) * (1 << 13) <= 4 * most
            assert name in asked
    assert server.read() == path.stat().st_size
    assert all(torch.isfinite(each).all() for each in kept)


def test_files_have_one_room(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are, and whichever of them is read."""
    monkeypatch.setattr(ahead, "_LEAST", 1 << 14)
    monkeypatch.setattr(ahead, "_PIECE", 1 << 13)
    with stand_ins.standing_in(is_plan=False):
        base, tuned = open_checkpoint("s3://bucket/base"), open_checkpoint("s3://bucket/tuned")
        room = base.files[0].ahead._room  # type: ignore[attr-defined]
        for name in base.specs:
            for side in (base, tuned):
                side.raw(name)
                assert room.unasked <= 64 * 128 * 4
                assert room._bytes <= 2 * 64 * 128 * 4
        assert {file.ahead._room for file in (*base.files, *tuned.files)} == {room}  # type: ignore[attr-defined]


def test_threads_may_ask_for_the_same(files: Path, server: Server) -> None:
    with opened("s3://bucket/tuned/model.safetensors") as file:
        name = next(iter(file.specs))
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(bytes(file.raw(name)))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1


# ------------------------------------------------------------------------------------------ hostile


def on_weights(change: Callable[[Answer], None], times: int = 10**9) -> servers.Fault:
    """A fault of so many answers that hold tensors."""
    count = 0

    def fault(name: str, answer: Answer) -> None:
        nonlocal count
        is_data = len(answer.body) > 4096 and name.endswith(".safetensors")
        if is_data and count < times:
            count += 1
            change(answer)

    return fault


def cut(answer: Answer) -> None:
    answer.is_cut = True


def busy(answer: Answer) -> None:
    answer.status, answer.body = "503 Slow Down", b""
    answer.headers["Content-Length"] = "0"


def short(answer: Answer) -> None:
    """As if there were no more."""
    answer.body = answer.body[:-100]
    answer.headers["Content-Length"] = str(len(answer.body))


def long(answer: Answer) -> None:
    answer.body += bytes(100)
    answer.headers["Content-Length"] = str(len(answer.body))


def larger(answer: Answer) -> None:
    [key] = [name for name in answer.headers if name.lower() == "content-range"]
    answer.headers[key] = answer.headers[key].partition("/")[0] + "/999999"


def other(answer: Answer) -> None:
    answer.headers["ETag"] = '"another"'


WAYS = ["s3", "http"]


def address(server: Server, way: str) -> str:
    return "s3://bucket" if way == "s3" else f"{server.address}/bucket"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [cut, short])
def test_what_comes_in_part_is_asked_for_again(
    way: str, change: Callable[[Answer], None], files: Path, server: Server
) -> None:
    server.fault = on_weights(change, times=5)
    lora_tools.merge(f"{address(server, way)}/tuned", files / "adapter", "out")
    assert len(server.given) > 5
    lora_tools.merge(files / "tuned", files / "adapter", "own")
    assert filecmp.cmp("out/model.safetensors", "own/model.safetensors", shallow=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "could not be read in 4 tries"),
        (short, r"could not be read in 4 tries \([\d,]+ bytes came of"),
        (long, "does not serve ranges"),
        (larger, "changed since it was opened"),
        (other, "changed since it was opened"),
    ],
)
def test_an_answer_that_is_none_is_an_error(
    way: str, change: Callable[[Answer], None], said: str, files: Path, server: Server
) -> None:
    server.fault = on_weights(change)
    named = f"{address(server, way)}/tuned/model.safetensors"
    with pytest.raises(CheckpointError, match=said) as caught:
        lora_tools.merge(f"{address(server, way)}/tuned", files / "adapter", "out")
    assert str(caught.value).startswith(f"{named}: ")
    assert [path.name for path in Path().iterdir()] == ["temporary"]
    assert left() == []


def test_a_busy_web_server_is_asked_again(files: Path, server: Server) -> None:
    server.fault = on_weights(busy, times=3)
    lora_tools.dequantize(f"{server.address}/bucket/four", "out")
    server.fault = on_weights(busy)
    with pytest.raises(CheckpointError, match=r"in 4 tries \(503 "):
        lora_tools.merge(f"{server.address}/bucket/tuned", files / "adapter", "again")


@pytest.mark.parametrize("way", WAYS)
def test_an_object_that_is_replaced_meanwhile(
    way: str, files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is mixed with the new one."""
    monkeypatch.setattr(ahead, "_LEAST", 1 << 14)
    monkeypatch.setattr(ahead, "_PIECE", 1 << 13)
    servers.fill(files / "tuned", "moving")

    def replace(_: Answer) -> None:
        new = iotools.checkpoint(Path("new"), iotools.weights(7, width=64, layers=3))
        servers.fill(new, "moving")

    server.fault = on_weights(replace, times=1)
    monkey = f"{address(server, way)}/moving"
    with pytest.raises(CheckpointError, match=r"moving/model\.safetensors: changed since"):
        lora_tools.merge(monkey, files / "adapter", "out")
    assert not Path("out").exists()


def test_a_store_whose_answers_do_not_tell(
    files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once the work is done, as that of Google and of Azure is."""
    blind = stores.Store("s3fs", stores._ask_any, tells=False)
    monkeypatch.setitem(stores.STORES, "s3", blind)
    stores.opened.cache_clear()
    lora_tools.merge("s3://bucket/tuned", files / "adapter", "out")
    servers.fill(files / "tuned", "moving")
    server.fault = on_weights(lambda _: servers.fill(files / "base", "moving/x"), times=1)
    lora_tools.merge("s3://bucket/moving", files / "adapter", "same")

    def replace(_: Answer) -> None:
        other = iotools.checkpoint(Path("new"), iotools.weights(7, width=64, layers=3))
        servers.fill(other, "moving")

    server.fault = on_weights(replace, times=1)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        lora_tools.merge("s3://bucket/moving", files / "adapter", "again")
    server.fault = on_weights(
        lambda _: servers.system().rm("bucket/moving/model.safetensors"), times=1
    )
    with pytest.raises(CheckpointError, match=r"was deleted since it was opened|nothing is there"):
        lora_tools.merge("s3://bucket/moving", files / "adapter", "again")
    stores.opened.cache_clear()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 8 + b"{}", "truncated or not safetensors"),
        (iotools.container({"a": iotools.entry()}, bytes(4)), "may be truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git-LFS pointer"),
        (iotools.container({"../a": iotools.entry()}, bytes(8)), None),
    ],
)
def test_a_header_that_is_none(data: bytes, said: str | None, server: Server) -> None:
    servers.system().pipe_file("bucket/odd/model.safetensors", data)
    if said is None:
        assert lora_tools.inspect("s3://bucket/odd").totals["tensors"] == 1
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        lora_tools.inspect("s3://bucket/odd")
    assert str(caught.value).startswith("s3://bucket/odd/model.safetensors: ")


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ({}, CheckpointError, "nothing is there, or access is not allowed"),
        (
            {"model.gguf": b"GGUF"},
            CheckpointError,
            r"other files \(model\.gguf\); download it first \(aws s3",
        ),
        (
            {"pytorch_model.bin": b"x"},
            CheckpointError,
            r"other files \(pytorch_model\.bin\); download it",
        ),
        ({"config.json": b"{}"}, CheckpointError, "there are none; download it first"),
        ({"a/../../b.safetensors": b""}, UnsafeInput, "is not the name of a file"),
    ],
)
def test_what_is_not_read_by_address(
    names: dict[str, bytes], error: type[LoraToolsError], said: str, server: Server
) -> None:
    if servers.system().exists("bucket/odd"):
        servers.system().rm("bucket/odd", recursive=True)
    for name, data in names.items():
        servers.system().call_s3("put_object", Bucket="bucket", Key=f"odd/{name}", Body=data)
    with pytest.raises(error, match=said) as caught:
        lora_tools.dequantize("s3://bucket/odd", "out")
    assert str(caught.value).startswith("s3://bucket/odd")
    assert left() == []


def test_weights_beside_are_left_and_runs_passed_by(files: Path, server: Server) -> None:
    """As of a folder here; of a training run nothing is read."""
    servers.fill(files / "tuned", "mixed")
    for name in ("pytorch_model.bin", "checkpoint-5/model.safetensors", ".cache/x.json"):
        servers.system().pipe_file(f"bucket/mixed/{name}", bytes(10))
    report = lora_tools.merge("s3://bucket/mixed", files / "adapter", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    )
    assert any("pytorch_model.bin" in note for note in report.notes)
    assert not any("checkpoint-5" in name for name, _ in server.given)


def test_what_is_secret_is_not_said(files: Path, server: Server) -> None:
    web = server.address.replace("//", "//user:secret@")
    for place in (f"{web}/bucket/none.safetensors?sig=secret", f"{server.address}/x?sig=secret"):
        with pytest.raises(CheckpointError) as caught:
            lora_tools.inspect(place)
        assert "secret" not in str(caught.value)
    report = lora_tools.inspect(f"{server.address}/bucket/tuned/model.safetensors?sig=secret")
    assert "secret" not in json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ("s3://bucket/a", 1.0),
        ("s3://bucket/a=0.5", 0.5),
        ("https://host/a.safetensors?sig=12", 1.0),
        ("https://host/a.safetensors?x=1&sig=12", 1.0),
        ("https://host/a.safetensors?x=1&sig=12=0.5", 0.5),
        ("https://host/a.safetensors?sig=ab%3D%3D", 1.0),
    ],
)
def test_the_value_of_a_query_is_no_weight(given: str, weight: float) -> None:
    place = given.removesuffix("=0.5") if weight != 1 else given
    assert split_weight(given) == (place, weight)


# ------------------------------------------------------------------------------------------ writing


def test_a_result_is_put_there_with_its_index_last(files: Path, server: Server) -> None:
    order: list[str] = []
    server.put = order.append
    report = lora_tools.merge(
        "s3://bucket/base", "s3://bucket/adapter", "s3://bucket/made", reversible=True
    )
    assert report.output == "s3://bucket/made"
    assert order[-2:] == ["made/config.json", "made/model.safetensors.index.json"]
    assert left() == []
    server.put = None
    lora_tools.merge(files / "base", files / "adapter", "own", reversible=True)
    made = servers.fetch("made", Path("made"))
    assert filecmp.dircmp(made, "own").left_only == []
    names = [path.name for path in Path("own").iterdir() if path.name != "README.md"]
    lora_tools.unmerge("s3://bucket/made", "s3://bucket/adapter", "undone")
    lora_tools.unmerge("own", files / "adapter", "again")
    for path in Path("again").glob("*.safetensors"):
        assert filecmp.cmp(path, Path("undone") / path.name, shallow=False)
    assert filecmp.cmpfiles(made, "own", names, shallow=False) == (names, [], [])
    with pytest.raises(OutputError, match="s3://bucket/made already exists"):
        lora_tools.merge("s3://bucket/base", "s3://bucket/adapter", "s3://bucket/made")
    lora_tools.quantize("s3://bucket/tuned", "s3://bucket/made", force=True)
    there = {name.rpartition("/")[2] for name in servers.system().find("bucket/made")}
    assert there == {"README.md", "config.json", "tokenizer.json", "model.safetensors"}
    servers.system().rm("bucket/made", recursive=True)


def test_a_file_is_put_there_with_what_lies_beside_it(files: Path, server: Server) -> None:
    base, out = files / "tuned/model.safetensors", "s3://bucket/one.safetensors"
    lora_tools.merge(base, files / "adapter", out, reversible=True)
    lora_tools.merge(base, files / "adapter", "own.safetensors", reversible=True)
    for suffix in ("", ".sidecar"):
        there = servers.system().cat_file(f"bucket/one.safetensors{suffix}")
        assert there == Path(f"own.safetensors{suffix}").read_bytes()
    lora_tools.merge(base, files / "other", out, force=True)
    assert not servers.system().exists("bucket/one.safetensors.sidecar")
    servers.system().rm("bucket/one.safetensors")


@pytest.mark.parametrize("force", [False, True])
def test_an_upload_that_fails_leaves_no_index(force: bool, files: Path, server: Server) -> None:
    """And the result here."""
    if force:
        servers.fill(files / "base", "torn")
    refused = "torn/model-00002-of-00002.safetensors"

    def put(name: str) -> None:
        if name == refused:
            raise PermissionError

    server.put = put
    said = r"^s3://bucket/torn: not uploaded .*the result is in (\S+); upload it \(aws s3 sync"
    with pytest.raises(OutputError, match=said) as caught:
        lora_tools.merge("s3://bucket/base", files / "adapter", "s3://bucket/torn", force=force)
    there = {name.rpartition("/")[2] for name in servers.system().find("bucket/torn")}
    assert not there & {"config.json", "model.safetensors.index.json"}
    [home] = left()
    assert home in str(caught.value)
    kept = Path("temporary") / home / "torn"
    assert (kept / "model.safetensors.index.json").exists()
    servers.system().rm("bucket/torn", recursive=True)


def test_what_is_not_put_there(
    files: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("https://host/x", {}, r"cannot write to such an address.*curl -T"),
        ("hf://org/name", {}, r"cannot write to such an address.*hf upload"),
        ("s3://bucket", {}, "is a bucket"),
        ("s3://bucket/new", {"resume": True}, "need a local output"),
        ("s3://bucket/new", {"shard": "1/2"}, "need a local output"),
        ("s3://bucket/base", {"force": True}, "is the input s3://bucket/base"),
        ("s3://bucket/base/in", {}, "is the input s3://bucket/base, or one contains the other"),
    ]
    for out, options, said in cases:
        with pytest.raises(UsageError, match=said):
            lora_tools.merge("s3://bucket/base", files / "adapter", out, **options)
    for flag in ("--report", "--spectrum-cache", "--activations"):
        words = ["extract", str(files / "base"), str(files / "tuned"), "-o", "out", "--rank", "2"]
        assert run([*words, flag, "s3://key:secret@bucket/file"]) == 2
    with pytest.raises(UsageError, match=r"^TEXT s3://bucket/text: this must be a local file"):
        lora_tools.collect_stats(files / "base", "s3://bucket/text", "out")
    monkeypatch.setattr(output, "free_bytes", lambda _: 10)
    with pytest.raises(
        OutputError, match=r"has only 10 free; .*temporary first; choose another folder"
    ):
        lora_tools.merge("s3://bucket/base", files / "adapter", "s3://bucket/new")
    assert [path.name for path in Path().iterdir()] == ["temporary"]
    with pytest.raises(AdapterError):
        lora_tools.merge("s3://bucket/base", "s3://bucket/tuned", "s3://bucket/new")
    assert not servers.system().exists("bucket/new")
    assert left() == []
