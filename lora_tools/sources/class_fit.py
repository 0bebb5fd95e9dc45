"""What a class of transformers makes of given tensors: which it lacks, which it leaves, and which
it would have of another shape. No weight is read; the model is built on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lora_tools.errors import NO_TRANSFORMERS
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import LoadedTensor, convert, weightless

# PEFT's task types, and transformers' names of the same tasks; then what PEFT has no type for.
TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
_OTHER_TASKS = ("IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")


@dataclasses.dataclass(frozen=True)
class ClassFit:
    """Tensors as a class would load them.

    Attributes:
        name: of the class; prefix: of its names, where the bare model's have none.
        tensors: by name in memory.
        ties: names in memory that need no tensor → the one that each is, too.
        unused: stored tensors that it does not load.
        missing: names in memory of what it would make at random.
        wanted: the shape that it makes of those that have another one, by name in memory.
    """

    name: str
    prefix: str
    tensors: Mapping[str, LoadedTensor]
    ties: Mapping[str, str]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    wanted: Mapping[str, tuple[int, ...]]


def fit_class(name: str, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> ClassFit:
    """How a class named ``name`` with this ``config.json`` would load these tensors.

    Raises:
        LookupError: transformers is not there, or cannot make such a model.
    """
    _need_transformers()
    try:
        model = weightless(name, config)
        tensors, unused = convert(model, specs)
        state = model.state_dict(keep_vars=True)
        ties = dict(model.all_tied_weights_keys)
    except Exception as error:  # an older transformers, a class that it does not know, …
        said = " ".join(str(error).split())
        raise LookupError(
            f"transformers cannot make a {name} ({type(error).__name__}: {said:.200})"
        ) from None
    ties |= {source: name for name, source in ties.items() if source not in tensors}
    missing = [k for k in state if k not in tensors and ties.get(k) not in tensors]
    shapes = {key: tuple(state[key].shape) for key in tensors}
    wanted = {key: shape for key, shape in shapes.items() if shape != tensors[key].spec.shape}
    return ClassFit(name, model.base_model_prefix, tensors, ties, unused, tuple(missing), wanted)


def classes_of(model_type: str, task: str | None) -> list[str]:
    """Names of transformers' classes for a PEFT task type; without one, for every such task.

    Raises:
        LookupError: transformers is not there.
    """
    _need_transformers()
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for kind in [TASKS[task]] if task else [*TASKS.values(), *_OTHER_TASKS]:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        names = mapping.get(model_type, ())
        found += [names] if isinstance(names, str) else names
    return found


def _need_transformers() -> None:
    if find_spec("transformers") is None:
        raise LookupError(NO_TRANSFORMERS)
