"""``extract --to``: straight to the file of another program, by what ``convert`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.table import FORMATS

from . import iotools, models
from .diffusers_layouts import Tensors
from .test_counterparts import BASES, comfyui, in_both, noise

CLIP_G = "conditioner.embedders.1.model.transformer.resblocks.0"


def changed(model: Tensors, vectors: bool) -> Tensors:
    """A change of rank 1 of every matrix and convolution; of vectors another."""
    result = {}
    for i, (name, weight) in enumerate(model.items()):
        change = torch.zeros_like(weight)
        if name.endswith(".weight") and weight.dim() > 1:
            column, row = noise((weight.shape[0], 1), 300 + i), noise((1, weight[0].numel()), i)
            change = 0.1 * (column @ row).reshape(weight.shape)
        elif vectors:
            change = noise(tuple(weight.shape), 500 + i)
        result[name] = weight + change
    return result


@pytest.mark.sweep(5)
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("mine_is", ["original", "diffusers"])
@pytest.mark.parametrize("case", BASES)
def test_of_either_layout(case: str, mine_is: str, to: str, tmp_path: Path) -> None:
    """q, k and v of a fused weight are each of the rank asked for, and the other way about; what
    ComfyUI has a place for is all of the change."""
    original, theirs = in_both(case)
    base = original if mine_is == "original" else theirs
    tuned = changed(base, vectors=to == "comfyui")
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    out = tmp_path / "o.safetensors"
    lora_tools.extract(*files, out, to=to, rank=4)
    if to == "comfyui":
        known = comfyui(case, original, theirs)
        assert {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key} <= known
    lora_tools.merge(files[0], [out], tmp_path / "m.safetensors")
    models.assert_same(load_file(tmp_path / "m.safetensors"), tuned, 1e-5)


def sdxl(path: Path) -> Tensors:
    """A single file of SDXL, in small, with its VAE and OpenCLIP's fused weight."""
    names = {
        "model.diffusion_model.input_blocks.1.0.in_layers.2": (8, 8, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": (16, 8),
        f"{CLIP_G}.mlp.c_fc": (32, 16),
        f"{CLIP_G}.attn.out_proj": (16, 16),
        "first_stage_model.encoder.conv_in": (8, 4, 3, 3),
    }
    model = {f"{name}.weight": noise(shape, i) for i, (name, shape) in enumerate(names.items())}
    model |= {f"{CLIP_G}.attn.in_proj_weight": noise((48, 16), 9)}
    model |= {f"{CLIP_G}.ln_1.weight": noise((16,), 10)}
    save_file(model, path)
    return model


def test_all_parts_of_a_single_file(tmp_path: Path) -> None:
    base = sdxl(tmp_path / "base.safetensors")
    tuned = {k: v + 0.1 for k, v in base.items() if "first_stage" not in k}
    save_file({**base, **tuned}, tmp_path / "tuned.safetensors")
    files, out = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"), tmp_path / "k"
    with pytest.raises(UnsupportedAdapter, match=r"kohya .* does not read tensors saved whole"):
        lora_tools.extract(*files, out, to="kohya")
    assert not out.exists()
    lora_tools.extract(*files, out, to="kohya", rest="skip", rank=2)
    layers = "text_model_encoder_layers_0"
    assert {key.partition(".")[0] for key in load_file(out)} == {
        "lora_unet_input_blocks_1_0_in_layers_2",
        f"lora_te1_{layers}_mlp_fc1",
        f"lora_te2_{layers}_mlp_fc1",
        *(f"lora_te2_{layers}_self_attn_{k}_proj" for k in ("q", "k", "v", "out")),
    }
    lora_tools.merge(files[0], [out], tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    wanted = {**base, **tuned, f"{CLIP_G}.ln_1.weight": base[f"{CLIP_G}.ln_1.weight"]}
    models.assert_same(found, wanted, 1e-5)


def test_a_part_that_a_format_has_no_names_for(tmp_path: Path) -> None:
    """A VAE that changed is refused before the others are written, or left out."""
    base = sdxl(tmp_path / "base.safetensors")
    vae = "first_stage_model.encoder.conv_in.weight"
    unet = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    save_file({**base, vae: base[vae] + 1, unet: base[unet] + 1}, tmp_path / "tuned.safetensors")
    files, out = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"), tmp_path / "k"
    with pytest.raises(UnsupportedAdapter, match=rf"\({vae} changed\)"):
        lora_tools.extract(*files, out, to="kohya")
    report = lora_tools.extract(*files, out, to="kohya", rest="skip")
    assert len(report.modules) == 1
    assert [f.tensor for f in report.plan if f.action == "skipped"] == [vae]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, and its fine-tuned copy."""
    folder = tmp_path_factory.mktemp("to")
    base = models.save(models.make("llama"), folder / "base")
    tensors = models.tensors(base)
    tuned = {k: v + 0.01 if k.endswith("_proj.weight") else v for k, v in tensors.items()}
    (folder / "tuned").mkdir()
    (folder / "tuned/config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tuned, folder / "tuned/model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.sweep(2)
@pytest.mark.parametrize("to", FORMATS)
def test_it_is_what_convert_makes_of_it(to: str, root: Path, tmp_path: Path) -> None:
    sides: Any = root / "base", root / "tuned"
    report = lora_tools.extract(*sides, tmp_path / "a", rank=2, to=to)
    assert report.output == str(tmp_path / "a")
    files = [*(tmp_path / "a").iterdir()] if (tmp_path / "a").is_dir() else [tmp_path / "a"]
    adapter = [file for file in files if file.name != "README.md"]
    assert report.totals["bytes"] == sum(file.stat().st_size for file in adapter)
    lora_tools.extract(*sides, tmp_path / "p", rank=2, names="stored")
    lora_tools.convert(tmp_path / "p", tmp_path / "c", to=to, base=root / "base")
    for name, given in (("m", tmp_path / "a"), ("n", tmp_path / "c")):
        lora_tools.merge(root / "base", [given], tmp_path / name)
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "n"), 0)
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(root / "tuned"), 1e-5)
    verified = lora_tools.verify(tmp_path / "a", base=root / "base", tuned=root / "tuned")
    assert verified.totals["same"]


def test_what_does_not_go_together(root: Path, tmp_path: Path) -> None:
    sides: Any = root / "base", root / "tuned"
    for options, why in (
        ({"to": "gguf", "consumer": "vllm"}, "needs the format of PEFT"),
        ({"to": "kohya", "base_name": "org/name"}, "cannot store it"),
        ({"to": "kohya", "budget": "50MB"}, "a size in bytes is only for PEFT's file"),
        ({"to": "mlx", "out": "x.safetensors"}, "the output is a folder"),
        ({"out": "x.safetensors"}, "the output is a folder"),
        ({"to": "none"}, "is needed"),
    ):
        more: dict[str, Any] = {**options}
        with pytest.raises(UsageError, match=why):
            lora_tools.extract(*sides, tmp_path / more.pop("out", "o"), **more)
    assert not [*tmp_path.iterdir()]


def test_the_error_gate_leaves_nothing(root: Path, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    other = {k: v + torch.randn(v.shape, generator=noise) for k, v in iotools.weights().items()}
    base, tuned = (
        iotools.checkpoint(tmp_path / n, w) for n, w in (("b", iotools.weights()), ("t", other))
    )
    with pytest.raises(lora_tools.QualityGateError):
        lora_tools.extract(base, tuned, tmp_path / "o", to="onnxruntime", rank=1, max_error=0.1)
    assert not (tmp_path / "o").exists()
    assert json.loads((base / "config.json").read_text())


def test_no_alpha_where_the_format_has_no_place_for_it(root: Path, tmp_path: Path) -> None:
    """Folded into lora_B it would be rounded after the error was measured."""
    sides: Any = root / "base", root / "tuned"
    settings: list[dict[str, Any]] = [{"alpha": 3}, {"rslora": True}]
    for more in settings:
        with pytest.raises(UsageError, match="lora_alpha; leave them out"):
            lora_tools.extract(*sides, tmp_path / "a", to="onnxruntime", **more)


def test_one_alpha_of_modules_of_several_ranks(tmp_path: Path) -> None:
    """It is not rounded into lora_B once the error is measured."""
    model = models.make("llama")
    base = models.save(model, tmp_path / "base")
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for i, (part, rank) in enumerate((("q", 8), ("k", 3), ("o", 5))):
        weight = model.get_parameter(f"model.layers.0.self_attn.{part}_proj.weight").data
        weight += noise((len(weight), rank), i) @ noise((rank, weight.shape[1]), 9 + i)
    tuned = models.save(model, tmp_path / "tuned")
    kinds: dict[str, Any] = {"energy": 0.9999, "dtype": "bfloat16"}
    report = lora_tools.extract(base, tuned, tmp_path / "a.gguf", to="gguf", **kinds)
    lora_tools.convert(tmp_path / "a.gguf", tmp_path / "p", to="peft", base=base)
    factors = load_file(tmp_path / "p/adapter_model.safetensors")
    config = json.loads((tmp_path / "p/adapter_config.json").read_text())
    ranks = set()
    for module in report.modules:
        start = f"base_model.model.{module.module}.lora_"
        if f"{start}A.weight" in factors:
            A, B = (factors[f"{start}{x}.weight"].double() for x in "AB")
            ranks.add(len(A))
            name = f"{module.module}.weight"
            change = model.state_dict()[name].double() - plain[name].double()
            alpha = config["alpha_pattern"].get(module.module, config["lora_alpha"])
            error = (change - alpha / len(A) * B @ A).norm() / change.norm()
            assert float(error) == pytest.approx(module.relative_error, rel=1e-3)
    assert len(ranks) > 1
    for to in ("mlx", "torchtune"):
        with pytest.raises(UsageError, match="has one scale for all ranks"):
            lora_tools.extract(base, tuned, tmp_path / "b", to=to, alpha=3, **kinds)
