"""Output appears whole or not at all, and what was there stays until its successor is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_tools import interruption
from lora_tools.errors import CheckpointError, OutputError
from lora_tools.formats import output, renames
from lora_tools.formats.output import check_destination, check_space, refuse_overlap, staged
from lora_tools.formats.synced import copy_synced, write_synced

from . import killing
from .iotools import is_root, tree


def build(kind: str, path: Path, text: str) -> None:
    """A file, a folder, or a symbolic link to either (or to nothing), holding a text."""
    if kind == "file":
        path.write_text(text)
    elif kind == "folder":
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "content").write_text(text)
    elif kind.startswith("link to a "):
        real = path.with_name("real")
        build(kind.removeprefix("link to a "), real, text)
        path.symlink_to(real)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    else:
        assert kind == "nothing"


def read(path: Path) -> str | None:
    if path.is_dir():
        return (path / "sub" / "content").read_text()
    return path.read_text() if path.exists() else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OLD = ["nothing", "file", "folder", "link to a file", "link to a folder", "dangling link"]


# ------------------------------------------------------------------------------------ staged


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", OLD)
def test_the_new_takes_the_place_of_the_old_only_at_the_end(old, new, tmp_path):
    out = tmp_path / "out"
    build(old, out, "old")
    before = tree(tmp_path)
    with staged(out, force=True) as staging:
        build(new, staging / "out", "new")
        during = {k: v for k, v in tree(tmp_path).items() if not k.startswith(".out.loratools-")}
        assert during == before
    assert read(out) == "new"
    assert not out.is_symlink()
    assert names(tmp_path) == (["out", "real"] if "to a" in old else ["out"])
    if "to a" in old:
        assert read(tmp_path / "real") == "old"  # the link was replaced, not what it leads to


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError(5, "bad")])
@pytest.mark.parametrize("old", OLD)
def test_after_an_exception_all_is_as_it_was(old, error, tmp_path):
    out = tmp_path / "out"
    build(old, out, "old")
    before = tree(tmp_path)
    expected = OutputError if isinstance(error, OSError) else error

    def work() -> None:
        with staged(out) as staging:
            build("folder", staging / "out", "new")
            (staging / "out.extra").write_text("beside")
            raise error

    with pytest.raises(expected):
        work()
    assert tree(tmp_path) == before


def test_files_beside_out_are_renamed_alongside(tmp_path):
    with staged(tmp_path / "m.safetensors") as staging:
        (staging / "out").write_text("weights")
        (staging / "out.sidecar").write_text("sidecar")
    assert names(tmp_path) == ["m.safetensors", "m.safetensors.sidecar"]
    assert (tmp_path / "m.safetensors.sidecar").read_text() == "sidecar"


def test_nothing_made_is_an_error_and_the_old_stays(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(OutputError), staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert read(tmp_path / "out") == "old"


# What a system may lack of what ``renames`` goes by.
SYSTEMS = ["renameat2", "links", "locks"]


@pytest.fixture(params=SYSTEMS)
def system(request, monkeypatch):
    """A file system that cannot do all."""
    if request.param != "renameat2":
        monkeypatch.setattr(renames, "_renameat2", lambda: None)
    if request.param == "locks":

        def refuse(*args: object, **options: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return request.param


def test_this_system_renames_in_one_step():
    assert renames._renameat2() is not None


RENAMES = [(renames, "_rename"), (os, "link"), (os, "rename"), (os, "replace"), (os, "unlink")]


def interrupt(monkeypatch, at: int, when: str, error: BaseException) -> list[str]:
    """Raise the error before or after the so-many-th rename; returns the names of those met."""
    met: list[str] = []

    def watch(place: Any, name: str) -> None:
        real = getattr(place, name)

        def call(*args: object, **options: object) -> object:
            met.append(name)
            here = len(met) == at
            if here and when == "before":
                raise error
            result = real(*args, **options)
            if here:
                raise error
            return result

        monkeypatch.setattr(place, name, call)

    for place, name in RENAMES:
        watch(place, name)
    return met


def put(out: Path, new: str, force: bool = True) -> None:
    with staged(out, force=force) as staging:
        build(new, staging / "out", "new")
        (staging / "out.extra").write_text("new, too")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError(5, "it broke"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_any_rename_all_is_as_before_or_as_after(
    old, new, error, when, system, tmp_path, monkeypatch
):
    """Once all has been settled, which the command line has done at its end in any case."""
    for at in range(1, 40):
        top = tmp_path / str(at)
        top.mkdir()
        build(old, top / "out", "old")
        (top / "out.extra").write_text("old, too")
        before, course = tree(top), interruption.begin()
        with monkeypatch.context() as patch, contextlib.suppress(type(error), OutputError):
            met = interrupt(patch, at, when, error)
            put(top / "out", new)
        course.clear()
        if tree(top) != before:
            assert (read(top / "out"), (top / "out.extra").read_text()) == ("new", "new, too"), met
            assert not [name for name in names(top) if name.startswith(".")]
        assert bool(course.placed) is (tree(top) != before)
        if len(met) < at:
            break
    assert at > 3
    assert read(top / "out") == "new"


class Killed(BaseException):
    """What no one is left to settle after."""


def several(out: Path, text: str, *, force: bool = True) -> None:
    with staged(out, force=force) as staging:
        build("file", staging / "out", text)
        for folder, names in {"beside": ["one", "two"], "parts": ["data"]}.items():
            (staging / folder).mkdir()
            for name in names:
                build("file", staging / folder / name, text)


@pytest.mark.parametrize("there", [True, False], ids=["old ones", "nothing"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_among_several_files_old_and_new_are_never_mixed(
    there, when, system, tmp_path, monkeypatch
):
    """The main one is away wherever others are not of its run; and the next command to the same
    place has all as it was, or finds all that is new."""
    seen = set()
    for at in range(1, 40):
        top = tmp_path / str(at)
        top.mkdir()
        out = top / "out"
        if there:
            several(out, "old")
            assert {read(path) for path in top.iterdir()} == {"old"}
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            met = interrupt(patch, at, when, Killed())
            patch.setattr(output._Staging, "settle", output._Staging._let_go)
            several(out, "new")
        if out.exists():
            found = {read(path) for path in top.iterdir() if path.is_file()}
            assert found == {read(out)}, met
        with contextlib.suppress(OutputError):  # it is there already
            check_destination(out, force=False)
        found = {path.name: read(path) for path in top.iterdir()}
        assert set(found) == ({"out", "one", "two", "data"} if there or found else set()), met
        assert len(set(found.values())) <= 1, met
        seen |= set(found.values()) or {"nothing"}
        if len(met) < at:
            break
    assert seen == {"old" if there else "nothing", "new"}


def test_files_beside_it_need_force_and_its_parts_do_not(tmp_path):
    for name in ("one", "data"):
        build("file", tmp_path / name, "theirs")
    with pytest.raises(OutputError, match="appeared during this run and was not"):
        several(tmp_path / "out", "new", force=False)
    assert {p.name: read(p) for p in tmp_path.iterdir()} == {"one": "theirs", "data": "theirs"}
    (tmp_path / "one").unlink()
    several(tmp_path / "out", "new", force=False)
    assert {read(path) for path in tmp_path.iterdir()} == {"new"}


@pytest.mark.parametrize("said", [b"", b"[1]", b'[["../x", "out.x", 1, 2]]', b"{}", b"\xff"])
def test_a_journal_that_says_anything_else_is_not_followed(said, tmp_path):
    left = stale(tmp_path / "out", "dead0a01")
    build("file", tmp_path / "x", "mine")
    (left / "journal").write_bytes(said)
    check_destination(tmp_path / "out", force=False)
    assert names(tmp_path) == ["x"]


LONG = ["n" * 240, "ü" * 120, "n" * 255]


@pytest.mark.parametrize("name", LONG, ids=["240", "120 of two bytes", "255"])
def test_a_long_name_is_staged_and_what_a_kill_leaves_is_known(name, tmp_path, monkeypatch):
    out = tmp_path / name
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(output._Staging, "settle", output._Staging._let_go)
        with staged(out):
            raise Killed
    assert len(names(tmp_path)) == 1
    check_destination(tmp_path / (name[:-1] + "m"), force=False)  # one that begins like it
    assert len(names(tmp_path)) == 1
    check_destination(out, force=False)
    assert names(tmp_path) == []
    with staged(out) as staging:
        build("file", staging / "out", "new")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("there", OLD[1:])
def test_what_appears_meanwhile_stays(there, new, system, tmp_path):
    """Without ``force`` another's output is not replaced, whoever made it."""
    out = tmp_path / "out"
    other: dict[str, object] = {}

    def work() -> None:
        with staged(out) as staging:
            build(new, staging / "out", "new")
            (staging / "out.extra").write_text("beside")
            build(there, out, "theirs")
            other.update((k, v) for k, v in tree(tmp_path).items() if ".loratools-" not in k)

    with pytest.raises(OutputError, match=f"^{out} appeared during this run and was not"):
        work()
    assert tree(tmp_path) == other


