"""Killed at any moment, interrupted, out of space, forbidden to write: the destination is absent or
complete, the inputs are as they were, and the next run succeeds."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_tools.cli import run
from lora_tools.formats import output

from . import forks, iotools, killing
from .campaign.lines import VERBS, command, inputs, is_complete, left_over


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=1, shards=2)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("medium"), width=512, layers=6, shards=3)


# ------------------------------------------------------------- a kill before every single step


@pytest.mark.sweep(3)
@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("verb", VERBS)
def test_killed_before_every_step(verb, force, small, tmp_path, full):
    """Every state that a kill can leave behind is met. In CI each fourth step is, or each sixth
    where ``--force`` adds its own at the end, and the next run is made after each third."""
    out, old = tmp_path / "here" / "out", tmp_path / "old"
    out.parent.mkdir()
    flags = ("--force",) if force else ()
    untouched = iotools.tree(small)
    assert run(command(verb, small, old)) == 0
    (old / "of the old one").write_text("the old one")
    if force:
        shutil.copytree(old, out)
    line = command(verb, small, out, *flags)
    kinds = killing.steps(line, out.parent, tmp_path / "log")
    shutil.rmtree(out)
    told = killing.telling(kinds)
    assert len(told) > 12
    if not full:
        told = killing.some(kinds, told, verb, 6 if force else 4)
    seen = set()
    for i, step in enumerate(told):
        if force:
            shutil.copytree(old, out)
        done = killing.stopped(line, out.parent, step)
        assert done.returncode == -signal.SIGKILL, step
        state = "absent" if not out.exists() else "old" if _is_old(out) else "new"
        seen.add(state)
        if state != "absent":
            assert is_complete(out), step
        if full or i % 3 == 0 or state == "new":
            assert forks.run(*line).returncode == (1 if state == "new" and not force else 0), step
            assert is_complete(out)
            assert not _is_old(out)
            assert left_over(out.parent, out) == [], step
        shutil.rmtree(out.parent)
        out.parent.mkdir()
    assert seen == {"old" if force else "absent", "new"}
    assert iotools.tree(small) == untouched


def _is_old(out: Path) -> bool:
    return (out / "of the old one").exists()


# ------------------------------------------------------------------ kills while there is much to do


@pytest.mark.slow
@pytest.mark.sweep(3)
@pytest.mark.parametrize("verb", VERBS)
def test_killed_in_the_middle(verb, medium, tmp_path, full):
    """At steps by chance, most of them amid the bytes of a tensor, while other threads write."""
    out, first = tmp_path / "here" / "out", tmp_path / "first"
    out.parent.mkdir()
    first.mkdir()
    untouched = iotools.tree(medium)
    count = len(killing.steps(command(verb, medium, first / "out"), first, tmp_path / "log"))
    whole = iotools.tree(first / "out")
    for i, step in enumerate(
        random.Random(verb).sample(range(1, count + 1), min(count, 50 if full else 5))
    ):
        force = i % 2 == 1
        shutil.rmtree(out, ignore_errors=True)
        if force:
            shutil.copytree(first / "out", out)
        line = command(verb, medium, out, *(["--force"] if force else []))
        done = killing.stopped(line, out.parent, step)
        # Replacing clears away what was replaced, which is steps more, never fewer.
        assert done.returncode == -signal.SIGKILL, step
        if out.exists():
            assert iotools.tree(out) == whole
        else:
            assert not force
    assert forks.run(*command(verb, medium, out, "--force")).returncode == 0
    assert iotools.tree(out) == whole
    assert left_over(out.parent, out) == []
    assert iotools.tree(medium) == untouched


# Sends itself a signal while torch is being imported.
_AT_THE_START = """
import os, signal, sys
number = int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
def hook(event, values):
    if event == "import" and values[0] == "torch.nn.modules":
        os.kill(os.getpid(), number)
