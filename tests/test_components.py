"""Parts of a diffusion pipeline: a key acts on its own part alone, and is written under the name
that its readers look for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, UnsupportedAdapter

from . import iotools

CLIP = "text_model.encoder.layers.0.mlp.fc1"
FLAT_CLIP = "text_model_encoder_layers_0_mlp_fc1"
# A single file of SDXL, in small: every part has a module that ends in "encoder.q".
SDXL = (
    "first_stage_model.encoder.q",
    "model.diffusion_model.input_blocks.1.q",
    "conditioner.embedders.0.transformer." + CLIP,
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc",
)
VAE = ("encoder.q", "decoder.conv_in", "post_quant_conv")
WAN = ("blocks.0.attn1.to_q",)


def base(path: Path, modules: tuple[str, ...], config: dict[str, str] | None = None) -> Path:
    """A file, or the folder of a part of a pipeline."""
    tensors = {f"{module}.weight": torch.zeros(6, 6) for module in modules}
    if config is None:
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    path.mkdir()
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def lora(path: Path, module: str) -> Path:
    names = ("lora_down", "lora_up") if module.startswith("lora_") else ("lora_A", "lora_B")
    save_file(
        {
            f"{module}.{names[0]}.weight": torch.ones(2, 6),
            f"{module}.{names[1]}.weight": torch.ones(6, 2),
        },
        path,
    )
    return path


# Base, its class, key → the module that it acts on, or "".
READ: dict[str, tuple[tuple[str, ...], str | None, dict[str, str]]] = {
    "sdxl": (
        SDXL,
        None,
        {
            "lora_te_encoder_q": "",  # the VAE's
            "lora_unet_encoder_q": "",
            "lora_unet_input_blocks_1_q": SDXL[1],
            "lora_te1_" + FLAT_CLIP: SDXL[2],
            "lora_te2_" + FLAT_CLIP: SDXL[3],
            "text_encoder." + CLIP: SDXL[2],
            "text_encoder_2." + CLIP: SDXL[3],
            "unet.input_blocks.1.q": SDXL[1],
            # As loratools before 0.2 wrote it.
            "lora_unet_model_diffusion_model_input_blocks_1_q": SDXL[1],
        },
    ),
    "vae": (VAE, "AutoencoderKL", {"lora_te_encoder_q": "", "lora_unet_encoder_q": ""}),
    "a file of a VAE": (VAE, None, {"lora_te_encoder_q": "", "text_encoder.encoder.q": ""}),
    "transformer": (
        WAN,
        "WanTransformer3DModel",
        {
            "transformer_2.blocks.0.attn1.to_q": "",
            "transformer.blocks.0.attn1.to_q": WAN[0],
            "lora_unet_blocks_0_attn1_to_q": WAN[0],
            "lora_te_blocks_0_attn1_to_q": "",
        },
    ),
    "transformer_2": (
        WAN,
        "WanTransformer3DModel",
        {
            "transformer.blocks.0.attn1.to_q": "",
            "transformer_2.blocks.0.attn1.to_q": WAN[0],
            "lora_unet_blocks_0_attn1_to_q": WAN[0],
        },
    ),
    "text_encoder": (  # as transformers 5 saves it
        (CLIP.removeprefix("text_model."),),
        "",
        {
            "lora_te_" + FLAT_CLIP: CLIP.removeprefix("text_model."),
            "lora_te2_" + FLAT_CLIP: "",
            "text_encoder." + CLIP: CLIP.removeprefix("text_model."),
            "text_encoder_2." + CLIP: "",
        },
    ),
    "of no part's name": (
        WAN,
        "WanTransformer3DModel",
        {key + ".blocks.0.attn1.to_q": WAN[0] for key in ("transformer", "transformer_2")},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_key_acts_on_its_own_part_alone(case: str, tmp_path: Path) -> None:
    modules, kind, keys = READ[case]
    model = base(tmp_path / case, modules, {"_class_name": kind} if kind is not None else None)
    for i, (key, module) in enumerate(keys.items()):
        given, out = lora(tmp_path / "l.safetensors", key), tmp_path / f"m{i}{model.suffix}"
        if not module:
            with pytest.raises(AdapterError, match=r"is this the right base"):
                lora_tools.merge(model, [given], out)
            continue
        report = lora_tools.merge(model, [given], out)
        assert [f.tensor for f in report.plan if f.action == "merge"] == [f"{module}.weight"]


# A module, what the adapter says it was trained on → its names in kohya's and diffusers' files, or
# "" where it has none.
WRITTEN = {
    (SDXL[0], ""): ("", ""),
    (SDXL[1], ""): ("lora_unet_input_blocks_1_q", ""),
    (SDXL[2], ""): ("lora_te1_" + FLAT_CLIP, "text_encoder." + CLIP),  # SDXL has another
    (SDXL[3], ""): ("", ""),
    ("model.diffusion_model.transformer_blocks.0.attn.to_q", ""): (
        "lora_unet_transformer_blocks_0_attn_to_q",
        "transformer.transformer_blocks.0.attn.to_q",
    ),
    ("blocks.0.self_attn.q", ""): ("lora_unet_blocks_0_self_attn_q", ""),
    (WAN[0], ""): ("", "transformer.blocks.0.attn1.to_q"),
    (CLIP, "pipe/text_encoder"): ("lora_te1_" + FLAT_CLIP, "text_encoder." + CLIP),
    (CLIP, "pipe/text_encoder_2"): ("lora_te2_" + FLAT_CLIP, "text_encoder_2." + CLIP),
    (CLIP.removeprefix("text_model."), "pipe/text_encoder"): (  # as of transformers 5
        "lora_te1_" + FLAT_CLIP,
        "text_encoder." + CLIP,
    ),
    (CLIP, "alone/text_encoder"): ("lora_te_" + FLAT_CLIP, "text_encoder." + CLIP),
}


@pytest.mark.parametrize(("module", "trained_on"), WRITTEN)
def test_written_as_its_readers_look_for_it(module: str, trained_on: str, tmp_path: Path) -> None:
    """sd-scripts' prefixes and diffusers' components."""
    for folder in ("pipe/text_encoder", "pipe/text_encoder_2", "alone/text_encoder"):
        (tmp_path / folder).mkdir(parents=True)
    given = iotools.adapter(tmp_path / "a", {module: (6, 6)})
    said = json.loads((given / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = str(tmp_path / trained_on)
    (given / "adapter_config.json").write_text(json.dumps(said))
    for to, name in zip(("kohya", "diffusers"), WRITTEN[module, trained_on], strict=True):
        if not name:
            with pytest.raises(UnsupportedAdapter, match=module.replace(".", r"\.") + ": "):
                lora_tools.convert(given, tmp_path / to, to=to)
            continue
        lora_tools.convert(given, tmp_path / to, to=to)
        file = tmp_path / to
        file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
        assert {key.partition(".lora_")[0].removesuffix(".alpha") for key in load_file(file)} == {
            name
        }


def test_a_guess_is_said(tmp_path: Path) -> None:
    given = iotools.adapter(tmp_path / "a", {"model.layers.0.q": (6, 6)})
    report = lora_tools.convert(given, tmp_path / "k", to="kohya")
    assert any("nothing shows to which part of a pipeline" in note for note in report.notes)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_keys_of_the_second_of_two_alike_are_told(component: str, tmp_path: Path) -> None:
    """A file of Wan 2.2's one expert does not say which of the two it is."""
    given = lora(tmp_path / "l.safetensors", f"{component}.blocks.0.attn1.to_q")
    out = tmp_path / "m.safetensors"
    report = lora_tools.merge(base(tmp_path / "b", WAN), [given], out)
    told = any("nothing shows whether" in note for note in report.notes)
    assert told == (component == "transformer_2")
    folder = base(tmp_path / component, WAN, {"_class_name": "WanTransformer3DModel"})
    assert not lora_tools.merge(folder, [given], tmp_path / "o").notes
