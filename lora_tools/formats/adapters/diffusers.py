"""diffusers (0.42): ``pytorch_lora_weights.safetensors`` with PEFT's parts under
``unet.``, ``transformer.``, ``text_encoder.`` …

Read: PEFT's ``lora_A.weight``, the older ``lora.down.weight``, ``lora_linear_layer.down.weight``
and ``processor.to_q_lora.down.weight``; alpha from ``.alpha`` keys or from the file's
``lora_adapter_metadata``, and the rank where neither says. Written: PEFT's parts with the scale
folded into lora_B, so that readers of every age agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.components import NAMES, is_of_first_layout, of_another, published
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Context, Outline, group_parts, pair
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.patterns import ends_with
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile

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
    rf"(?P<module>({'|'.join(NAMES)})\..+?)\."
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
    modules = group_parts(outline, set(_PARTS.values()), split)
    in_base = _in_base(modules, context.base)
    for name, keys in modules.items():
        a, b = pair(outline, name, keys, "A", "B")
        module = in_base[name]
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


def _in_base(names: Collection[str], base: BaseNames | None) -> dict[str, str]:
    """By the base's names: without the component, where the base is that component by itself, and
    with its wrapper in a single file. What the base lacks stays."""
    if base is None:
        return {name: name for name in names}
    own: dict[str, str] = {}
    for module in base.weights:
        components, rest = base.place(module)
        for each in (rest, published(rest)):
            own |= {f"{part}.{each}" if part else each: module for part in components or ("",)}
    found = {}
    for name in names:
        whole = name in base.weights or of_another(name, base.components)
        bare = name if whole else name.partition(".")[2]
        found[name] = own.get(name) or own.get(bare, name)
    return found


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
        place = self.places.of(factors.module)
        if place.component not in NAMES:
            raise place.refusal(f"diffusers takes no factors of a {place.component}")
        if is_of_first_layout(place.rest):
            raise place.refusal(
                "diffusers has it under another name and would pass it by; of kohya's files (--to "
                "kohya) it reads some with such names"
            )
        module = f"{place.component}.{place.rest}"
        result = {
            f"{module}.lora_A.weight": factors.lora_A,
            f"{module}.lora_B.weight": factors.lora_B,
        }
        if factors.bias is not None:
            result[f"{module}.lora_B.bias"] = factors.bias
        if factors.magnitude is not None:
            result[f"{module}.lora_magnitude_vector"] = factors.magnitude
        return result


class FileWriter(DiffusersWriter):
    """Writes the file alone, which it takes as well."""

    file_name = ""


FORMAT = Format(
    "diffusers",
    "diffusers",
    frozenset({"conv", "dora", "bias", "head"}),
    "folded",
    "diffusers 0.42",
    is_folder=True,
    as_file=FileWriter,
    by_component=True,
    reads_besides="its older key names",
    knows=knows,
    read=read,
    writer=DiffusersWriter,
    file_name=DiffusersWriter.file_name,
)
