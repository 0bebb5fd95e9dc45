"""Nothing is written over, into or around what is read, nor over another output: for every pair of
paths that a verb takes. And the report, which is there whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import OutputError, QualityGateError, UsageError
from lora_tools.formats import output
from lora_tools.verbs import VERBS
from lora_tools.verbs.row import Verb

from . import iotools

REPORT = "report"


def inputs(verb: Verb) -> list[str]:
    """What it reads, by the names of arguments and keywords."""
    named = [k.name for k in verb.keywords if k.option is not None and k.option.path == "input"]
    return [*(a.name for a in verb.arguments if a.name != "out"), *named]


def outputs(verb: Verb) -> list[str]:
    """What it writes."""
    named = [k.name for k in verb.keywords if k.option is not None and k.option.path == "output"]
    return [*(["out"] if verb.writes else []), *named, REPORT]


def command(verb: Verb, places: dict[str, str]) -> list[str]:
    """A call with these paths; adapters have a weight."""
    words = [verb.command]
    options = [word for k in verb.keywords if k.required for word in (k.flag, k.choices[0])]
    for name, place in places.items():
        value = f"{place}=0.5" if name == "adapters" else place
        if name in ("out", REPORT):
            options += [f"--{name}", value]
        elif name in verb.by_name:
            options += [verb.by_name[name].flag, value]
        else:
            words.append(value)
    return [*words, *options, *(["--force"] if verb.writes else [])]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """Runs a command that must change nothing; returns its exit code and its error."""

    def check(words: list[str]) -> tuple[int, str]:
        before = iotools.tree(Path())
        capfd.readouterr()
        code = run(words)
        printed, error = capfd.readouterr()
        assert iotools.tree(Path()) == before
        assert printed == ""
        assert error.startswith("Error: "), error
        assert error.count("\n") == 1, error
        return code, error

    return check


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for each input there is, with a file in it; nothing in them need be sound, since
    paths are looked at first."""
    monkeypatch.chdir(tmp_path)
    for name in {name for verb in VERBS.values() for name in inputs(verb)}:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "file.svg").write_text("precious")
    (tmp_path / "other").mkdir()
    return tmp_path


# Where an output goes, seen from an input's name; made as a link where it says so.
RELATIONS = {
    "the same": "{0}",
    "a file in it": "{0}/file.svg",
    "something new in it": "{0}/sub/new.svg",
    "in it, by another way": "other/../{0}/file.svg",
    "a link to a file in it": "link.svg",
}
PAIRS = [
    (verb.name, read, written, relation)
    for verb in VERBS.values()
    for read in inputs(verb)
    for written in outputs(verb)
    for relation in RELATIONS  # files may be added to a checkpoint's own folder
    if (relation, read, written) != ("the same", verb.adds_to, "out")
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("name", "read", "written", "relation"), PAIRS)
def test_no_output_is_an_input(
    name: str, read: str, written: str, relation: str, here: Path, said: Any
) -> None:
    verb = VERBS[name]
    place = RELATIONS[relation].format(read)
    if written != "out" and relation == "the same":
        place = f"{read}/file.svg"  # a file, as they are
        read_at = place
    else:
        read_at = read
    if relation == "a link to a file in it":
        Path(place).symlink_to(f"{read}/file.svg")
    places = {each: each for each in inputs(verb)} | {read: read_at}
    if verb.writes:
        places["out"] = "out"
    code, error = said(command(verb, places | {written: place}))
    assert code == (2 if written == REPORT else 1)
    assert "is the input" in error
    assert read in error


OUTPUTS = [
    (verb.name, one, other, inside)
    for verb in VERBS.values()
    for one, other in itertools.permutations(outputs(verb), 2)
    for inside in ((False, True) if one == "out" else (False,))
]


