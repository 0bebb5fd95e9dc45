"""What lies in a folder and is no file of it: links, pipes, devices, holes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, LoraToolsError, UnsafeInput
from lora_tools.formats import regular_files, synced
from lora_tools.formats.regular_files import read_file, refuse_outside
from lora_tools.sources.adapters import open_adapter

from . import iotools

WAIT = 60  # seconds that no case here needs


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(WAIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound inputs of every kind."""
    top = tmp_path_factory.mktemp("made")
    base = iotools.weights(layers=1)
    iotools.checkpoint(top / "base", base, shards=2)
    index = {n: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, n in enumerate(base)}
    iotools.write_index(top / "base", index)
    iotools.checkpoint(top / "tuned", iotools.moved(base))
    iotools.adapter(top / "adapter", iotools.linear_shapes(base))
    lora_tools.merge(top / "base", [top / "adapter"], top / "merged", reversible=True)
    iotools.graph(top / "graph", top / "base", base)
    shutil.copy(top / "graph/model.onnx", top / "x.onnx")
    (top / "text").write_text("w1 w2")
    (top / "secret").write_text("token")
    return top


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


MERGE = ["merge", "base", "adapter", "-o", "out"]
EXTRACT = ["extract", "base", "tuned", "-o", "out", "--rank", "1"]
STATISTICS = ["collect-stats", "base", "text", "-o", "out"]
PLACES = {
    "base/model-00001-of-00002.safetensors": MERGE,
    "base/model.safetensors.index.json": MERGE,
    "base/config.json": MERGE,
    "base/tokenizer.json": MERGE,
    "base/modules.json": MERGE,
    "base/README.md": MERGE,
    "adapter/adapter_config.json": MERGE,
    "adapter/adapter_model.safetensors": MERGE,
    "merged/loratools-unmerge.sidecar": ["unmerge", "merged", "adapter", "-o", "out"],
    "x.onnx": ["inspect", "x.onnx"],
    "graph/model.onnx": ["export", "base", "-o", "out", *iotools.EXPORT],
    "graph/config.json": ["export", "base", "-o", "out", *iotools.EXPORT],
    "cache": [*EXTRACT, "--spectrum-cache", "cache"],
    "stats": [*EXTRACT, "--activations", "stats"],
    "text": STATISTICS,
    "base/tokenizer_config.json": STATISTICS,
    "base/vocab.txt": STATISTICS,
    "base/chat_template.jinja": STATISTICS,
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path], None]] = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": pipe,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_there_and_no_file_is_an_error(
    place: str, kind: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(place)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    code, said = run(PLACES[place]), capsys.readouterr().err
    assert code in (1, 2), said
    assert path.name in said
    assert "Traceback" not in said
    assert not os.path.lexists("out")


@pytest.mark.parametrize(
    "place", ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json"]
)
def test_a_link_to_nothing_says_where_it_leads(place: str, work: Path) -> None:
    path = work / "base" / place
    path.unlink()
    path.symlink_to("away/there")
    for source in (path.parent, path):
        with pytest.raises(
            CheckpointError, match=rf"{place}: a link to away/there, which does not exist"
        ):
            lora_tools.inspect(source)


def test_zeros_in_the_place_of_weights_are_told_for_what_they_are(work: Path) -> None:
    """As a download leaves them that reserved its room and ended."""
    for name, said in (
        ("x.gguf", r"not a GGUF file: its first"),
        ("x.safetensors", r"has 0 bytes"),
    ):
        Path(name).write_bytes(bytes(1000))
        for asked in (lambda n=name: lora_tools.inspect(n), lambda n=name: open_adapter(n)):
            with pytest.raises(CheckpointError, match=said):
                asked()