sys.addaudithook(hook)
from lora_tools.cli import entry
entry()
"""
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def ends_in_a_line(
    done: subprocess.CompletedProcess[str], number: signal.Signals, written: object = "nothing"
) -> None:
    word = {signal.SIGTERM: "Terminated", signal.SIGINT: "Interrupted"}[number]
    assert done.stderr == f"{word}; {written} was written.\n"
    assert done.returncode == 128 + number


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["extract", "export"])
def test_a_signal_at_the_start_leaves_no_trace(verb, number, small, tmp_path):
    untouched = iotools.tree(small)
    line = [sys.executable, "-c", _AT_THE_START, str(int(number))]
    line += command(verb, small, tmp_path / "out")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    ends_in_a_line(done, number)
    assert list(tmp_path.iterdir()) == []
    assert iotools.tree(small) == untouched


@pytest.mark.sweep(6)
@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_leaves_no_trace(verb, number, medium, tmp_path):
    """Once staged, in the middle, and right before the output would appear."""
    here, first = tmp_path / "here", tmp_path / "first"
    untouched = iotools.tree(medium)
    for folder in (here, first):
        folder.mkdir()
    kinds = killing.steps(command(verb, medium, first / "out"), first, tmp_path / "log")
    appears = kinds.index("os.rename /.out.#/out") + 1
    middle = random.Random(f"{verb} {number}").randrange(3, appears)
    line = command(verb, medium, here / "out")
    for step in (2, middle, appears):
        ends_in_a_line(killing.stopped(line, here, step, number), number)
        assert list(here.iterdir()) == [], step
    done = killing.stopped(line, here, appears + 1, number)  # the output stands by then
    if done.returncode:
        ends_in_a_line(done, number, here / "out")
    assert is_complete(here / "out")
    assert left_over(here, here / "out") == []
    assert iotools.tree(medium) == untouched


# ------------------------------------------------------------------------- disks full or locked


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 32 kB."""
    if not iotools.is_root() or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Inputs of which no output fits on the disk."""
    return inputs(tmp_path_factory.mktemp("larger"), width=256, layers=4, shards=2)


@pytest.fixture
def fails(capfd):
    """Runs a command that must fail in one line, and returns the line."""

    def check(line: list[str]) -> str:
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        assert run(line) == 1
        signal.signal(signal.SIGTERM, before)
        said = capfd.readouterr().err
        assert said.startswith("Error: ")
        assert said.count("\n") == 1
        return said

    return check


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "met on the way"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk(verb, checked, larger, disk, fails, monkeypatch):
    untouched = iotools.tree(larger)
    if not checked:
        monkeypatch.setattr("lora_tools.verbs.writing.check_space", lambda *given: None)
    said = fails(command(verb, larger, disk / "out"))
    assert said.startswith(f"Error: {disk / 'out'}: ")
    assert ("needs" in said) is checked
    assert ("No space left on device" in said) is not checked
    assert list(disk.iterdir()) == []
    assert iotools.tree(larger) == untouched


def test_a_disk_that_small_files_fill(small, disk, fails, tmp_path):
    shutil.copytree(small, tmp_path / "in")
    (tmp_path / "in" / "base" / "tokenizer.json").write_bytes(b" " * 40_000)
    said = fails(command("merge", tmp_path / "in", disk / "out"))
    assert "needs" in said
    assert list(disk.iterdir()) == []


def test_what_a_kill_left_does_not_count_against_the_space(small, disk):
    left = disk / ".out.loratools-0badcafe" / "out"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b" " * 20_000)
    killing.mark(left.parent)
    assert run(command("unmerge", small, disk / "out")) == 0
    assert left_over(disk, disk / "out") == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_may_not_be_written_to(verb, small, disk, fails):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = fails(command(verb, small, disk / "out"))
    assert said == f"Error: {disk}: cannot write there (Read-only file system)\n"
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fails_at_the_end(verb, small, tmp_path, fails, monkeypatch):
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output.os, "fsync", fail)
    said = fails(command(verb, small, tmp_path / "out"))
    assert said == f"Error: {tmp_path / 'out'}: Input/output error\n"
    assert list(tmp_path.iterdir()) == []
