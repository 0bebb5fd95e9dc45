"""State-space models: PEFT refuses factors of the layers that their kernels read past it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import MismatchError, UnsupportedAdapter

from . import models

_SMALL: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
MODELS: dict[str, Any] = {
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**_SMALL, state_size=4)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**_SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1)
    ),
    "falcon_mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**_SMALL, state_size=4)),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(
        hf.FalconH1Config(
            **_SMALL | _HEADS,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=4,
            mamba_n_groups=1,
        )
    ),
}


def test_what_is_read_without_a_call_is_saved_whole(tmp_path: Path) -> None:
    """Jamba takes the weight of dt_proj, so that PEFT's layer around it would be passed by."""
    config = hf.JambaConfig(
        **_SMALL | _HEADS,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    torch.manual_seed(0)
    model = models.quietly(lambda: hf.JambaForCausalLM(config)).eval()
    models.save(model, tmp_path / "base")
    models.perturb(model, 0.05, 1, only="mamba")
    models.save(model, tmp_path / "tuned")
    report = lora_tools.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=64)
    fates = {fate.tensor: fate.action for fate in report.plan}
    assert fates["model.layers.0.mamba.dt_proj.weight"] == "saved whole"
    assert fates["model.layers.0.mamba.out_proj.weight"] == "decomposed"
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    wanted = models.quietly(lambda: models.outputs(model))
    torch.testing.assert_close(models.outputs(peft), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_what_peft_refuses_is_saved_whole(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.quietly(MODELS[kind]).eval()
    models.save(model, tmp_path / "base")
    models.perturb(model, 0.05, 1, only="_proj")
    models.save(model, tmp_path / "tuned")
    report = lora_tools.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=64)
    fates = {fate.tensor: fate for fate in report.plan if ".out_proj.weight" in fate.tensor}
    assert {fate.action for fate in fates.values()} == {"saved whole"}
    assert all("do not take factors of it" in fate.reason for fate in fates.values())
    assert any(module.module.endswith("in_proj") for module in report.modules)
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    wanted = models.quietly(lambda: models.outputs(model))
    torch.testing.assert_close(models.outputs(peft), wanted, rtol=1e-4, atol=1e-4)
    lora_tools.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=64, consumer="vllm", rest="skip"
    )


def test_a_config_with_an_infinite_number_is_read_as_its_library_does(tmp_path: Path) -> None:
    """Written as {"__float__": "Infinity"}; unread, nobody would know the names of the experts."""
    config = hf.GraniteMoeHybridConfig(
        **_SMALL | _HEADS,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=2,
        shared_intermediate_size=8,
    )
    torch.manual_seed(0)
    model = models.quietly(lambda: hf.GraniteMoeHybridForCausalLM(config)).eval()
    models.perturb(model, 0.1, 0)
    models.save(model, tmp_path / "base")
    assert "__float__" in (tmp_path / "base" / "config.json").read_text()
    models.perturb(model, 0.05, 1, only="experts")
    models.save(model, tmp_path / "tuned")
    lora_tools.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=64)
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    wanted = models.quietly(lambda: models.outputs(model))
    torch.testing.assert_close(models.outputs(peft), wanted, rtol=1e-4, atol=1e-4)


def _dt_proj_adapter(tmp_path: Path) -> torch.nn.Module:
    """One on Mamba, whose mixer takes the weight of dt_proj; as PEFT loads it."""
    torch.manual_seed(0)
    models.save(models.quietly(MODELS["mamba"]), tmp_path / "base")
    targets = {"target_modules": ["x_proj", "dt_proj"], "init_lora_weights": False}
    return models.adapt(tmp_path / "base", tmp_path / "a", targets)


def test_what_is_read_without_a_call_is_not_merged(tmp_path: Path) -> None:
    """PEFT's layer around it is passed by: merged, the factors would begin to count."""
    peft = _dt_proj_adapter(tmp_path)
    with pytest.raises(UnsupportedAdapter, match=r"dt_proj.*no effect.*allow_unmatched"):
        lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    report = lora_tools.merge(
        tmp_path / "base", [tmp_path / "a"], tmp_path / "m", allow_unmatched=True
    )
    left_out = {fate.tensor for fate in report.plan if fate.action == "unmatched"}
    assert left_out == {f"backbone.layers.{i}.mixer.dt_proj.weight" for i in (0, 1)}
    merged = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(merged, models.outputs(peft), rtol=1e-5, atol=1e-5)


def test_factors_of_it_that_were_never_trained_are_merged(tmp_path: Path) -> None:
    """No gradient reaches them, so that a target of all linear layers leaves them at 0."""
    _dt_proj_adapter(tmp_path)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "dt_proj.lora_B" in key:
            tensors[key].zero_()
    save_file(tensors, file)
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    merged = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(merged, models.outputs(peft), rtol=1e-5, atol=1e-5)


def _mobilebert() -> Any:
    """Its head reads the weights of both its layers, one of which is the embedding's."""
    config = hf.MobileBertConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=1,
    )
    return hf.MobileBertForMaskedLM(config)


def _llama4() -> Any:
    """Its router is a linear layer that gives two tensors."""
    sizes = _SMALL | _HEADS | {"num_local_experts": 2, "head_dim": 8, "moe_layers": [0]}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes))


def _tuned(make: Any, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    model = models.quietly(make).eval()
    models.save(model, tmp_path / "base")
    models.perturb(model, 0.05, 1)
    models.save(model, tmp_path / "tuned")
    return model


def test_a_router_that_is_a_linear_layer_is_saved_whole(tmp_path: Path) -> None:
    model = _tuned(_llama4, tmp_path)
    lora_tools.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=64)
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    wanted = models.quietly(lambda: models.outputs(model))
    torch.testing.assert_close(models.outputs(peft), wanted, rtol=1e-4, atol=1e-4)


def test_an_embedding_that_the_head_reads_is_refused(tmp_path: Path) -> None:
    _tuned(_mobilebert, tmp_path)
    sides = tmp_path / "base", tmp_path / "tuned", tmp_path / "a"
    with pytest.raises(MismatchError, match=r"decoder,.*PEFT"):
        lora_tools.extract(*sides, rank=64)
    lora_tools.extract(*sides, rank=64, embeddings="skip")
    models.attach(tmp_path / "base", tmp_path / "a")
