"""Whole models with convolutions and experts: extract, load in PEFT, merge, attach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lora_tools
from lora_tools import nn

from . import models

SMALL = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
# In gpt-oss and Llama 4 one expert's down_proj is square; the one stores (in, out), of the other
# PEFT takes it for (out, in).
MOES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "gpt_oss": (
        lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **SMALL,
                num_local_experts=3,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        ),
        {"experts-transposed"},
    ),
    "llama4": (
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**SMALL, num_local_experts=3, intermediate_size_mlp=24)
        ),
        {"experts"},
    ),
    "qwen3_moe": (  # stored one by one, fused in memory
        lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=3)
        ),
        {"experts"},
    ),
}


@pytest.mark.parametrize("kind", MOES)
def test_experts(kind: str, tmp_path: Path) -> None:
    make, layouts = MOES[kind]
    torch.manual_seed(0)
    model = make()
    models.perturb(model, 0.1, 0)
    models.save(model.eval(), tmp_path / "base")
    config = peft.LoraConfig(
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[], r=2
    )
    tuned = models.quietly(lambda: peft.get_peft_model(copy.deepcopy(model), config))
    models.perturb(tuned, 0.2, 0, only="lora_")
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a"))
    models.save(models.quietly(tuned.merge_and_unload), tmp_path / "peft")
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "peft"), 1e-6)
    report = lora_tools.extract(tmp_path / "base", tmp_path / "m", tmp_path / "e", rank=4)
    assert {module.layout for module in report.modules} == layouts
    assert {module.rank for module in report.modules} == {2}
    loaded = models.quietly(
        lambda: peft.PeftModel.from_pretrained(models.load(tmp_path / "base"), tmp_path / "e")
    )
    wanted = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(models.outputs(loaded.eval()), wanted, rtol=1e-4, atol=1e-5)
    live = nn.attach(models.load(tmp_path / "base"), tmp_path / "a")
    torch.testing.assert_close(models.outputs(live), wanted, rtol=1e-4, atol=1e-5)


VISION: dict[str, Callable[[], Any]] = {
    # depthwise convolutions, and a layer named 1 beside stages named 1
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, image_size=32)
    ),
    "resnet": lambda: transformers.ResNetModel(  # BatchNorms
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("kind", VISION)
@torch.no_grad()
def test_convolutions(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VISION[kind]()
    models.perturb(model, 0.1, 0)
    models.save(model.eval(), tmp_path / "base")
    models.perturb(model, 0.02, 1)
    models.save(model, tmp_path / "tuned")
    report = lora_tools.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=512)
    assert "conv" in {module.layout for module in report.modules}
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    pixels = torch.randn(1, 3, 32, 32)
    base = models.load(tmp_path / "base")
    wanted, before = model(pixels)[0], base(pixels)[0]
    assert (wanted - before).abs().max() > 1e-3
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(models.load(tmp_path / "m")(pixels)[0], wanted, **close)
    nn.attach(base, tmp_path / "a")
    torch.testing.assert_close(base(pixels)[0], wanted, **close)
    assert torch.equal(nn.detach(base)(pixels)[0], before)
    loaded = models.quietly(lambda: peft.PeftModel.from_pretrained(base, tmp_path / "a")).eval()
    torch.testing.assert_close(loaded(pixels)[0], wanted, **close)
