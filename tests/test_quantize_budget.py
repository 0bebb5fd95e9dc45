"""``quantize --budget``: how bits are shared out, and that transformers loads what comes of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import LoraToolsError
from lora_tools.linalg.allocation import allocate

from . import iotools, models
from .test_error_feedback import MARK, moments_of

pytestmark = pytest.mark.filterwarnings("ignore")
LOUD = "model.layers.0.self_attn.k_proj"  # its error is many times that of any other layer

STEPS = st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 900)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 3000))
def test_what_is_shared_out_is_near_the_best(drawn: list[tuple[float, int]], size: int) -> None:
    """One step each, as of layers that stay or not, against every choice that fits."""

    def gain(choice: tuple[int, ...]) -> float:
        return sum(g * k for (g, _), k in zip(drawn, choice, strict=True))

    def cost(choice: tuple[int, ...]) -> int:
        return sum(c * k for (_, c), k in zip(drawn, choice, strict=True))

    taken = tuple(allocate([[g / c] for g, c in drawn], [[c] for _, c in drawn], size))
    choices = list(itertools.product(range(2), repeat=len(drawn)))
    assert cost(taken) <= size
    left = [c for (_, c), k in zip(drawn, taken, strict=True) if not k]
    assert all(c > size - cost(taken) for c in left)  # nothing that still fits is left
    best = max(gain(each) for each in choices if cost(each) <= size)
    # What is given first misses the best by less than the one step that does not fit any more.
    assert gain(taken) >= best - max(g for g, _ in drawn) - 1e-9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with one loud layer, statistics by which another one is, and a GPT-2."""
    top = tmp_path_factory.mktemp("work")
    model = models.make("llama", width=128).bfloat16()
    with torch.no_grad():
        model.get_submodule(LOUD).weight.mul_(30)
    models.save(model, top / "llama")
    models.save(models.make("gpt2", width=64).bfloat16(), top / "gpt2")
    moments = moments_of(models.tensors(top / "llama"), False)
    moments["model.layers.1.mlp.down_proj"].mul_(1e4)
    save_file(moments, top / "stats", MARK)
    save_file({k: v.diagonal().contiguous() for k, v in moments.items()}, top / "diagonal", MARK)
    return top


def blocks(folder: Path) -> dict[str, int]:
    """The block size of each weight in four bits."""
    states = {k: v for k, v in models.tensors(folder).items() if ".quant_state." in k}
    return {
        name.partition(".weight.")[0]: json.loads(bytes(state.tolist()))["blocksize"]
        for name, state in states.items()
    }


def test_transformers_loads_what_it_wrote(work: Path, tmp_path: Path) -> None:
    """The loud layer stays, others are in smaller blocks; logits are those of the plain numbers."""
    report = lora_tools.quantize(work / "llama", tmp_path / "q", budget="5.4bits")
    kinds = blocks(tmp_path / "q")
    assert LOUD not in kinds
    assert set(kinds.values()) == {32}
    sizes = {r.tensor: math.prod(r.shape) for r in report.tensors}
    kept = models.tensors(work / "llama")[f"{LOUD}.weight"]
    bits = sum(r.bits_per_parameter * sizes[r.tensor] for r in report.tensors) + 16 * kept.numel()
    assert 5.0 < bits / (sum(sizes.values()) + kept.numel()) <= 5.4
    assert torch.equal(models.tensors(tmp_path / "q")[f"{LOUD}.weight"], kept)
    [fate] = [fate for fate in report.plan if fate.tensor == f"{LOUD}.weight"]
    assert "--budget" in fate.reason
    made = models.load(tmp_path / "q")
    fours = {n for n, m in made.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert fours == set(kinds)
    lora_tools.dequantize(tmp_path / "q", tmp_path / "back")
    wanted = models.outputs(models.load(tmp_path / "back"))
    assert (models.outputs(made) - wanted).norm() < 0.02 * wanted.norm()
    args = ["verify", str(tmp_path / "q"), "--against", str(work / "llama"), "-q"]
    assert run(args) == 0


def test_transposed_layers_and_any_jobs(work: Path, tmp_path: Path) -> None:
    for jobs in (1, 3):
        lora_tools.quantize(work / "gpt2", tmp_path / f"{jobs}", budget="6bits", jobs=jobs)
    assert iotools.tree(tmp_path / "1") == iotools.tree(tmp_path / "3")
    made, kinds = models.load(tmp_path / "1"), blocks(tmp_path / "1")
    fours = {n for n, m in made.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {name.removeprefix("transformer.") for name in fours} == {
        name.removeprefix("transformer.") for name in kinds
    }
    assert 32 in kinds.values()


def test_with_statistics_it_goes_by_the_outputs(work: Path, tmp_path: Path) -> None:
    """And leaves less of their error than the same without; in bytes, of all files."""
    lora_tools.quantize(work / "llama", tmp_path / "a", activations=work / "stats")
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors")) + 60_000
    report = lora_tools.quantize(
        work / "llama", tmp_path / "q", activations=work / "stats", budget=f"{size}B"
    )
    assert "model.layers.1.mlp.down_proj" not in blocks(tmp_path / "q")
    written = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    assert 0.9 * size < written <= size
    [note] = [note for note in report.notes if "--budget" in note]
    assert "layers' outputs" in note

    def left(results: tuple[lora_tools.TensorResult, ...]) -> float:
        return sum(((r.output_error or 0) * (r.output_norm or 0)) ** 2 for r in results)

    same = lora_tools.quantize(
        work / "llama", tmp_path / "b", activations=work / "stats", blocksize=32
    )
    part = left(report.tensors) / left(same.tensors)
    assert f"is {part:.1%} of" in note
    assert part < 0.1
    unlike = {r.tensor: r.output_error for r in same.tensors}
    assert all(r.output_error == unlike[r.tensor] for r in report.tensors)


def test_the_plan_says_so(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["quantize", str(work / "llama"), "-o", str(tmp_path / "q"), "--budget", "5bits"]
    assert run([*args, "--dry-run"]) == 0
    assert "depends on the weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_refused(work: Path, tmp_path: Path) -> None:
    for said, options in (
        ("more are needed.*larger blocksize", {"budget": "4bits"}),
        ("bytes? more are needed", {"budget": "10KB"}),
        ("there is nothing to do", {"budget": "16bits"}),
        ("such as 4.5bits", {"budget": "10M"}),
        ("such as 4.5bits", {"budget": "-4bits"}),
        ("is for nf4", {"budget": "5bits", "scheme": "int8"}),
        ("kind full", {"budget": "5bits", "activations": work / "diagonal"}),
    ):
        with pytest.raises(LoraToolsError, match=said):
            lora_tools.quantize(work / "llama", tmp_path / "q", **options)
    assert not list(tmp_path.iterdir())
