"""diffusers (0.42): ``pytorch_lora_weights.safetensors`` with PEFT's parts under
``unet.``, ``transformer.``, ``text_encoder.`` …

Read: PEFT's ``lora_A.weight``, the older ``lora.down.weight``, ``lora_linear_layer.down.weight``
and ``processor.to_q_lora.down.weight``; alpha from ``.alpha`` keys or from the file's
``lora_adapter_metadata``, and the rank where neither says. Written: PEFT's parts with the scale
folded into lora_B, so that readers of every age agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Context, Outline, group_parts, pair
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.patterns import ends_with
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "controlnet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
METADATA = "lora_adapter_metadata"
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "alpha": "alpha",
    "down.weight": "A",
    "up.weight": "B",
    "dora_scale": "magnitude",
}
_KEY = re.compile(
    rf"(?P<module>({'|'.join(COMPONENTS)})\..+?)\."
    rf"(?P<part>{'|'.join(re.escape(p) for p in sorted(_PARTS, key=len, reverse=True))})"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$")


def split(key: str) -> tuple[str, str] | None:
    """A key → its module, ``unet.`` and all, and which part it is."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    module = _PROCESSOR.sub(lambda m: "." + m[1].replace("to_out", "to_out.0"), match["module"])
    return module, _PARTS[match["part"]]


def knows(key: str) -> bool:
    """Whether a key is a component's."""
    return split(key) is not None


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would; in a pipeline module names keep their component."""
    outline = Outline(path, file, "diffusers")
    said = _metadata(outline)
    for name, keys in group_parts(outline, set(_PARTS.values()), split).items():
        a, b = pair(outline, name, keys, "A", "B")
        module = _in_base(name, context)
        if "alpha" in keys:
            alpha: float | None = outline.scalar(keys["alpha"])
            rslora = False
        else:
            alpha, rslora = _configured(outline, said, name)
        outline.add_lora(
            module,
            outline.same(a),
            outline.same(b),
            alpha,
            bias=keys.get("bias", ""),
            magnitude=keys.get("magnitude", ""),
            rslora=rslora,
        )
    return outline


def _in_base(name: str, context: Context) -> str:
    """Without the component, where the base is that component by itself."""
    bare = name.partition(".")[2]
    own = context.base.weights if context.base is not None else {}
    return bare if name not in own and bare in own else name


def _metadata(outline: Outline) -> dict[str, Any]:
    """``lora_adapter_metadata``: the config of each component, as ``component.field``."""
    text = outline.file.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        said = strict_json(text)
    except CheckpointError as error:
        raise outline.fail(f"its metadata {METADATA}: {error}") from None
    if not isinstance(said, dict):
        raise outline.fail(f"its metadata {METADATA} is no JSON object")
    return said


def _configured(
    outline: Outline, said: Mapping[str, Any], module: str
) -> tuple[float | None, bool]:
    """lora_alpha of a module, and use_rslora, by its component's config."""
    component, _, name = module.partition(".")
    if f"{component}.lora_alpha" not in said:
        return None, False
    alpha = said[f"{component}.lora_alpha"]
    patterns = said.get(f"{component}.alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if ends_with(pattern, name):
                alpha = value
                break
        except re.error as error:
            raise outline.fail(f"{METADATA}: {pattern!r} is no pattern ({error})") from None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise outline.fail(f"{METADATA}: {component}.lora_alpha is {alpha!r}")
    return float(alpha), bool(said.get(f"{component}.use_rslora"))


class DiffusersWriter(Keyed):
    """Writes the folder that ``load_lora_weights`` takes."""

    file_name = "pytorch_lora_weights.safetensors"

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        module = factors.module
        if module.partition(".")[0] not in COMPONENTS:
            module = f"{self._component()}.{module}"
        result = {
            f"{module}.lora_A.weight": factors.lora_A,
            f"{module}.lora_B.weight": factors.lora_B,
        }
        if factors.bias is not None:
            result[f"{module}.lora_B.bias"] = factors.bias
        if factors.magnitude is not None:
            result[f"{module}.lora_magnitude_vector"] = factors.magnitude
        return result

    def _component(self) -> str:
        """What a model by itself is in a pipeline, by the class in its config."""
        name = str(self.base.config.get("_class_name", "")) if self.base is not None else ""
        return "transformer" if "Transformer" in name else "unet"


FORMAT = Format(
    "diffusers",
    "diffusers",
    frozenset({"conv", "dora", "bias", "head"}),
    "folded",
    "diffusers 0.42",
    is_folder=True,
    reads_besides="its older key names",
    knows=knows,
    read=read,
    writer=DiffusersWriter,
    file_name=DiffusersWriter.file_name,
)