@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_file_beside_that_appears_meanwhile_stays(new, system, tmp_path):
    out = tmp_path / "out"

    def work() -> None:
        with staged(out) as staging:
            build(new, staging / "out", "new")
            (staging / "out.extra").write_text("beside")
            (tmp_path / "out.extra").write_text("theirs")

    with pytest.raises(OutputError, match="appeared during this run and was not"):
        work()
    assert names(tmp_path) == ["out.extra"]
    assert (tmp_path / "out.extra").read_text() == "theirs"


@pytest.mark.parametrize("new", ["file", "folder"])
def test_of_many_at_once_one_wins_and_the_others_say_so(new, system, tmp_path):
    """All begin before any ends, on threads here."""
    out, count = tmp_path / "out", 6
    begun = threading.Barrier(count)

    def one(number: int) -> str | None:
        try:
            with staged(out) as staging:
                build(new, staging / "out", str(number))
                begun.wait()
        except OutputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(count) as pool:
        said = list(pool.map(one, range(count)))
    assert said.count(None) == 1
    assert read(out) == str(said.index(None))
    assert {text for text in said if text} == {
        f"{out} appeared during this run and was not replaced; choose another output or pass "
        "--force"
    }
    assert names(tmp_path) == ["out"]


def test_an_error_of_the_system_names_what_it_befell(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=f"^{out}: No space left"), staged(out):
        raise OSError(28, "No space left on device")
    with pytest.raises(OutputError, match=f"^{out}: File exists"), staged(out) as staging:
        staging.mkdir()
    with pytest.raises(OutputError, match=r"^/elsewhere/config.json: Permission"), staged(out):
        raise PermissionError(13, "Permission denied", "/elsewhere/config.json")
    with pytest.raises(OutputError, match=r"^said already$"), staged(out):
        raise OutputError("said already")


