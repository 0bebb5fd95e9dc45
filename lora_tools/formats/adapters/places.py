"""Where in a diffusion pipeline the modules of an adapter belong, for formats whose keys say so."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.components import (
    DENOISERS,
    ENCODERS,
    KOHYA,
    NAMES,
    OF_SEVERAL,
    T5,
    is_of_diffusers,
    looks_like,
    placed,
    published,
    whose_t5,
)

_BY_BASE = "give the pipeline that it was trained on, or its folder of that part, with --base"


@dataclasses.dataclass(frozen=True)
class Place:
    """A module's place.

    Attributes:
        component: the part of a pipeline; rest: its name in that.
        beside_others: of a text encoder, that the pipeline has several.
        guessed: nothing tells the component.
        unlooked: no base is at hand, among whose modules it was looked up.
    """

    module: str
    component: str
    rest: str
    beside_others: bool = False
    guessed: bool = False
    unlooked: bool = False

    @property
    def named_by_diffusers(self) -> bool:
        """Whether diffusers gave it its name, and no base tells what its makers call it."""
        return self.unlooked and not placed(self.module)[0] and is_of_diffusers(self.rest)

    def refusal_of_diffusers(self, whose: str) -> UnsupportedAdapter:
        """The error for such a module. ``whose``: what the makers' names are wanted by."""
        return self.refusal(
            f"{whose}, and this is diffusers'; give the model that it was trained on with --base, "
            "and the layout is converted"
        )

    def refusal(self, why: str) -> UnsupportedAdapter:
        """The error for a module that a format has no name for."""
        return UnsupportedAdapter(f"{self.module}: {why}")


class Places:
    """The places of an adapter's modules.

    Args:
        base: the names of the model, where it is at hand.
        trained_on: what the adapter says it was trained on, a path or hub id.
        modules: all that are written.
    """

    def __init__(
        self, base: BaseNames | None, trained_on: str = "", modules: Collection[str] = ()
    ) -> None:
        self._base, self._trained_on = base, Path(trained_on)
        self._modules = modules
        heads = {module.partition(".")[0] for module in modules}
        there = heads if base is None else {*base.components}
        self._beside_others = len(there & {*ENCODERS}) > 1 or self._has_siblings()

    def _has_siblings(self) -> bool:
        path = self._base.path if self._base is not None else self._trained_on
        beside = [path.parent / name for name in ENCODERS if name != path.name]
        return path.name in ENCODERS and any(map(Path.is_dir, beside))

    def of(self, module: str) -> Place:
        """By its wrapper or its component's name, by what the base is, or by its own name."""
        found, rest = placed(module) if self._base is None else self._base.place(module)
        head, _, inner = module.partition(".")
        if not found and self._base is None and head in NAMES and inner:
            found, rest = (head,), inner
        elif not found:
            found = self._of_all()
        if found == T5 and self._t5:
            found = (self._t5,)
        likely = [each for each in looks_like(rest) if not found or each in found]
        # A model is one thing: what one module is by its name, its others are.
        if not likely and (not found or self._denoiser in found):
            likely = [self._denoiser] if self._denoiser else []
        # What is of a UNet is known by its name.
        component = (likely or [each for each in found if each != "unet"] or [*found, "unet"])[0]
        if component in ENCODERS:
            rest = published(rest)
        guessed = len(likely) != 1 and (component in ENCODERS if len(found) > 1 else not found)
        unlooked = self._base is None
        beside = self._beside_others or module.startswith(OF_SEVERAL)
        return Place(module, component, rest, beside, guessed, unlooked)

    @functools.cached_property
    def _denoiser(self) -> str:
        """What the denoiser is by the names of those of its modules that tell; "" where none do, or
        where there are text encoders under no name of their own, too."""
        names = {*self._modules, *(self._base.weights if self._base is not None else ())}
        looks = {
            look
            for found, rest in map(placed, names)
            if (look := looks_like(rest))
            if look != ENCODERS or not found
        }
        only = looks.pop()[0] if len(looks) == 1 else ""
        return only if only in DENOISERS else ""

    @functools.cached_property
    def _t5(self) -> str:
        """Which encoder T5 is: the third where CLIP G is the second (SD3), which a file may lack,
        the second of FLUX, the only one of Chroma; "" where nothing tells."""
        names = self._base.weights if self._base is not None else self._modules
        parts = [placed(name) for name in names]
        if any(found == ("text_encoder_2",) for found, _ in parts):
            return "text_encoder_3"
        bare = (rest.partition(".") for _, rest in parts)
        known = {whose_t5(rest if head in NAMES else f"{head}.{rest}") for head, _, rest in bare}
        return min(known - {""}, default="")  # Chroma's "text_encoder" before FLUX's

    def _of_all(self) -> tuple[str, ...]:
        """Of a model by itself, all that it may be."""
        if self._base is not None and self._base.components:
            return self._base.components
        if self._base is not None and self._base.parts:
            looks = {looks_like(module) for module in self._base.weights} - {()}
            return looks.pop() if len(looks) == 1 else ()
        return (self._trained_on.name,) if self._trained_on.name in NAMES else ()

    def notes(self, modules: Collection[str]) -> list[str]:
        """What to say where nothing tells the component."""
        resolved = (m for m in sorted(modules) if "." in m or not m.startswith(tuple(KOHYA)))
        guessed = [place for place in map(self.of, resolved) if place.guessed]
        if not guessed:
            return []
        return [
            f"nothing shows to which part of a pipeline {len(guessed)} of {len(modules)} modules "
            f"belong, such as {guessed[0].module}. They are written as modules of the "
            f"{guessed[0].component}; if that is wrong, {_BY_BASE}"
        ]
