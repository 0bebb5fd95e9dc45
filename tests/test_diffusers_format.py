"""diffusers itself reads what is written for it, and for kohya: a small UNet with attention and
convolutions adapted, on which the outputs are those of PEFT's own adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.sources.adapters import open_adapter

from . import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

CONFIG = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["to_q", "to_v", "conv1"],
    "rank_pattern": {"to_v": 2},
    "alpha_pattern": {"to_v": 3},
}


def unet() -> Any:
    torch.manual_seed(0)
    return models.quietly(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    ).eval()


def outputs(model: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=noise)
    text = torch.randn(1, 5, 8, generator=noise)
    with torch.no_grad():
        return model(x, torch.tensor(7), encoder_hidden_states=text)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with a UNet in it, PEFT's adapter of it, and what it computes."""
    folder = tmp_path_factory.mktemp("unet")
    (folder / "pipe").mkdir()
    (folder / "pipe/model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    models.quietly(lambda: unet().save_pretrained(folder / "pipe/unet"))
    torch.manual_seed(2)
    model = models.quietly(lambda: peft.get_peft_model(unet(), peft.LoraConfig(**CONFIG)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    models.quietly(lambda: model.eval().save_pretrained(folder / "adapter"))
    torch.save(outputs(model), folder / "wanted.pt")
    return folder


def wanted(root: Path) -> torch.Tensor:
    return torch.load(root / "wanted.pt")


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_diffusers(root: Path, tmp_path: Path) -> None:
    lora_tools.convert(root / "adapter", tmp_path / "d", to="diffusers")
    model = unet()
    model.load_lora_adapter(
        load_file(tmp_path / "d/pytorch_lora_weights.safetensors"), prefix="unet"
    )
    torch.testing.assert_close(outputs(model), wanted(root), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_kohya(root: Path, tmp_path: Path) -> None:
    """One alpha: of a kohya file diffusers 0.42 does not apply an attention layer's own."""
    lora_tools.rescale(root / "adapter", tmp_path / "one-alpha", alpha=3)
    lora_tools.convert(tmp_path / "one-alpha", tmp_path / "k.safetensors", to="kohya")
    model = unet()
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "k.safetensors"), unet_config=model.config
    )
    model.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    torch.testing.assert_close(outputs(model), wanted(root), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["kohya", "diffusers", "lycoris"])
def test_a_pipeline_gives_the_names(to: str, root: Path, tmp_path: Path) -> None:
    """Back out of each format by the pipeline's names, then merged into the UNet."""
    lora_tools.convert(root / "adapter", tmp_path / "a", to=to)
    unet_only = root / "pipe/unet"
    report = lora_tools.convert(tmp_path / "a", tmp_path / "p", to="peft", base=root / "pipe")
    assert all(fate.tensor.startswith("unet.") for fate in report.plan)
    for given in (tmp_path / "a", tmp_path / "p"):
        lora_tools.merge(unet_only, [given], tmp_path / f"m-{given.name}")
        model = diffusers.UNet2DConditionModel.from_config(unet().config)
        model.load_state_dict(models.tensors(tmp_path / f"m-{given.name}"))
        torch.testing.assert_close(outputs(model.eval()), wanted(root), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_pipeline_is_merged(to: str, root: Path, tmp_path: Path) -> None:
    """Its loader opens what is written, shards, variant and all."""
    lora_tools.convert(root / "adapter", tmp_path / "a", to=to)
    base = tmp_path / "base"
    shutil.copytree(root / "pipe", base)
    shutil.rmtree(base / "unet")
    how: dict[str, Any] = {"variant": "fp16", "max_shard_size": "20KB"} if to == "kohya" else {}
    models.quietly(lambda: unet().save_pretrained(base / "unet", **how))
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m", variant=how.get("variant"))
    assert len([*(tmp_path / "m/unet").iterdir()]) == len([*(base / "unet").iterdir()])
    model = models.quietly(
        lambda: diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "m", subfolder="unet")
    )
    torch.testing.assert_close(outputs(model.eval()), wanted(root), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_writes_is_read(root: Path, tmp_path: Path) -> None:
    """With its own metadata: ranks and alphas by pattern."""
    model = unet()
    model.add_adapter(peft.LoraConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_lora_adapter(tmp_path / "u")
    [file] = (tmp_path / "u").glob("*.safetensors")
    state, metadata = load_file(file), _metadata(file)
    # save_lora_adapter leaves the component out, pipelines put it before every name and field.
    prefixed = {f"unet.{k}": v for k, v in state.items()}
    said = {f"unet.{k}": v for k, v in metadata.items()}
    save_file(
        prefixed,
        tmp_path / "l.safetensors",
        {"format": "pt", "lora_adapter_metadata": json.dumps(said)},
    )
    lora_tools.merge(root / "pipe/unet", [tmp_path / "l.safetensors"], tmp_path / "m")
    merged = diffusers.UNet2DConditionModel.from_config(unet().config)
    merged.load_state_dict(models.tensors(tmp_path / "m"))
    torch.testing.assert_close(outputs(merged.eval()), outputs(model.eval()), rtol=1e-4, atol=1e-5)


def _metadata(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    return json.loads(text)


def test_older_names(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 8, generator=noise), torch.randn(8, 2, generator=noise)
    for module, a, b in (
        (
            "unet.mid.attn1.to_out.0",
            "unet.mid.attn1.processor.to_out_lora.down.weight",
            "unet.mid.attn1.processor.to_out_lora.up.weight",
        ),
        (
            "unet.mid.attn1.to_q",
            "unet.mid.attn1.processor.to_q_lora.down.weight",
            "unet.mid.attn1.processor.to_q_lora.up.weight",
        ),
        (
            "text_encoder.x.q_proj",
            "text_encoder.x.q_proj.lora_linear_layer.down.weight",
            "text_encoder.x.q_proj.lora_linear_layer.up.weight",
        ),
        ("unet.x.to_k", "unet.x.to_k.lora.down.weight", "unet.x.to_k.lora.up.weight"),
    ):
        alpha = {f"{module}.alpha": torch.tensor(4.0)}
        save_file({a: A, b: B, **alpha}, tmp_path / "a.safetensors")
        opened = open_adapter(tmp_path / "a.safetensors")
        [(name, found)] = opened.modules.items()
        assert (name, found.r, found.alpha) == (module, 2, 4.0)
        assert torch.equal(opened.tensor(found.A), A)
        assert torch.equal(opened.tensor(found.B), B)
