"""Several processes that each do a share of the work, and one that puts all into its place."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools import OutputError, QualityGateError, UsageError
from lora_tools.cli import run
from lora_tools.engine import threads
from lora_tools.formats import shared_staging
from lora_tools.formats.shared_staging import Job
from lora_tools.options.tables import part

from . import forks, iotools, killing
from .campaign.lines import VERBS, command, inputs, left_over

SHARED = sorted(VERBS.keys() - {"export"})
ALL = ("1/3", "2/3", "3/3")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=2, shards=2)


@pytest.fixture
def rescale(small: Path, tmp_path: Path) -> Callable[..., lora_tools.Report[Any]]:
    def job(**options: Any) -> lora_tools.Report[Any]:
        return lora_tools.rescale(small / "adapter", tmp_path / "out", rank=1, **options)

    return job


@pytest.mark.parametrize("verb", SHARED)
def test_the_bytes_are_those_of_one_process(
    verb: str, small: Path, tmp_path: Path, counted: list[str], capfd
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "here" / "out"
    out.parent.mkdir()
    before = signal.getsignal(signal.SIGTERM)
    assert run(command(verb, small, whole)) == 0
    done = sorted(counted)
    counted.clear()
    for each in reversed(ALL):
        assert run(command(verb, small, out, "--shard", each)) == 0
        assert [path.name for path in out.parent.iterdir()] == [shared_staging.place(out).name], (
            "nothing else, and nothing at its place"
        )
    shared = len(counted)
    assert shared >= len(done) / 2
    assert run(command(verb, small, out, "--finish")) == 0
    signal.signal(signal.SIGTERM, before)
    assert verb == "compensate" or sorted(counted) == done, "each once"
    assert iotools.tree(out) == iotools.tree(whole)
    assert left_over(out.parent, out) == []


def test_a_policy_in_two_steps_takes_the_array_twice(
    small: Path, tmp_path: Path, counted: list[str]
) -> None:
    def extract(out: Path, **options: Any) -> lora_tools.Report[Any]:
        return lora_tools.extract(small / "base", small / "tuned", out, budget="6K", **options)

    extract(tmp_path / "whole")
    done = len(counted)
    counted.clear()
    (to := tmp_path / "to").mkdir()
    for _ in range(2):
        for each in ALL:
            report = extract(to / "out", shard=each)
            assert report.output == ""
    assert len(counted) == done
    assert extract(to / "out", shard="2/3").notes[-1].startswith("all work is done")
    extract(to / "out", finish=True)
    assert len(counted) == done
    assert iotools.tree(to / "out") == iotools.tree(tmp_path / "whole")


@pytest.mark.slow
def test_at_the_same_time(small: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "here" / "out"
    out.parent.mkdir()
    assert forks.run(*command("quantize", small, whole)).returncode == 0

    def share(each: str) -> int:
        return forks.run(*command("quantize", small, out, "--shard", each)).returncode

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(share, ALL)) == [0, 0, 0]
    assert forks.run(*command("quantize", small, out, "--finish")).returncode == 0
    assert iotools.tree(out) == iotools.tree(whole)
    assert left_over(out.parent, out) == []


def test_one_begins_while_others_end(tmp_path: Path) -> None:
    out, over = tmp_path / "out", threading.Event()
    with shared_staging.joined(out, 1, Job({}, 2)) as (folder, own, _):
        (own / "x.safetensors").touch()

        def come_and_go() -> None:
            while not over.is_set():
                (other := folder / "own-other").mkdir()
                shutil.rmtree(other)

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(100):
                with shared_staging.joined(out, 2, Job({}, 2)):
                    pass
        finally:
            over.set()
            thread.join()


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("verb", ["merge", "extract", "quantize"])
def test_a_share_that_is_killed_is_done_again(verb: str, small: Path, tmp_path: Path, full: bool):
    whole, here = tmp_path / "whole", tmp_path / "here"
    here.mkdir()
    out = here / "out"
    assert forks.run(*command(verb, small, whole)).returncode == 0
    line = command(verb, small, out, "--shard", "2/2")
    first = command(verb, small, out, "--shard", "1/2")
    assert forks.run(*first).returncode == 0
    kinds = killing.steps(line, here, tmp_path / "log")
    shutil.rmtree(here)
    told = killing.telling(kinds)
    for step in told if full else told[:: max(len(told) // 4, 1)]:
        here.mkdir()
        assert forks.run(*first).returncode == 0
        assert killing.stopped(line, here, step).returncode == -signal.SIGKILL
        finished = forks.run(*command(verb, small, out, "--finish"))
        if finished.returncode:
            assert finished.returncode == 2
            assert "are not done, such as" in finished.stderr
            assert forks.run(*line).returncode == 0
            assert forks.run(*command(verb, small, out, "--finish")).returncode == 0
        assert iotools.tree(out) == iotools.tree(whole), step
        assert left_over(here, out) == [], step
        shutil.rmtree(here)


def test_what_is_missing_is_named(rescale: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the work of shard 1/N to N/N, and there is none"):
        rescale(finish=True)
    assert list(tmp_path.iterdir()) == []
    rescale(shard="2/4")
    with pytest.raises(UsageError, match=r"3 of 4 tasks .* as model\.l.* \(shards 1/4, 3/4, 4/4\)"):
        rescale(finish=True)
    rescale(shard="4/4")
    assert "2 tasks were already done" in rescale(resume=True).notes[-1]
    assert left_over(tmp_path, tmp_path / "out") == []


def test_shards_of_something_else_are_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small / "adapter", adapter := tmp_path / "adapter")

    def rescale(**options: Any) -> None:
        lora_tools.rescale(adapter, tmp_path / "out", **{"rank": 1, **options})

    rescale(shard="1/2")
    with pytest.raises(UsageError, match="delete it to start again"):
        rescale(shard="1/3")
    for how in ({"finish": True}, {"shard": "2/2"}):
        with pytest.raises(UsageError, match=r"the command was .*rank=1, and is .*rank=2"):
            rescale(rank=2, **how)
        with monkeypatch.context() as patch:
            patch.setattr("lora_tools.verbs.writing.tool_version", lambda: "9.9")
            with pytest.raises(UsageError, match=r"the version was .*, and is 9\.9 .*; use the"):
                rescale(**how)
    with pytest.raises(UsageError, match=r"shards of it are in .*; shard and finish=True continue"):
        rescale()
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    for how in ({"finish": True}, {"shard": "2/2"}):
        with pytest.raises(UsageError, match=r"model\.safetensors has changed since the"):
            rescale(**how)


def test_one_share_is_done_by_one_process(rescale: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rescale(shard="1/2")
    job = shared_staging.Job(*said_of(out))
    with shared_staging.joined(out, 2, job):
        for way in ({"shard": "2/2"}, {"finish": True}, {"resume": True}, {"clean": True}):
            with pytest.raises(OutputError, match="another process works on shard 2/2"):
                rescale(**way)
        rescale(shard="1/2")
    rescale(shard="2/2")
    rescale(finish=True)
    assert left_over(tmp_path, out) == []


def said_of(out: Path) -> tuple[dict[str, str], int]:
    there = json.loads((shared_staging.place(out) / "plan.json").read_text())
    return there["said"], there["shards"]


def test_statistics_are_collected_once(small: Path, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("a b c")
    for way in ({"shard": "1/2"}, {"finish": True}):
        with pytest.raises(UsageError, match="calibrate: each shard would collect"):
            lora_tools.quantize(small / "base", tmp_path / "out", calibrate=text, **way)


def test_who_completes_is_not_disturbed(
    rescale: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescale(shard="1/2")
    said: list[str] = []
    real = threads._run

    def meanwhile(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(threads, "_run", real)
            try:
                rescale(shard="2/2")
            except OutputError as error:
                said.append(str(error))
        return real(*args, **options)

    monkeypatch.setattr(threads, "_run", meanwhile)
    rescale(resume=True)
    assert len(said) == 1
    assert "works on shard 2/2, or completes or deletes the shards" in said[0]


def test_a_gate_that_fails_leaves_what_the_shards_made(small: Path, tmp_path: Path) -> None:
    def extract(**options: Any) -> Any:
        return lora_tools.extract(
            small / "base", small / "tuned", tmp_path / "out", rank=1, max_error=1e-9, **options
        )

    extract(shard="1/1")
    for _ in range(2):
        with pytest.raises(QualityGateError):
            extract(finish=True)
    assert left_over(tmp_path, tmp_path / "out") == [shared_staging.place(tmp_path / "out").name]


def test_what_was_shared_is_removed_when_that_is_asked_for(
    rescale: Callable[..., Any], tmp_path: Path
) -> None:
    rescale(shard="1/2")
    rescale(clean=True)
    assert left_over(tmp_path, tmp_path / "out") == []


def test_only_one_way_can_be_given(rescale: Callable[..., Any], tmp_path: Path) -> None:
    for ways in (
        {"clean": True, "finish": True},
        {"shard": "1/2", "clean": True},
        {"shard": "1/2", "resume": True},
        {"shard": "1/2", "finish": True},
    ):
        with pytest.raises(UsageError, match="give only one of them"):
            rescale(**ways)
    for wrong in ("", "1", "0/2", "3/2", "1/2/3", "-1/2", "a/b", "1/", "²/3"):
        with pytest.raises(UsageError, match="I/N is needed"):
            rescale(shard=wrong)
    assert part("2/3") == (2, 3)
    assert list(tmp_path.iterdir()) == []
