"""ComfyUI (0.3.77): factors under the names that its models have, with dots:
``diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight``, and an alpha that is not the rank.

``model_lora_keys_unet`` and ``model_lora_keys_clip`` of its ``comfy/lora.py`` say which names those
are, and what stands beside factors: differences of biases (``diff_b``), those of other tensors
(``diff``), and weights that take another's place (``set_weight``). Its models have their makers'
layout, and transformers' names of text encoders. Files are read as diffusers' are, which have the
same parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters import diffusers
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.components import DENOISERS, ENCODERS, is_t5
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Compute, Context, Outline
from lora_tools.formats.adapters.places import Place
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.counterparts.transformers import HUNYUAN_VIDEO
from lora_tools.formats.names import split_tensor
from lora_tools.formats.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

TITLE = "ComfyUI"
MODEL, _TEXT = "diffusion_model.", "text_encoders."
_T5 = f"{_TEXT}t5xxl.transformer."
# The layers of CLIP that have a name in adapters whichever encoder it is (LORA_CLIP_MAP).
_ADAPTED = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")))
# HunyuanVideo's layers of which ComfyUI's key map has no name but its own.
_EMBEDDERS = {
    module: HUNYUAN_VIDEO.respelled(module)
    for module in (
        *("time_in.mlp.0", "time_in.mlp.2", "guidance_in.mlp.0", "guidance_in.mlp.2"),
        *("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2"),
        *("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"),
    )
}
# What each CLIP is called, by its place and its width.
_CLIPS = {
    ("text_encoder", 768): "clip_l",
    ("text_encoder", 1024): "clip_h",
    ("text_encoder_2", 1280): "clip_g",
}


def knows(key: str) -> bool:
    """Whether a key is one of these: diffusers' with components may stand beside them."""
    return diffusers.split(key) is not None


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    return diffusers.read(path, file, context, TITLE)


def name_of(place: Place) -> str:
    """The module's name. Raises UnsupportedAdapter where it has none."""
    component, rest = place.component, place.rest
    if component in DENOISERS:
        if place.named_by_diffusers:
            raise place.refusal_of_diffusers("ComfyUI uses the original names of this model")
        return MODEL + _EMBEDDERS.get(rest, rest)
    if component in ENCODERS and rest.startswith("text_model."):
        return f"{component}.{rest}"
    if component in ENCODERS and is_t5(rest):
        return _T5 + rest
    raise place.refusal(f"it is not known how ComfyUI names the layers of a {component}")


class ComfyuiWriter(Keyed):
    """Writes one file."""

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._names: dict[str, str] = {}

    def name(self, module: str, width: int) -> str:
        """What the module is called. A module of CLIP that adapters do not have is called as in the
        model itself, whose width tells which CLIP that is. Raises UnsupportedAdapter."""
        place = self.places.of(module)
        name = name_of(place)
        if self._names.setdefault(name, module) != module:
            raise UnsupportedAdapter(
                f"{self._names[name]} and {module} both become {name}, because a ComfyUI file is "
                "for one model; make one file for each, or use --to diffusers, which holds both"
            )
        if name.startswith((MODEL, _TEXT)) or name.endswith(_ADAPTED):
            return name
        clip = _CLIPS.get((place.component, width))
        if clip is None:
            raise place.refusal(
                f"of width {width}, which none of ComfyUI's CLIPs has as {place.component}, so "
                "nothing would read it"
            )
        return f"{_TEXT}{clip}.transformer.{place.rest}"

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        import torch

        A, B = factors.lora_A, factors.lora_B
        name = self.name(factors.module, A.shape[1])
        result: dict[str, Any] = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if factors.alpha != factors.r:  # diffusers takes alphas of some models only
            result[f"{name}.alpha"] = torch.tensor(factors.alpha, dtype=torch.float32)
        if factors.dora_scale is not None:
            result[f"{name}.dora_scale"] = factors.dora_scale
        if factors.bias is not None:  # which no alpha scales there
            result[f"{name}.diff_b"] = factors.bias * factors.scale
        return result

    def add_difference(self, name: str, tensor: torch.Tensor) -> None:
        """Under its module's name, or of a tensor that is no weight or bias under its own."""
        module, parameter = split_tensor(name)
        part = {"weight": "diff", "bias": "diff_b"}.get(parameter)
        width = tensor.shape[-1] if tensor.dim() else 1
        key = f"{self.name(name, width)}.diff"
        if part is not None:
            key = f"{self.name(module, width)}.{part}"
        self.add_key(key, tensor)

    def add_saved(self, name: str, tensor: torch.Tensor) -> None:
        """In place of a weight. Raises UnsupportedAdapter for other tensors."""
        module, parameter = split_tensor(name)
        if parameter != "weight":
            raise UnsupportedAdapter(
                f"{name}: ComfyUI can replace weights only; leave it out with --drop saved, or "
                "merge the adapter into the base to keep it"
            )
        self.add_key(f"{self.name(module, tensor.shape[-1])}.set_weight", tensor)


FORMAT = Format(
    "comfyui",
    TITLE,
    frozenset({"conv", "dora", "bias", "saved", "differences", "head"}),
    "module",
    "ComfyUI 0.3.77",
    input_dora=True,
    mixes_dora=True,
    by_component=True,
    names="comfyui",
    called=name_of,
    reads_besides="LoHa, LoKr, whole differences, those of norms and biases; names of trainers",
    knows=knows,
    read=read,
    writer=ComfyuiWriter,
    marks=diffusers.FORMAT.marks,
)
