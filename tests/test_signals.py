"""What is said after a signal is true, and a second one leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from . import forks, iotools

WORDS = {signal.SIGTERM: "Terminated", signal.SIGINT: "Interrupted"}
_START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
given = __import__("json").loads(sys.argv.pop(1))
number = given["number"]
"""
_END = """
from lora_tools.cli import entry
entry()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tensors = iotools.weights()
    iotools.checkpoint(folder / "base", tensors, 2)
    iotools.adapter(folder / "adapter", iotools.linear_shapes(tensors), 2)
    return folder


def run(
    code: str, number: signal.Signals, *args: object, **given: object
) -> subprocess.CompletedProcess[str]:
    said = json.dumps({"number": int(number), **given})
    return forks.run(said, *args, "-q", code=_START + code + _END)


def files(folder: Path) -> Mapping[str, str]:
    """What stands there."""
    return iotools.tree(folder) if folder.exists() else {}


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_that_an_import_makes_an_error_of(number, work, tmp_path):
    """Extension modules do: an interrupted import is an ImportError, as of what is not there."""
    code = """
class Finder:
    def find_spec(self, name, *rest):
        if name == "onnxruntime":
            try:
                os.kill(os.getpid(), number)
            except BaseException:
                raise ImportError(name) from None
sys.meta_path.insert(0, Finder())
sys.modules.pop("onnxruntime", None)
"""
    args = ["convert", work / "adapter", "-o", tmp_path / "out", "--to", "onnxruntime"]
    done = run(code, number, *args)
    assert done.stderr == f"{WORDS[number]}; nothing was written.\n"
    assert done.returncode == 128 + number
    assert files(tmp_path) == {}


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("name", ["_keep_freed_memory", "interruption.begin"])
def test_a_signal_before_the_command_begins_ends_it_without_a_word(name, number, work, tmp_path):
    code = f"""
import lora_tools.cli as cli
def early():
    os.kill(os.getpid(), number)
cli.{name} = early
"""
    done = run(code, number, "merge", work / "base", work / "adapter", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (-number, "")
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_that_something_swallows_ends_the_command_all_the_same(number, work, tmp_path):
    """What it broke off may be missing from the output: that does not appear."""
    code = """
import lora_tools.engine.threads as threads
real = threads.run
def swallow(*args, **options):
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass
    return real(*args, **options)
threads.run = swallow
"""
    done = run(code, number, "merge", work / "base", work / "adapter", "-o", tmp_path / "out")
    assert done.stderr == f"{WORDS[number]}; nothing was written.\n"
    assert done.returncode == 128 + number
    assert files(tmp_path) == {}


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_that_falls_into_a_finalizer_leaves_no_traceback(number, work, tmp_path):
    code = """
class Loud:
    def __del__(self):
        os.kill(os.getpid(), number)
import lora_tools.engine.threads as threads
real = threads.run
def run(*args, **options):
    Loud()
    return real(*args, **options)
threads.run = run
"""
    done = run(code, number, "merge", work / "base", work / "adapter", "-o", tmp_path / "out")
    assert done.stderr == f"{WORDS[number]}; nothing was written.\n"
    assert done.returncode == 128 + number
    assert files(tmp_path) == {}


# Sends a signal at the so-many-th change below a folder, and at each one that follows.
_OVER_AND_OVER = """
count = 0
def hook(event, values):
    global count
    writes = event == "open" and values[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or writes
    path = values[0] if changes else None
    if isinstance(path, str | os.PathLike) and ".loratools-" in os.fspath(path):
        count += 1
        if count >= given["at"]:
            os.kill(os.getpid(), number)
sys.addaudithook(hook)
"""


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_signals_over_and_over_from_any_step_on(number, force, work, tmp_path):
    args = ["merge", work / "base", work / "adapter", "--reversible"]
    top, whole = tmp_path / "top", tmp_path / "whole"
    whole.mkdir()
    assert forks.run(*args, "-o", whole / "out").returncode == 0
    new, seen = files(whole), set()
    for at in range(1, 60):
        top.mkdir()
        if force:
            (top / "out").mkdir()
            (top / "out" / "old").touch()
        before = files(top)
        given = [*args, "-o", top / "out", *(["--force"] if force else [])]
        done = run(_OVER_AND_OVER, number, *given, at=at)
        after = files(top)
        shutil.rmtree(top)
        if not done.returncode:
            assert after == new
            break
        assert done.returncode == 128 + number, done.stderr
        what = "nothing" if after == before else top / "out"
        assert done.stderr == f"{WORDS[number]}; {what} was written.\n", at
        assert after in (before, new), at
        seen.add(after == new)
    assert seen == {False, True}


def test_all_that_stands_is_named(work, tmp_path):
    """Right before the end, when all has been written."""
    code = """
import lora_tools.cli.render as render
render.show = lambda *args, **options: os.kill(os.getpid(), number)
"""
    report, out = tmp_path / "report.json", tmp_path / "out"
    args = ["merge", work / "base", work / "adapter", "-o", out, "--report", report]
    said = json.dumps({"number": int(signal.SIGTERM)})
    done = forks.run(said, *args, code=_START + code + _END)
    assert done.returncode == 143
    assert done.stderr == f"Terminated; {out}, {report} were written.\n"
    assert out.is_dir()
    assert json.loads(report.read_text())["verb"] == "merge"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_of_several_runs_at_once_one_writes(verb, work, tmp_path):
    """None has seen another's output before all have begun; there is no --force."""
    lines = {
        "merge": ["merge", work / "base", work / "adapter"],
        "convert": ["convert", work / "adapter", "--to", "kohya"],
    }
    code = """
import json, time
from pathlib import Path
import lora_tools.formats.output as output
given = json.loads(sys.argv.pop(1))
commit = output._Staging.commit
def together(self, force):
    Path(given["here"], str(os.getpid())).touch()
    while len(os.listdir(given["here"])) < 3:
        time.sleep(0.001)
    commit(self, force)
output._Staging.commit = together
"""
    for attempt in range(3):
        here, top = tmp_path / f"here{attempt}", tmp_path / f"top{attempt}"
        here.mkdir()
        top.mkdir()
        out = top / "out"
        given = json.dumps({"here": str(here)})
        said = [(tmp_path / f"said{i}").open("w+") for i in range(3)]
        line = [given, *lines[verb], "-o", out, "-q"]
        runs = [forks.Run(line, code="import os, sys" + code + _END, stderr=each) for each in said]
        codes = [each.wait() for each in runs]
        texts = []
        for each in said:
            each.seek(0)
            texts.append(each.read())
            each.close()
        assert sorted(codes) == [0, 1, 1]
        loser = f"Error: {out} appeared during this run and was not replaced; choose another output"
        assert sorted(texts) == ["", *[f"{loser} or pass --force\n"] * 2]
        assert [path.name for path in top.iterdir()] == ["out"]
        (alone := tmp_path / f"alone{attempt}").mkdir()
        assert forks.run(*lines[verb], "-o", alone / "out", "-q").returncode == 0
        assert files(top) == files(alone)
