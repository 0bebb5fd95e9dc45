"""``quantize --activations``: rounding errors fed forward on the stored grid. Against GPTQ written
down as its paper has it, and laws: scales and layout are plain NF4's, the error of the outputs is
never larger."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, MismatchError, OutputError, UsageError
from lora_tools.linalg import error_feedback, nf4
from lora_tools.linalg.codebooks import CODEBOOKS, Codebook
from lora_tools.linalg.nf4_search import quantize_searched
from lora_tools.records import Report

from . import iotools, models

pytestmark = pytest.mark.filterwarnings("ignore")

MARK = {"loratools_activations": "1", "tokens": "4096"}
Moments = dict[str, torch.Tensor]


def moment(n: int, seed: int = 0, tokens: int = 500) -> torch.Tensor:
    """Of inputs that depend on one another, some of them much larger than others."""
    noise = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, generator=noise) @ torch.randn(n, n, generator=noise)
    X *= torch.randn(n, generator=noise).exp()
    return X.T @ X / tokens


def moments_of(tensors: Moments, conv1d: bool = False) -> Moments:
    """For every matrix of a layer of the transformer."""
    return {
        name.removesuffix(".weight"): moment(tensor.shape[0 if conv1d else 1], i)
        for i, (name, tensor) in enumerate(tensors.items())
        if tensor.dim() == 2 and (".h." in name or "_proj" in name)
    }


def output_error(E: torch.Tensor, R: torch.Tensor) -> float:
    """tr(E R Eᵀ) in float64."""
    return float(((E.double() @ R.double()) * E.double()).sum())


# ------------------------------------------------------------------------------- the arithmetic


def plain(x: torch.Tensor, book: Codebook, blocksize: int, double: bool = True) -> nf4.Quantized:
    room = torch.empty(nf4.packed_size(x.numel()), dtype=torch.uint8)
    return nf4.quantize_whole(x.reshape(-1), book, blocksize, double, room, nf4.Scratch())


def unpacked(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    both = np.stack((packed >> 4, packed & 15), 1).reshape(-1)
    return both[: math.prod(shape)].reshape(shape)


def gptq(
    W: torch.Tensor, R: torch.Tensor, S: torch.Tensor, table: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 without its blocks, in float64: the values (m, n) that W
    comes to, S (m, n) the scale of each."""
    W, S, R = W.double()[:, order], S.double()[:, order], R.double()[order][:, order]
    R = R + 0.01 * R.diagonal().mean() * torch.eye(len(R))
    U = torch.linalg.cholesky(torch.linalg.inv(R), upper=True)
    out = torch.empty_like(W)
    for j in range(len(R)):
        nearest = (W[:, j, None] - S[:, j, None] * table).abs().argmin(1)
        out[:, j] = S[:, j] * table[nearest]
        W[:, j:] -= ((W[:, j] - out[:, j]) / U[j, j])[:, None] * U[j, j:]
    return out[:, torch.argsort(order)]


SHAPES = [(48, 128, 64), (33, 96, 64), (7, 45, 32), (5, 8, 64), (3, 200, 4096), (130, 64, 32)]


