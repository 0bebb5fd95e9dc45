"""diffusers (0.42): ``pytorch_lora_weights.safetensors`` with PEFT's parts under
``unet.``, ``transformer.``, ``text_encoder.`` …

Trainers such as ai-toolkit write the same parts, or kohya's, under ComfyUI's wrappers
(``diffusion_model.``) or the bare names of the model; all are read here, as are ``xlabs``'.

Read: PEFT's ``lora_A.weight``, the older ``lora.down.weight``, ``lora_linear_layer.down.weight``
and ``processor.to_q_lora.down.weight``; alpha from ``.alpha`` keys or from the file's
``lora_adapter_metadata``, and the rank where neither says. Written: PEFT's parts with the scale
folded into lora_B, so that readers of every age agree.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, UnsupportedAdapter
from lora_tools.formats.adapters import xlabs
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.components import (
    DENOISERS,
    KOHYA,
    NAMES,
    is_of_first_layout,
    is_t5,
    looks_like,
    placed,
    published,
)
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.lycoris import (
    CHANGE_PARTS,
    MODULATION,
    OWN_PARTS,
    add_module,
    add_notes,
)
from lora_tools.formats.adapters.outline import Context, Outline, group_parts, pair, reshaped
from lora_tools.formats.adapters.peft import PREFIX
from lora_tools.formats.adapters.places import Place
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.counterparts.unordered import refuse_interleaved
from lora_tools.formats.patterns import ends_with
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile

# ComfyUI's names for whatever model there is: files with such are its own (``comfyui``).
_GENERIC = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
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
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "alpha": "alpha",
    "down.weight": "A",
    "up.weight": "B",
    "dora_scale": "magnitude",
    "magnitude": "magnitude",
    **{part: part for part in (*OWN_PARTS, *CHANGE_PARTS, MODULATION)},
}
_LYCORIS = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}
_PART = "|".join(re.escape(part) for part in sorted(_PARTS, key=len, reverse=True))
_KEY = re.compile(rf"(?P<module>({'|'.join(NAMES)})\..+?)\.(?P<part>{_PART})")
# Without a component before them; what a model's own layers may be called is none of a part then.
_BARE = re.compile(
    rf"(?P<module>(?!{'|'.join(KOHYA)}|{re.escape(PREFIX)}).+?)"
    rf"\.(?P<part>(?!(down|up)\.weight)({_PART}))"
)
_CONTROL = re.compile(r".*norm\.(query|key)_norm\.scale")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$")


def split(key: str) -> tuple[str, str] | None:
    """A key → its module, ``unet.`` and all, and which part it is."""
    key = key.removeprefix(PREFIX)
    match = _KEY.fullmatch(key) or _BARE.fullmatch(key)
    if not match:
        return xlabs.split(key)
    module = _PROCESSOR.sub(lambda m: "." + m[1].replace("to_out", "to_out.0"), match["module"])
    part = _PARTS[match["part"]]
    return f"{module}.modulation" if part == MODULATION else module, part


def knows(key: str) -> bool:
    """Whether a key is one of these."""
    return not key.startswith((*_GENERIC, PREFIX)) and split(key) is not None


def read(path: Path, file: TensorFile, context: Context, form: str = "diffusers") -> Outline:
    """What the file holds, as PEFT would; in a pipeline module names keep their component."""
    outline = Outline(path, file, form, context.base)
    _refuse_control(path, file.specs)
    said = _metadata(outline)
    modules = group_parts(outline, set(_PARTS.values()), split)
    several = {name: made for name in modules if (made := xlabs.modules(name))}
    of_diffusion = any(_is_of_diffusion(name, context.base) for name in modules)
    if not context.guess:
        parts = context.base.parts if context.base is not None else None
        refuse_interleaved(path, file.specs, modules, parts)
    in_base = _in_base([*modules, *itertools.chain(*several.values())], context.base)
    _note_on_second(outline, in_base)
    for name, keys in modules.items():
        module = in_base[name]
        if keys.keys() & {*OWN_PARTS, *CHANGE_PARTS, MODULATION}:
            own = {_LYCORIS.get(part, part): key for part, key in keys.items()}
            add_module(outline, module, own, context, zero_is_rank=False)
            continue
        a, b = pair(outline, name, keys, "A", "B")
        if name in several:
            _add_cut(outline, a, b, [in_base[each] for each in several[name]])
            continue
        if "alpha" in keys:
            alpha: float | None = outline.scalar(keys["alpha"])
            rslora = False
        else:
            alpha, rslora = _configured(outline, said, name)
            if alpha is None and (context.alpha is not None or not of_diffusion):
                alpha = context.need_alpha(outline)
        outline.add_lora(
            module,
            outline.same(a),
            outline.same(b),
            alpha,
            bias=keys.get("bias", ""),
            magnitude=keys.get("magnitude", ""),
            rslora=rslora,
        )
    add_notes(outline)
    return outline


def _add_cut(outline: Outline, a: str, b: str, modules: Sequence[str]) -> None:
    """Factors of several modules, whose outputs are as many each, one after the other."""
    rows, *rest = outline.shape(b)
    count, left = divmod(rows, len(modules))
    if left:
        raise outline.fail(
            f"{b}: its {rows} rows cannot be divided among {len(modules)} equal modules"
        )
    for i, module in enumerate(modules):
        B = outline.recipe(outline.same(b), "rows", (i * count, (i + 1) * count))
        outline.add_lora(module, outline.same(a), reshaped(B, (count, *rest)), None)


def _refuse_control(path: Path, keys: Collection[str]) -> None:
    """Raises UnsupportedAdapter for a control LoRA of FLUX.1 Tools (Depth, Canny)."""
    norms = [key for key in keys if _CONTROL.fullmatch(key)]
    if norms and any(key.startswith("img_in.lora_A") for key in keys):
        raise UnsupportedAdapter(
            f"{path}: a control LoRA of FLUX.1 Tools. It also replaces norms ({min(norms)}) and "
            "widens img_in for a second image, and FLUX.1 has no input for that; load it in "
            "diffusers' FluxControlPipeline or in ComfyUI"
        )


def _is_of_diffusion(name: str, base: BaseNames | None) -> bool:
    """Whether a name is a diffusion model's: trainers of such leave out an alpha that is the rank.
    (Files of PEFT's that lost their config do not say theirs.)"""
    if name.partition(".")[0] in NAMES or placed(name)[0] or looks_like(name):
        return True
    return base is not None and bool(base.parts or {*base.components} & {*DENOISERS})


def _in_base(names: Collection[str], base: BaseNames | None) -> dict[str, str]:
    """By the base's names: without the component, where the base is that component by itself, and
    with its wrapper in a single file. What the base lacks stays."""
    if base is None:
        return {name: name for name in names}
    own: dict[str, str] = {}
    for module in (*base.others, *base.weights, *base.alone):
        components, rest = base.place(module)
        for each in (rest, published(rest)):
            own |= {f"{part}.{each}" if part else each: module for part in components or ("",)}
    return {name: next(filter(None, map(own.get, _meant(name, base))), name) for name in names}


def _note_on_second(outline: Outline, in_base: Mapping[str, str]) -> None:
    """Say so where keys are of the second of two alike, and nothing tells which one the base is."""
    base = outline.base
    outline.notes += base.notes_on_twins(in_base) if base is not None else []
    if base is None or base.is_cut or len(base.components) == 1:
        return
    heads = (name.partition(".")[0] for name, own in in_base.items() if name != own)
    for head in sorted({each for each in heads if each in NAMES and each[-1].isdigit()}):
        outline.notes.append(
            f"its keys are of a pipeline's {head}, and nothing shows whether {base.path} is that "
            f"or the {head.rpartition('_')[0]}"
        )


def _meant(name: str, base: BaseNames) -> list[str]:
    """What a key's name may be called in a base, likeliest first: as it is, in the component that
    it is of, and without that where the base is nothing else."""
    head, _, bare = name.partition(".")
    components, rest = placed(name)
    if not components and head in NAMES:
        components, rest = (head,), bare
    elif not components:
        components = DENOISERS
    own = base.components
    alone = not own or bool({*own} & {*components})
    there = [each for each in components if not own or each in own]
    return [name, *(f"{each}.{rest}" for each in there), *([rest] if alone else [])]


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
        raise outline.fail(f"its metadata {METADATA} is not a JSON object")
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
            raise outline.fail(f"{METADATA}: {pattern!r} is not a pattern ({error})") from None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise outline.fail(f"{METADATA}: {component}.lora_alpha is {alpha!r}")
    return float(alpha), bool(said.get(f"{component}.use_rslora"))


def name_of(place: Place) -> str:
    """The module with its component. Raises UnsupportedAdapter where it has no name."""
    if place.component not in NAMES:
        raise place.refusal(f"diffusers does not take factors of a {place.component}")
    if is_of_first_layout(place.rest):
        base = "; give the model that it was trained on with --base, and the layout is converted"
        raise place.refusal(
            "diffusers has it under another name and would ignore "
            f"it{base if place.unlooked else ''}; try --to kohya, because diffusers reads some "
            "of kohya's files with such names"
        )
    if place.guessed and is_t5(place.rest):
        raise place.refusal(
            "nothing tells which text encoder T5 is: diffusers has it as text_encoder_2 of FLUX, "
            "as text_encoder_3 of SD3 and as text_encoder of others; give the pipeline that it was "
            "trained on, or its folder of that part, with --base"
        )
    return f"{place.component}.{place.rest}"


class DiffusersWriter(Keyed):
    """Writes the folder that ``load_lora_weights`` takes."""

    file_name = "pytorch_lora_weights.safetensors"

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        module = name_of(self.places.of(factors.module))
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
    names="diffusers",
    called=name_of,
    reads_besides="its older key names",
    knows=knows,
    read=read,
    writer=DiffusersWriter,
    file_name=DiffusersWriter.file_name,
    marks=("lora", "lokr_", "hada_", ".diff"),
)