@pytest.mark.parametrize(("name", "one", "other", "inside"), OUTPUTS)
def test_no_two_outputs_are_one(
    name: str, one: str, other: str, inside: bool, here: Path, said: Any
) -> None:
    verb = VERBS[name]
    if inside:
        Path("made.svg").mkdir()  # by an earlier run, and to be replaced
    second = "made.svg/file.svg" if inside else "made.svg"
    places = {each: each for each in inputs(verb)} | ({"out": "out"} if verb.writes else {})
    code, error = said(command(verb, places | {one: "made.svg", other: second}))
    assert code == 2
    assert "made.svg" in error
    assert "or is inside it" in error or "are the same, or one is inside the other" in error


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.writes])
def test_an_output_never_contains_an_input(name: str, here: Path, said: Any) -> None:
    verb = VERBS[name]
    places = {each: each for each in inputs(verb)}
    for read in inputs(verb):
        if read != verb.adds_to:
            code, error = said(command(verb, places | {read: f"{read}/sub", "out": read}))
            assert code == 1
            assert "is the input" in error


# ------------------------------------------------------------------------------------ sound inputs


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its fine-tune, an adapter, a merge with a sidecar, statistics and text."""
    top = tmp_path_factory.mktemp("sound")
    tensors = iotools.weights()
    iotools.checkpoint(top / "base", tensors)
    iotools.checkpoint(top / "tuned", iotools.moved(tensors))
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors))
    iotools.graph(top / "graph", top / "base", tensors)
    bare = top / "base" / "model.safetensors"
    lora_tools.merge(bare, [top / "adapter"], top / "m.safetensors", reversible=True)
    moments = {name: torch.ones(s[1]) for name, s in iotools.linear_shapes(tensors).items()}
    save_file(moments, top / "stats", {"loratools_activations": "1"})
    (top / "text.txt").write_text("precious")
    return top


@pytest.fixture
def work(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(sound, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


EXTRACT = ["extract", "base", "tuned", "-o", "out", "--rank", "2"]
EXPORT = ["export", "base", "-o", "out", *iotools.EXPORT]
FAULTS = {
    "a report over statistics": [*EXTRACT, "--activations", "stats", "--report", "stats"],
    "an adapter over statistics": [
        *("extract", "base", "tuned", "--activations", "stats"),
        *("-o", "stats", "--force"),
    ],
    "a checkpoint over statistics": [
        *("quantize", "base", "--activations", "stats", "-o", "stats", "--force")
    ],
    "a text to calibrate by": [
        *("quantize", "base", "-o", "text.txt", "--calibrate", "text.txt", "--force")
    ],
    "a quantized model's text": [
        *("quantize", "base", "-o", "text.txt", "--eval-text", "text.txt", "--force")
    ],
    "a graph's text": [*("export", "base", "-o", "text.txt", "--eval-text", "text.txt", "--force")],
    "a graph": ["export", "base", "-o", "graph", "--force", *iotools.EXPORT],
    "in place over its own graph": [
        *("export", "base", "-o", "base", "--force", "--graph", "base/model.onnx"),
        *iotools.EXPORT[2:],
    ],
    "a report over the sidecar": [
        *("unmerge", "m.safetensors", "adapter", "-o", "u.safetensors"),
        *("--report", "m.safetensors.sidecar"),
    ],
    "an output over the sidecar": [
        *("unmerge", "m.safetensors", "adapter", "-o", "m.safetensors.sidecar", "--force")
    ],
    "a report over the config beside an adapter": [
        *("rescale", "adapter/adapter_model.safetensors", "-o", "out", "--scale", "2"),
        *("--report", "adapter/adapter_config.json"),
    ],
    "a cache over the base": [*EXTRACT, "--spectrum-cache", "base/model.safetensors"],
    "a cache that is the output": [*EXTRACT, "--spectrum-cache", "out"],
    "a cache in the output": [*EXTRACT, "--spectrum-cache", "out/cache"],
    "a report that is the cache": [*EXTRACT, "--spectrum-cache", "c", "--report", "c"],
    "a report in the output": [*EXTRACT, "--report", "out/r.json", "--force"],
    "a report that is an output": [
        *("merge", "base/model.safetensors", "adapter", "-o", "x", "--report", "x")
    ],
    "a report that is a sidecar": [
        *("merge", "base/model.safetensors", "adapter", "-o", "x", "--reversible"),
        *("--report", "x.sidecar"),
    ],
    "a report in an adapter with a weight": [
        *("merge", "base", "adapter=0.5", "-o", "out", "--report", "adapter/r.json")
    ],
    "a report in what a failed export leaves": [
        *EXPORT[:4],
        *("--keep-failed", "--report", "out.failed"),
        *iotools.EXPORT,
    ],
    "a sidecar over an adapter": [
        *("merge", "base/model.safetensors", "x.sidecar", "-o", "x", "--reversible", "--force")
    ],
    "the sidecar of a replaced file is an adapter": [
        *("merge", "base/model.safetensors", "x.sidecar", "-o", "x", "--force")
    ],
    "a dry run's report over an input": [*EXTRACT, "--dry-run", "--report", "base/config.json"],
    "where a link in an input leads": [*EXTRACT, "--report", "elsewhere.json"],
    "where a link in a pipeline's part leads": [
        *("rescale", "adapter", "-o", "out", "--scale", "2", "--base", "pipe"),
        *("--report", "elsewhere.json"),
    ],
    "an output where a link in an input leads": [*EXTRACT[:3], "-o", "elsewhere.json", "--force"],
    "a device": ["merge", "base", "adapter", "-o", "/dev/null", "--force"],
    "a cache that is a folder": [*EXTRACT, "--spectrum-cache", "graph"],
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_read_stays(what: str, work: Path, said: Any) -> None:
    shutil.copytree("adapter", "x.sidecar")
    Path("elsewhere.json").write_text("{}")
    Path("base/generation_config.json").symlink_to("../elsewhere.json")
    Path("pipe/unet").mkdir(parents=True)
    Path("pipe/unet/config.json").symlink_to("../../elsewhere.json")
    if "own graph" in what:
        shutil.copy("graph/model.onnx", "base/model.onnx")
    code, error = said(FAULTS[what])
    assert code in (1, 2), error
    assert "already exists" not in error


def test_what_lies_apart_is_written(work: Path) -> None:
    """Else the tests above show nothing."""
    paths = {"activations": "stats", "spectrum_cache": "cache", "rank": 2}
    lora_tools.extract("base", "tuned", "out", **paths)
    assert run([*EXTRACT, "--force", "--spectrum-cache", "cache", "--report", "r.json"]) == 0
    assert {"out", "cache", "r.json"} <= {p.name for p in Path().iterdir()}
    export = [*EXPORT[:3], "onnx", *iotools.EXPORT, "--keep-failed", "--report", "e.json"]
    assert run(export) == 0
    assert run(["export", "base", "-o", "base", *iotools.EXPORT, "--report", "e.json"]) == 0
    assert Path("base/model.onnx").is_file()


def test_the_python_functions_refuse_the_same(work: Path) -> None:
    before = iotools.tree(Path())
    with pytest.raises(OutputError, match="is the input stats"):
        lora_tools.extract("base", "tuned", "stats", activations="stats", force=True)
    with pytest.raises(OutputError, match="is the input adapter"):
        lora_tools.merge("base", [("adapter", 0.5)], Path("adapter/out"))
    with pytest.raises(UsageError, match=r"^out out and spectrum_cache out"):
        lora_tools.extract("base", "tuned", "out", spectrum_cache="out")
    assert iotools.tree(Path()) == before


# -------------------------------------------------------------------------------------- the report


def test_a_report_that_cannot_be_written_fails_before_anything_is_read(
    here: Path, said: Any
) -> None:
    Path("folder").mkdir()
    for place in ("/proc/r.json", "folder", "absent/r.json", "text/file.svg/r.json"):
        code, error = said(["diff", "nowhere", "nothing", "--report", place])
        assert code == 2
        assert "--report" in error


def test_a_report_takes_the_place_of_an_earlier_one_whole(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("real.json").write_text("earlier")
    Path("r.json").symlink_to("real.json")
    call = ["inspect", "base", "-q", "--report", "r.json"]
    real = os.fsync

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output.os, "fsync", fail)
    assert run(call) == 1
    assert Path("r.json").read_text() == "earlier"
    monkeypatch.setattr(output.os, "fsync", real)
    assert run(call) == 0
    assert json.loads(Path("real.json").read_text())["verb"] == "inspect"
    assert Path("r.json").is_symlink()
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


def test_a_failed_run_leaves_the_earlier_report(work: Path) -> None:
    Path("r.json").write_text("earlier")
    assert run(["inspect", "text.txt", "--report", "r.json"]) == 1
    assert Path("r.json").read_text() == "earlier"


def test_a_report_goes_into_a_pipe(work: Path) -> None:
    os.mkfifo("pipe")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()))
    reader.start()
    assert run(["inspect", "base", "-q", "--report", "pipe"]) == 0
    reader.join(60)
    assert json.loads(found[0])["verb"] == "inspect"
    assert Path("pipe").is_fifo()


def test_a_report_goes_to_where_the_output_is_sent(work: Path) -> None:
    """``--report /dev/stdout > log``: the log stays in its place, with what else is printed."""
    command = [sys.executable, "-m", "lora_tools", "inspect", "base"]
    with Path("log").open("w") as log:
        log.write("before\n")
        log.flush()
        subprocess.run(
            [*command, "--json", "--report", "/dev/stdout"], stdout=log, check=True, timeout=900
        )
    first, *report, printed = Path("log").read_text().splitlines()
    assert first == "before"
    assert json.loads("".join(report))["verb"] == json.loads(printed)["verb"] == "inspect"


def test_every_report_says_when_it_was_done_and_where(work: Path) -> None:
    """The frame's part: it is the same for a gate's report, which comes with an error."""
    with pytest.raises(QualityGateError) as caught:
        lora_tools.extract("base", "tuned", "out", rank=1, max_error=1e-9)
    for report in (lora_tools.inspect("base"), caught.value.report):
        assert report is not None
        assert report.seconds > 0
        assert report.output == ("out" if report.verb == "extract" else "")
    assert lora_tools.extract("base", "tuned", "out", dry_run=True).dry_run


def test_a_gate_that_meets_no_number_is_closed(work: Path) -> None:
    from lora_tools.figures import exceeded

    nan = float("nan")
    assert exceeded(None, [("a", nan, "")], 0.0) == ""
    assert exceeded(0.1, [("a", 0.1, "")], 0.05) == ""
    assert exceeded(0.1, [], 0.1) == ""
    assert "worst is a with nan" in exceeded(0.1, [("a", nan, "")], 0.05)
    assert "a with 0.05 at rank 3, total is 0.2" in exceeded(0.1, [("a", 0.05, " at rank 3")], 0.2)
    for wrong in (float("nan"), -1):
        with pytest.raises(UsageError, match="max_error"):
            lora_tools.extract("base", "tuned", "out", max_error=wrong)


def test_a_cache_is_kept_only_with_what_it_belongs_to(work: Path) -> None:
    assert run([*EXTRACT, "--spectrum-cache", "cache", "--max-error", "1e-9"]) == 3
    assert not Path("cache").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "base", "adapter"],
        ["unmerge", "base", "adapter", "--allow-other-base"],
        ["quantize", "base"],
        ["extract", "base/model.safetensors", "tuned", "--rank", "1"],
        ["combine", "adapter", "adapter=2"],
        ["rescale", "adapter", "--scale", "2"],
        ["convert", "adapter", "--to", "mlx"],
        ["export", "base", *iotools.EXPORT],
    ],
    ids=lambda words: words[0],
)
def test_a_folder_is_not_called_as_a_file_is(words: list[str], work: Path, said: Any) -> None:
    code, error = said([*words, "-o", "x.safetensors"])
    assert code == 2
    assert "the output is a folder, and this is the name of a file" in error


def test_a_file_is(work: Path) -> None:
    assert run(["merge", "base/model.safetensors", "adapter", "-o", "x.safetensors"]) == 0
    assert run(["convert", "adapter", "--to", "diffusers", "-o", "y.safetensors"]) == 0
    assert Path("x.safetensors").is_file()
    assert Path("y.safetensors").is_file()