@pytest.mark.parametrize(("m", "n", "blocksize"), SHAPES)
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codes_are_those_of_gptq(
    m: int, n: int, blocksize: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not fit rows, a last one in part, an odd count of numbers, several runs of
    rows."""
    monkeypatch.setattr(error_feedback, "FED_ROWS", 32)
    W, R, book = (
        torch.randn(m, n, generator=torch.Generator().manual_seed(m)),
        moment(n),
        CODEBOOKS[kind],
    )
    made = plain(W, book, blocksize)
    by = error_feedback.factor(R)
    assert by is not None
    fed = np.zeros_like(made.packed)
    errors = error_feedback.feed(W, made.packed, made.scales, book, blocksize, by, fed)
    table = torch.from_numpy(book.table)
    S = torch.from_numpy(np.repeat(made.scales, blocksize)[: m * n].reshape(m, n))
    values = table[torch.from_numpy(unpacked(fed, (m, n)).astype(np.int64))] * S
    wanted = gptq(W, R, S, table.double(), by.order).float()
    differing = (~torch.isclose(values, wanted, rtol=1e-5)).any(1).float().mean()
    assert differing <= 1 / m, "up to one tie"
    before = table[torch.from_numpy(unpacked(made.packed, (m, n)).astype(np.int64))] * S
    assert errors.plain == pytest.approx(output_error(before - W, R), rel=1e-3)
    assert errors.fed == pytest.approx(output_error(values - W, R), rel=1e-3)
    assert errors.energy == pytest.approx(output_error(W, R), rel=1e-3)
    if m * n % 2:
        odd = made.packed[-1] & 15
        assert fed[-1] & 15 == odd, "what fills the last byte"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from((32, 64, 128)),
    st.integers(1, 300),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_the_identity_of_the_error(
    m: int, n: int, blocksize: int, tokens: int, dtype: torch.dtype
) -> None:
    """What the steps add up is the error of what a reader makes of the codes, in its dtype."""
    noise = torch.Generator().manual_seed(m * n)
    W, R, book = (
        torch.randn(m, n, generator=noise).to(dtype),
        moment(n, 1, tokens),
        CODEBOOKS["nf4"],
    )
    made = plain(W, book, blocksize)
    by = error_feedback.factor(R)
    assert by is not None
    fed = np.zeros_like(made.packed)
    errors = error_feedback.feed(W, made.packed, made.scales, book, blocksize, by, fed)
    back = torch.empty(m * n, dtype=dtype)
    nf4.dequantize(fed, made.scales, book, blocksize, back)
    scale = 1e-4 * output_error(W.float(), R)
    wanted = output_error(back.view(m, n).float() - W.float(), R)
    assert errors.fed == pytest.approx(wanted, rel=1e-2, abs=scale)


def test_moments_without_an_inverse() -> None:
    """Of fewer tokens than inputs, of inputs that are always 0 or always the same."""
    few, dead = moment(64, tokens=3), moment(64)
    dead[:, 5] = dead[5] = 0
    for R in (few, dead, torch.ones(64, 64), torch.eye(64) * 1e-30, torch.eye(64) * 1e30):
        by = error_feedback.factor(R)
        assert by is not None
        assert by.U.isfinite().all()
    for bad in (torch.zeros(8, 8), -torch.eye(8), torch.eye(8) - 4 * torch.ones(8, 8)):
        assert error_feedback.factor(bad) is None
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 100
    assert error_feedback.factor(indefinite) is None


def test_a_diagonal_moment_changes_nothing_but_for_scales_as_read() -> None:
    """Without dependence nothing can be made up for: each number goes to its nearest value."""
    W, book = torch.randn(16, 64), CODEBOOKS["nf4"]
    made = plain(W, book, 64, double=False)
    by = error_feedback.factor(torch.rand(64).add(0.1).diag())
    assert by is not None
    fed = np.zeros_like(made.packed)
    error_feedback.feed(W, made.packed, made.scales, book, 64, by, fed)
    assert np.array_equal(fed, made.packed)


# ------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama and a GPT-2 in bfloat16, and statistics of each."""
    top = tmp_path_factory.mktemp("work")
    for kind in ("llama", "gpt2"):
        models.save(models.make(kind, width=64).bfloat16(), top / kind)
        moments = moments_of(models.tensors(top / kind), kind == "gpt2")
        save_file(moments, top / f"{kind}.stats", MARK)
    return top


def energies(report: Report[lora_tools.QuantizeTotals]) -> tuple[float, float]:
    return report.totals["output_error"], report.totals["output_error_unfed"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"double_quant": False, "scheme": "fp4"}])
