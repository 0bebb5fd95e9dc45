"""What a dry run says of seconds and bytes: sums, rates, and where it says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools.cli import run
from lora_tools.engine import rates
from lora_tools.engine.rates import Rates
from lora_tools.verbs import needs

from .campaign.lines import inputs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=2, shards=2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Work of any size is worth a measurement, which is made up; the calls for it."""
    calls: list[Any] = []

    def measure(*args: Any) -> Rates:
        calls.append(args)
        return Rates(read=1000.0, write=10.0, passes=500.0)

    monkeypatch.setattr(needs, "_WORTH", 0)
    monkeypatch.setattr(rates, "measure", measure)
    return calls


def test_seconds_are_of_the_jobs_and_the_rates(
    small: Path, tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    merge = ["merge", small / "base", small / "adapter", "-o", tmp_path / "o", "-n", "--jobs", 3]
    assert run([*map(str, merge), "--plan", str(plan)]) == 0
    [(files, folder, jobs)] = measured
    assert sorted(files) == sorted(
        [*(small / "base").glob("*.safetensors"), small / "adapter" / "adapter_model.safetensors"]
    )
    assert (folder, jobs) == (tmp_path, 3)
    made = json.loads(plan.read_text())
    copied = sum(job["numbers"] for job in made["jobs"] if job["action"] == "copy")
    merged = sum(job["numbers"] for job in made["jobs"] if job["action"] == "merge")
    assert copied
    assert merged
    read, written = made["totals"]["bytes_read"], made["totals"]["bytes_written"]
    work = read / 1000 + (rates.COPY * copied + rates.MERGE * merged) / 500
    expected = 1.0 + max(work, written / 10)
    said = capsys.readouterr().out
    assert f"{written / 1e3:.1f} kB to write" in said
    assert f"; about {expected / 60:.0f} min here" in said
    report = lora_tools.merge(small / "base", small / "adapter", tmp_path / "o", dry_run=True)
    assert report.totals["expected_seconds"] == pytest.approx(expected)
    assert report.totals["output_bytes"] == written


def test_each_kind_of_work_has_its_passes(
    small: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "measure", lambda *_: Rates(1e9, 1e9, 500.0))

    def said(verb: str, *args: str, **options: Any) -> float | None:
        call = getattr(lora_tools, verb)
        report = call(*(small / arg for arg in args), tmp_path / "o", dry_run=True, **options)
        seconds: float | None = report.totals.get("expected_seconds")
        return seconds

    for less, more in (
        (("quantize", "base", {"scheme": "fp8-channel"}), ("quantize", "base", {})),
        (("extract", "base", "tuned", {"rank": 1}), ("extract", "base", "tuned", {"rank": 64})),
        (("merge", "packed", "adapter", {}), ("merge", "packed", "adapter", {"requantize": True})),
        (("dequantize", "packed", {}), ("quantize", "base", {"scheme": "nvfp4"})),
    ):
        found = [said(*words, **options) for *words, options in (less, more)]
        assert None not in found
        assert found == sorted(found), (less, more)
        assert found[0] != found[1]
    for verb, args, options in (
        ("quantize", ("base",), {"scale_search": True}),
        ("quantize", ("base",), {"compensate": 2}),
        ("extract", ("base", "tuned"), {"energy": 0.9}),
        ("extract", ("base", "tuned"), {"svd": "exact"}),
        ("merge", ("base", "adapter"), {"engine": "dask"}),
        ("rescale", ("adapter",), {"rank": 2}),
    ):
        assert said(verb, *args, **options) is None, (verb, options)


def test_little_work_is_not_measured(small: Path, tmp_path: Path) -> None:
    report = lora_tools.merge(small / "base", small / "adapter", tmp_path / "o", dry_run=True)
    assert "expected_seconds" not in report.totals


_MEASURED = """
import sys
from pathlib import Path
from lora_tools.engine import rates
rates._SECONDS, rates._MOST = 0.02, 32 << 20
file, folder = map(Path, sys.argv[1:])
found = rates.measure([file], folder, 2)
assert min(found.read, found.write, found.passes) > 1e6, found
assert rates.measure([folder / "no"], folder, 1) is None
assert rates.measure([file], folder / "no", 1) is None
assert "torch" not in sys.modules
"""


def test_rates_are_measured_without_torch_and_nothing_is_left(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(bytes(10 << 20))
    subprocess.run([sys.executable, "-c", _MEASURED, str(file), str(tmp_path)], check=True)
    assert [*tmp_path.iterdir()] == [file]
