"""``--plan``: which jobs the work is made of, held against what lies there and what is made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from safetensors import safe_open

import lora_tools
from lora_tools import OutputError, UsageError
from lora_tools.cli import run
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.jobs import Job

from . import iotools
from .campaign.lines import VERBS, command, inputs

PLANNED = sorted(VERBS.keys() - {"export"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=2, shards=2)


def held(path: Path) -> dict[str, int]:
    """Every tensor of a file with its bytes, as the library of the format reads it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: t.numel() * t.element_size() for name, t in tensors.items()}


@pytest.mark.parametrize("verb", PLANNED)
def test_a_plan_is_what_is_read_and_what_is_made(
    verb: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out"
    plain = [word for word in command(verb, small, out, "--plan", str(file)) if word != "-q"]
    assert run([*plain, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
    written = file.read_bytes()
    plan = json.loads(written)
    Draft202012Validator(lora_tools.plan_schema()).validate(plan)
    assert plan["command"] == report["command"]
    assert plan["totals"]["jobs"] == len(plan["jobs"])
    for sums in ("bytes_read", "bytes_written"):
        assert plan["totals"][sums] == sum(job[sums] for job in plan["jobs"])
    most = plan["totals"]["peak_memory"] = max(job["peak_memory"] for job in plan["jobs"])
    assert report["totals"]["peak_memory"] > most

    read: dict[str, set[str]] = {}
    for job in plan["jobs"]:
        for each in job["inputs"]:
            lies = held(Path(each["path"]))
            assert set(each["tensors"]) <= lies.keys(), job["name"]
            assert each["nbytes"] == sum(lies[name] for name in each["tensors"])
            read.setdefault(each["path"], set()).update(each["tensors"])
        assert job["bytes_read"] == sum(each["nbytes"] for each in job["inputs"])
    ours = {str(p) for p in small.rglob("*.safetensors") if Path(p).name != "model.sidecar"}
    for path, tensors in read.items():  # of a file all is read, or the plan would lack a job
        if path in ours:
            assert tensors == held(Path(path)).keys(), path

    assert run(plain) == 0
    assert file.read_bytes() == written, "a plan of the same work is the same"
    made = {path.relative_to(out).as_posix(): path for path in out.rglob("*.safetensors")}
    jobs: dict[str, list[dict[str, Any]]] = {}
    for job in plan["jobs"]:
        jobs.setdefault(job["output"], []).append(job)
    assert jobs.keys() == {name for name in made if "/" not in name}
    for name, mine in jobs.items():
        there = held(made[name])
        assert sum(job["bytes_written"] for job in mine) >= sum(there.values()) - _shrunk(mine)
        if mine[0]["tensors"]:
            assert sorted(t for job in mine for t in job["tensors"]) == sorted(there)


def _shrunk(jobs: list[dict[str, Any]]) -> int:
    """States of four bits are JSON, whose size is known once it is there."""
    return sum(len(job["tensors"]) > 1 for job in jobs) * 64


def test_shares_are_of_the_plan_that_is_written(small: Path, tmp_path: Path) -> None:
    def merge(**options: Any) -> lora_tools.Report[Any]:
        return lora_tools.merge(
            small / "base", small / "adapter", tmp_path / "out", plan=file, **options
        )

    file = tmp_path / "plan.json"
    with pytest.raises(UsageError, match="no such file; write it first, with"):
        merge(shard="1/2")
    merge(dry_run=True)
    written = file.read_bytes()
    for other, said in (
        (
            {"dtype": "float16"},
            r'it has "command": "merge", but this command has .*"merge dtype=.float16',
        ),
        ({"shard_size": "9KB"}, r"is a plan of other work"),
    ):
        with pytest.raises(UsageError, match=said):
            merge(shard="1/2", **other)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "before any work"
    for each in ("1/2", "2/2"):
        merge(shard=each)
    merge(finish=True)
    assert file.read_bytes() == written
    lora_tools.merge(small / "base", small / "adapter", tmp_path / "whole")
    assert iotools.tree(tmp_path / "out") == iotools.tree(tmp_path / "whole")


def test_the_job_that_differs_is_named(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    call = [small / "base", small / "adapter", tmp_path / "out"]
    lora_tools.merge(*call, plan=file, dry_run=True)
    lines = file.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"action": "merge"' in line)
    name = json.loads(lines[at].strip(" ,\n"))["name"]
    lines[at] = lines[at].replace('"action": "merge"', '"action": "copy"')
    file.write_text("".join(lines))
    with pytest.raises(UsageError, match=rf"it has {name}: copy lora, but .* {name}: merge lora"):
        lora_tools.merge(*call, plan=file, resume=True)
    lora_tools.merge(*call, plan=file, dry_run=True)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UsageError, match="it has no more, but"):
        lora_tools.merge(*call, plan=file, shard="1/2")
    file.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match="cannot be read"):
        lora_tools.merge(*call, plan=file, shard="1/2")
    lora_tools.merge(*call, plan=tmp_path / "new.json", resume=True)
    assert (tmp_path / "new.json").is_file()


def test_a_plan_is_written_over_no_input_and_into_no_output(small: Path, tmp_path: Path) -> None:
    def merge(plan: Path, **options: Any) -> None:
        lora_tools.merge(small / "base", small / "adapter", tmp_path / "out", plan=plan, **options)

    for dry_run in (True, False):
        with pytest.raises(OutputError, match="is the input"):
            merge(small / "base" / "config.json", dry_run=dry_run)
        with pytest.raises(OutputError, match="is a folder; name a file"):
            merge(tmp_path, dry_run=True)
        with pytest.raises(OutputError, match="is not a folder; create it first"):
            merge(tmp_path / "no" / "plan.json", dry_run=dry_run)
    with pytest.raises(UsageError, match=r"plan .* are.*the other"):
        merge(tmp_path / "out" / "plan.json")
    assert [*tmp_path.iterdir()] == []


def test_what_depends_on_results_has_no_plan(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"with budget, .* the jobs are not known"):
        lora_tools.quantize(
            small / "base", tmp_path / "o", budget="12bits", plan=tmp_path / "p", dry_run=True
        )
    lora_tools.extract(
        *(small / "base", small / "tuned", tmp_path / "o"),
        budget="6K",
        plan=tmp_path / "p",
        dry_run=True,
    )
    assert (tmp_path / "p").is_file()


def test_a_file_alone_is_the_output(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    given = next((small / "base").glob("*-00001*.safetensors"))
    out = tmp_path / "it.safetensors"
    lora_tools.merge(given, [], out, dtype="float16", plan=file)
    plan = json.loads(file.read_text())
    assert {job["output"] for job in plan["jobs"]} == {out.name}
    assert sorted(SafetensorsFile(out).specs) == sorted(job["name"] for job in plan["jobs"])


def test_records_are_described() -> None:
    defs = lora_tools.plan_schema()["$defs"]
    assert defs["Job"]["required"] == sorted(field.name for field in dataclasses.fields(Job))
