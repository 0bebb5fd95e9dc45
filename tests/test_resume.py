"""A run that was ended is gone on with: what it has done is not done again, the bytes are those of
a run that was never ended, and nothing that lies in its folder is believed unseen."""

from __future__ import annotations

import enum
import functools
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools
from lora_tools.cli import run
from lora_tools.engine import memo
from lora_tools.engine.canonical import Canonical, Unknown
from lora_tools.errors import OutputError, UsageError
from lora_tools.formats import kept, ledger, output
from lora_tools.formats.checkpoint_writer import CheckpointWriter, Shard
from lora_tools.formats.ledger import Ledger
from lora_tools.formats.recorded import HashedWrites, Recording
from lora_tools.records import TensorSpec

from . import forks, iotools, killing
from .campaign.lines import VERBS, command, inputs, left_over

SOME = 1e-9  # seconds: whatever was done is worth it
_ALL_COUNTS = f"import lora_tools.formats.ledger as ledger; ledger.WORTH = {SOME}\n"
WAYS = "--resume continues it, --clean deletes it and starts again"
BY_NAME = WAYS.replace("--resume", "resume=True").replace("--clean", "clean=True")
RESUMED = sorted(VERBS.keys() - {"export"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=2, shards=2)


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WORTH", SOME)


def end(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object]) -> None:
    """Do a job up to where all is made and nothing stands in its place, where the disk fails."""

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "commit", fails)
        with pytest.raises(OutputError, match="Input/output"):
            job()


Merge = Callable[..., lora_tools.Report]


@pytest.fixture
def merge(small: Path, tmp_path: Path) -> Merge:
    return functools.partial(
        lora_tools.merge, small / "base", [small / "adapter"], tmp_path / "out", reversible=True
    )


@pytest.fixture
def ended(
    merge: Merge, worth_it: None, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A merge that was ended; what is done from then on."""
    end(monkeypatch, merge)
    assert counted
    counted.clear()
    return counted


def staging(folder: Path) -> Path:
    [found] = folder.glob(".out.loratools-*")
    return found


# ------------------------------------------------------------------------------- the two ways on


@pytest.mark.parametrize("verb", RESUMED)
def test_what_was_done_is_not_done_again(
    verb: str, small: Path, tmp_path: Path, worth_it: None, counted: list[str], monkeypatch, capfd
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "here" / "out"
    out.parent.mkdir()
    before = signal.getsignal(signal.SIGTERM)
    assert run(command(verb, small, whole)) == 0
    assert (done := list(counted))
    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "commit", lambda *_: os.close(1 << 20))
        assert run(command(verb, small, out)) == 1
    assert f"{out}: work of 0 s (" in (said := capfd.readouterr().err)
    assert said.endswith(f" is kept; {WAYS}\n")
    assert len(left_over(out.parent, out)) == 1
    counted.clear()
    assert run(command(verb, small, out, "--resume")) == 0
    signal.signal(signal.SIGTERM, before)
    # What is made of the adapter for an error's correction is made of a file that is written anew.
    assert len(counted) <= (len(done) // 2 if verb == "compensate" else 0)
    assert iotools.tree(out) == iotools.tree(whole)
    assert left_over(out.parent, out) == []


def test_work_that_was_left_is_neither_lost_nor_kept_unasked(
    merge: Merge, ended: list[str], tmp_path: Path
) -> None:
    left = iotools.tree(tmp_path)
    with pytest.raises(UsageError, match=rf"out: an interrupted run has left .*; {BY_NAME}"):
        merge()
    assert iotools.tree(tmp_path) == left
    assert merge(dry_run=True).dry_run
    with pytest.raises(UsageError, match="give only one of them"):
        merge(resume=True, clean=True)
    report = merge(clean=True)
    assert ended
    assert not any("--resume" in note for note in report.notes)
    assert left_over(tmp_path, tmp_path / "out") == []


def test_what_was_found_done_is_said(merge: Merge, ended: list[str]) -> None:
    report = merge(resume=True)
    assert not ended
    assert "tasks were already done" in report.notes[-1]


def test_with_nothing_to_go_on_with_it_begins(
    merge: Merge, counted: list[str], tmp_path: Path
) -> None:
    assert not any("--resume" in note for note in merge(resume=True).notes)
    assert counted
    assert left_over(tmp_path, tmp_path / "out") == []


def test_work_of_less_than_a_minute_is_not_kept(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(monkeypatch, merge)
    assert list(tmp_path.iterdir()) == []


def test_work_that_an_error_makes_useless_is_not_kept(
    small: Path, tmp_path: Path, worth_it: None
) -> None:
    """A gate that is missed is missed again."""
    with pytest.raises(lora_tools.QualityGateError):
        lora_tools.quantize(small / "base", tmp_path / "out", max_error=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_of_several_the_one_with_most_work_is_gone_on_with(
    merge: Merge, ended: list[str], tmp_path: Path
) -> None:
    most = staging(tmp_path)
    less = most.with_name(most.name[:-8] + "0badcafe")
    less.mkdir()
    killing.mark(less)
    Ledger(less).put(b"k" * 16, SOME, b"")
    merge(resume=True)
    assert not ended
    assert left_over(tmp_path, tmp_path / "out") == []


def test_a_result_that_stands_is_not_gone_on_with(
    merge: Merge, worth_it: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last rename and the end."""
    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "settle", output._Staging._let_go)
        merge()
    assert ledger.files(staging(tmp_path))
    with pytest.raises(OutputError, match="already exists"):
        merge()
    assert left_over(tmp_path, tmp_path / "out") == []


