"""What each tensor is to its model: the kind of layer it is the weight of, whether it is the input
embedding or the output head, and which other tensors are the same one.

The model's class says so where it can be asked (``ModelSays``), names, shapes and config.json
otherwise. It is asked when an answer is wanted that it may know better, and then once: to ask may
mean to import transformers. This is the one place that puts the answers together.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from lora_tools.formats.names import (
    EMBEDDING,
    is_input_embedding,
    is_output_head,
    layout_name,
    split_tensor,
    tied_head,
)
from lora_tools.records import TensorSpec

# Parts of names of weights that models hold under several names: embeddings of every kind, and
# Zamba's layers.
_SHARED = re.compile(r"embed|shared_transf")


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model.

    Attributes:
        layout: the kind of layer that it is the weight of (a key of ``linalg.layouts.LAYOUTS``), or
            None where it has none.
        groups: of a convolution.
        stored: there is a tensor of its own name.
    """

    spec: TensorSpec
    layout: str | None
    groups: int = 1
    stored: bool = True
    _beside: Weights | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def module(self) -> str:
        return split_tensor(self.spec.name)[0]

    @property
    def parameter(self) -> str:
        return split_tensor(self.spec.name)[1]

    @property
    def is_head(self) -> bool:
        """It belongs to a language model's output head."""
        name, beside = self.spec.name, self._beside
        return is_output_head(name) or (beside is not None and name in beside.heads)

    @property
    def is_embedding(self) -> bool:
        """It belongs to a language model's input embedding."""
        name, beside = self.spec.name, self._beside
        return is_input_embedding(name) or (beside is not None and name == beside.embedding)

    @property
    def tied_to(self) -> str:
        """The tensor that it is the same as, or "". Then it need not be stored."""
        return self._beside.ties.get(self.spec.name, "") if self._beside is not None else ""


@dataclasses.dataclass(frozen=True)
class ModelSays:
    """What a model's class says of its tensors, by the names that they are stored under; of one
    that is not stored, by one that a loader finds it by.

    Attributes:
        layouts: of those it knows, the kind of layer and its groups.
        groups: names of one tensor each; the first is stored.
        heads: the weights of output heads.
        embedding: the weight of the input embedding, or "".
        linears: linear layers → whether each is a Conv1D, which is stored transposed.
    """

    layouts: Mapping[str, tuple[str | None, int]] = dataclasses.field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    heads: tuple[str, ...] = ()
    embedding: str = ""
    linears: Mapping[str, bool] = dataclasses.field(default_factory=dict)


Says = ModelSays | Callable[[], ModelSays | None] | None


class Weights(Mapping[str, Weight]):
    """Every tensor that is stored, and those that are not, since they are tied to one that is.

    Args:
        model: what its class says, or how to ask it.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], model: Says = None
    ) -> None:
        self.specs, self._config, self._model = specs, config, model
        self._layouts = model.layouts if isinstance(model, ModelSays) else {}
        self._seen: dict[str, Weight] = {}

    @functools.cached_property
    def model(self) -> ModelSays | None:
        """What the model's class says, or None where nobody knows it."""
        return self._model() if callable(self._model) else self._model

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of one tensor each, weights and biases; the first is stored."""
        if self.model is not None:
            return self.model.groups
        head, embedding = self._head_by_name, self._embedding_by_name
        return ((embedding, head),) if head and embedding else ()

    def groups_with(self, names: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """Those that some of the names may belong to; of plain layers nobody is asked. A name that
        is not stored may be another one for what is: all groups are given then."""
        if all(name in self.specs and not self._may_be_tied(name) for name in names):
            return ()
        wanted = set(names)
        if not wanted.issubset(self.specs):
            return self.groups
        return tuple(group for group in self.groups if wanted.intersection(group))

    @functools.cached_property
    def ties(self) -> dict[str, str]:
        """Weights that are another one → that, which is stored."""
        return {
            name: group[0]
            for group in self.groups
            for name in group[1:]
            if name.endswith(".weight")
        }

    @functools.cached_property
    def heads(self) -> tuple[str, ...]:
        """The weights of output heads, as far as the model's class says."""
        return self.model.heads if self.model is not None else ()

    @functools.cached_property
    def head(self) -> str:
        """The output head that is tied to another weight, by the name that it has or would have,
        or ""."""
        if self.model is None:
            return self._head_by_name
        return next((name for name in self.heads if any(name in g for g in self.groups)), "")

    @functools.cached_property
    def embedding(self) -> str:
        """The input embedding, or ""."""
        said = self.model.embedding if self.model is not None else ""
        return said or self._embedding_by_name

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a linear layer is a Conv1D, stored transposed; None where the model's class does
        not say."""
        return self.model.linears.get(module) if self.model is not None else None

    @property
    def tied_pair(self) -> tuple[str, str]:
        """(output head, the stored weight that it is), else two ""."""
        head = self.head
        return (head, self.ties[head]) if head in self.ties else ("", "")

    @property
    def _head_by_name(self) -> str:
        return tied_head(self._config, self.specs) if ties_embeddings(self._config) else ""

    @property
    def _embedding_by_name(self) -> str:
        """By its name, else by its rows: one for each token of the vocabulary."""
        rows = (
            name
            for name, spec in self.specs.items()
            if spec.shape[:1] in self._vocabularies
            and len(spec.shape) == 2
            and not is_output_head(name)
        )
        return next(filter(is_input_embedding, self.specs), next(rows, ""))

    def _may_be_tied(self, name: str) -> bool:
        """Whether a stored tensor may go by other names, too: an embedding, a head, a weight with a
        row for each token."""
        module, _ = split_tensor(name)
        named = _SHARED.search(module) or EMBEDDING.fullmatch(module.rpartition(".")[2])
        shape = self.specs[name].shape
        return bool(named) or is_output_head(name) or shape[:1] in self._vocabularies

    @functools.cached_property
    def _vocabularies(self) -> set[tuple[int, ...]]:
        return {(size,) for size in vocabulary_sizes(self._config)}

    def __getitem__(self, name: str) -> Weight:
        if name not in self._seen:
            spec = self.specs.get(name) or self.specs[self.ties[name]]
            self._seen[name] = self.of(dataclasses.replace(spec, name=name))
        return self._seen[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.specs
        yield from (name for name in self.ties if name not in self.specs)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def of(self, spec: TensorSpec) -> Weight:
        """What a tensor of that name is, in whatever dtype and under a name of any kind."""
        own = self._layouts.get(spec.name)
        layout, groups = own if own is not None else (layout_name(spec, self._config), 1)
        return Weight(spec, layout, groups, spec.name in self.specs, self)


def weight_of(spec: TensorSpec, config: Mapping[str, Any]) -> Weight:
    """What a tensor is by its own name and shape, whatever lies beside it."""
    return Weight(spec, layout_name(spec, config))


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Every size of a vocabulary that a config.json gives, on whatever level."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= vocabulary_sizes(value)
        elif type(value) is int and "vocab" in key:
            found.add(value)
    return found


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the output head is the input embedding."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says that they are two."""
    inner = config.get("text_config")
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(inner, Mapping):
        changed["text_config"] = {**inner, "tie_word_embeddings": False}
    return changed
