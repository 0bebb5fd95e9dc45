"""``quantize --compensate --activations``: the adapter that is best for a layer's outputs. Against
QERA's exact form written down as its paper has it, and against what the files hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.linalg import error_feedback

from . import iotools, models
from .test_error_feedback import MARK, moment, moments_of, output_error

pytestmark = pytest.mark.filterwarnings("ignore")
RANK = 4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 300), st.integers(1, 600))
def test_the_factor_weighs_as_the_moment_does(m: int, n: int, tokens: int) -> None:
    """(A·S)(A·S)ᵀ = A (R + λI) Aᵀ, and (A·S)·S⁻¹ = A, several runs of columns among them."""
    A, R = torch.randn(m, n, generator=torch.Generator().manual_seed(n)), moment(n, 1, tokens)
    by = error_feedback.factor(R)
    assert by is not None
    wide = A.double()
    damped = wide @ (R.double() + by.damping * torch.eye(n))
    S = by.apply(A.clone()).double()
    wanted = damped @ wide.T
    assert (S @ S.T - wanted).norm() < 1e-5 * wanted.norm()
    assert (by.moment(wide) - damped).norm() < 1e-5 * damped.norm()
    assert (by.undo(S) - wide).norm() < 1e-4 * wide.norm()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama and a GPT-2, statistics of each, and both quantized with an adapter by them."""
    top = tmp_path_factory.mktemp("work")
    for kind in ("llama", "gpt2"):
        models.save(models.make(kind, width=64).bfloat16(), top / kind)
        save_file(moments_of(models.tensors(top / kind), kind == "gpt2"), top / f"{kind}.st", MARK)
    return top


def qera(E: torch.Tensor, R: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD_r(E R^½) R^-½ by an eigendecomposition, in float64."""
    values, vectors = torch.linalg.eigh(R.double())
    values = values.clamp(min=1e-9 * float(values.max()))
    U, S, Vh = torch.linalg.svd(E.double() @ (vectors * values.sqrt()), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank] @ (vectors / values.sqrt()).T


def turned(x: torch.Tensor, kind: str) -> torch.Tensor:
    """(out, in), float64."""
    return (x.T if kind == "gpt2" else x).double()


def of_adapter(folder: Path, name: str) -> torch.Tensor:
    """B·A (out, in) in float64."""
    adapter = models.tensors(folder / "loftq_init")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    A, B = (adapter[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
    return B @ A


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_best_for_the_outputs(kind: str, work: Path, tmp_path: Path) -> None:
    """The four-bit files are those without an adapter; the figures are those of the files; the
    error is that of the paper's solution, damping and rounding of the factors aside."""
    stats, base, moments = work / f"{kind}.st", work / kind, load_file(work / f"{kind}.st")
    report = lora_tools.quantize(base, tmp_path / "q", activations=stats, compensate=RANK)
    lora_tools.quantize(base, tmp_path / "fed", activations=stats)
    made, alone = models.tensors(tmp_path / "q"), models.tensors(tmp_path / "fed")
    assert all(torch.equal(made[name], alone[name]) for name in alone)
    lora_tools.dequantize(tmp_path / "q", tmp_path / "back")
    back, plain = models.tensors(tmp_path / "back"), models.tensors(base)
    squares = energy = 0.0
    for result in report.tensors:
        R = moments[result.tensor.removesuffix(".weight")]
        W = turned(plain[result.tensor], kind)
        E = W - turned(back[result.tensor], kind)
        change, best, whole = (
            of_adapter(tmp_path / "q", result.tensor),
            qera(E, R, RANK),
            R.double(),
        )
        norm = math.sqrt(output_error(W, whole))
        errors = [output_error(x, whole) for x in (E, E - change, E - best)]
        assert result.output_error == pytest.approx(math.sqrt(errors[0]) / norm, rel=1e-3)
        left = math.sqrt(errors[1]) / norm
        assert result.compensated_output_error == pytest.approx(left, rel=2e-3)
        assert errors[1] < 0.8 * errors[0]
        assert errors[1] <= 1.1 * errors[2]
        of_weights = float((E - change).norm() / W.norm())
        assert result.compensated_error == pytest.approx(of_weights, rel=1e-3)
        squares, energy = squares + errors[1], energy + norm**2
    total = report.totals["compensated_output_error"]
    assert total == pytest.approx(math.sqrt(squares / energy), rel=2e-3)
    assert total < report.totals["output_error"] < report.totals["output_error_unfed"]
    assert "all by their outputs" in report.plan[-1].reason


def test_more_turns_leave_less(work: Path, tmp_path: Path) -> None:
    """The figures are those of the last turn, but for what plain rounding would have cost."""
    given = {"activations": work / "llama.st", "compensate": RANK}
    one = lora_tools.quantize(work / "llama", tmp_path / "1", **given)
    more = lora_tools.quantize(work / "llama", tmp_path / "3", compensate_iterations=3, **given)
    key = "compensated_output_error"
    assert more.totals[key] < one.totals[key]
    assert more.totals["output_error"] > one.totals["output_error"]
    assert more.totals["output_error_unfed"] == one.totals["output_error_unfed"]
    lora_tools.dequantize(tmp_path / "3", tmp_path / "back")
    back, plain = models.tensors(tmp_path / "back"), models.tensors(work / "llama")
    moments = load_file(work / "llama.st")
    for result in more.tensors[:2]:
        R, W = moments[result.tensor.removesuffix(".weight")], plain[result.tensor].double()
        lost = math.sqrt(output_error(W - back[result.tensor].double(), R))
        assert result.output_norm is not None
        assert result.output_error == pytest.approx(lost / result.output_norm, rel=1e-3)


def test_what_is_not_known_is_compensated_by_its_weights(work: Path, tmp_path: Path) -> None:
    """No statistics, or inputs that are always 0: as without --activations."""
    moments = load_file(work / "llama.st")
    q, k = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    del moments[q]
    moments[k].zero_()
    save_file(moments, tmp_path / "st", MARK)
    report = lora_tools.quantize(
        work / "llama", tmp_path / "q", activations=tmp_path / "st", compensate=RANK
    )
    lora_tools.quantize(work / "llama", tmp_path / "plain", compensate=RANK)
    for module in (q, k):
        name = f"{module}.weight"
        assert torch.equal(of_adapter(tmp_path / "q", name), of_adapter(tmp_path / "plain", name))
    results = {result.tensor: result for result in report.tensors}
    assert results[f"{q}.weight"].compensated_output_error is None
    assert "13 by their outputs" in report.plan[-1].reason


def test_the_same_with_any_jobs(work: Path, tmp_path: Path) -> None:
    given = {"activations": work / "llama.st", "compensate": RANK}
    for jobs in (1, 3):
        lora_tools.quantize(work / "llama", tmp_path / f"{jobs}", jobs=jobs, **given)
    assert iotools.tree(tmp_path / "1") == iotools.tree(tmp_path / "3")


def test_the_command_says_what_it_gained(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["quantize", str(work / "llama"), "-o", str(tmp_path / "out"), "--compensate", "2"]
    assert run([*args, "--activations", str(work / "llama.st")]) == 0
    said = capsys.readouterr().err
    [line] = [each for each in said.splitlines() if "error-fed layers" in each]
    assert "with the adapter; with plain rounding" in line
