"""A family of models that has two layouts: its makers', and the one that diffusers converts it to.

Most modules only have another name there. Some are cut: the rows of a fused projection are those of
several modules, one above the other; and diffusers has the halves of some modulations swapped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

Layout = Literal["original", "diffusers"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One module of the original, and what diffusers has in its place.

    Attributes:
        original: its name; where that ends in an underscore, tensors' names go on without a dot
            (``in_proj_`` of OpenCLIP).
        diffusers: the modules that its rows are, from the first row on; most often one.
        swapped: of one module, that its halves have changed places.
        unordered: of three, that they are one above the other in some files of the original, and
            head by head in others, and nothing in a file tells.
        grouped: of three, that the first has as many rows as there are columns, and that the other
            two share the rest (heads of q that have one of k and of v in common).
    """

    original: str
    diffusers: tuple[str, ...]
    swapped: bool = False
    grouped: bool = False
    unordered: bool = False

    def modules(self, layout: Layout) -> tuple[str, ...]:
        """Its modules in a layout."""
        return (self.original,) if layout == "original" else self.diffusers


def tensor(module: str, parameter: str) -> str:
    """The tensor's name."""
    return module + parameter if module.endswith("_") else f"{module}.{parameter}"


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        title: what people call it.
        is_original, is_diffusers: whether modules are of a model of it in that layout.
        pairs: all that is known of a model with these modules, in the layout given.
        kohya: the layout whose names kohya's files have; comfyui: ComfyUI's.
        respelled: what others call a module of the original, which is else the same.
    """

    title: str
    is_original: Callable[[Collection[str]], bool]
    is_diffusers: Callable[[Collection[str]], bool]
    pairs: Callable[[Collection[str], Layout], Iterable[Pair]]
    kohya: Callable[[Collection[str]], Layout]
    comfyui: Layout = "original"
    respelled: Callable[[str], str] = lambda module: module

    def layout(self, modules: Collection[str]) -> Layout | None:
        """The layout that a model with these modules is in; None where it is of another family."""
        if self.is_original(modules):
            return "original"
        return "diffusers" if self.is_diffusers(modules) else None


# Original → diffusers' module, or modules where it is cut; # stands for a block's number.
Rules = Mapping[str, str | tuple[str, ...]]


def by_rules(
    rules: Rules, swapped: Collection[str] = (), *, grouped: bool = False, unordered: bool = False
) -> Callable[..., Iterable[Pair]]:
    """``Family.pairs`` by such a table.

    Args:
        swapped: the originals whose halves change places.
        grouped, unordered: what the pairs are that have q, k and v in one.
    """
    table = [
        (original, (names,) if isinstance(names, str) else names)
        for original, names in rules.items()
    ]
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    by_name: dict[Layout, dict[str, list[tuple[str, tuple[str, ...]]]]] = {
        "original": {},
        "diffusers": {},
    }
    for row in table:
        by_name["original"].setdefault(row[0], []).append(row)
        by_name["diffusers"].setdefault(row[1][0], []).append(row)

    def pairs(modules: Collection[str], layout: Layout) -> Iterable[Pair]:
        for module in modules:
            found = number.search(module)
            block = found[0] if found else ""
            for shape in dict.fromkeys((module, number.sub("#", module, count=1))):
                for original, names in by_name[layout].get(shape, ()):
                    is_fused = len(names) == 3
                    yield Pair(
                        original.replace("#", block),
                        tuple(name.replace("#", block) for name in names),
                        original in swapped,
                        grouped=grouped and is_fused,
                        unordered=unordered and is_fused,
                    )

    return pairs


def has(*beginnings: str) -> Callable[[Collection[str]], bool]:
    """Whether there are modules of each of these beginnings."""
    return lambda modules: all(any(m.startswith(b) for m in modules) for b in beginnings)


def lacks(beginning: str) -> Callable[[Collection[str]], bool]:
    """Whether there is no module of this beginning."""
    return lambda modules: not has(beginning)(modules)


def both(*conditions: Callable[[Collection[str]], bool]) -> Callable[[Collection[str]], bool]:
    """Whether all of them hold."""
    return lambda modules: all(holds(modules) for holds in conditions)


def qkv(path: str, names: Sequence[str] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    """Three projections of an attention."""
    return tuple(f"{path}.{name}" for name in names)


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# The last layers, which several families have; of the modulation diffusers swaps the halves.
FINAL: Rules = {
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
FINAL_SWAPPED = ("final_layer.adaLN_modulation.1",)
