"""The names of a model, by which short or flattened adapter names are resolved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats.adapters.components import ENCODERS, held, in_pipeline, placed, published
from lora_tools.formats.counterparts.table import Part, counterparts, parts
from lora_tools.formats.names import EMBEDDING, split_tensor
from lora_tools.formats.weights import Weights
from lora_tools.records import TensorSpec, rows_of


def names_of(
    path: Path, weights: Weights, config: Mapping[str, Any], prefix: str = ""
) -> BaseNames:
    """From what is known of a model's tensors, with a prefix put before its modules' names."""
    specs: dict[str, TensorSpec] = {}
    layouts: dict[str, str | None] = {}
    for weight in weights.values():
        if weight.parameter == "weight" and weight.module:
            module = prefix + weight.module
            there = weight if weight.stored else weights[weight.tied_to]
            specs[module], layouts[module] = there.spec, weight.layout
    others: dict[str, TensorSpec] = {}
    same: dict[str, str] = {}
    for name, made in counterparts(weights.specs).items():
        if name.endswith(".weight"):
            module, [first, *more] = prefix + split_tensor(name)[0], made.pieces
            others[module] = made.spec
            if not more and first.rows == rows_of(weights.specs[first.stored]):
                same[module] = prefix + split_tensor(first.stored)[0]
    two = tuple(
        dataclasses.replace(part, wrapper=prefix + part.wrapper) for part in parts(weights.specs)
    )
    alone = frozenset(
        prefix + w.spec.name for w in weights.values() if w.parameter not in ("weight", "bias")
    )
    head = split_tensor(weights.head)[0]
    return BaseNames(
        path, specs, config, head, layouts, others=others, same=same, parts=two, alone=alone
    )


@dataclasses.dataclass(frozen=True)
class Flattened:
    """Module names with every dot made an underscore, and the modules that each stands for.

    Attributes:
        whole: with and without the wrapper or component that a name begins with.
        endings: of a model that is not cut into components.
    """

    base: BaseNames
    whole: Mapping[str, tuple[str, ...]]
    endings: Mapping[str, tuple[str, ...]]

    def resolve(
        self, flat: str, components: Sequence[str] = (), allow_unmatched: bool | None = None
    ) -> str:
        """The module of that flattened name: the whole name, else one that ends in it; "" where
        none is and that is allowed.

        Args:
            components: those meant by the key, or none for any; the first that the base has is.
            allow_unmatched: None where that cannot be asked for.

        Raises:
            AdapterError: none is, or several are: then they are listed.
        """
        own = self.base.components
        meant = next((each for each in components if each in own), "")
        found = self.whole.get(flat, ()) or self.endings.get(flat, ())
        if components and own:
            found = tuple(m for m in found if meant in (self.base.place(m)[0] or own))
        if len(found) > 1:  # two names of one tensor are one
            found = tuple({self.base.same.get(m, m): None for m in found})
        if len(found) > 1:
            raise AdapterError(
                f"{flat!r} can stand for {' or '.join(sorted(found)[:8])} of {self.base.path}; "
                "rename the key to PEFT's naming, with dots"
            )
        if found or allow_unmatched:
            return "".join(found)
        hint = "" if allow_unmatched is None else " --allow-unmatched leaves such keys out"
        asked = "is this the right base?"
        if components and {*components} <= {*ENCODERS} and not {*components} & {*own}:
            asked += f" It has no {components[0]}: give one that has, such as the whole pipeline."
        raise AdapterError(f"{flat!r} is not a module of {self.base.path}; {asked}{hint}")


def flattened(base: BaseNames) -> Flattened:
    """Index a model's module names by their flattened form."""
    whole: dict[str, list[str]] = {}
    endings: dict[str, list[str]] = {}
    for module in (*base.weights, *base.others, *base.alone):
        parts = module.split(".")
        _, rest = base.place(module)
        for name in dict.fromkeys((module, rest, published(rest))):
            whole.setdefault(name.replace(".", "_"), []).append(module)
        alone = not base.is_cut and module in base.weights
        for start in range(1, len(parts) if alone else 0):
            endings.setdefault("_".join(parts[start:]), []).append(module)
    return Flattened(
        base, {k: tuple(v) for k, v in whole.items()}, {k: tuple(v) for k, v in endings.items()}
    )


@dataclasses.dataclass(frozen=True)
class BaseNames:
    """What a reader needs to know of the model: module names, weight shapes, config.json.

    ``tied`` is the output head that is the input embedding, or "": it is among the modules, though
    the checkpoint may not store it. ``layouts`` are the weights' kinds of layer. The modules of a
    ``pipeline`` of diffusers begin with their component. ``others`` are weights by the modules that
    have them in the model's other layout, ``same`` those of them that are a stored one's whole
    tensor, and ``parts`` are those that have one (``formats.counterparts``). ``alone`` are tensors
    that are no weight or bias of a module.
    """

    path: Path
    weights: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    tied: str = ""
    layouts: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    pipeline: bool = False
    others: Mapping[str, TensorSpec] = dataclasses.field(default_factory=dict)
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    alone: frozenset[str] = frozenset()

    @functools.cached_property
    def components(self) -> tuple[str, ...]:
        """The components of a diffusion pipeline that it may be, or has; () where nothing tells."""
        if self.pipeline:
            return tuple(dict.fromkeys(module.partition(".")[0] for module in self.weights))
        return held(self.path, self.config, self.weights)

    def notes_on_twins(self, in_base: Mapping[str, str]) -> list[str]:
        """What to say where a pipeline has two denoisers alike (Wan 2.2), and keys that name
        neither are taken for the first's, as diffusers does.

        Args:
            in_base: modules of keys → the pipeline's own.
        """
        if not (self.pipeline and {"transformer", "transformer_2"} <= {*self.components}):
            return []
        first = "transformer."
        taken = [
            n for n, own in in_base.items() if own.startswith(first) and not n.startswith(first)
        ]
        if not taken:
            return []
        return [
            "its keys do not say which of the pipeline's two transformers they belong to; "
            "transformer is used. If it should be transformer_2 (Wan 2.2's low noise), give "
            f"{self.path}/transformer_2 as the base"
        ]

    @functools.cached_property
    def is_cut(self) -> bool:
        """Whether it is made of components, each under a name or a wrapper of its own."""
        return self.pipeline or any(placed(module)[0] for module in self.weights)

    def place(self, module: str) -> tuple[tuple[str, ...], str]:
        """The components that a module may be of, and its name in that; () where nothing but the
        model itself may tell."""
        return in_pipeline(module) if self.pipeline else placed(module)

    def weight(self, module: str) -> TensorSpec | None:
        """The weight of a module of either layout."""
        return self.weights.get(module) or self.others.get(module)

    def is_embedding(self, module: str, in_out: tuple[int, int]) -> bool:
        """Whether factors for (in, out) on this module are those of an Embedding, stored (in, out):
        by the weight's shape, and where that is square by the module's name."""
        spec = self.weights.get(module)
        if spec is None or in_out[0] == in_out[1]:
            return named_embedding(module)
        return spec.shape == in_out and named_embedding(module)


def named_embedding(module: str) -> bool:
    """Whether the module's name is one that models give to an Embedding."""
    return bool(EMBEDDING.fullmatch(module.rpartition(".")[2]))
