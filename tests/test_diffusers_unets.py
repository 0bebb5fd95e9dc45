"""kohya's and LyCORIS' files of Stable Diffusion, and LoKr: merged here, each weight changes by
what diffusers' own ``lora_conversion_utils`` makes of the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools

from .diffusers_converters import CASES, FLUX_2, D, M, of
from .diffusers_layouts import Tensors, specs
from .test_counterparts import counterparts, in_both, made
from .test_diffusers_converters import noise, theirs
from .test_key_maps import modules as encoder_modules

__all__ = ["theirs"]  # a fixture

RANK, ALPHA = 2, 1.0
ENCODERS = {"sd1": ("lora_te_",), "sdxl": ("lora_te1_", "lora_te2_")}
WRAPPERS = {
    "sd1": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "text_encoders.clip_g.transformer."),
}
# What the pipeline makes of the converter's keys then (utils/state_dict_utils.py).
RENAMED = {
    r"\.processor\.(to_[qkv])_lora": r".\1",
    r"\.processor\.to_out_lora": ".to_out.0",
    r"\.to_([qkv])_lora": r".\1_proj",
    r"\.to_out_lora": ".out_proj",
    r"\.lora(_linear_layer)?$": "",
}


def file_of(case: str, model: Tensors) -> Tensors:
    """Factors for all layers of a UNet, by its own names, and for its text encoders'."""
    shapes = {
        "lora_unet_" + name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.items()
        if name.endswith(".weight") and weight.dim() > 1
    }
    for prefix in ENCODERS[case]:
        shapes |= {prefix + name: shape for name, shape in encoder_modules("clip").items()}
    file: Tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        key = name.replace(".", "_")
        file[f"{key}.lora_down.weight"] = noise((RANK, *shape[1:]), 2 * i)
        ones = [1] * (len(shape) - 2)
        file[f"{key}.lora_up.weight"] = noise((shape[0], RANK, *ones), 2 * i + 1)
        file[f"{key}.alpha"] = torch.tensor(ALPHA)
    return file


def by_diffusers(theirs: Any, file: Tensors) -> Tensors:
    """The change of each module, with its component, by diffusers."""
    config = SimpleNamespace(layers_per_block=2)  # as in ``diffusers_layouts.unet``
    given = theirs._maybe_map_sgm_blocks_to_diffusers(dict(file), config)
    there, alphas = theirs._convert_non_diffusers_lora_to_diffusers(given)
    assert len(alphas) == len(there) / 2
    deltas = {}
    for key, down in there.items():
        if not key.endswith(".down.weight"):
            continue
        module = key.removesuffix(".down.weight")
        for pattern, by in RENAMED.items():
            module = re.sub(pattern, by, module)
        up = there[key.replace(".down.", ".up.")]
        product = ALPHA / RANK * up.flatten(1) @ down.flatten(1)
        deltas[module] = product.reshape(up.shape[0], *down.shape[1:])
    return deltas


def pipeline(path: Path, deltas: Tensors) -> None:
    """diffusers' folder of a model whose weights are all zero."""
    parts = {name.partition(".")[0] for name in deltas}
    for part in parts:
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text("{}")
        own = {
            f"{name.partition('.')[2]}.weight": torch.zeros_like(delta)
            for name, delta in deltas.items()
            if name.startswith(f"{part}.")
        }
        stem = "diffusion_pytorch_model" if part == "unet" else "model"
        save_file(own, path / part / f"{stem}.safetensors", {"format": "pt"})
    index = {part: ["diffusers", "Part"] for part in parts}
    (path / "model_index.json").write_text(json.dumps(index))


