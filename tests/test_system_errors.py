"""What the system refuses: the tree's error, with the file's name, and still an OSError."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools import plots
from lora_tools.cli import run
from lora_tools.errors import FileError, LoraToolsError, OutputError, UsageError, errors_of_the_tree
from lora_tools.formats.output import check_destination

from . import forks, iotools
from .test_kill import disk  # noqa: F401 (a fixture)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tensors = iotools.weights(layers=1)
    iotools.checkpoint(tmp_path / "base", tensors)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    return tmp_path


def test_an_error_of_the_system_is_of_the_tree() -> None:
    with pytest.raises(FileError, match=r"^/x: Permission denied$") as caught, errors_of_the_tree():
        raise PermissionError(errno.EACCES, "Permission denied", "/x")
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, "/x")
    with pytest.raises(FileError, match="ulimit -n"), errors_of_the_tree():
        raise OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OutputError, match=r"^as it was$"), errors_of_the_tree():
        raise OutputError("as it was")
    with pytest.raises(BrokenPipeError), errors_of_the_tree():
        raise BrokenPipeError


@pytest.mark.parametrize("verb", ["merge", "inspect", "quantize"])
def test_no_bare_error_of_the_system_reaches_a_caller(verb: str, work: Path, monkeypatch: Any):
    """A disk that fails wherever a file is opened: of any number of times."""
    calls: dict[str, Any] = {
        "merge": lambda: lora_tools.merge(work / "base", [work / "adapter"], work / "out"),
        "inspect": lambda: lora_tools.inspect(work / "base"),
        "quantize": lambda: lora_tools.quantize(work / "base", work / "out"),
    }
    real = os.open
    for at in range(1, 60):
        left = [at]

        def failing(path: Any, *rest: Any, left: list[int] = left, **more: Any) -> int:
            left[0] -= str(path).startswith(str(work))
            if left[0] == 0:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            try:
                calls[verb]()
            except LoraToolsError as error:
                assert "Input/output error" in str(error)  # noqa: PT017
        shutil.rmtree(work / "out", ignore_errors=True)
        if left[0] > 0:
            break
    assert 2 < at < 59


def test_a_folder_that_was_deleted_is_no_place_to_work_in(work: Path) -> None:
    gone = work / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd())\nfrom lora_tools.cli import entry\nentry()"
    done = forks.run("merge", work / "base", work / "adapter", "-o", "out", code=code, cwd=gone)
    assert done.stderr == (
        "Error: the current folder does not exist any more; change to another one (cd)\n"
    )
    assert done.returncode == 2


def test_a_mount_point_is_refused_before_the_work(disk: Path, work: Path) -> None:  # noqa: F811
    with pytest.raises(OutputError, match="another file system is mounted there"):
        lora_tools.merge(work / "base", [work / "adapter"], disk, force=True)
    assert list(disk.iterdir()) == []
    check_destination(disk / "inside", force=True)
    file, other = work / "a file", work / "o ther"
    file.touch()
    other.touch()
    subprocess.run(["mount", "--bind", str(file), str(other)], check=True)
    try:
        with pytest.raises(OutputError, match="is mounted there"):
            check_destination(other, force=True)
        check_destination(file, force=True)
    finally:
        subprocess.run(["umount", str(other)], check=True)


@pytest.mark.parametrize("length", [240, 250, 255])
def test_long_names(length: int, work: Path) -> None:
    """Of the output, and of a bare file, whose sidecar's name is longer by eight."""
    shutil.copy(work / "base" / "model.safetensors", work / "bare.safetensors")
    stem = length - len(".safetensors")
    out = work / ("n" * stem + ".safetensors")
    call: Any = lambda **more: lora_tools.merge(  # noqa: E731
        work / "bare.safetensors", [work / "adapter"], out, **more
    )
    call()
    assert out.is_file()
    out.unlink()
    if length + len(".sidecar") <= 255:
        call(reversible=True)
        assert lora_tools.unmerge(out, [work / "adapter"], work / "back").totals["exact"]
    else:
        with pytest.raises(OutputError, match="File name too long"):
            call(reversible=True)
        assert not out.exists()
    with pytest.raises(OutputError, match="File name too long"):
        lora_tools.merge(work / "base", [work / "adapter"], work / ("n" * 256))


def test_an_adapter_of_onnxruntime_on_a_full_disk(disk: Path, work: Path, monkeypatch: Any):  # noqa: F811
    monkeypatch.setattr("lora_tools.verbs.writing.check_space", lambda *given: None)
    for taken in range(8):
        (disk / "taken").write_bytes(b" " * 4096 * taken)
        try:
            lora_tools.convert(work / "adapter", disk / "a.onnx_adapter", to="onnxruntime")
            (disk / "a.onnx_adapter").unlink()
        except OutputError as error:
            assert "No space left" in str(error) or "cannot write" in str(error)  # noqa: PT017
    assert [path.name for path in disk.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    "given", ["0", "0.4", "-1", "-5GB", "5 parsecs", "", "GB", "1" * 400, f"{10**30}", "1e3"]
)
def test_sizes_that_are_none(given: str, work: Path, capfd: Any) -> None:
    line = ["merge", str(work / "base"), str(work / "adapter"), "-o", str(work / "out")]
    assert run([*line, f"--shard-size={given}"]) == 2
    said = capfd.readouterr().err
    assert "size" in said
    assert said.count("\n") == 1
    with pytest.raises(UsageError, match="size"):
        lora_tools.merge(work / "base", [work / "adapter"], work / "out", shard_size=given)
    assert not (work / "out").exists()


def test_the_smallest_size_puts_each_tensor_into_a_file(work: Path) -> None:
    lora_tools.merge(work / "base", [work / "adapter"], work / "out", shard_size="1")
    tensors = len(iotools.weights(layers=1))
    assert len(list((work / "out").glob("model-*.safetensors"))) == tensors


HOSTILE = ["$", "$$", r"$\frac{", "a$b$c", r"$\$", r"\$x$", "_^{}%&#~", "${x}$ $"]


def test_names_are_no_formulas(monkeypatch: Any) -> None:
    """Drawn, and as they are written."""
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    lines = [plots.Line(name, [3.0, 2.0, 1.0], float("nan"), 1) for name in HOSTILE]
    picture = plots.Picture(
        "$\\frac$", [[1.0, 2.0]] * len(HOSTILE), HOSTILE, ["$0$", "$1"], "relative change, %",
        lines, {"$\\x$": [(1, 1.0), (2, 0.5)]}, [("$\\y$", 1, 1.0)],
    )  # fmt: skip
    import html

    drawn = html.unescape(plots.draw(picture, ".svg").decode())
    for name in [*HOSTILE[:3], "$\\x$", "$\\y$", "$\\frac$", "$0$"]:
        assert f">{name}</text>" in drawn, name