# ---------------------------------------------------------------- what lies there is not believed


def whole(merge: Merge, tmp_path: Path) -> dict[str, str]:
    """What it must come to."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    functools.partial(merge.func, *merge.args[:2], place / "out", **merge.keywords)()  # type: ignore[attr-defined]
    return iotools.tree(place / "out")


@pytest.mark.parametrize("what", ["a byte", "a file", "its end", "all"])
def test_bytes_that_are_not_those_written_are_made_again(
    what: str, merge: Merge, ended: list[str], tmp_path: Path
) -> None:
    wanted = whole(merge, tmp_path)
    ended.clear()
    path = staging(tmp_path) / "kept" / "out" / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    if what == "a byte":
        data[-1] ^= 1
        path.write_bytes(data)
    elif what == "a file":
        path.unlink()
    elif what == "its end":
        os.truncate(path, len(data) // 2)
    else:
        path.write_bytes(data + b"more")
        path.with_name("model-00002-of-00002.safetensors").unlink()
    merge(resume=True)
    assert ended
    assert iotools.tree(tmp_path / "out") == wanted


@pytest.mark.parametrize("damage", ["torn", "another byte", "zeros", "empty", "garbage"])
def test_a_ledger_that_is_damaged_costs_time_only(
    damage: str, merge: Merge, ended: list[str], tmp_path: Path
) -> None:
    wanted = whole(merge, tmp_path)
    ended.clear()
    [path] = ledger.files(staging(tmp_path))
    data = bytearray(path.read_bytes())
    count = len(data)
    if damage == "torn":
        data = data[: count - 10]
    elif damage == "another byte":
        data[count // 2] ^= 1
    elif damage == "zeros":
        data[count // 3 : 2 * count // 3] = bytes(2 * count // 3 - count // 3)
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(random.Random(0).randbytes(count))
    path.write_bytes(data)
    merge(resume=True)
    assert ended
    assert iotools.tree(tmp_path / "out") == wanted


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_ledger_runs_nothing(tmp_path: Path) -> None:
    for evil in (_Evil(tmp_path / "ran"), lora_tools.merge, run, memo._loaded):
        assert memo._loaded(pickle.dumps(memo.Done(evil, None, 1.0))) is None
    assert memo._loaded(pickle.dumps(7)) is None
    assert list(tmp_path.iterdir()) == []
    done = memo.Done(TensorSpec("a", "F32", (2,)), None, 1.0)
    assert memo._loaded(pickle.dumps(done)) == done


@pytest.mark.parametrize("what", ["its time", "its config", "the adapter", "another option"])
def test_of_other_inputs_all_is_done_anew(
    what: str, small: Path, tmp_path: Path, worth_it: None, counted: list[str], monkeypatch
) -> None:
    there = shutil.copytree(small, tmp_path / "in")
    (tmp_path / "to").mkdir()
    job = functools.partial(lora_tools.merge, there / "base", out=tmp_path / "to" / "out")
    end(monkeypatch, lambda: job(adapters=[there / "adapter"]))
    weight = 0.5 if what == "another option" else 1.0
    if what == "its time":
        for path in (there / "base").glob("*.safetensors"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif what == "its config":
        (there / "base" / "config.json").write_text('{"model_type": "llama", "x": 1}')
    elif what == "the adapter":
        path = there / "adapter" / "adapter_model.safetensors"
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    all_of_it = sorted(counted)
    counted.clear()
    job(adapters=[(there / "adapter", weight)], resume=True)
    # What an adapter does not act on is a copy of the base, whatever becomes of the adapter.
    others = {name for name in all_of_it if not name.endswith("proj.weight")}
    spared = others if what == "the adapter" else set()
    assert sorted(counted) == [name for name in all_of_it if name not in spared]


def test_another_version_begins_anew(
    merge: Merge, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_tools.verbs.writing.tool_version", lambda: "another")
    merge(resume=True)
    assert ended


# ------------------------------------------------------------------------------- kills and signals


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("verb", RESUMED)
def test_killed_and_resumed(verb: str, small: Path, tmp_path: Path, full: bool) -> None:
    """At steps by chance: killed, resumed and killed again, until it comes to its end."""
    first, here = tmp_path / "first", tmp_path / "here"
    first.mkdir()
    kinds = killing.steps(
        command(verb, small, first / "out"), first, tmp_path / "log", prelude=_ALL_COUNTS
    )
    wanted, chance = iotools.tree(first / "out"), random.Random(verb)
    for _ in range(40 if full else 2):
        here.mkdir()
        step = chance.randrange(1, len(kinds) + 1)
        line = command(verb, small, here / "out")
        for _ in range(3):
            done = killing.stopped(line, here, step, prelude=_ALL_COUNTS)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            if (here / "out").exists():
                assert iotools.tree(here / "out") == wanted
                break
            line = command(verb, small, here / "out", "--resume")
            step = chance.randrange(1, len(kinds) + 1)
        if not (here / "out").exists():
            assert forks.run(*line, code=_ALL_COUNTS + _RUN).returncode == 0
        assert iotools.tree(here / "out") == wanted, step
        forks.run(*line, code=_ALL_COUNTS + _RUN)  # refused, and clears away
        assert left_over(here, here / "out") == [], step
        shutil.rmtree(here)


_RUN = """
import sys
from lora_tools.cli import entry
entry()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_work_is_kept(number: signal.Signals, small: Path, tmp_path: Path):
    here, first = tmp_path / "here", tmp_path / "first"
    for folder in (here, first):
        folder.mkdir()
    line = command("merge", small, first / "out")
    kinds = killing.steps(line, first, tmp_path / "log", prelude=_ALL_COUNTS)
    line = command("merge", small, here / "out")
    appears = kinds.index("os.rename /.out.#/out") + 1
    done = killing.stopped(line, here, appears, number, prelude=_ALL_COUNTS)
    word = {signal.SIGTERM: "Terminated", signal.SIGINT: "Interrupted"}[number]
    assert done.returncode == 128 + number
    head, tail = done.stderr.splitlines()
    assert head == f"{word}; nothing was written."
    assert tail.startswith(f"{here / 'out'}: work of 0 s (")
    assert tail.endswith(f"is kept; {WAYS}")
    refused = forks.run(*line, code=_ALL_COUNTS + _RUN)
    assert refused.returncode == 2
    assert WAYS in refused.stderr
    assert forks.run(*line, "--resume").returncode == 0
    assert iotools.tree(here / "out") == iotools.tree(first / "out")
    assert left_over(here, here / "out") == []


