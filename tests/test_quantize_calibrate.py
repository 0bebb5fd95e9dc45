"""``quantize --calibrate``: both steps in one run, by the same bytes as one after the other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import UsageError

from . import iotools, models

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a tokenizer, and a text that is longer than two of its windows."""
    top = tmp_path_factory.mktemp("work")
    models.save(models.make("llama", width=64).bfloat16(), top / "llama")
    iotools.tokenizer(top / "llama", models.VOCAB)
    dice = random.Random(0)
    words = [f"w{dice.randrange(models.VOCAB)}" for _ in range(300)]
    (top / "text").write_text(" ".join(words))
    return top


def length_of(folder: Path) -> int:
    from lora_tools.calibration import window
    from lora_tools.sources.checkpoints import open_checkpoint

    return window(open_checkpoint(folder).config)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = models.tensors(one), models.tensors(other)
    return list(a) == list(b) and all(bool((a[name] == b[name]).all()) for name in a)


@pytest.mark.parametrize("more", [{"compensate": 2}, {"scheme": "int8"}])
def test_it_is_both_steps(more: dict[str, Any], work: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**more, "jobs": 1}
    report = lora_tools.quantize(
        work / "llama", tmp_path / "one", calibrate=work / "text", **options
    )
    lora_tools.collect_stats(
        work / "llama", work / "text", tmp_path / "stats", length=length_of(work / "llama"), jobs=1
    )
    lora_tools.quantize(work / "llama", tmp_path / "two", activations=tmp_path / "stats", **options)
    assert same_tensors(tmp_path / "one", tmp_path / "two")
    assert [each.role for each in report.inputs] == ["checkpoint", "text"]
    assert report.totals["output_error"] < report.totals["output_error_unfed"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "stats"}


def test_tokens_and_seed_choose_the_sequences(work: Path, tmp_path: Path) -> None:
    whole: dict[str, Any] = {"calibrate": work / "text", "jobs": 1}
    few = {**whole, "calibration_tokens": length_of(work / "llama")}
    for name, seed in (("a", None), ("b", 0), ("c", 1)):
        lora_tools.quantize(work / "llama", tmp_path / name, calibration_seed=seed, **few)
    lora_tools.quantize(work / "llama", tmp_path / "all", **whole)
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert not same_tensors(tmp_path / "a", tmp_path / "c")
    assert not same_tensors(tmp_path / "a", tmp_path / "all")


def test_the_plan_says_so(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["quantize", str(work / "llama"), "-o", str(tmp_path / "q"), "--dry-run"]
    assert run([*args, "--calibrate", str(work / "text")]) == 0
    assert "statistics for error feedback were collected on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_refused(work: Path, tmp_path: Path) -> None:
    lora_tools.quantize(work / "llama", tmp_path / "fp8", scheme="fp8-channel")
    given = {"calibrate": work / "text"}
    for said, base, options in (
        ("exclude each other", "llama", {**given, "activations": work / "text"}),
        ("needs", "llama", {"calibration_tokens": 4096}),
        ("needs", "llama", {"calibration_seed": 0}),
        ("one sequence", "llama", {**given, "calibration_tokens": 3}),
        ("No such file", "llama", {"calibrate": tmp_path / "none"}),
        ("plain weights", str(tmp_path / "fp8"), given),
    ):
        with pytest.raises(UsageError, match=said):
            lora_tools.quantize(work / base, tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()
