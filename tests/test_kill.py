"""Killed at any moment, interrupted, out of space, forbidden to write: the destination is absent or
complete, the inputs are as they were, and the next run succeeds."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from lora_tools.cli import run
from lora_tools.formats import output
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint

from . import iotools

VERBS = {
    "extract": ["extract", "base", "tuned", "--rank", "4"],
    "merge": ["merge", "base", "adapter", "--reversible"],
    "unmerge": ["unmerge", "merged", "adapter"],
    "rescale": ["rescale", "adapter", "--rank", "3"],
    "combine": ["combine", "adapter", "adapter", "--rank", "3"],
    "convert": ["convert", "adapter", "--to", "mlx"],
    "quantize": ["quantize", "base", "--adapter", "adapter"],
    "compensate": ["quantize", "base", "--adapter", "adapter", "--compensate", "2"],
    "dequantize": ["dequantize", "packed"],
    "requantize": ["merge", "packed", "adapter", "--requantize"],
    "export": ["export", "base", "--adapter", "adapter", *iotools.EXPORT],
}


def inputs(top: Path, width: int, layers: int, shards: int) -> Path:
    """Everything that the verbs read, below a folder."""
    tensors = iotools.weights(width=width, layers=layers)
    iotools.checkpoint(top / "base", tensors, shards)
    iotools.checkpoint(top / "tuned", iotools.moved(tensors), shards)
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors), 8)
    iotools.graph(top / "graph", top / "base", tensors)
    before = signal.getsignal(signal.SIGTERM)
    merge = ["merge", str(top / "base"), str(top / "adapter"), "-o", str(top / "merged")]
    assert run([*merge, "--reversible", "-q"]) == 0
    assert run(["quantize", str(top / "base"), "-o", str(top / "packed"), "-q"]) == 0
    signal.signal(signal.SIGTERM, before)
    return top


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=1, shards=2)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("medium"), width=512, layers=6, shards=3)


def command(verb: str, top: Path, out: Path, *rest: str) -> list[str]:
    name, *words = VERBS[verb]
    given = [str(top / word) if (top / word).exists() else word for word in words]
    return [name, *given, "-o", str(out), "-q", *rest]


def is_complete(out: Path) -> bool:
    """Loadable, every file of it."""
    if (out / "adapter_config.json").exists() or (out / "adapter_model.safetensors").exists():
        adapter = open_adapter(out)
        return all(len(adapter.file.raw(name)) >= 0 for name in adapter.file.specs)
    if (out / "model.onnx").exists():
        onnx.checker.check_model(str(out / "model.onnx"))  # which looks for the weights' files
    checkpoint = open_checkpoint(out)
    return bool(checkpoint.config) and (out / "tokenizer.json").is_file()


def left_over(folder: Path, out: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path != out]


# ------------------------------------------------------------- a kill before every single step

# Forks a child for each number read; the child is killed right before that many-th change of the
# file system, so that every state a kill can leave behind is met. Starting torch once is enough.
_SERVER = """
import os, signal, sys
import torch
import lora_tools
from lora_tools.cli import run
for name in lora_tools.__all__:
    getattr(lora_tools, name)
import lora_tools.linalg.nf4, lora_tools.quantizing.requantize, lora_tools.onnx.graphs
import lora_tools.sources.adapters, lora_tools.engine.threads, lora_tools.formats.sidecar
import lora_tools.linalg.lora, lora_tools.linalg.merge, lora_tools.linalg.svd
top, args = sys.argv[1], sys.argv[2:]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
left = 0

