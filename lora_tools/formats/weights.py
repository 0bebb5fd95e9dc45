"""What each tensor is to its model: the kind of layer it is the weight of, whether it is the input
embedding or the output head, and which other tensor it is tied to.

No model is built: names, shapes and config.json tell, or the model's class where somebody asked it
(``ModelSays``). This is the one place that puts the answers together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lora_tools.formats.names import (
    is_input_embedding,
    is_output_head,
    layout_name,
    split_tensor,
    tied_head,
)
from lora_tools.records import TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model.

    Attributes:
        layout: the kind of layer that it is the weight of (a key of ``linalg.layouts.LAYOUTS``), or
            None where it has none.
        is_head: it belongs to a language model's output head.
        is_embedding: it belongs to a language model's input embedding.
        tied_to: the tensor that it is the same as, or "". Then it need not be stored.
        groups: of a convolution.
        stored: there is a tensor of its own name.
    """

    spec: TensorSpec
    layout: str | None
    is_head: bool
    is_embedding: bool
    tied_to: str = ""
    groups: int = 1
    stored: bool = True

    @property
    def module(self) -> str:
        return split_tensor(self.spec.name)[0]

    @property
    def parameter(self) -> str:
        return split_tensor(self.spec.name)[1]


@dataclasses.dataclass(frozen=True)
class ModelSays:
    """What a model's class says of its tensors.

    Attributes:
        layouts: of those it knows, the kind of layer and its groups.
        ties: tensors that are not stored → the one that each is.
    """

    layouts: Mapping[str, tuple[str | None, int]]
    ties: Mapping[str, str]


class Weights(Mapping[str, Weight]):
    """Every tensor that is stored, and those that are not, since they are tied to one that is.

    Attributes:
        head: the output head that config.json ties to the input embedding, by the name that it has
            or would have, or "".
        embedding: the input embedding, or "".
        ties: tensors that are another one → that.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        config: Mapping[str, Any],
        model: ModelSays | None = None,
    ) -> None:
        self._specs, self._config = specs, config
        self._layouts = model.layouts if model is not None else {}
        self._seen: dict[str, Weight] = {}
        self.head = tied_head(config, specs) if ties_embeddings(config) else ""
        if model is not None and self.head not in specs:
            self.head = ""  # the model has it, or says what it is tied to
        self.embedding = next(filter(is_input_embedding, specs), "")
        self.ties: dict[str, str] = dict(model.ties) if model is not None else {}
        if self.head and self.embedding:
            self.ties[self.head] = self.embedding

    def __getitem__(self, name: str) -> Weight:
        if name not in self._seen:
            spec = self._specs.get(name) or self._specs[self.ties[name]]
            self._seen[name] = self.of(dataclasses.replace(spec, name=name))
        return self._seen[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._specs
        yield from (name for name in self.ties if name not in self._specs)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def tied_pair(self) -> tuple[str, str]:
        """(output head, input embedding) where config.json ties the two, else two ""."""
        return (self.head, self.embedding) if self.head and self.embedding else ("", "")

    def of(self, spec: TensorSpec) -> Weight:
        """What a tensor of that name is, in whatever dtype and under a name of any kind."""
        name = spec.name
        own = self._layouts.get(name)
        layout, groups = own if own is not None else (layout_name(spec, self._config), 1)
        return Weight(
            spec,
            layout,
            is_output_head(name),
            is_input_embedding(name),
            self.ties.get(name, ""),
            groups,
            name in self._specs,
        )


def weight_of(spec: TensorSpec, config: Mapping[str, Any]) -> Weight:
    """What a tensor is by its own name and shape, whatever lies beside it."""
    head, embedding = is_output_head(spec.name), is_input_embedding(spec.name)
    return Weight(spec, layout_name(spec, config), head, embedding)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the output head is the input embedding."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))
