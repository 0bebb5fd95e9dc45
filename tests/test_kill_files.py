"""Files that stand beside a verb's main output, or are all of it (spectrum caches, statistics,
pictures): whole or as they were after a kill, on a full disk and on one that is locked."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import lora_tools
from lora_tools.formats import output

from . import iotools, killing, models
from .test_kill import disk, fails  # noqa: F401 (fixtures)

FILES = {
    "cache": [
        "extract",
        "base",
        "tuned",
        "--rank",
        "4",
        "-o",
        "OUT",
        "--force",
        "--spectrum-cache",
        "FILE",
    ],
    "statistics": [
        "collect-stats",
        "base",
        "text.txt",
        "-o",
        "FILE",
        "--force",
        "--length",
        "20",
        "--max-tokens",
        "40",
        "-j",
        "1",
    ],
    "picture of a change": ["diff", "base", "tuned", "--plot", "FILE"],
    "picture of an adapter": ["inspect", "adapter", "--plot", "FILE"],
}
# Drawing takes a second or two, and is all done before the first step.
PRELUDE = """
import lora_tools.plots
lora_tools.plots.draw = lambda picture, suffix: b"a picture " * 10_000
"""
OPTIONS = {"imports": ["transformers.models.llama.modeling_llama"], "prelude": PRELUDE}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, an adapter, and text."""
    folder = tmp_path_factory.mktemp("sides")
    model = models.make("llama").bfloat16()
    models.save(model, folder / "base")
    models.perturb(model, 0.02, seed=1)
    models.save(model, folder / "tuned")
    iotools.tokenizer(folder / "base", models.VOCAB)
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=8)
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 41}" for i in range(40)))
    return folder


def command(what: str, sides: Path, here: Path, out: Path) -> list[str]:
    paths = {"FILE": str(here / "file.svg"), "OUT": str(out)}
    words = [paths.get(word, word) for word in FILES[what]]
    return [str(sides / w) if (sides / w).exists() else w for w in words] + ["-q"]


def an_old_one(what: str, sides: Path, file: Path) -> None:
    """What may stand there: a cache of other options; any file else."""
    if what == "cache":
        lora_tools.extract(
            sides / "base",
            sides / "tuned",
            file.with_name("made"),
            rank=4,
            seed=1,
            spectrum_cache=file,
            force=True,
        )
        shutil.rmtree(file.with_name("made"))
    else:
        file.write_bytes(b"the old one")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("what", "there"),
    [
        ("cache", False),
        ("cache", True),
        ("statistics", False),
        ("statistics", True),
        ("picture of a change", True),
        ("picture of an adapter", False),
    ],
)
def test_killed_before_every_step(what, there, sides, tmp_path, full):
    here, out = tmp_path / "here", tmp_path / "elsewhere" / "out"
    here.mkdir()
    out.parent.mkdir()
    file, untouched = here / "file.svg", iotools.tree(sides)
    old = None
    if there:
        an_old_one(what, sides, file)
        old = file.read_bytes()
    line = command(what, sides, here, out)

    def child(step: int) -> int:
        return killing.stopped(line, here, step, **OPTIONS).returncode

    kinds = killing.steps(line, here, tmp_path / "log", **OPTIONS)
    assert len(kinds) > 3
    new = file.read_bytes()
    assert new != old
    seen = set()
    told = killing.telling(kinds)
    if not full:
        told = killing.some(kinds, told, what, 3)
    for i, step in enumerate([*told, 0]):
        file.unlink(missing_ok=True)
        if old is not None:
            file.write_bytes(old)
        status = child(step)
        now = file.read_bytes() if file.exists() else None
        assert now in (old, new), step
        seen.add(now)
        assert status == (-signal.SIGKILL if step else 0), step
        if step and i % 4 == 3:
            assert child(0) == 0, step
            assert file.read_bytes() == new
            assert [path.name for path in here.iterdir()] == [file.name], step
    assert seen == {old, new}
    assert iotools.tree(sides) == untouched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sweep(2)
@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("trouble", ["full", "locked", "failing"])
def test_a_disk_that_is_full_or_locked_or_fails(
    what, trouble, sides, tmp_path, request, monkeypatch
):
    fails = request.getfixturevalue("fails")  # noqa: F811
    untouched = iotools.tree(sides)
    here = tmp_path / "here"
    if trouble == "failing":
        here.mkdir()

        def fail(fd: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(output.os, "fsync", fail)
        says = "Input/output error"
    else:
        here = request.getfixturevalue("disk")
        if trouble == "locked":
            subprocess.run(["mount", "-o", "remount,ro", str(here)], check=True)
            says = "cannot write there (Read-only file system)"
        else:
            says = "No space left on device"
        monkeypatch.setattr("lora_tools.verbs.writing.check_space", lambda *given: None)
    said = fails(command(what, sides, here, tmp_path / "out"))
    assert says in said
    assert list(here.iterdir()) == []
    assert not (tmp_path / "out").exists()
    assert iotools.tree(sides) == untouched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FILES)
def test_no_input_is_written_to(what, sides, tmp_path, fails):  # noqa: F811
    untouched = iotools.tree(sides)
    folder = sides / ("adapter" if "adapter" in FILES[what] else "base")
    said = fails(command(what, sides, folder, tmp_path / "out"))
    assert "the input is never modified" in said
    assert iotools.tree(sides) == untouched


def test_statistics_that_exist_stay_without_force(sides, tmp_path, fails):  # noqa: F811
    line = command("statistics", sides, tmp_path, tmp_path)
    line.remove("--force")
    (tmp_path / "file.svg").write_text("mine")
    assert "already exists" in fails(line)
    assert (tmp_path / "file.svg").read_text() == "mine"