def single_file(case: str, deltas: Tensors) -> Tensors:
    """The makers' layout of the changes, as one file has them."""
    unet = {f"{k.removeprefix('unet.')}.weight": x for k, x in deltas.items() if k[:5] == "unet."}
    known = counterparts(specs(unet))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    result = {name: made(each, unet) for name, each in known.items()}
    result |= {name: x for name, x in unet.items() if name not in covered}
    result = {f"model.diffusion_model.{name}": x for name, x in result.items()}
    for part, wrapper in zip(("text_encoder.", "text_encoder_2."), WRAPPERS[case], strict=False):
        result |= {
            f"{wrapper}{name.removeprefix(part)}.weight": x
            for name, x in deltas.items()
            if name.startswith(part)
        }
    return result


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", ["sd1", "sdxl, sgm", "sdxl"])
def test_stable_diffusion(case: str, theirs: Any, tmp_path: Path) -> None:
    model, _, sgm = case.partition(",")
    original, diffusers = in_both(model)
    file = file_of(model, original if sgm else diffusers)
    if case == "sdxl":  # diffusers takes the two for one
        file = {k: x for k, x in file.items() if "add_embedding" not in k}
    save_file(file, given := tmp_path / "l.safetensors")
    deltas = by_diffusers(theirs, file)
    unet = {f"unet.{k.removesuffix('.weight')}" for k, x in diffusers.items() if x.dim() > 1}
    absent = {"unet.add_embedding.linear_1", "unet.add_embedding.linear_2"}
    assert unet - deltas.keys() == (absent if case == "sdxl" else set())
    assert len(deltas) == len(file) / 3
    pipeline(tmp_path / "p", deltas)
    lora_tools.merge(tmp_path / "p", [given], tmp_path / "mp")
    found = {
        f"{path.parent.name}.{name.removesuffix('.weight')}": tensor
        for path in (tmp_path / "mp").rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert found.keys() == deltas.keys()
    wanted = single_file(model, deltas)
    save_file({k: torch.zeros_like(x) for k, x in wanted.items()}, tmp_path / "b.safetensors")
    lora_tools.merge(tmp_path / "b.safetensors", [given], tmp_path / "m.safetensors")
    one = load_file(tmp_path / "m.safetensors")
    for have, want in ((found, deltas), (one, wanted)):
        for name, delta in want.items():
            torch.testing.assert_close(have[name], delta, rtol=1e-5, atol=1e-5, msg=name)


LOKR = ("whole", "second", "both")  # which side is a product of two factors
FLUX_2_CUT = {
    **of(D, D, *(f"transformer_blocks.0.attn.to_{x}" for x in ("q", "k", "v", "out.0", "add_out"))),
    **of(
        2 * M, D, "transformer_blocks.0.ff.linear_in", "transformer_blocks.0.ff_context.linear_in"
    ),
    **of(3 * D + 2 * M, D, "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    **of(D, D + M, "single_transformer_blocks.0.attn.to_out"),
}
Z_IMAGE_CUT = {
    **of(D, D, *(f"layers.0.attention.to_{x}" for x in ("q", "k", "v", "out.0"))),
    **of(M, D, "layers.0.feed_forward.w1"),
}
# Converter → prefix, modules in the file, whether its names are flat, and what is fused there.
KRONECKER: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "_convert_non_diffusers_lokr": ("diffusion_model.", Z_IMAGE_CUT),
    "_convert_non_diffusers_flux2_lokr": ("diffusion_model.", FLUX_2),
    "_convert_lycoris_flux2_lokr": ("lycoris_", FLUX_2_CUT),
}
FUSED = {
    ".to_qkv": [".to_q", ".to_k", ".to_v"],
    ".to_added_qkv": [".add_q_proj", ".add_k_proj", ".add_v_proj"],
}


def lokr(prefix: str, modules: dict[str, tuple[int, ...]], kind: str) -> Tensors:
    file: Tensors = {}
    for i, (module, (rows, columns)) in enumerate(modules.items()):
        key = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        parts = {
            "lokr_w1": noise((2, 3), 4 * i),
            "lokr_w2": noise((rows // 2, columns // 3), 4 * i),
        }
        if kind != "whole":
            del parts["lokr_w2"]
            parts["lokr_w2_a"] = noise((rows // 2, RANK), 4 * i)
            parts["lokr_w2_b"] = noise((RANK, columns // 3), 4 * i + 1)
        if kind == "both":
            del parts["lokr_w1"]
            parts["lokr_w1_a"] = noise((2, RANK), 4 * i + 2)
            parts["lokr_w1_b"] = noise((RANK, 3), 4 * i + 3)
        parts["alpha"] = torch.tensor(1e10 if kind == "whole" else ALPHA)  # no scale of whole sides
        file |= {f"{key}.{part}": x for part, x in parts.items()}
    return file


def kronecker(there: Tensors) -> Tensors:
    """The change of each module in diffusers' layout, by PEFT's parts."""
    result: Tensors = {}
    for module in {key.rpartition(".")[0] for key in there}:
        sides = [
            there.get(f"{module}.lokr_{w}", there.get(f"{module}.lokr_{w}_a")) for w in ("w1", "w2")
        ]
        for i, w in enumerate(("w1", "w2")):
            if f"{module}.lokr_{w}_b" in there:
                sides[i] = sides[i] @ there[f"{module}.lokr_{w}_b"]
        delta = torch.kron(sides[0], sides[1])
        name = module.removeprefix("transformer.")
        end = next((fused for fused in FUSED if name.endswith(fused)), "")
        names = [name.removesuffix(end) + part for part in FUSED[end]] if end else [name]
        result |= dict(zip((f"{n}.weight" for n in names), delta.chunk(len(names)), strict=True))
    return result


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", LOKR)
@pytest.mark.parametrize("converter", KRONECKER)
def test_lokr(converter: str, kind: str, theirs: Any, tmp_path: Path) -> None:
    prefix, modules = KRONECKER[converter]
    file = lokr(prefix, modules, kind)
    deltas = kronecker(getattr(theirs, f"{converter}_to_diffusers")(dict(file)))
    base = {k: torch.zeros_like(x) for k, x in deltas.items()}
    base["double_stream_modulation_img.linear.weight"] = torch.zeros(6 * D, D)  # what tells FLUX.2
    save_file(base, tmp_path / "b.safetensors")
    save_file(file, tmp_path / "l.safetensors")
    lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")
    found = load_file(tmp_path / "m")
    for name, delta in deltas.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-4, msg=name)


# Those that this file, and test_counterparts, hold one by one.
OTHERS = {
    "_convert_non_diffusers": "test_stable_diffusion",
    "_convert_xlabs_flux": "test_xlabs_factors_are_those_that_diffusers_makes_of_them",
    "_convert_bfl_flux_control": "test_a_control_lora_is_refused_by_name",
}


def test_no_converter_is_left_out(theirs: Any) -> None:
    names = {name for name in vars(theirs) if name.endswith("_to_diffusers")}
    loras = {n.removesuffix("_lora_to_diffusers") for n in names if "_lora_to" in n}
    kronecker = {n.removesuffix("_to_diffusers") for n in names if "_lokr_to" in n}
    others = {n for n in names if "_lora_to" not in n and "_lokr_to" not in n}
    assert loras == {case.converter for case in CASES.values()} | OTHERS.keys()
    assert kronecker == KRONECKER.keys()
    assert others == {"_maybe_map_sgm_blocks_to_diffusers"}
