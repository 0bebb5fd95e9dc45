"""The parts of a diffusion pipeline: what folders, single files and adapters call each of them.

One table for reading and writing. A pipeline of diffusers has a folder for each part; a single file
has all parts, each under a wrapper of its own; adapters have a prefix. sd-scripts 0.9, diffusers
0.42, and ComfyUI's ``model_lora_keys_unet`` and ``model_lora_keys_clip``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError
from lora_tools.formats.alignment import align
from lora_tools.formats.names import class_name

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")  # of SD3, of FLUX, of Chroma
VAE = "vae"
# What diffusers' adapters begin with.
NAMES = (*DENOISERS, "controlnet", *ENCODERS)

# Prefix of kohya's keys → components that it may mean, likeliest first. (T5 is the third encoder of
# SD3, the second of FLUX and the only one of Chroma, and ``lora_te3_`` of all.) The first prefix of
# one is written.
KOHYA: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", "transformer_2"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": T5,
    "lora_prior_unet_": ("prior",),
    "lycoris_": (),
}
# Wrapper in a single file → components that may be in it. The longest that fits is meant.
_WRAPPERS: dict[str, tuple[str, ...]] = {
    "model.diffusion_model.": DENOISERS,
    "diffusion_model.": DENOISERS,
    "conditional_transformer.": ("transformer",),  # of Ideogram 4, which has another one
    "cond_stage_model.transformer.": ("text_encoder",),
    "cond_stage_model.": ("text_encoder",),
    "conditioner.embedders.0.transformer.": ("text_encoder",),
    "conditioner.embedders.0.": ("text_encoder",),
    "conditioner.embedders.1.": ("text_encoder_2",),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_l.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.clip_g.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": T5,
    "text_encoders.t5xxl.": T5,
    "first_stage_model.": (VAE,),
}
# What only a single file with several text encoders has: SDXL.
OF_SEVERAL = "conditioner.embedders."
# Comfy-Org's wrapper of HunyuanVideo, which language models have as well: it is one of the modules
# that HunyuanVideo has in either layout.
_HUNYUAN = re.compile(
    r"model\.model\.(?=((single_)?transformer_blocks|(double|single)_blocks|context_embedder|"
    r"(img|txt|time|vector|guidance|byt5|vision)_in|final_layer|x_embedder|time_text_embed|norm_out|"
    r"proj_out)(\.|$))"
)
_EVERY_WRAPPER = (*_WRAPPERS, "model.model.")
# Names of modules that only one kind of part has. Those of models before diffusers renamed them
# are told apart: diffusers' own adapters have no such names.
_UNET = re.compile(r"(down_blocks|up_blocks|mid_block)\..*")
_FIRST_UNET = re.compile(r"(input_blocks|output_blocks|middle_block)\..*")
_TRANSFORMER = re.compile(r"(single_)?transformer_blocks\..*|blocks\.\d+\.(attn\d|ffn\.net)\..*")
_FIRST_TRANSFORMER = re.compile(
    r"(double_blocks|single_blocks|joint_blocks)\..*|blocks\.\d+\.(self_attn|cross_attn|ffn\.\d).*"
)
_Z_IMAGE = re.compile(r"(noise_refiner|context_refiner|cap_embedder)\..*")
_LOOKS = {
    _UNET: ("unet",),
    _FIRST_UNET: ("unet",),
    _TRANSFORMER: ("transformer",),
    _FIRST_TRANSFORMER: ("transformer",),
    _Z_IMAGE: ("transformer",),
    re.compile(r"text_model\.encoder\.layers\..*"): ENCODERS,
}
_TEXT_MODEL = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)\..*")
_T5 = re.compile(r"encoder\.(block|final_layer_norm)\b.*|shared")
_WHOSE_T5 = {
    re.compile(r"distilled_guidance_layer\..*"): "text_encoder",
    re.compile(r"joint_blocks\..*"): "text_encoder_3",
    re.compile(r"(double_blocks|single_blocks|single_transformer_blocks)\..*"): "text_encoder_2",
}
_OPEN_CLIP = re.compile(r"(model\.)?transformer\.resblocks\..*")
# What the class that a config.json names holds, by the first word that is found in it.
_CLASSES = {
    "Transformer": ("transformer", "transformer_2"),
    "UNet": ("unet",),
    "Prior": ("prior",),
    "ControlNet": ("controlnet",),
    "Autoencoder": (VAE,),
    "CLIPTextModel": ENCODERS,
    "T5EncoderModel": ENCODERS,  # and UMT5's
}


def held(path: Path, config: Mapping[str, Any], names: Collection[str]) -> tuple[str, ...]:
    """The components that a model may be, or that a single file has, by the names of its modules or
    tensors; () where nothing tells.

    A folder of a pipeline is called as its component is, and of some there are two of one class.
    """
    if path.name in (*NAMES, VAE):
        return (path.name,)
    wrapped = [found for found, _ in map(placed, names) if found]
    if wrapped:
        return tuple(dict.fromkeys(name for found in wrapped for name in found))
    called = str(config.get("_class_name") or class_name(config))
    if called:
        return next((meant for word, meant in _CLASSES.items() if word in called), ())
    return (VAE,) if any(name.startswith("post_quant_conv") for name in names) else ()


def placed(module: str) -> tuple[tuple[str, ...], str]:
    """A module of a single file → the components that it may be of, and its name in that; () of one
    under no wrapper."""
    if not module.startswith(_EVERY_WRAPPER):
        return (), module
    if found := _HUNYUAN.match(module):
        return ("transformer",), module[found.end() :]
    fitting = [wrapper for wrapper in _WRAPPERS if module.startswith(wrapper)]
    if not fitting:
        return (), module
    wrapper = max(fitting, key=len)
    return _WRAPPERS[wrapper], module.removeprefix(wrapper)


def in_pipeline(module: str) -> tuple[tuple[str, ...], str]:
    """The same of a module of a pipeline, whose name begins with its component."""
    head, _, rest = module.partition(".")
    return (head,), rest


def of_another(name: str, components: Collection[str]) -> bool:
    """Whether a name begins with a component that is none of those, where any are known."""
    head = name.partition(".")[0]
    return bool(components) and head in NAMES and head not in components


def aligned(
    theirs: Collection[str], ours: Collection[str], pipeline: Collection[str], trained_on: object
) -> tuple[dict[str, str], str]:
    """``align`` for the names of an adapter of one part of a pipeline, and those of all its parts:
    two text encoders have the same names, and the adapter's config says which one is meant.

    Args:
        pipeline: its parts; none of a model by itself.
        trained_on: ``base_model_name_or_path`` of the adapter's config.

    Raises:
        MismatchError: two parts explain the names equally well.
    """
    if not pipeline or any(name.partition(".")[0] in pipeline for name in theirs):
        return align(theirs, ours)
    part = str(trained_on or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    mine = [name for name in ours if name.startswith(f"{part}.")] if part in pipeline else ours
    try:
        return align(theirs, mine)
    except MismatchError as error:
        raise MismatchError(
            f"{error}, or give the folder of the right part "
            f"({' or '.join(sorted({*pipeline} & {*NAMES}))}) instead of the pipeline"
        ) from None


def looks_like(module: str) -> tuple[str, ...]:
    """The components that have a module of that name, where it is one that no others have."""
    return next((found for look, found in _LOOKS.items() if look.fullmatch(module)), ())


def published(module: str) -> str:
    """The name that adapters have of a module of a text encoder: transformers 5 has CLIP's text
    model without the part ``text_model.`` that it had before."""
    return f"text_model.{module}" if _TEXT_MODEL.fullmatch(module) else module


def is_of_first_layout(module: str) -> bool:
    """Whether diffusers has that module under another name."""
    firsts = (_FIRST_UNET, _FIRST_TRANSFORMER, _OPEN_CLIP)
    return any(first.fullmatch(module) for first in firsts)


def is_t5(module: str) -> bool:
    """Whether it is one of T5, by its name."""
    return bool(_T5.fullmatch(module))


def whose_t5(module: str) -> str:
    """Which encoder T5 is in a pipeline whose denoiser has that module; "" where it does not tell.
    (Chroma has FLUX's modules, too.)"""
    return next((own for look, own in _WHOSE_T5.items() if look.fullmatch(module)), "")


def is_of_diffusers(module: str) -> bool:
    """Whether it has the name that diffusers gave it, which it need not have had before."""
    return bool(_UNET.fullmatch(module) or _TRANSFORMER.fullmatch(module))


def is_open_clip(module: str) -> bool:
    """Whether it is one of OpenCLIP's text encoder, of which adapters have transformers' names."""
    return bool(_OPEN_CLIP.fullmatch(module))
