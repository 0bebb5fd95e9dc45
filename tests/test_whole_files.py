"""Files of whole models, in both layouts: each key converted is one of the part that it was of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter

CLIP, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
# Module → its part; "" of one that only the base has.
ALL_IN_ONE = {
    "flux": {
        "model.diffusion_model.double_blocks.0.img_attn.proj": "",
        "model.diffusion_model.img_in": "transformer",
        f"text_encoders.clip_l.transformer.{CLIP}": "text_encoder",
        f"text_encoders.t5xxl.transformer.{T5}": "text_encoder_2",
    },
    "sd3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.proj": "",
        "model.diffusion_model.x_embedder.proj": "transformer",
        f"text_encoders.clip_l.transformer.{CLIP}": "text_encoder",
        f"text_encoders.clip_g.transformer.{CLIP}": "text_encoder_2",
        f"text_encoders.t5xxl.transformer.{T5}": "text_encoder_3",
    },
    "sd3 without CLIP G": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.proj": "",
        f"text_encoders.clip_l.transformer.{CLIP}": "text_encoder",
        f"text_encoders.t5xxl.transformer.{T5}": "text_encoder_3",
    },
    "chroma": {
        "model.diffusion_model.double_blocks.0.img_attn.proj": "",
        "model.diffusion_model.distilled_guidance_layer.in_proj": "",
        "model.diffusion_model.img_in": "transformer",
        f"text_encoders.t5xxl.transformer.{T5}": "text_encoder",
    },
    "sdxl": {
        "model.diffusion_model.input_blocks.0.0": "",
        "model.diffusion_model.label_emb.0.0": "unet",
        f"conditioner.embedders.0.transformer.{CLIP}": "text_encoder",
    },
    "qwen": {"transformer_blocks.0.attn.to_q": "transformer", "img_in": "transformer"},
    "z-image": {"layers.0.attention.to_q": "transformer", "cap_embedder.1": "transformer"},
}


def factors(modules: list[str]) -> dict[str, torch.Tensor]:
    parts = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    return {f"{m}.{p}.weight": x.clone() for m in modules for p, x in parts.items()}


@pytest.mark.parametrize("case", ALL_IN_ONE)
def test_the_part_of_each_module_of_a_single_file(case: str, tmp_path: Path) -> None:
    parts = {m: part for m, part in ALL_IN_ONE[case].items() if part}
    base = {f"{m}.weight": torch.zeros(4, 4) for m in ALL_IN_ONE[case]}
    save_file(base, tmp_path / "b.safetensors")
    save_file(factors([*parts]), tmp_path / "a.safetensors")
    out = tmp_path / "o.safetensors"
    lora_tools.convert(
        tmp_path / "a.safetensors", out, to="diffusers", base=tmp_path / "b.safetensors"
    )
    heads = [key.partition(".")[0] for key in load_file(out) if ".lora_A." in key]
    assert sorted(heads) == sorted(parts.values())
    lora_tools.merge(tmp_path / "b.safetensors", [out], tmp_path / "m.safetensors")
    for key, merged in load_file(tmp_path / "m.safetensors").items():
        torch.testing.assert_close(merged, base[key] + 2 * (key.removesuffix(".weight") in parts))


@pytest.mark.parametrize(
    ("beside", "part"),
    [
        ("transformer.single_transformer_blocks.0.proj_out", "text_encoder_2"),
        (f"text_encoders.clip_g.transformer.{CLIP}", "text_encoder_3"),
        (f"text_encoders.clip_l.transformer.{CLIP}", ""),
    ],
)
def test_which_encoder_t5_is_without_a_base(beside: str, part: str, tmp_path: Path) -> None:
    """FLUX's by its denoiser's keys, SD3's by CLIP G; where nothing tells it is asked for."""
    save_file(factors([f"text_encoders.t5xxl.transformer.{T5}", beside]), tmp_path / "a")
    out = tmp_path / "o.safetensors"
    if part:
        lora_tools.convert(tmp_path / "a", out, to="diffusers")
        assert f"{part}.{T5}.lora_A.weight" in load_file(out)
        return
    with pytest.raises(UnsupportedAdapter, match=r"which text encoder T5 is.*base"):
        lora_tools.convert(tmp_path / "a", out, to="diffusers")
    lora_tools.convert(tmp_path / "a", out, to="comfyui")  # which has one name for all
    assert f"text_encoders.t5xxl.transformer.{T5}.lora_A.weight" in load_file(out)


