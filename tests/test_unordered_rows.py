"""MiniMax-H3's fused q, k and v, whose rows lie in two orders that no file tells apart: refused by
name wherever one could be taken for the other. What else there is merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, UnsupportedAdapter
from lora_tools.formats.counterparts.table import parts

from .diffusers_converters import BARE, DEFAULT, DOTTED, KOHYA, MINIMAX_H3, Case, D
from .test_diffusers_converters import RANK, adapter

ORIGINAL = {f"{name}.weight": torch.zeros(shape) for name, shape in MINIMAX_H3.items()}
TO_Q = "transformer_blocks.0.attn.to_q"
DIFFUSERS = {
    f"{name}.weight": torch.zeros(D, D)
    for name in (
        *(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        *(f"token_refiner.refiner_blocks.0.attn.to_{x}" for x in "qkv"),
        "audio_proj_in",
    )
}
QKV = Case("", {k: v for k, v in MINIMAX_H3.items() if "qkv" in k}, ())
REST = Case("", {k: v for k, v in MINIMAX_H3.items() if "qkv" not in k}, ())
CUT = Case("", {TO_Q: (D, D)}, ())
SPELLINGS = [DOTTED, KOHYA, BARE]
IS_MINIMAX = r"of MiniMax-H3 has q, k and v one above the other in some files and head by head"


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def peft(folder: Path) -> Path:
    """A fused weight's factors as PEFT saves them."""
    folder.mkdir()
    file, _ = adapter(QKV, ("base_model.model.", "AB", False, False))
    save_file(file, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["qkv_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("wrapper", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", [*SPELLINGS, "cut", "peft"])
def test_the_makers_layout_does_not_tell_its_order(
    variant: str | tuple[str, str, bool, bool], wrapper: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "b.safetensors", {wrapper + k: v for k, v in ORIGINAL.items()})
    if variant == "peft":
        given = peft(tmp_path / "l")
    elif variant == "cut":
        given = saved(tmp_path / "l.safetensors", adapter(CUT, ("transformer.", *DOTTED[1:]))[0])
    else:
        assert isinstance(variant, tuple)
        given = saved(tmp_path / "l.safetensors", adapter(QKV, variant)[0])
    out = tmp_path / "o"
    with pytest.raises(UnsupportedAdapter, match=rf"{IS_MINIMAX}.*use the model in the layout of"):
        lora_tools.merge(base, [given], out)
    with pytest.raises(UnsupportedAdapter, match=IS_MINIMAX):
        lora_tools.convert(given, out, to="comfyui", base=base)
    assert not out.exists()


@pytest.mark.parametrize("base", [None, DIFFUSERS, ORIGINAL])
def test_diffsynths_rows_lie_head_by_head(
    base: dict[str, torch.Tensor] | None, tmp_path: Path
) -> None:
    given = saved(tmp_path / "l.safetensors", adapter(QKV, DEFAULT)[0])
    names = None if base is None else saved(tmp_path / "b.safetensors", base)
    out = tmp_path / "o"
    said = rf"{IS_MINIMAX}.*DiffSynth-Studio's files .* head by head.*save_lora_adapter"
    for to in ("comfyui", "peft"):
        with pytest.raises(UnsupportedAdapter, match=said):
            lora_tools.convert(given, out, to=to, base=names)
    with pytest.raises(UnsupportedAdapter, match=said):
        lora_tools.rescale(given, out, scale=0.5)
    if names is not None:
        with pytest.raises(UnsupportedAdapter, match=said):
            lora_tools.merge(names, [given], out)
    assert not out.exists()
    assert "blocks.0.attn.qkv_proj" in str(lora_tools.inspect(given))


def test_a_peft_adapter_does_not_tell_its_order(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", DIFFUSERS)
    given, out = peft(tmp_path / "l"), tmp_path / "o"
    said = rf"{IS_MINIMAX}.*a PEFT adapter does not show which"
    with pytest.raises(UnsupportedAdapter, match=said):
        lora_tools.merge(base, [given], out)
    for of in (None, base):
        for to in ("comfyui", "kohya", "lycoris"):
            with pytest.raises(UnsupportedAdapter, match=said):
                lora_tools.convert(given, out, to=to, base=of)
    assert not out.exists()


@pytest.mark.parametrize("to", ["comfyui", "kohya", "diffusers", "lycoris"])
def test_what_is_extracted_for_a_program_would_tell_the_order(to: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", ORIGINAL)
    tuned = saved(tmp_path / "t.safetensors", {k: v + 1 for k, v in ORIGINAL.items()})
    with pytest.raises(UnsupportedAdapter, match=rf"{IS_MINIMAX}.*but the output needs to"):
        lora_tools.extract(base, tuned, tmp_path / "o", to=to)


@pytest.mark.parametrize("variant", [DOTTED, KOHYA, DEFAULT])
def test_the_other_modules_merge(variant: tuple[str, str, bool, bool], tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", ORIGINAL)
    file, deltas = adapter(REST, variant)
    given, out = saved(tmp_path / "l.safetensors", file), tmp_path / "m.safetensors"
    lora_tools.merge(base, [given], out)
    found = load_file(out)
    for module, delta in deltas.items():
        torch.testing.assert_close(found[f"{module}.weight"], delta, rtol=1e-5, atol=1e-5)


def test_the_same_names_in_another_model_are_read(tmp_path: Path) -> None:
    case = Case("", {"blocks.0.attn.qkv_proj": (3 * D, D)}, ())
    file, deltas = adapter(case, DEFAULT)
    zeros = {f"{name}.weight": torch.zeros_like(delta) for name, delta in deltas.items()}
    base = saved(tmp_path / "b.safetensors", zeros)
    given, out = saved(tmp_path / "l.safetensors", file), tmp_path / "m.safetensors"
    lora_tools.convert(given, tmp_path / "p", to="peft", base=base, alpha=RANK)
    lora_tools.merge(base, [tmp_path / "p"], out)
    [(name, delta)] = deltas.items()
    torch.testing.assert_close(load_file(out)[f"{name}.weight"], delta, rtol=1e-5, atol=1e-5)


BLOCK = {"layers.0.attention.qkv": 36, "cap_embedder.0": 12, "x_embedder": 12, "noise_refiner.0": 4}


@pytest.mark.parametrize(
    ("modulations", "title"), [((0,), "Z-Image"), ((1,), "Lumina-Image 2"), ((0, 1), ""), ((), "")]
)
def test_z_image_and_lumina_2_are_told_by_their_modulation_alone(
    modulations: tuple[int, ...], title: str
) -> None:
    shapes = BLOCK | {f"layers.0.adaLN_modulation.{i}": 48 for i in modulations}
    found = parts([f"{module}.weight" for module in shapes])
    assert "".join(part.family.title for part in found) == title


@pytest.mark.parametrize("mode", ["image", "image_cond", "video", "audio"])
def test_flux_3_has_the_modes_of_diffusers(mode: str, tmp_path: Path) -> None:
    """Whose transformer knows two."""
    case = Case("", {f"content_mode_blocks.{mode}.0.q_proj": (D, D)}, ())
    given = saved(tmp_path / "l.safetensors", adapter(case, DOTTED)[0])
    theirs = (f"mode_blocks.{mode}.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")
    base = saved(tmp_path / "b.safetensors", {f"{k}.weight": torch.zeros(D, D) for k in theirs})
    out = tmp_path / "m.safetensors"
    if mode.startswith("image"):
        lora_tools.merge(base, [given], out)
        assert load_file(out)[f"{theirs[0]}.weight"].any()
        return
    with pytest.raises(AdapterError, match=rf"{mode}.*is this the right base"):
        lora_tools.merge(base, [given], out)
    assert not out.exists()
