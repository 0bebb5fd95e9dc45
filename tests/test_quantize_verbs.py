"""``quantize``, ``dequantize`` and merging into a four-bit base: laws, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    QualityGateError,
    UsageError,
)
from lora_tools.formats.quantized.bitsandbytes import STATE, QuantState

from . import iotools, models

pytestmark = pytest.mark.filterwarnings("ignore")

Q = "model.layers.0.q_proj.weight"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base in three shards, an adapter on it, and the base in four bits."""
    top = tmp_path_factory.mktemp("work")
    tensors = {k: v.bfloat16() for k, v in iotools.weights(width=64).items()}
    iotools.checkpoint(top / "base", tensors, shards=3)
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors), r=4)
    lora_tools.quantize(top / "base", top / "packed")
    return top


def by_bitsandbytes(folder: Path, name: str) -> torch.Tensor:
    """A weight as bitsandbytes dequantizes it."""
    tensors = models.tensors(folder)
    parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    return bnb.dequantize_4bit(tensors[name], state)


def test_dequantize_is_bitsandbytes_formula(work, tmp_path):
    report = lora_tools.dequantize(work / "packed", tmp_path / "plain")
    plain, base = models.tensors(tmp_path / "plain"), models.tensors(work / "base")
    assert {k: (v.dtype, v.shape) for k, v in plain.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    for name, tensor in plain.items():
        linear = name.endswith("_proj.weight")
        wanted = by_bitsandbytes(work / "packed", name) if linear else base[name]
        assert torch.equal(tensor, wanted), name
    assert report.totals["tensors_dequantized"] == 4
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    index = json.loads((tmp_path / "plain/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in plain.values())


def test_compensation_is_the_same_with_any_jobs_and_stays_behind(work, tmp_path):
    """Its folder is no part of what is made out of the weights."""
    for jobs in (1, 3):
        out = tmp_path / f"{jobs}"
        report = lora_tools.quantize(work / "base", out, compensate=4, jobs=jobs)
    assert iotools.tree(tmp_path / "1") == iotools.tree(out)
    assert report.plan[-1].tensor == "loftq_init"
    files = [*out.glob("*.safetensors"), *(out / "loftq_init").iterdir()]
    assert report.totals["bytes"] == sum(file.stat().st_size for file in files)
    lora_tools.dequantize(out, tmp_path / "plain")
    assert not (tmp_path / "plain" / "loftq_init").exists()
    error = report.totals["compensated_error"]
    assert error < report.totals["quantization_error"]
    lora_tools.quantize(work / "base", tmp_path / "g", compensate=4, max_error=error * 1.1)
    with pytest.raises(QualityGateError):
        lora_tools.quantize(work / "base", tmp_path / "h", compensate=4, max_error=error * 0.9)
    assert not (tmp_path / "h").exists()


def test_compensation_of_nothing_lost(tmp_path):
    """Numbers that four bits hold exactly leave no error, and no factors to write."""
    exact = torch.tensor([0.0, 1.0, -1.0]).repeat(22)[:64].repeat(64, 1)
    iotools.checkpoint(tmp_path / "base", {Q: exact, Q.replace("q_", "k_"): torch.randn(64, 64)})
    report = lora_tools.quantize(
        tmp_path / "base", tmp_path / "out", compensate=4, double_quant=False
    )
    assert min(t.compensated_error for t in report.tensors) == 0
    assert not any(
        Q.removesuffix(".weight") in key for key in models.tensors(tmp_path / "out" / "loftq_init")
    )


def test_what_cannot_be_compensated_is_refused(work, tmp_path):
    out = tmp_path / "out"
    for given, said in (
        ({"compensate": 0}, "compensate 0"),
        ({"compensate": 4, "compensate_iterations": 0}, "compensate_iterations 0"),
        ({"compensate_iterations": 2}, "compensate"),
    ):
        with pytest.raises(UsageError, match=said):
            lora_tools.quantize(work / "base", out, **given)
    save_file({Q: torch.randn(64, 64)}, tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="needs a folder"):
        lora_tools.quantize(tmp_path / "bare.safetensors", out, compensate=4)
    iotools.adapter(tmp_path / "named", {"base." + Q.removesuffix(".weight"): (64, 64)}, r=2)
    with pytest.raises(MismatchError, match="what the base calls"):
        lora_tools.quantize(work / "base", out, compensate=4, adapters=[tmp_path / "named"])
    exact = torch.tensor([0.0, 1.0, -1.0]).repeat(22)[:64].repeat(64, 1)
    iotools.checkpoint(tmp_path / "exact", {Q: exact})
    with pytest.raises(MismatchError, match="nothing to compensate"):
        lora_tools.quantize(tmp_path / "exact", out, compensate=4, double_quant=False)
    assert not out.exists()


def test_what_is_dequantized_quantizes_to_the_same_codes(work, tmp_path):
    """In float32 the code of a code's value is that code, and the scales differ by rounding."""
    lora_tools.dequantize(work / "packed", tmp_path / "plain", dtype="float32")
    again = lora_tools.quantize(tmp_path / "plain", tmp_path / "again", double_quant=False)
    before, after = models.tensors(work / "packed"), models.tensors(tmp_path / "again")
    same = (before[Q] == after[Q]).float().mean()
    assert same > 0.999
    assert again.totals["quantization_error"] < 1e-3


def test_gpt2_is_turned_and_turned_back(tmp_path):
    base = models.save(models.make("gpt2"), tmp_path / "base")
    lora_tools.quantize(base, tmp_path / "packed", blocksize=32, double_quant=False)
    lora_tools.dequantize(tmp_path / "packed", tmp_path / "plain")
    before, after = models.tensors(base), models.tensors(tmp_path / "plain")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert before[name].shape == after[name].shape == (32, 64)
    assert torch.equal(after[name].T, by_bitsandbytes(tmp_path / "packed", name))
    assert 0 < (after[name] - before[name]).norm() < 0.1 * before[name].norm()


def test_quantize_with_an_adapter_is_merge_and_then_quantize(work, tmp_path):
    given = [(work / "adapter", 0.5)]
    lora_tools.merge(work / "base", given, tmp_path / "merged")
    lora_tools.quantize(tmp_path / "merged", tmp_path / "two")
    lora_tools.quantize(work / "base", tmp_path / "one", adapters=given)
    one, two = models.tensors(tmp_path / "one"), models.tensors(tmp_path / "two")
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = [(tmp_path / folder / "config.json").read_text() for folder in ("one", "two")]
    assert config[0] == config[1]


def test_the_bytes_do_not_depend_on_jobs(work, tmp_path):
    for jobs in (1, 3):
        lora_tools.quantize(work / "base", tmp_path / f"{jobs}", jobs=jobs)
    assert iotools.tree(tmp_path / "1") == iotools.tree(tmp_path / "3")


def test_merging_into_four_bits_rounds_once(work, tmp_path):
    report = lora_tools.merge(work / "packed", [work / "adapter"], tmp_path / "out")
    lora_tools.dequantize(work / "packed", tmp_path / "wide", dtype="float32")
    lora_tools.merge(tmp_path / "wide", [work / "adapter"], tmp_path / "wanted", dtype="bfloat16")
    found, wanted = models.tensors(tmp_path / "out"), models.tensors(tmp_path / "wanted")
    for name, tensor in found.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(tensor, wanted[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert 0.99 < report.totals["delta_kept"] < 1.01


def test_what_is_kept_of_the_adapter_is_measured(work, tmp_path):
    """Against the same figures made from the files alone."""
    for requantize in (False, True):
        out = tmp_path / f"{requantize}"
        report = lora_tools.merge(
            work / "packed", [(work / "adapter", 0.02)], out, requantize=requantize
        )
        plain = out
        if requantize:
            plain = tmp_path / "plain"
            lora_tools.dequantize(out, plain, dtype="float32")
        base = tmp_path / f"base {requantize}"
        lora_tools.dequantize(work / "packed", base, dtype="float32")
        exact = tmp_path / f"exact {requantize}"
        lora_tools.merge(base, [(work / "adapter", 0.02)], exact)
        w, b, e = (models.tensors(folder) for folder in (plain, base, exact))
        moved = wanted = 0.0
        for name in w:
            delta = e[name].double() - b[name].double()
            if name.endswith("_proj.weight"):
                wanted += float((delta * delta).sum())
                moved += float(((w[name].double() - b[name].double()) * delta).sum())
        assert report.totals["delta_kept"] == pytest.approx(moved / wanted, rel=1e-3)
        kept = report.totals["delta_kept"]
        assert (kept < 0.9) is requantize, kept


def test_requantize_keeps_the_scheme_and_what_no_adapter_touches(work, tmp_path):
    iotools.adapter(tmp_path / "small", {Q.removesuffix(".weight"): (64, 64)}, r=2)
    lora_tools.merge(work / "packed", [tmp_path / "small"], tmp_path / "out", requantize=True)
    before, after = models.tensors(work / "packed"), models.tensors(tmp_path / "out")
    assert sorted(before) == sorted(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(Q) for name in changed)
    config = "config.json"
    assert json.loads((work / "packed" / config).read_text()) == json.loads(
        (tmp_path / "out" / config).read_text()
    )
    lora_tools.dequantize(tmp_path / "out", tmp_path / "plain")


def test_the_report_counts_every_bit_and_the_gate_holds(work, tmp_path):
    report = lora_tools.quantize(work / "base", tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report.totals["bytes"] == sum(file.stat().st_size for file in files)
    base = models.tensors(work / "base")
    for result in report.tensors:
        parts = [
            v for k, v in models.tensors(tmp_path / "out").items() if k.startswith(result.tensor)
        ]
        n = base[result.tensor].numel()
        assert result.bits_per_parameter == 8 * sum(p.nbytes for p in parts) / n
        error = (
            by_bitsandbytes(tmp_path / "out", result.tensor).double() - base[result.tensor].double()
        ).norm()
        found = float(error / base[result.tensor].double().norm())
        assert result.relative_error == pytest.approx(found, rel=1e-5)
    with pytest.raises(QualityGateError, match="relative error above") as caught:
        lora_tools.quantize(work / "base", tmp_path / "strict", max_error=0.01)
    assert caught.value.report is not None
    assert not (tmp_path / "strict").exists()
    call = ["quantize", str(work / "base"), "-o", str(tmp_path / "strict"), "--max-error", "0.01"]
    assert run(call) == 3


def test_what_stays_is_listed_and_what_the_loader_would_skip_stays(tmp_path):
    tensors = {
        f"{module}.weight": torch.randn(64, 64)
        for module in (
            "distil.q_lin",
            "pre_classifier",
            "classifier",
            "distil.mlp.gate",
            "distil.mlp.experts.0.w1",
            "lm_head",
        )
    }
    iotools.checkpoint(tmp_path / "base", tensors)
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "out", lm_head=True)
    fates = {fate.tensor: fate.action for fate in report.plan}
    assert fates == dict.fromkeys(tensors, "copy") | {
        "distil.q_lin.weight": "quantize",
        "lm_head.weight": "quantize",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == [
        "classifier",
        "distil.mlp.experts",
        "distil.mlp.gate",
        "pre_classifier",
        "qa_outputs",
        "score",
    ]


def test_what_cannot_be_quantized_is_refused(work, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="blocksize 65"):
        lora_tools.quantize(work / "base", out, blocksize=65)
    with pytest.raises(CheckpointError, match="is already quantized, in"):
        lora_tools.quantize(work / "packed", out)
    with pytest.raises(MismatchError, match="no linear layer"):
        lora_tools.quantize(work / "base", out, include=["norm"])
    with pytest.raises(MismatchError, match="no weight is quantized"):
        lora_tools.dequantize(work / "base", out)
    with pytest.raises(UsageError, match="requantize=True"):
        lora_tools.merge(work / "base", [work / "adapter"], out, requantize=True)
    with pytest.raises(UsageError, match="reversible=True"):
        lora_tools.merge(work / "packed", [work / "adapter"], out, reversible=True)
    for dtype, value, error in (
        (torch.float64, 1.0, UsageError),
        (torch.float32, float("nan"), NonFiniteError),
        (torch.float32, float("-inf"), NonFiniteError),
        (torch.float32, 3e38, NonFiniteError),
    ):
        folder = tmp_path / f"{dtype} {value}"
        iotools.checkpoint(folder, {Q: torch.full((64, 64), value, dtype=dtype)})
        with pytest.raises(error, match=Q):
            lora_tools.quantize(folder, out)
    assert not out.exists()


SPOILT = {
    "absmax gone": lambda t: t.pop(f"{Q}.absmax"),
    "absmax short": lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1].clone()}),
    "weight gone": lambda t: t.pop(Q),
    "weight short": lambda t: t.update({Q: t[Q][:-1].clone()}),
    "map of another dtype": lambda t: t.update({f"{Q}.quant_map": t[f"{Q}.quant_map"].half()}),
    "state gone": lambda t: t.pop(f"{Q}{STATE}nf4"),
    "state of text": lambda t: t.update({f"{Q}{STATE}nf4": torch.zeros(9, dtype=torch.uint8)}),
    "another shape": lambda t: t.update({f"{Q}{STATE}nf4": _state(shape=[64, 65])}),
    "a shape too large": lambda t: t.update({f"{Q}{STATE}nf4": _state(shape=[2**62, 2**62])}),
    "a block size of 0": lambda t: t.update({f"{Q}{STATE}nf4": _state(blocksize=0)}),
    "an endless offset": lambda t: t.update({f"{Q}{STATE}nf4": _state(nested_offset=1e999)}),
}


def _state(**fields: object) -> torch.Tensor:
    state = QuantState("nf4", 64, "BF16", (64, 64), 0.5).to_json()
    text = json.dumps(json.loads(state) | fields).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_quantized_weight_is_refused_by_name(what, tmp_path, capfd):
    iotools.checkpoint(tmp_path / "base", {Q: torch.randn(64, 64).bfloat16()})
    lora_tools.quantize(tmp_path / "base", tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    SPOILT[what](tensors)
    save_file(tensors, file, {"format": "pt"})
    capfd.readouterr()
    assert run(["dequantize", str(tmp_path / "packed"), "-o", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert Q in said
    assert not (tmp_path / "out").exists()
