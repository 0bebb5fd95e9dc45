"""Files that stand beside a verb's main output, or are all of it (spectrum caches, statistics,
pictures): whole or as they were after a kill, on a full disk and on one that is locked."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lora_tools
from lora_tools.formats import output

from . import iotools, models
from .test_kill import _SERVER, disk, fails  # noqa: F401 (fixtures)

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
IMPORTS = """
import matplotlib.figure, matplotlib.backends.backend_svg, matplotlib.font_manager
import transformers, transformers.models.llama.modeling_llama, torch._dynamo
import lora_tools.calibration, lora_tools.plots, lora_tools.formats.spectra
"""


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
def test_killed_before_every_step(what, there, sides, tmp_path):
    here, out = tmp_path / "here", tmp_path / "elsewhere" / "out"
    here.mkdir()
    out.parent.mkdir()
    file, untouched = here / "file.svg", iotools.tree(sides)
    old = None
    if there:
        an_old_one(what, sides, file)
        old = file.read_bytes()
    line = command(what, sides, here, out)
    server = _SERVER.replace(
        "import lora_tools.sources.adapters", IMPORTS + "import lora_tools.sources.adapters"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", server, str(here), *line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def child(step: int) -> int:
            print(step, file=process.stdin)
            return int(process.stdout.readline())

        assert child(0) == 0
        new = file.read_bytes()
        assert new != old
        seen = set()
        for step in itertools.count(1):
            file.unlink(missing_ok=True)
            if old is not None:
                file.write_bytes(old)
            status = child(step)
            now = file.read_bytes() if file.exists() else None
            assert now in (old, new), step
            seen.add(now)
            if status == 0:
                break
            assert status == signal.SIGKILL, step
            if step % 3 == 0:
                assert child(0) == 0, step
                assert file.read_bytes() == new
                assert [path.name for path in here.iterdir()] == [file.name], step
    assert step > 3
    assert seen == {old, new}
    assert iotools.tree(sides) == untouched


@pytest.mark.filterwarnings("ignore")
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
        monkeypatch.setattr("lora_tools.verbs.frame.check_space", lambda *given: None)
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