@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"base/tokenizer.json", "base/README.md"}))
def test_a_folder_in_the_place_of_a_file_is_an_error(
    place: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(place)
    path.unlink(missing_ok=True)
    path.mkdir()
    code, said = run(PLACES[place]), capsys.readouterr().err
    assert code in (1, 2), said
    assert path.name in said
    assert not os.path.lexists("out")


def test_a_report_is_not_written_into_a_pipe_that_nobody_reads(work: Path) -> None:
    os.mkfifo("pipe")
    assert run(["inspect", "base", "-q", "--report", "pipe"]) == 1


def test_a_text_comes_through_a_pipe_that_is_open(work: Path) -> None:
    from lora_tools.options.parse import read_text

    ends = os.pipe()
    os.write(ends[1], b"w1\r\nw2")
    os.close(ends[1])
    try:
        assert read_text(Path(f"/dev/fd/{ends[0]}")) == "w1\nw2"
    finally:
        os.close(ends[0])


@pytest.mark.parametrize("target", ["secret", "/proc/self/environ", "/etc/passwd"])
@pytest.mark.parametrize("name", ["README.md", "config.json", "code/notes.txt"])
def test_what_a_link_leads_to_outside_is_not_copied(name: str, target: str, work: Path) -> None:
    path = Path("base") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name == "config.json":
        Path("secret").write_text('{"model_type": "llama"}')
        target = "secret"
    path.symlink_to(Path(target).absolute())
    verbs: list[Callable[[], Any]] = [
        lambda: lora_tools.merge("base", ["adapter"], "out"),
        lambda: lora_tools.merge("base", ["adapter"], "out", dry_run=True),
        lambda: lora_tools.quantize("base", "out"),
        lambda: lora_tools.export("base", "out", graph="graph", task="features", no_verify=True),
    ]
    for verb in verbs:
        with pytest.raises(UnsafeInput, match="a link out of its folder"):
            verb()
    assert not Path("out").exists()


def test_a_tokenizer_beside_an_adapter_is_no_way_out(work: Path) -> None:
    from lora_tools.formats.adapters.peft_folder import open_peft
    from lora_tools.merging.vocabulary import tokenizer_files

    Path("adapter/tokenizer.json").symlink_to("../secret")
    with pytest.raises(UnsafeInput, match="a link out of its folder"):
        tokenizer_files(open_peft("adapter", Path("adapter")))


def test_links_inside_the_folder_and_into_the_hubs_blobs_are_followed(work: Path) -> None:
    Path("base/real.md").write_text("x")
    Path("base/NOTES.md").symlink_to("real.md")
    lora_tools.merge("base", ["adapter"], "out", no_card=True)
    assert Path("out/NOTES.md").read_text() == "x"
    assert not Path("out/NOTES.md").is_symlink()
    snapshot = Path("models--a--b/snapshots/0")
    snapshot.mkdir(parents=True)
    Path("models--a--b/blobs").mkdir()
    for path in Path("base").iterdir():
        shutil.copy(path, Path("models--a--b/blobs") / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    lora_tools.merge(snapshot, ["adapter"], "again", no_card=True)
    assert iotools.tree(Path("out")) == iotools.tree(Path("again"))
    blob = Path("models--a--b/blobs/NOTES.md")
    blob.unlink()
    blob.symlink_to(Path("secret").absolute())
    with pytest.raises(UnsafeInput, match="a link out of its folder"):
        lora_tools.merge(snapshot, ["adapter"], "third")


def test_blobs_that_are_a_link_are_no_way_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").symlink_to("/etc")
    (snapshot / "x").symlink_to("../../blobs/passwd")
    with pytest.raises(UnsafeInput):
        refuse_outside(snapshot / "x", snapshot)


def sparse(path: Path, nbytes: int) -> Path:
    """A file with a hole of that size, and a word after it."""
    with path.open("wb") as file:
        file.seek(nbytes)
        file.write(b"end")
    return path


def test_a_hole_is_copied_as_one(tmp_path: Path) -> None:
    source = sparse(tmp_path / "a", 1 << 32)
    synced.copy_synced(source, tmp_path / "b")
    copied = (tmp_path / "b").stat()
    assert copied.st_size == (1 << 32) + 3
    assert copied.st_blocks * 512 < 1 << 20
    with (tmp_path / "b").open("rb") as file:
        file.seek(1 << 32)
        assert file.read() == b"end"
    assert synced.held_bytes(source) < 1 << 20


@pytest.mark.parametrize("data", [b"", b"x", bytes(5 << 20), os.urandom(3 << 20)])
def test_a_copy_is_the_same_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    synced.copy_synced(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert synced.held_bytes(tmp_path / "a") <= len(data)


def test_what_is_copied_counts_as_room(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("base/large.txt").write_bytes(os.urandom(1 << 20))
    asked = []
    monkeypatch.setattr("lora_tools.verbs.writing.check_space", lambda _, n, *held: asked.append(n))
    lora_tools.merge("base", ["adapter"], "out")
    Path("base/large.txt").unlink()
    lora_tools.merge("base", ["adapter"], "out2")
    assert asked[0] - asked[1] == 1 << 20


@pytest.mark.parametrize(
    "place",
    [
        "base/config.json",
        "base/model.safetensors.index.json",
        "base/modules.json",
        "adapter/adapter_config.json",
    ],
)
def test_a_small_file_of_gigabytes_is_refused(place: str, work: Path) -> None:
    sparse(Path(place), 8 << 30)
    with pytest.raises(LoraToolsError, match=rf"{Path(place).name}: 8,589,934,595 bytes; at most"):
        lora_tools.merge("base", ["adapter"], "out")


def test_what_says_no_size_is_read_up_to_the_bound(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at most 3 are read"):
        read_file(Path("/proc/self/status"), most=3)
    assert regular_files.MOST >= 100_000_000  # an index of a million tensors


def test_no_more_memory_is_taken_than_a_small_file_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_file(tmp_path / "empty", most=1 << 60) == b""
    data = os.urandom((1 << 24) + 5)  # more than is read at a time
    (tmp_path / "some").write_bytes(data)
    assert read_file(tmp_path / "some", most=1 << 60) == data