def test_two_transformers_alike(tmp_path: Path) -> None:
    """Of Wan 2.2: what names neither is the first's, which is said; ComfyUI has a file for each."""
    module = "blocks.0.attn1.to_q"
    base = tmp_path / "pipe"
    for folder in ("transformer", "transformer_2"):
        (base / folder).mkdir(parents=True)
        (base / folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
        save_file(
            {f"{module}.weight": torch.zeros(4, 4)},
            base / folder / "diffusion_pytorch_model.safetensors",
        )
    index = {f: ["diffusers", "WanTransformer3DModel"] for f in ("transformer", "transformer_2")}
    (base / "model_index.json").write_text(json.dumps(index))
    given = tmp_path / "low.safetensors"
    save_file(factors([f"diffusion_model.{module}"]), given)
    report = lora_tools.merge(base, [given], tmp_path / "m", dry_run=True)
    assert "transformer_2 as the base" in " ".join(report.notes)
    assert not lora_tools.merge(base / "transformer_2", [given], tmp_path / "m", dry_run=True).notes
    save_file(factors([f"transformer.{module}", f"transformer_2.{module}"]), given)
    assert not lora_tools.merge(base, [given], tmp_path / "m", dry_run=True).notes
    for to, says in (("comfyui", "a ComfyUI file is for one model"), ("kohya", "make one of")):
        with pytest.raises(AdapterError, match=says):
            lora_tools.convert(given, tmp_path / "c.safetensors", to=to, base=base)


def test_an_adapter_of_one_part_is_at_home_in_the_pipeline(tmp_path: Path) -> None:
    """By the digest of the part that it acts on, and of no other."""
    pipes = {}
    for name in ("base", "tuned", "other"):
        for i, part in enumerate(("text_encoder", "transformer")):
            folder = tmp_path / name / part
            folder.mkdir(parents=True)
            weight = torch.eye(4) * (1 + i) + (name != "base") * torch.ones(4, 4)
            save_file({f"{'qk'[i]}.weight": weight}, folder / "model.safetensors")
        index = {part: ["transformers", "X"] for part in ("text_encoder", "transformer")}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        pipes[name] = tmp_path / name
    part = "transformer"
    lora_tools.extract(pipes["base"] / part, pipes["tuned"] / part, tmp_path / "a", rank=1)
    lora_tools.merge(pipes["base"], [tmp_path / "a"], tmp_path / "m")
    found = load_file(tmp_path / "m" / part / "model.safetensors")["k.weight"]
    torch.testing.assert_close(found, 2 * torch.eye(4) + 1)
    with pytest.raises(MismatchError, match="was made for another base"):
        lora_tools.merge(pipes["other"], [tmp_path / "a"], tmp_path / "n")


@pytest.mark.parametrize("flat", [True, False])
def test_a_text_encoder_that_the_base_lacks(flat: bool, tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.proj.weight": torch.zeros(4, 4)}, tmp_path / "b")
    keys = factors([f"lora_te_{CLIP.replace('.', '_')}" if flat else f"text_encoder.{CLIP}"])
    if flat:
        names = {"lora_A": "lora_down", "lora_B": "lora_up"}
        keys = {k.replace(p, names[p]): x for k, x in keys.items() for p in names if p in k}
    save_file(keys, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="It has no text_encoder: give one that has"):
        lora_tools.convert(
            tmp_path / "a.safetensors", tmp_path / "o", to="comfyui", base=tmp_path / "b"
        )
