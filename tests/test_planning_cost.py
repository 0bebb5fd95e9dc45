"""What a plan costs for each tensor, however many there are: counted, not timed."""

from __future__ import annotations

import gc
import sys
import tracemalloc

import pytest

from benchmarks import bench_plan
from lora_tools import cli
from lora_tools.engine import rates
from lora_tools.formats import regular_files
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.sources import transformers_names

FEW, MANY = 300, 900
# Calls and bytes for each tensor; with 200,000 of them it is 10 seconds and 500 MiB.
LIMITS = {
    "merge base adapter -o out": (130, 1400),
    "unmerge base adapter -o out": (130, 1400),
    "quantize base -o out": (320, 3000),
    "quantize base -o out --scheme fp8-block": (320, 3000),
    "extract base tuned -o out --rank 8": (320, 2200),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for count in (FEW, MANY):
        for name in ("base", "tuned"):
            bench_plan.make(folder / str(count) / name, "layers", count, shards=3)
        bench_plan.adapter(folder / str(count) / "adapter", layers=2)
    return folder


def _plan(models, count, command):
    words = [
        str(models / str(count) / word) if word in bench_plan.PLACES else word
        for word in command.split()
    ]
    assert cli.run([*words, "--dry-run", "-q"]) == 0


def _calls(models, count, command) -> int:
    calls = 0

    def profile(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        _plan(models, count, command)
    finally:
        sys.setprofile(None)
    return calls


def _peak(models, count, command) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        _plan(models, count, command)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("command", LIMITS)
def test_a_tensor_more_costs_so_many_calls_and_bytes(command, models, monkeypatch):
    monkeypatch.setattr(regular_files, "_PIECE", 1 << 12)  # room that is the same for all files
    monkeypatch.setattr(rates, "measure", lambda *_: None)  # what that costs is not the tensors'
    _plan(models, FEW, command)  # imports
    most_calls, most_bytes = LIMITS[command]
    for measure, most in ((_calls, most_calls), (_peak, most_bytes)):
        few, many = (measure(models, count, command) for count in (FEW, MANY))
        assert 0 < (many - few) / (MANY - FEW) < most, measure.__name__


def test_names_are_looked_through_a_few_times_and_not_for_each_tensor(models, monkeypatch):
    """It was once for each: 200,000 tensors took hours."""
    looked = 0

    class Counting:
        def search(self, name):
            nonlocal looked
            looked += 1
            return

    monkeypatch.setattr(transformers_names, "_LEGACY", Counting())
    _plan(models, FEW, "quantize base -o out")
    assert FEW <= looked < 10 * FEW


def test_rows_of_fused_experts_are_not_gone_over_one_by_one(models):
    """Of a layer of experts there are a million rows; its pieces are as many as its tensors."""
    specs = SafetensorsFile(
        next((models / str(FEW) / "base").glob("model-00001*.safetensors"))
    ).specs
    names = [name for name in specs if name.endswith("up_proj.weight")][:20]
    rows = transformers_names._Rows(specs)
    import torch

    joined = torch.cat([rows.of(name) for name in names])
    calls = 0

    def profile(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(profile)
    try:
        pieces = rows.pieces(joined, (len(joined), bench_plan.HIDDEN))
    finally:
        sys.setprofile(None)
    assert [(p.stored, p.first, p.rows) for p in pieces] == [
        (name, 0, bench_plan.INNER) for name in names
    ]
    assert calls < 20 * len(names)
