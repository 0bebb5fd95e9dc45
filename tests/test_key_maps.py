"""Text encoders in files for other programs: every key is one that sd-scripts' rules and ComfyUI's
map have, and all of them are there. (Those of denoisers: test_counterparts.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools

from . import models
from .diffusers_layouts import Tensors
from .test_counterparts import noise

# What they train of CLIP (LORA_CLIP_MAP; CLIPAttention and CLIPMLP) and of T5 (T5Attention,
# T5DenseGatedActDense): linear layers.
CLIP = {
    "mlp.fc1": (32, 16),
    "mlp.fc2": (16, 32),
    **{f"self_attn.{k}_proj": (16, 16) for k in ("q", "k", "v", "out")},
}
T5 = {
    **{f"layer.0.SelfAttention.{k}": (16, 16) for k in "qkvo"},
    **{f"layer.1.DenseReluDense.{k}": (24, 16) for k in ("wi_0", "wi_1")},
    "layer.1.DenseReluDense.wo": (16, 24),
}
LAYERS = {"clip": ("text_model.encoder.layers.", CLIP), "t5": ("encoder.block.", T5)}
NORM = "encoder.layers.0.layer_norm1"
WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280}  # of CLIP L and G
# The encoders of a pipeline, and what sd-scripts (networks/lora.py, lora_flux.py, lora_sd3.py,
# LORA_PREFIX_TEXT_ENCODER…) puts before their names.
ENCODERS = {
    "sd1": (("clip", "lora_te_"),),
    "sdxl": (("clip", "lora_te1_"), ("clip", "lora_te2_")),
    "flux": (("clip", "lora_te1_"), ("t5", "lora_te3_")),
    "sd3": (("clip", "lora_te1_"), ("clip", "lora_te2_"), ("t5", "lora_te3_")),
}


def folders(case: str) -> list[tuple[str, str, str]]:
    """Folder, kind and sd-scripts' prefix of each encoder."""
    return [
        (f"text_encoder_{i}" if i > 1 else "text_encoder", kind, prefix)
        for i, (kind, prefix) in enumerate(ENCODERS[case], 1)
    ]


def modules(kind: str) -> dict[str, tuple[int, ...]]:
    start, layers = LAYERS[kind]
    return {f"{start}{i}.{name}": shape for i in range(2) for name, shape in layers.items()}


def comfyui(case: str) -> set[str]:
    """``model_lora_keys_clip`` of comfy/lora.py (v0.3.77), as far as these encoders go: CLIP's
    layers flat and under diffusers' component, T5's flat (``lora_te2_`` is OneTrainer's for FLUX),
    and everything under ``text_encoders.``"""
    known = set()
    clips = ("clip_l", "clip_g")
    for i, (folder, kind, _) in enumerate(folders(case)):
        own = modules(kind)
        if kind == "clip":
            flat = ("lora_te_", "lora_te1_") if i == 0 else ("lora_te2_",)
            known |= {prefix + m.replace(".", "_") for prefix in flat for m in own}
            known |= {f"{folder}.{m}" for m in own}
            known |= {f"text_encoders.{clips[i]}.transformer.{m}" for m in own}
        else:
            flat = (f"lora_te{i + 1}_", "lora_te3_")
            known |= {prefix + m.replace(".", "_") for prefix in flat for m in own}
            known |= {f"text_encoders.t5xxl.transformer.{m}" for m in own}
    return known


def pipeline(path: Path, case: str, by: float) -> Path:
    """With transformers 5's names of CLIP, which has no ``text_model.`` in a file any more."""
    index = {folder: ["transformers", "Encoder"] for folder, _, _ in folders(case)}
    for folder, kind, _ in folders(case):
        (path / folder).mkdir(parents=True)
        (path / folder / "config.json").write_text("{}")
        tensors: Tensors = {}
        for i, (module, shape) in enumerate(modules(kind).items()):
            change = by * noise((shape[0], 1), i) @ noise((1, shape[1]), 90 + i)
            name = module.removeprefix("text_model.") + ".weight"
            tensors[name] = noise(shape, 50 + i) + change
        if kind == "clip":
            tensors[f"{NORM}.weight"] = torch.ones(WIDTHS[folder]) + by
        save_file(tensors, path / folder / "model.safetensors", {"format": "pt"})
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def held(folder: Path) -> Tensors:
    return {
        f"{file.parent.name}.{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("case", ENCODERS)
def test_every_key_is_one_that_is_read(case: str, to: str, tmp_path: Path) -> None:
    base, tuned = (pipeline(tmp_path / n, case, by) for n, by in (("b", 0.0), ("t", 0.1)))
    given = tmp_path / "a.safetensors"
    rest = "save" if to == "comfyui" else "skip"
    lora_tools.extract(base, tuned, given, to=to, rank=1, rest=rest)
    keys = load_file(given)
    names = {key.partition(".lora_")[0] for key in keys if ".lora_" in key}
    if to == "kohya":
        assert names == {
            prefix + module.replace(".", "_")
            for _, kind, prefix in folders(case)
            for module in modules(kind)
        }
    if to == "diffusers":
        assert names == {
            f"{folder}.{m}" for folder, kind, _ in folders(case) for m in modules(kind)
        }
    else:
        assert names <= comfyui(case)
    assert len(names) == sum(len(modules(kind)) for _, kind, _ in folders(case))
    others = {key for key in keys if ".lora_" not in key and not key.endswith(".alpha")}
    clips = [f for f, kind, _ in folders(case) if kind == "clip"]
    norms = {
        f"text_encoders.{clip}.transformer.text_model.{NORM}.diff"
        for _, clip in zip(clips, ("clip_l", "clip_g"), strict=False)
    }
    assert others == (norms if to == "comfyui" else set())
    lora_tools.merge(base, [given], tmp_path / "m")
    wanted = {
        name: torch.ones_like(x) if NORM in name and to != "comfyui" else x
        for name, x in held(tuned).items()
    }
    models.assert_same(held(tmp_path / "m"), wanted, 1e-5)
