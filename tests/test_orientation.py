"""Square weights, whose shape does not tell whether they are stored as (in, out): the model's class
says, else the adapter's fan_in_fan_out. And adapters whose effects on one tensor meet."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import lora_tools
from lora_tools import nn
from lora_tools.errors import AdapterError, MismatchError

from . import iotools, models


class OneLayer(torch.nn.Module):
    """A model of nobody's, with Conv1D or with Linear."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def trained(model: torch.nn.Module, config: Any, out: Path) -> peft.PeftModel:
    """An adapter with numbers of its own, saved."""
    made = models.quietly(lambda: peft.get_peft_model(copy.deepcopy(model), config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    models.quietly(lambda: made.save_pretrained(out))
    return made


KINDS: dict[str, Any] = {
    "lora": lambda **more: peft.LoraConfig(target_modules=["proj"], r=2, **more),
    "dora": lambda **more: peft.LoraConfig(target_modules=["proj"], r=2, use_dora=True, **more),
    "ia3": lambda **more: peft.IA3Config(target_modules=["proj"], feedforward_modules=[], **more),
    "ia3-input": lambda **more: peft.IA3Config(
        target_modules=["proj"], feedforward_modules=["proj"], **more
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("config", [None, {"model_type": "mine"}, {"model_type": "gpt2"}])
def test_the_flag_is_honoured(
    kind: str, transposed: bool, config: dict[str, Any] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = OneLayer(Conv1D(5, 5) if transposed else torch.nn.Linear(5, 5)).eval()
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    if config is not None:
        base = iotools.checkpoint(tmp_path / "base", model.state_dict())
        (base / "config.json").write_text(json.dumps(config))
    want = trained(model, KINDS[kind](fan_in_fan_out=transposed), tmp_path / "a")
    x = torch.randn(3, 5)
    lora_tools.merge(base, [tmp_path / "a"], out := tmp_path / ("m" + base.suffix))
    merged = load_file(out if out.is_file() else out / "model.safetensors")
    found = copy.deepcopy(model)
    found.load_state_dict(merged)
    torch.testing.assert_close(found(x), want(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nn.merge_(model, tmp_path / "a")(x), want(x), rtol=1e-5, atol=1e-5)


def test_a_shape_that_contradicts_the_flag_is_refused(tmp_path: Path) -> None:
    """Of an adapter of several kinds of layers PEFT keeps the last one's flag, which is then wrong
    of square ones: what one shape shows is not used for it alone."""
    model = OneLayer(Conv1D(7, 5))
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    trained(model, KINDS["lora"](fan_in_fan_out=True), tmp_path / "a")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    said = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**said, "fan_in_fan_out": False}))
    with pytest.raises(MismatchError, match=r"proj\.weight: .*fan_in_fan_out: false"):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "n.safetensors")


@pytest.mark.parametrize("flag", [True, False])
def test_the_class_knows_better_than_the_flag(flag: bool, tmp_path: Path) -> None:
    """A ViT with Linears beside a GPT-2 with Conv1Ds: one flag cannot be right of both."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = hf.ViTConfig(**sizes, intermediate_size=8, image_size=8, patch_size=4)
    gpt2 = hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    gpt2.add_cross_attention = gpt2.is_decoder = True
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    torch.manual_seed(0)
    model = models.quietly(lambda: hf.VisionEncoderDecoderModel(config)).eval()
    models.save(model, tmp_path / "base")
    layers = {"attention.q_proj", "attn.c_proj"}  # a Linear and a Conv1D, both square
    wanted = peft.LoraConfig(target_modules=list(layers), init_lora_weights=False, r=2)
    made = trained(model, wanted, tmp_path / "a")
    assert all(any(layer in name for name in models.tensors(tmp_path / "a")) for layer in layers)
    said = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**said, "fan_in_fan_out": flag}))
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    models.save(models.quietly(made.merge_and_unload), tmp_path / "wanted")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "wanted"), 1e-6)


def test_two_of_ia3_multiply(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneLayer(torch.nn.Linear(6, 5)).eval()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    given = [tmp_path / "a", tmp_path / "b"]
    for out, kind in zip(given, ("ia3", "ia3-input"), strict=True):
        trained(model, KINDS[kind](), out)
    one = peft.PeftModel.from_pretrained(copy.deepcopy(model), given[0]).merge_and_unload()
    want = peft.PeftModel.from_pretrained(one, given[1]).merge_and_unload()
    for name, order in (("m", given), ("n", given[::-1])):
        lora_tools.merge(
            tmp_path / "base.safetensors", order, out := tmp_path / f"{name}.safetensors"
        )
        models.assert_same(load_file(out), dict(want.state_dict()), 1e-6)
    lora_tools.merge(
        tmp_path / "base.safetensors", given, tmp_path / "r.safetensors", reversible=True
    )
    lora_tools.unmerge(tmp_path / "r.safetensors", given, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (
        tmp_path / "base.safetensors"
    ).read_bytes()


def test_two_adapters_of_one_token_are_refused(tmp_path: Path) -> None:
    """PEFT 0.21 raises ValueError."""
    model = models.make("llama")
    models.save(model, tmp_path / "base")
    for name, rows in (("a", [0, 1]), ("b", [1, 2]), ("c", [3])):
        chosen = {"target_modules": ["q_proj"], "trainable_token_indices": rows}
        models.train(tmp_path / "base", tmp_path / name, chosen)
    with pytest.raises(AdapterError, match="each replace its row of token 1"):
        lora_tools.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    lora_tools.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "c"], tmp_path / "m")
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    models.train(tmp_path / "base", tmp_path / "d", whole)
    with pytest.raises(AdapterError, match="each replace rows of it, or all"):
        lora_tools.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "d"], tmp_path / "n")
