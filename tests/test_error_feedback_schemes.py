"""Rounding errors fed forward in number formats of codes times scales: ``quantize --scheme
--activations`` and ``merge --requantize --activations``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import MismatchError, UsageError
from lora_tools.linalg import error_feedback, scaled_feedback
from lora_tools.linalg.e2m1 import values as e2m1_values
from lora_tools.linalg.scaled_feedback import Grid

from . import iotools, models
from .test_error_feedback import MARK, moment, moments_of, output_error
from .written import NEW

pytestmark = pytest.mark.filterwarnings("ignore")

CODES = (".weight", ".weight_packed")
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


# ------------------------------------------------------------------------------- the arithmetic


def spread(table: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """What each number's block has."""
    wide = table.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]].double()


def gptq(W: torch.Tensor, R: torch.Tensor, grid: Grid, order: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 without its blocks, in float64: the values (m, n), not yet
    scaled, that W comes to."""
    shape = (W.shape[0], W.shape[1])
    S = spread(grid.scales, grid.block, shape)[:, order]
    Z = 0 * S if grid.zeros is None else spread(grid.zeros, grid.block, shape)[:, order]
    W, R = W.double()[:, order], R.double()[order][:, order]
    R = R + 0.01 * R.diagonal().mean() * torch.eye(len(R))
    U = torch.linalg.cholesky(torch.linalg.inv(R), upper=True)
    out = torch.empty_like(W)
    for j in range(len(R)):
        s, z = S[:, j, None], Z[:, j, None]
        out[:, j] = grid.values[(W[:, j, None] - s * (grid.values - z)).abs().argmin(1)]
        lost = (W[:, j] - S[:, j] * (out[:, j] - Z[:, j])) / U[j, j]
        W[:, j:] -= lost[:, None] * U[j, j:]
    return out[:, torch.argsort(order)]


GRIDS = {
    "whole numbers": (torch.arange(-8.0, 8.0), (1, 32), False),
    "with zero points": (torch.arange(16.0), (1, 16), True),
    "E2M1": (scaled_feedback.finite(e2m1_values()), (1, 16), False),
    "E4M3 in squares": (scaled_feedback.finite(E4M3), (24, 32), False),
    "E4M3 by rows": (scaled_feedback.finite(E4M3), (1, 90), False),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_codes_are_those_of_gptq(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged last blocks, several runs of rows, which squares lie across."""
    monkeypatch.setattr(error_feedback, "FED_ROWS", 32)
    monkeypatch.setattr(scaled_feedback, "FED_ROWS", 32)
    (m, n), (values, block, zeroed) = (70, 90), GRIDS[kind]
    noise = torch.Generator().manual_seed(1)
    W, R = torch.randn(m, n, generator=noise), moment(n)
    down, across = -(m // -block[0]), -(n // -block[1])
    scales = torch.rand(down, across, generator=noise).add(1) * 2 / float(values.abs().max())
    zeros = torch.randint(5, 11, (down, across), generator=noise).float() if zeroed else None
    grid = Grid(values, scales, block, zeros)
    by = error_feedback.factor(R)
    assert by is not None
    out = torch.empty(m, n)
    errors = scaled_feedback.feed(W, torch.zeros(m, n), grid, by, out)
    wanted = gptq(W, R, grid, by.order)
    assert (out != wanted).any(1).float().mean() <= 1 / m, "up to one tie"
    S, Z = spread(scales, block, (m, n)), 0.0 if zeros is None else spread(zeros, block, (m, n))
    assert errors.fed == pytest.approx(output_error(S * (out - Z) - W, R), rel=1e-3)
    assert errors.plain == errors.energy == pytest.approx(output_error(W, R), rel=1e-3)


# ------------------------------------------------------------------------------------- quantize


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in bfloat16, an adapter of little change, and statistics."""
    top = tmp_path_factory.mktemp("work")
    models.save(models.make("llama", width=128).bfloat16(), top / "base")
    save_file(moments_of(models.tensors(top / "base")), top / "stats", MARK)
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]}
    models.train(top / "base", top / "trained", config)
    lora_tools.rescale(top / "trained", top / "lora", scale=0.3)
    return top


def is_code(name: str) -> bool:
    return name.endswith(CODES)


@pytest.mark.parametrize("scheme", NEW)
def test_only_codes_differ_and_errors_are_those_of_the_files(
    scheme: str, work: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"scheme": scheme, "jobs": 1}
    lora_tools.quantize(work / "base", tmp_path / "plain", **given)
    given["activations"] = work / "stats"
    report = lora_tools.quantize(work / "base", tmp_path / "fed", **given)
    before, after = (models.tensors(tmp_path / name) for name in ("plain", "fed"))
    assert list(before) == list(after)
    changed = {
        n
        for n in before
        if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))
    }
    named = {result.tensor.removesuffix(".weight") for result in report.tensors}
    assert {n.rpartition(".")[0] for n in changed} == named
    assert all(map(is_code, changed))
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("plain", "fed")]
    assert configs[0] == configs[1]
    assert report.totals["tensors_fed"] == len(report.tensors)
    assert report.totals["output_error"] < 0.8 * report.totals["output_error_unfed"]
    assert not any("by themselves" in note for note in report.notes)
    for name in ("plain", "fed"):
        lora_tools.dequantize(tmp_path / name, tmp_path / f"{name}-back")
    backs = [models.tensors(tmp_path / f"{name}-back") for name in ("fed", "plain")]
    moments, base = load_file(work / "stats"), models.tensors(work / "base")
    for result in report.tensors:
        R, W = moments[result.tensor.removesuffix(".weight")], base[result.tensor].float()
        norm = math.sqrt(output_error(W, R))
        fed, unfed = (
            math.sqrt(output_error(back[result.tensor].float() - W, R)) / norm for back in backs
        )
        assert result.output_error == pytest.approx(fed, rel=2e-3)
        assert result.output_error_unfed == pytest.approx(unfed, rel=2e-3)
        assert fed <= unfed


def test_transformers_loads_it(work: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"scheme": "int4", "activations": work / "stats"}
    for jobs in (1, 3):
        lora_tools.quantize(work / "base", tmp_path / f"{jobs}", jobs=jobs, **given)
    assert iotools.tree(tmp_path / "1") == iotools.tree(tmp_path / "3")
    lora_tools.dequantize(tmp_path / "1", tmp_path / "back")
    ids = torch.arange(8)[None]
    load = hf.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        found = load(tmp_path / "1").eval()(ids).logits
        assert torch.equal(found, load(tmp_path / "back").eval()(ids).logits)


# --------------------------------------------------------------------------------------- export


def test_what_statistics_do_nothing_for_is_refused(work: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"activations": work / "stats", "dry_run": True}
    with pytest.raises(UsageError, match="activations needs"):
        lora_tools.export(work / "base", tmp_path / "onnx", **given)
    lora_tools.quantize(work / "base", tmp_path / "q")
    with pytest.raises(UsageError, match="in four bits already"):
        lora_tools.export(tmp_path / "q", tmp_path / "onnx", nf4=True, **given)
    save_file({"z": torch.eye(4)}, tmp_path / "other", MARK)
    given["activations"] = tmp_path / "other"
    with pytest.raises(MismatchError, match="has none of the modules"):
        lora_tools.export(work / "base", tmp_path / "onnx", int4=True, **given)


# ----------------------------------------------------------------------------------- requantize


@pytest.mark.parametrize("scheme", ["nf4", "nvfp4", "fp8-channel", "int8"])
def test_more_of_an_adapter_is_kept(scheme: str, work: Path, tmp_path: Path) -> None:
    """The figures are those of what ``dequantize`` reads; what no adapter acts on keeps its
    bytes."""
    lora_tools.quantize(work / "base", tmp_path / "q", scheme=scheme)
    given: dict[str, Any] = {"requantize": True, "allow_other_base": True, "jobs": 1}
    args = (tmp_path / "q", [work / "lora"])
    lora_tools.merge(*args, tmp_path / "plain", **given)
    report = lora_tools.merge(*args, tmp_path / "fed", activations=work / "stats", **given)
    lora_tools.merge(*args, tmp_path / "exact", dtype="float32", allow_other_base=True)
    for name in ("q", "plain", "fed"):
        lora_tools.dequantize(tmp_path / name, tmp_path / f"{name}-back", dtype="float32")
    base, plain, fed = (models.tensors(tmp_path / f"{n}-back") for n in ("q", "plain", "fed"))
    exact, moments = models.tensors(tmp_path / "exact"), load_file(work / "stats")
    acted = {n for n in exact if "q_proj.weight" in n or "up_proj.weight" in n}
    assert {r.tensor for r in report.tensors} == acted
    assert all(torch.equal(base[n], fed[n]) for n in base if n not in acted)
    for way, back in (("", fed), ("_unfed", plain)):
        wanted = moved = lost = 0.0
        for name in acted:
            D, R = (exact[name] - base[name]).double(), moments[name.removesuffix(".weight")]
            M = (back[name] - base[name]).double()
            wanted += output_error(D, R)
            moved += float(((M @ R.double()) * D).sum())
            lost += output_error(M - D, R)
        totals: Any = report.totals
        assert totals[f"output_delta_kept{way}"] == pytest.approx(
            moved / wanted, rel=1e-2, abs=2e-3
        )
        assert totals[f"output_delta_error{way}"] == pytest.approx(
            math.sqrt(lost / wanted), rel=1e-2
        )
    assert totals["output_delta_error"] < 0.8 * totals["output_delta_error_unfed"]
    assert [i.role for i in report.inputs] == ["base", "adapter", "activations"]
    reasons = {fate.tensor: fate.reason for fate in report.plan}
    assert all(reasons[name].endswith("error-fed") for name in acted)


def test_the_command_says_what_is_kept(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tools.quantize(work / "base", tmp_path / "q")
    args = ["merge", str(tmp_path / "q"), str(work / "lora"), "--allow-other-base"]
    args += ["-o", str(tmp_path / "out"), "--activations", str(work / "stats")]
    assert run(args) == 2
    assert "--activations needs --requantize" in capsys.readouterr().err
    assert run([*args, "--requantize", "--report", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().err
    totals = json.loads((tmp_path / "r.json").read_text())["totals"]
    assert f"in the layers' outputs {totals['output_delta_kept']:.1%}" in said
    with pytest.raises(UsageError, match="activations needs requantize"):
        lora_tools.merge(
            work / "base", [work / "lora"], tmp_path / "no", activations=work / "stats"
        )