def test_only_codes_differ(
    kind: str, options: dict[str, object], work: Path, tmp_path: Path
) -> None:
    stats = work / f"{kind}.stats"
    lora_tools.quantize(work / kind, tmp_path / "plain", **options)
    report = lora_tools.quantize(work / kind, tmp_path / "fed", activations=stats, **options)
    before, after = (models.tensors(tmp_path / name) for name in ("plain", "fed"))
    assert list(before) == list(after)
    named = {result.tensor for result in report.tensors}
    assert {name for name in before if not torch.equal(before[name], after[name])} == named
    sizes = [(tmp_path / name / "config.json").read_bytes() for name in ("plain", "fed")]
    assert sizes[0] == sizes[1]
    fed, unfed = energies(report)
    assert fed < 0.8 * unfed
    assert report.totals["tensors_fed"] == len(named) == len(report.tensors)
    assert [i.role for i in report.inputs] == ["checkpoint", "activations"]
    assert report.inputs[1].digest
    assert not report.notes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_errors_are_those_of_the_files(kind: str, work: Path, tmp_path: Path) -> None:
    """Measured on what ``dequantize`` reads, transposed layers included; never above plain's."""
    from safetensors.torch import load_file

    moments, base = load_file(work / f"{kind}.stats"), models.tensors(work / kind)
    found = {}
    for name, stats in (("fed", work / f"{kind}.stats"), ("plain", None)):
        report = lora_tools.quantize(work / kind, tmp_path / name, activations=stats)
        lora_tools.dequantize(tmp_path / name, tmp_path / f"{name}-back")
        found[name] = models.tensors(tmp_path / f"{name}-back")
        if name == "fed":
            results = report.tensors
    for result in results:
        R = moments[result.tensor.removesuffix(".weight")]

        def turned(x: torch.Tensor) -> torch.Tensor:
            return (x.T if kind == "gpt2" else x).float()

        W = turned(base[result.tensor])
        norm = math.sqrt(output_error(W, R))
        fed, unfed = (
            math.sqrt(output_error(turned(found[way][result.tensor]) - W, R)) / norm
            for way in ("fed", "plain")
        )
        assert result.output_norm == pytest.approx(norm, rel=1e-3)
        assert result.output_error == pytest.approx(fed, rel=1e-3)
        assert result.output_error_unfed == pytest.approx(unfed, rel=1e-3)
        assert fed <= unfed


def test_transformers_loads_it(work: Path, tmp_path: Path) -> None:
    lora_tools.quantize(work / "gpt2", tmp_path / "fed", activations=work / "gpt2.stats")
    lora_tools.dequantize(tmp_path / "fed", tmp_path / "back")
    loaded = models.outputs(models.load(tmp_path / "fed"))
    wanted = models.outputs(models.load(tmp_path / "back"))
    assert (loaded - wanted).norm() < 2e-2 * wanted.norm()


def test_the_same_with_any_jobs(work: Path, tmp_path: Path) -> None:
    for jobs in (1, 3):
        lora_tools.quantize(
            work / "llama",
            tmp_path / f"{jobs}",
            activations=work / "llama.stats",
            scale_search=True,
            jobs=jobs,
        )
    assert iotools.tree(tmp_path / "1") == iotools.tree(tmp_path / "3")


def test_what_is_not_known_is_rounded_by_itself(work: Path, tmp_path: Path) -> None:
    """A diagonal, no statistics, a layer that nothing reached: each as plain quantizing has it."""
    from safetensors.torch import load_file

    moments = load_file(work / "llama.stats")
    q, k, v = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    moments[q] = moments[q].diagonal().clone()
    del moments[k]
    moments[v].zero_()
    save_file(moments, tmp_path / "stats", MARK)
    lora_tools.quantize(work / "llama", tmp_path / "plain")
    report = lora_tools.quantize(work / "llama", tmp_path / "fed", activations=tmp_path / "stats")
    before, after = (models.tensors(tmp_path / name) for name in ("plain", "fed"))
    for module in (q, k, v):
        assert torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])
    reasons = {fate.tensor: fate.reason for fate in report.plan}
    assert "rounded by itself: only a diagonal of its inputs is known" in reasons[f"{q}.weight"]
    assert "rounded by itself: no statistics of its inputs" in reasons[f"{k}.weight"]
    assert reasons[f"{v}.weight"].endswith(", error-fed")
    results = {result.tensor: result for result in report.tensors}
    assert results[f"{q}.weight"].output_error is None
    assert results[f"{v}.weight"].output_error == 0
    assert [
        n for n in report.notes if n.startswith("rounded without error feedback: 2 of 14 weights")
    ]


def test_few_tokens_are_said(work: Path, tmp_path: Path) -> None:
    moments = moments_of(models.tensors(work / "llama"))
    save_file(moments, tmp_path / "stats", {**MARK, "tokens": "50"})
    report = lora_tools.quantize(
        work / "llama", tmp_path / "out", activations=tmp_path / "stats", dry_run=True
    )
    assert any("50 tokens" in note and "96 inputs" in note for note in report.notes)


def test_an_adapter_is_merged_before(work: Path, tmp_path: Path) -> None:
    models.train(work / "llama", tmp_path / "lora", {"target_modules": ["q_proj"], "r": 2})
    lora_tools.merge(work / "llama", [tmp_path / "lora"], tmp_path / "merged")
    stats = {"activations": work / "llama.stats"}
    lora_tools.quantize(work / "llama", tmp_path / "a", adapters=[tmp_path / "lora"], **stats)
    lora_tools.quantize(tmp_path / "merged", tmp_path / "b", **stats)
    a, b = models.tensors(tmp_path / "a"), models.tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in b)


