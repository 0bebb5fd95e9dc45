"""What a config.json must say for a head and an embedding that were one and are two now, and
whether what was made of a checkpoint can be loaded: by the class itself, where it is known."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_tools.formats.weights import untied
from lora_tools.records import TensorSpec
from lora_tools.sources.model_facts import groups_of
from lora_tools.sources.transformers_names import convert, model_of


@dataclasses.dataclass(frozen=True)
class Untied:
    """A checkpoint's config.json that no longer ties the two.

    Attributes:
        config: it, with what else would change with the tie set as it was.
        groups: names in memory that are one tensor all the same, as T5's embeddings always are.
        computes_otherwise: the class, where its own arithmetic asks whether they are tied; or "".
    """

    config: dict[str, Any]
    groups: tuple[tuple[str, ...], ...] = ()
    computes_otherwise: str = ""


def untie(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Untied:
    """What follows from it, by the class where it is known. Headers tell."""
    changed = untied(config)
    before, _ = model_of(config, specs)
    after, _ = model_of(changed, specs)
    if before is None or after is None:
        return Untied(changed)
    had, has = before.config.to_dict(), after.config.to_dict()
    # T5 no longer scales what goes into its head, if it is not told to.
    changed |= {key: value for key, value in had.items() if _moved(key, value, has)}
    kind, key = type(after), "tie_word_embeddings"
    asks = has.get(key) != had.get(key) and key in inspect.getsource(kind.forward)  # Switch scales
    groups = groups_of(after.state_dict(keep_vars=True))
    return Untied(changed, groups, kind.__name__ if asks else "")


def _moved(key: str, value: Any, has: Mapping[str, Any]) -> bool:
    return not isinstance(value, Mapping) and key != "tie_word_embeddings" and has.get(key) != value


@dataclasses.dataclass(frozen=True)
class Loading:
    """Names in memory that a loader finds nothing for, and stored ones that it has no use for."""

    missing: frozenset[str]
    unexpected: frozenset[str]


def loading_of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Loading | None:
    """What transformers would say on loading a checkpoint; None where it does not know the class.

    Nothing is loaded: the model is built without weights.
    """
    model, _ = model_of(config, specs)
    if model is None:
        return None
    try:
        tensors, other = convert(model, specs)
    except Exception:  # an older transformers
        return None
    state = model.state_dict(keep_vars=True)
    found = set(tensors)
    for group in groups_of(state):
        if found.intersection(group):
            found.update(group)
    missing = _not_ignored(model, "missing", state.keys() - found)
    return Loading(missing, _not_ignored(model, "unexpected", other))


def _not_ignored(model: Any, kind: str, names: Collection[str]) -> frozenset[str]:
    patterns: Iterable[str] = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return frozenset(name for name in names if not any(re.search(p, name) for p in patterns))