def test_what_is_replaced_comes_back_before_work_is_kept(
    small: Path, tmp_path: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end fails while the old one is away."""
    out = tmp_path / "out.safetensors"
    base = iotools.checkpoint(tmp_path / "base", iotools.weights(width=32)) / "model.safetensors"
    job = functools.partial(lora_tools.merge, base, [small / "adapter"], out)
    job(reversible=True)
    old = iotools.tree(tmp_path)
    real = output.put

    def put(made: Path, place: Path, force: bool) -> None:
        if made.name == "out":
            raise OSError(5, "Input/output error")
        real(made, place, force)

    with monkeypatch.context() as patch:
        patch.setattr(output, "put", put)
        with pytest.raises(OutputError):
            job(reversible=True, force=True)
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert {k: v for k, v in iotools.tree(tmp_path).items() if not k.startswith(".")} == old
    assert len(left) == 1
    job(reversible=True, force=True, resume=True)
    assert iotools.tree(tmp_path) == old


# ---------------------------------------------------------------------------------- its parts


def test_a_ledger_on_a_full_disk_is_given_up(
    tmp_path: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    mine = Ledger(tmp_path)
    mine.put(b"a" * 16, 1.0, b"one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        mine.put(b"b" * 16, 1.0, b"two")
    mine.put(b"c" * 16, 1.0, b"three")
    mine.close()
    assert ledger.worth(tmp_path) == 0
    assert ledger.files(tmp_path)[0].stat().st_size == 0, "its room is the run's"


def test_a_ledger_is_read_by_the_next_and_not_before_it_is_worth_it(tmp_path: Path, monkeypatch):
    one = Ledger(tmp_path)
    one.put(b"a" * 16, 40.0, b"first")
    assert not ledger.files(tmp_path)
    one.put(b"b" * 16, 40.0, b"")
    one.close()
    two = Ledger(tmp_path)
    assert two.get(b"a" * 16) == b"first"
    assert two.get(b"b" * 16) == b""
    assert two.get(b"c" * 16) is None
    assert two.worth == ledger.worth(tmp_path) == 80
    two.put(b"c" * 16, 1.0, b"third")
    two.close()
    assert len(ledger.files(tmp_path)) == 2
    assert Ledger(tmp_path).get(b"c" * 16) == b"third"


def test_a_ledger_that_is_large_does_not_wait_in_memory(tmp_path: Path) -> None:
    one = Ledger(tmp_path)
    for i in range(5):
        one.put(bytes([i]) * 16, 0.1, bytes(4 << 20))
    assert ledger.files(tmp_path)[0].stat().st_size > 16 << 20


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(6.0)[::2],
        torch.zeros(3, 0, dtype=torch.bfloat16),
        torch.tensor(3, dtype=torch.int8),
        torch.rand(4).to(torch.float8_e4m3fn),
        torch.ones(2, 3).expand(4, 2, 3),
    ],
)
def test_results_hold_tensors_as_they_lie(tensor: torch.Tensor) -> None:
    done = memo._loaded(memo._dumped(memo.Done({"x": tensor}, None, 0.5)))
    assert done is not None
    again = done.result["x"]
    assert again.dtype == tensor.dtype
    assert torch.equal(again.float(), tensor.float())
    if tensor.dim() == 2 and 0 not in tensor.stride():
        assert again.stride() == tensor.stride()


class _Colour(enum.Enum):
    RED = 1


class _Pair:
    def __init__(self, one: object, two: object) -> None:
        self.one, self.two = one, two

    @functools.cached_property
    def both(self) -> str:
        return f"{self.one}{self.two}"


def test_a_digest_is_of_what_there_is() -> None:
    def key(value: object) -> bytes:
        return Canonical()(value)

    circle: list[object] = [1]
    circle.append(circle)
    other: list[object] = [2]
    other.append(other)
    different = [
        None,
        0,
        1,
        True,
        1.0,
        -0.0,
        0.0,
        "1",
        b"1",
        (1,),
        [1],
        (1, 2),
        (12,),
        {1: 2},
        {2: 1},
        {1},
        frozenset({1, 2}),
        _Colour.RED,
        Path("a"),
        Path("b"),
        len,
        pickle.dumps,
        _Colour,
        functools.partial(max, 1),
        functools.partial(max, 2),
        [].append,
        torch.zeros(2),
        torch.zeros(1, 2),
        torch.zeros(2, dtype=torch.float64),
        torch.ones(2),
        _Pair(1, 2),
        _Pair(2, 1),
        TensorSpec("a", "F32", (1,)),
        TensorSpec("b", "F32", (1,)),
        circle,
        other,
        "a" * 100,
        ["a", ["b"]],
        [["a"], "b"],
    ]
    assert len({key(each) for each in different}) == len(different)
    seen = _Pair(1, 2)
    assert seen.both
    assert key(seen) == key(_Pair(1, 2)), "what was computed so far says nothing"
    assert key({1: 2, 3: 4}) == key({3: 4, 1: 2})
    for unknown in (lambda: 1, (x for x in ())):
        with pytest.raises(Unknown):
            key(unknown)


def test_what_is_written_can_be_told() -> None:
    written: list[tuple[str, bytes, int]] = []

    class Writer:
        def write(self, name: str, data: memoryview, offset: int = 0) -> None:
            written.append((name, bytes(data), offset))

        def write_last(self, name: str, data: bytes) -> None:
            written.append((name, data, -1))

    sink = Recording(Writer())
    for name, data, offset in [("a", b"12", 0), ("a", b"34", 2), ("b", b"5", 0), ("a", b"7", 9)]:
        sink.write(name, memoryview(data), offset)
    sink.write_last("z", b"end")
    for name in "pq":
        out = HashedWrites(sink, name)
        out.write(memoryview(b"12"))
        out.write(memoryview(b"34"))
    sink.write("q", memoryview(b"56"), 4)
    taken = sink.taken()
    said = {extent[:3]: extent[3] for extent in taken.extents}
    assert list(said) == [
        ("a", 0, 4),
        ("b", 0, 1),
        ("a", 9, 1),
        ("p", 0, 4),
        ("q", 0, 4),
        ("q", 4, 2),
    ]
    one = bytes.fromhex(out.hexdigest())
    assert [said["a", 0, 4], said["p", 0, 4], said["q", 0, 4]] == [one] * 3
    assert taken.last == {"z": b"end"}
    assert len(written) == 10


@pytest.fixture
def one_file(tmp_path: Path) -> Iterator[CheckpointWriter]:
    shard = Shard("x", (TensorSpec("a", "U8", (4,)), TensorSpec("z", "U8", (9,))), {})
    with CheckpointWriter(tmp_path / "out", [shard], False) as writer:
        yield writer


def test_only_what_is_there_is_confirmed(one_file: CheckpointWriter, tmp_path: Path) -> None:
    sink = one_file.recording()
    sink.write("a", memoryview(b"abcd"))
    sink.write_last("z", b"end")
    taken = sink.taken()
    with CheckpointWriter(tmp_path / "two", one_file.memo_key()[0], False) as other:
        assert not other.confirm(taken), "it is another file"
        other.write("a", memoryview(b"abcd"))
        other.hand_over()
        assert other.confirm(taken)
        nowhere = memo.Done(None, taken, 0).taken.__class__((("q", 0, 1, b""),), {})
        beyond = nowhere.__class__((("z", 0, 1 << 40, b""),), {})
        assert not other.confirm(nowhere)
        assert not other.confirm(beyond)
        assert not other.confirm(nowhere.__class__((), {"q": b""}))
        other.finish(None, None, {})  # type: ignore[arg-type]
    assert (tmp_path / "two").read_bytes().endswith(b"abcdend")


def test_files_are_taken_up_within_their_staging_folder_alone(tmp_path: Path) -> None:
    place = tmp_path / "staging" / "out" / "a.safetensors"
    place.parent.mkdir(parents=True)
    place.write_text("it")
    assert not kept.take_up(place)
    kept.keep(tmp_path / "staging")
    assert not place.exists()
    with kept.within(tmp_path / "staging"):
        assert not kept.take_up(tmp_path / "a.safetensors")
        assert not kept.take_up(place.with_name("b.safetensors"))
        assert kept.take_up(place)
    assert place.read_text() == "it"