def count(event, values):
    global left
    if event == "open":
        path, _, flags = values
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(top):
            return
        if not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            return
    elif event not in CHANGES:
        return
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        left = int(line)
        sys.addaudithook(count)
        os._exit(run(args))
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("verb", VERBS)
def test_killed_before_every_step(verb, force, small, tmp_path):
    out, old = tmp_path / "here" / "out", tmp_path / "old"
    out.parent.mkdir()
    flags = ("--force",) if force else ()
    untouched = iotools.tree(small)
    assert run(command(verb, small, old)) == 0
    (old / "README.md").write_text("the old one")
    server = [sys.executable, "-c", _SERVER, str(out.parent), *command(verb, small, out, *flags)]
    seen = set()
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def child(step: int) -> int:
            print(step, file=process.stdin)
            return int(process.stdout.readline())

        for step in itertools.count(1):
            if force:
                shutil.copytree(old, out)
            status = child(step)
            state = "absent" if not out.exists() else "old" if _is_old(out) else "new"
            seen.add(state)
            if state != "absent":
                assert is_complete(out), step
            elif force:  # between the two renames: the old one lies beside, whole
                (aside,) = out.parent.glob(".out.loratools-*/old")
                assert is_complete(aside), step
            if status == 0:
                break
            assert status == signal.SIGKILL, step
            assert child(0) == (256 if state == "new" and not force else 0), step
            assert is_complete(out)
            assert not _is_old(out)
            assert left_over(out.parent, out) == [], step
            shutil.rmtree(out)
    assert step > 8
    assert seen == ({"old", "absent", "new"} if force else {"absent", "new"})
    assert iotools.tree(small) == untouched


def _is_old(out: Path) -> bool:
    return (out / "README.md").exists()


# ----------------------------------------------------------------------- kills at any old moment


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random_moments(verb, medium, tmp_path):
    out, first = tmp_path / "here" / "out", tmp_path / "first"
    out.parent.mkdir()
    untouched = iotools.tree(medium)
    started = time.monotonic()
    assert iotools.cli(*command(verb, medium, first)).returncode == 0
    lasts = time.monotonic() - started
    whole = iotools.tree(first)
    dice = random.Random(verb)
    killed = 0
    for i in range(12):
        if killed == 5:
            break
        force = i % 2 == 1
        shutil.rmtree(out, ignore_errors=True)
        if force:
            shutil.copytree(first, out)
        line = [*iotools.COMMAND, *command(verb, medium, out, *(["--force"] if force else []))]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
            # Most of a run is the start of Python; the moments that matter come after.
            time.sleep(lasts * dice.uniform(0.35, 1.0))
            process.kill()
            was_killed = process.wait() == -signal.SIGKILL
        killed += was_killed
        if not was_killed:  # the machine has become faster than it was
            lasts *= 0.8
        if out.exists():
            assert iotools.tree(out) == whole
        else:
            assert not force or list(out.parent.glob(".out.loratools-*/old"))
    assert killed >= 5
    assert iotools.cli(*command(verb, medium, out, "--force")).returncode == 0
    assert iotools.tree(out) == whole
    assert left_over(out.parent, out) == []
    assert iotools.tree(medium) == untouched


# Says when the handlers stand, so that no test depends on how long Python takes to start.
_READY = """
import signal
real = signal.signal
def announce(*args):
    result = real(*args)
    print("ready", flush=True)
    return result
signal.signal = announce
from lora_tools.cli import entry
entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_leaves_no_trace(verb, number, medium, tmp_path):
    out = tmp_path / "out"
    untouched = iotools.tree(medium)
    dice = random.Random(f"{verb} {number}")
    for moment in ("at the start", "once staged", "a little later"):
        line = [sys.executable, "-c", _READY, *command(verb, medium, out)]
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05)
            deadline = time.monotonic() + 60
            while moment != "at the start" and time.monotonic() < deadline:
                if out.exists() or left_over(tmp_path, out):
                    break
                time.sleep(0.002)
            if moment == "a little later":
                time.sleep(dice.uniform(0.01, 0.1))
            process.send_signal(number)
            said = process.communicate()[1].strip()
        if process.returncode == 0:  # it was done by then
            assert is_complete(out)
            shutil.rmtree(out)
        else:
            assert process.returncode == 128 + number, said
            assert said.count("\n") == 0, said
            assert said
            assert "Traceback" not in said
            assert moment != "at the start" or not out.exists()
            if out.exists():
                assert is_complete(out)
                shutil.rmtree(out)
        assert list(tmp_path.iterdir()) == []
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
        monkeypatch.setattr("lora_tools.verbs.frame.check_space", lambda *given: None)
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
    assert "No space left on device" in said
    assert list(disk.iterdir()) == []


def test_what_a_kill_left_does_not_count_against_the_space(small, disk):
    left = disk / ".out.loratools-0badcafe" / "out"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b" " * 20_000)
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
