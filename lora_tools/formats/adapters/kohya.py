"""kohya's sd-scripts (0.9): ``lora_unet_<path_with_underscores>.lora_down.weight`` and the like.

Each module has ``lora_down`` (r, in, *k), ``lora_up`` (out, r, *1), ``alpha`` (absent: the rank),
perhaps ``lora_mid`` (a CP-decomposed convolution) and ``dora_scale``. Names do not invert without
the model's own: where two modules flatten to one name, the reader shows both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats.adapters.base_names import BaseNames, flattened
from lora_tools.formats.adapters.components import KOHYA, is_open_clip, is_t5
from lora_tools.formats.adapters.format import READ, Format
from lora_tools.formats.adapters.outline import (
    Compute,
    Context,
    Outline,
    group_parts,
    pair,
    reshaped,
)
from lora_tools.formats.adapters.places import Place
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.tensor_file import TensorFile

_MAGNITUDES = ("dora_scale", "magnitude")  # the latter of ai-toolkit
LORA_PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", *_MAGNITUDES)
_OF_T5 = "lora_te3_"
_KEY = re.compile(rf"(?P<prefix>{'|'.join(KOHYA)})(?P<flat>\w+)\.(?P<part>[\w.]+)")


def split(key: str) -> tuple[str, str] | None:
    """``lora_unet_a_b.alpha`` → (``lora_unet_a_b``, ``alpha``)."""
    match = _KEY.fullmatch(key)
    return (match["prefix"] + match["flat"], match["part"]) if match else None


def knows(key: str) -> bool:
    """Whether a key is one of these."""
    found = split(key)
    return found is not None and found[1] in LORA_PARTS and not key.startswith("lycoris_")


def resolve_all(outline: Outline, names: Collection[str], context: Context) -> dict[str, str]:
    """Every flattened name → the base's module, or itself where the file's own are wanted."""
    base = context.base_for(outline, "its names have underscores instead of dots")
    if base is None:
        return {name: name for name in names}
    index = flattened(base)
    result = {}
    for name in names:
        prefix = next(p for p in KOHYA if name.startswith(p))
        try:
            flat = name.removeprefix(prefix)
            result[name] = index.resolve(flat, KOHYA[prefix], context.allow_unmatched) or name
        except AdapterError as error:
            raise outline.fail(f"{name}: {error}") from None
    outline.notes += base.notes_on_twins(result)
    return result


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "kohya (sd-scripts)", context.base)
    modules = group_parts(outline, LORA_PARTS, split)
    names = resolve_all(outline, modules, context)
    for flat, keys in modules.items():
        add_locon(outline, names[flat], keys)
    idle = [
        names[flat]
        for flat, keys in modules.items()
        if "alpha" in keys and not outline.scalar(keys["alpha"])
    ]
    if idle:
        outline.notes.append(
            f"{len(idle)} of {len(modules)} modules have an alpha of 0, so they have no effect: "
            f"{idle[0]}{', …' if idle[1:] else ''} (sd-scripts uses the rank instead when it "
            "continues training)"
        )
    return outline


def add_locon(
    outline: Outline, module: str, keys: Mapping[str, str], zero_is_rank: bool = False
) -> None:
    """lora_down, lora_up and what stands beside them."""
    down, up = pair(outline, module, keys, "lora_down.weight", "lora_up.weight")
    A, B = outline.same(down), outline.same(up)
    if "lora_mid.weight" in keys:
        mid = keys["lora_mid.weight"]
        kernel = outline.shape(mid)
        shape = (kernel[0], outline.shape(down)[1], *kernel[2:])
        A = outline.computed(shape, (mid, down), "tucker_down")
    if "lora_mid.weight" in keys:
        B = reshaped(B, (*B.spec.shape[:2], *[1] * (len(A.spec.shape) - 2)))
    alpha = outline.scalar(keys["alpha"]) if "alpha" in keys else None
    if zero_is_rank and not alpha:
        alpha = None
    outline.add_lora(module, A, B, alpha, magnitude=magnitude(outline, module, keys))


def magnitude(outline: Outline, module: str, keys: Mapping[str, str]) -> str:
    """The key of DoRA's magnitudes, or ""."""
    found = [keys[part] for part in _MAGNITUDES if part in keys]
    if len(found) > 1:
        raise outline.fail(f"{module}: has both {' and '.join(found)}; remove the wrong one")
    return found[0] if found else ""


def flat_name(module: str, place: Place | None) -> str:
    """``a.b`` of a UNet → ``lora_unet_a_b``; of no place, so for LyCORIS: ``lycoris_a_b``. A name
    that was never resolved stays.

    Raises:
        UnsupportedAdapter: nothing reads such a key.
    """
    if "." not in module and module.startswith(tuple(KOHYA)):
        return module
    if place is None:
        return "lycoris_" + module.replace(".", "_")
    fitting = [p for p, meant in KOHYA.items() if place.component in meant]
    if not fitting:
        raise place.refusal(
            f"kohya's files have no prefix for a {place.component}, so nothing would read it"
        )
    if is_open_clip(place.rest):
        raise place.refusal(
            "kohya's files name text encoders as transformers does, and this is OpenCLIP's, so "
            "nothing would read it"
        )
    if place.component != "unet" and place.named_by_diffusers:
        raise place.refusal_of_diffusers("kohya's files have the original names of this model")
    # T5 is te3 wherever it stands beside others. Of two text encoders the first is te1, and of one
    # alone it is te.
    if is_t5(place.rest) and _OF_T5 in fitting:
        return _OF_T5 + place.rest.replace(".", "_")
    prefix = fitting[place.component == "text_encoder" and place.beside_others]
    return prefix + place.rest.replace(".", "_")


class KohyaWriter(Keyed):
    """Writes one file. Two text encoders are te1 and te2, one is te."""

    placing = True

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._names: dict[str, str] = {}

    def _one_name(self, name: str, first: str, second: str) -> str:
        """What to say of two modules."""
        what = f"{second} and {first} both become {name}"
        if self.placing and self.places.of(first).component != self.places.of(second).component:
            return (
                f"{what}: a file of kohya's is of one denoiser, so make one of each, with its "
                "folder as the base; --to diffusers has both in one"
            )
        return f"{what}, with underscores for dots: this format cannot tell them apart"

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        import torch

        name = flat_name(factors.module, self.places.of(factors.module) if self.placing else None)
        if name in self._names:
            raise AdapterError(self._one_name(name, self._names[name], factors.module))
        self._names[name] = factors.module
        result: dict[str, Any] = {
            f"{name}.lora_down.weight": factors.lora_A,
            f"{name}.lora_up.weight": factors.lora_B,
            f"{name}.alpha": torch.tensor(factors.alpha, dtype=torch.float32),
        }
        if factors.dora_scale is not None:
            result[f"{name}.dora_scale"] = factors.dora_scale
        return result


def name_of(place: Place) -> str:
    """What a module of a diffusion model is called."""
    return flat_name(place.module, place)


FORMAT = Format(
    "kohya",
    "kohya (sd-scripts)",
    frozenset({"conv", "dora", "head"}),
    "module",
    "sd-scripts",
    base=READ,
    keeps_names=True,
    input_dora=True,
    mixes_dora=True,
    by_component=True,
    names="kohya",
    called=name_of,
    knows=knows,
    read=read,
    writer=KohyaWriter,
)