def test_an_error_never_names_the_hidden_folder(tmp_path):
    inner = CheckpointError("no config.json in {}, a folder")

    def fail(folder: Path) -> None:
        inner.args = (inner.args[0].format(folder / "out"),)
        raise inner

    with pytest.raises(CheckpointError) as caught, staged(tmp_path / "dest") as folder:
        fail(folder)
    assert caught.value is inner
    assert str(inner) == f"no config.json in {tmp_path / 'dest'}, a folder"


def test_a_folder_that_cannot_be_written_to_is_named():
    with pytest.raises(OutputError, match=r"^/proc: cannot write there"), staged(Path("/proc/out")):
        pytest.fail("never entered")


def test_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(output, "_sync", synced.append)
    with staged(tmp_path / "out") as staging:
        build("folder", staging / "out", "new")
    assert [path.name for path in synced] == ["out", "sub", tmp_path.name]


# ------------------------------------------------------------------------------- stale staging


def stale(destination: Path, token: str) -> Path:
    folder = destination.with_name(f".{destination.name}.loratools-{token}")
    build("folder", folder / "out", "half")
    killing.mark(folder)
    return folder


def test_what_dead_processes_left_is_removed_and_what_living_ones_hold_is_kept(tmp_path):
    out = tmp_path / "out"
    stale(out, "dead0a01")
    held = stale(out, "11fe0001")
    others = [stale(tmp_path / "outer", "dead0a02"), tmp_path / ".out.loratools-0000f11e"]
    others[1].write_text("a file")
    code = (
        "import fcntl, os, signal, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, held], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            check_destination(out, False)
            assert names(tmp_path) == sorted(p.name for p in (held, *others))
            assert read(held / "out") == "half"
        finally:
            process.kill()
    check_destination(out, False)
    assert names(tmp_path) == sorted(p.name for p in others)


def test_a_staging_folder_in_use_is_held(tmp_path):
    with staged(tmp_path / "out") as staging:
        check_destination(tmp_path / "out", False)  # another command to the same place
        assert staging.is_dir()
        fd = os.open(staging, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        (staging / "out").write_text("new")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [kind for kind in OLD if kind != "nothing"])
def test_killed_between_the_two_renames_the_next_command_brings_the_old_back(old, tmp_path):
    out = tmp_path / "out"
    left = stale(out, "dead0a01")
    build(old, out, "old")
    wanted = read(out)
    out.rename(left / "old")
    with pytest.raises(OutputError, match="already exists"):
        check_destination(out, force=False)
    assert read(out) == wanted
    assert not left.exists()


def test_a_complete_successor_wins_over_the_old_of_a_killed_command(tmp_path):
    out = tmp_path / "out"
    left = stale(out, "dead0a01")
    build("folder", left / "old", "old")
    build("folder", out, "new")
    check_destination(out, force=True)
    assert names(tmp_path) == ["out"]
    assert read(out) == "new"


FOREIGN = {
    "another name": lambda folder: folder.rename(folder.with_name(".out.loratools-backup")),
    "a longer name": lambda folder: folder.rename(folder.with_name(folder.name + "a")),
    "without a mark": lambda folder: (folder / f"loratools-{folder.stat().st_ino}").unlink(),
    "with the mark of another": lambda folder: (
        folder / f"loratools-{folder.stat().st_ino}"
    ).rename(folder / "loratools-1"),
    "a copy": lambda folder: (
        shutil.copytree(folder, folder.with_name("copy")),
        shutil.rmtree(folder),
        folder.with_name("copy").rename(folder),
    ),
    "a link": lambda folder: (
        folder.rename(folder.with_name("elsewhere")),
        folder.symlink_to("elsewhere"),
    ),
    "whose mark is a link": lambda folder: (
        (folder / f"loratools-{folder.stat().st_ino}").unlink(),
        (folder / f"loratools-{folder.stat().st_ino}").symlink_to("out"),
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_folders_that_are_not_of_this_package_are_left_alone(what, tmp_path):
    """Neither removed, nor is what they call old moved into the destination."""
    folder = stale(tmp_path / "out", "dead0a01")
    build("folder", folder / "old", "a victim's")
    FOREIGN[what](folder)
    before = tree(tmp_path)
    check_destination(tmp_path / "out", force=False)
    with staged(tmp_path / "out") as staging:
        build("file", staging / "out", "new")
    (tmp_path / "out").unlink()
    assert tree(tmp_path) == before


def test_links_in_a_stale_folder_are_not_followed(tmp_path):
    build("folder", tmp_path / "precious", "mine")
    folder = stale(tmp_path / "out", "dead0a01")
    (folder / "out" / "link").symlink_to(tmp_path / "precious")
    check_destination(tmp_path / "out", force=False)
    assert names(tmp_path) == ["precious"]
    assert read(tmp_path / "precious") == "mine"


def test_the_folder_of_another_user_is_left_alone(tmp_path, monkeypatch):
    folder = stale(tmp_path / "out", "dead0a01")
    monkeypatch.setattr(output.os, "geteuid", lambda: folder.stat().st_uid + 1)
    check_destination(tmp_path / "out", force=False)
    assert read(folder / "out") == "half"


def test_what_was_killed_before_its_mark_is_removed(tmp_path):
    (tmp_path / ".out.loratools-dead0a01").mkdir()
    check_destination(tmp_path / "out", False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("when", ["before it is open", "before it is locked", "before its mark"])
def test_a_folder_that_another_command_clears_away_at_once_is_made_anew(
    when, tmp_path, monkeypatch
):
    """Between two steps of making one, another process may take it for a dead one's."""
    place, name = {
        "before it is open": (os, "open"),
        "before it is locked": (fcntl, "flock"),
        "before its mark": (output, "marker"),
    }[when]
    real, done = getattr(place, name), []

    def call(*args: object, **options: object) -> object:
        if not done and list(tmp_path.iterdir()):
            done.append(1)
            subprocess.run(["rmdir", *tmp_path.iterdir()], check=True)
        return real(*args, **options)

    monkeypatch.setattr(place, name, call)
    with staged(tmp_path / "out") as staging:
        build("file", staging / "out", "new")
    assert done
    assert names(tmp_path) == ["out"]


def test_a_stale_folder_that_cannot_be_opened_is_no_hindrance(tmp_path, monkeypatch):
    left = stale(tmp_path / "out", "dead0a01")

    def refuse(path: object, *rest: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(output.os, "open", refuse)
    check_destination(tmp_path / "out", False)
    assert left.is_dir()


# -------------------------------------------------------------------------- check_destination


@pytest.mark.parametrize("kind", OLD[1:])
def test_what_exists_is_refused_without_force(kind, tmp_path):
    out = tmp_path / "out"
    build(kind, out, "old")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"out already exists.*--force"):
        check_destination(out, force=False)
    check_destination(out, force=True)
    assert tree(tmp_path) == before


# Where the output goes, relative to a folder holding the input folder "in" and links to it.
CLASHES = {
    "the input": "in",
    "the input by another way": "in/sub/..",
    "inside the input": "in/out",
    "deep inside the input": "in/sub/out",
    "the input's folder": ".",
    "through a link": "link",
    "inside, through a link": "link/out",
    "a link into it": "inner/out",
    "a link to a parent": "up/in",
}


def check(out: Path, sources: list[Path], force: bool) -> None:
    """As the frame does."""
    for source in sources:
        refuse_overlap(out, source)
    check_destination(out, force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", CLASHES)
def test_an_input_is_never_an_output(what, force, tmp_path):
    top = tmp_path / "top"
    build("folder", top / "in", "input")
    (top / "link").symlink_to("in")
    (top / "inner").symlink_to("in/sub")
    (top / "up").symlink_to(".")
    before = tree(top)
    with pytest.raises(OutputError, match=r"input|no name"):
        check(top / CLASHES[what], [top / "else", top / "in"], force)
    assert tree(top) == before


def test_an_input_given_by_a_link_is_known(tmp_path):
    build("folder", tmp_path / "in", "input")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "m").write_text("file")
    (tmp_path / "m2").symlink_to("m")
    for source, out in (("link", "in"), ("link", "in/out"), ("m2", "m"), ("m", "m2")):
        with pytest.raises(OutputError, match="is the input"):
            check(tmp_path / out, [tmp_path / source], force=True)
    check(tmp_path / "inside", [tmp_path / "in"], force=False)  # a name that begins so


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_no_name_for_something_new(name):
    with pytest.raises(OutputError, match="is not the name of a new"):
        check_destination(Path(name), force=True)


def test_a_parent_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "absent" / "out", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match="is not a folder"):
            check_destination(out, force=True)


def test_space(tmp_path):
    check_space(tmp_path / "out", 1)
    with pytest.raises(OutputError, match=r"out: needs 1,000,000,000,000,000,000 bytes"):
        check_space(tmp_path / "out", 10**18)


# -------------------------------------------------------------------------------- small files


def test_small_files_are_new_and_copies_are_plain_files(tmp_path):
    write_synced(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_synced(tmp_path / "a", b"2")
    (tmp_path / "a").chmod(0o400)
    (tmp_path / "link").symlink_to("a")
    copy_synced(tmp_path / "link", tmp_path / "deep" / "er" / "b")
    copied = tmp_path / "deep" / "er" / "b"
    assert copied.read_bytes() == b"1"
    assert not copied.is_symlink()
    assert copied.stat().st_mode & 0o200
    with pytest.raises(FileExistsError):
        copy_synced(tmp_path / "a", copied)


def test_a_copy_shares_the_blocks_where_the_file_system_can(tmp_path, monkeypatch):
    write_synced(tmp_path / "a", b"weights")
    asked = []

    def clone(fd: int, request: int, source: int) -> int:
        asked.append(request)
        return os.write(fd, os.pread(source, 100, 0))

    monkeypatch.setattr(output.fcntl, "ioctl", clone)
    monkeypatch.setattr(output.shutil, "copyfileobj", None)
    copy_synced(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert asked == [0x40049409]  # FICLONE of Linux


def test_a_real_reflink(tmp_path):
    """On btrfs in a file, two copies of 60 MB fit into 110 MB."""
    if not is_root() or shutil.which("mkfs.btrfs") is None:
        pytest.skip("only root with mkfs.btrfs can make such a file system")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    image.touch()
    os.truncate(image, 120 << 20)
    subprocess.run(["mkfs.btrfs", "-q", "-m", "single", image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.decode().strip()}")
    try:
        data = os.urandom(1 << 20) * 60
        write_synced(folder / "a", data)
        copy_synced(folder / "a", folder / "b")
        assert (folder / "b").read_bytes() == data
        with pytest.raises(OSError, match="No space left"):
            write_synced(folder / "c", data)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_staging_of_two_at_once(tmp_path):
    """With ``force`` the second to finish replaces the first; neither is ever half."""
    out = tmp_path / "out"
    with staged(out, force=True) as one:
        build("folder", one / "out", "one")
        with staged(out, force=True) as two:
            build("folder", two / "out", "two")
        assert read(out) == "two"
    assert read(out) == "one"
    assert names(tmp_path) == ["out"]