Q = "model.layers.0.self_attn.q_proj"
SPOILT: dict[str, tuple[type[Exception], str, Callable[[Moments], Moments]]] = {
    "another width": (MismatchError, "has 5 inputs", lambda m: {**m, Q: torch.eye(5)}),
    "another model's": (MismatchError, "none of the modules", lambda m: {"z": m[Q]}),
    "a NaN": (CheckpointError, "q_proj holds an inf", lambda m: {**m, Q: m[Q] * math.nan}),
    "an inf": (CheckpointError, "q_proj holds an inf", lambda m: {**m, Q: m[Q] * math.inf}),
    "negative": (CheckpointError, r"q_proj: no.*moment", lambda m: {**m, Q: -m[Q]}),
    "no matrix": (CheckpointError, "not a second moment", lambda m: {**m, Q: m[Q][:3]}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_statistics_that_are_none(what: str, work: Path, tmp_path: Path) -> None:
    error, said, spoil = SPOILT[what]
    save_file(spoil(moments_of(models.tensors(work / "llama"))), tmp_path / "stats", MARK)
    with pytest.raises(error, match=said):
        lora_tools.quantize(work / "llama", tmp_path / "out", activations=tmp_path / "stats")
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together(work: Path, tmp_path: Path) -> None:
    stats, out = work / "llama.stats", tmp_path / "out"
    with pytest.raises(UsageError, match=r"scale.search=True is for nf4 and fp4"):
        lora_tools.quantize(
            work / "llama", out, activations=stats, scheme="int8", scale_search=True
        )
    with pytest.raises(OutputError, match="is the input"):
        lora_tools.quantize(work / "llama", stats, activations=stats, force=True)
    (tmp_path / "no").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(CheckpointError, match="does not hold activation statistics"):
        lora_tools.quantize(work / "llama", out, activations=tmp_path / "no")


def test_the_command_says_what_it_gained(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["quantize", str(work / "llama"), "-o", str(tmp_path / "out")]
    args += ["--activations", str(work / "llama.stats"), "--report", str(tmp_path / "r.json")]
    assert run(args) == 0
    said = capsys.readouterr().err
    assert "outputs of 14 error-fed layers: relative error" in said
    assert "unfed" in said
    totals = json.loads((tmp_path / "r.json").read_text())["totals"]
    assert totals["output_error"] < totals["output_error_unfed"]


# ------------------------------------------------------------------------------ searched scales


@pytest.mark.parametrize(("m", "n", "blocksize"), [(16, 128, 64), (9, 40, 32)])
def test_scales_are_searched_by_weights(m: int, n: int, blocksize: int) -> None:
    """Each is the least-squares scale of its codes, and better so weighed than without weights; an
    input that is always 0 has no say, and a block of such inputs keeps its largest magnitude."""
    noise = torch.Generator().manual_seed(n)
    W, book = torch.randn(m, n, generator=noise), CODEBOOKS["nf4"]
    weights = torch.randn(n, generator=noise).exp()
    weights[:3] = 0
    weights[64:] = 0

    def searched(by: torch.Tensor | None) -> nf4.Quantized:
        room = torch.empty(nf4.packed_size(W.numel()), dtype=torch.uint8)
        return quantize_searched(W.view(-1), book, blocksize, False, room, nf4.Scratch(), by)

    def cost(made: nf4.Quantized) -> float:
        back = torch.empty(m * n)
        nf4.dequantize(made.packed, made.scales, book, blocksize, back)
        return float((weights * (back.view(m, n) - W).square()).sum())

    plainly = searched(None)
    assert np.allclose(searched(torch.ones(n)).scales, plainly.scales, rtol=1e-5)
    assert cost(searched(weights)) < 0.97 * cost(plainly)
    if n == 128:
        most = W.view(m, 2, 64)[:, 1].abs().amax(1)
        assert torch.equal(torch.from_numpy(searched(weights).scales).view(m, 2)[:, 1], most)


def test_searched_scales_gain_more(work: Path, tmp_path: Path) -> None:
    stats = work / "llama.stats"
    fed = lora_tools.quantize(work / "llama", tmp_path / "fed", activations=stats)
    both = lora_tools.quantize(
        work / "llama", tmp_path / "both", activations=stats, scale_search=True
    )
    assert energies(both)[0] < energies(fed)[0]
