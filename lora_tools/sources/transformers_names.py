"""What transformers makes of a checkpoint's tensors as it loads them: their names in memory, which
of them it joins or cuts, and what layers hold them. No weight is read.

transformers 5 loads many architectures under other names than their files have (ViT's, LLaVA's),
and fuses experts that are stored one by one; PEFT goes by what is in memory. The model is built on
the meta device, and transformers' own conversions are run on the numbers of the rows, so that what
is said here is what it does. Written against transformers 5.23; PEFT uses the same functions of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_tools.errors import NO_TRANSFORMERS
from lora_tools.formats.names import class_name
from lora_tools.pretrained import quietly, too_many, without_kernels
from lora_tools.records import Piece, TensorSpec, rows_of
from lora_tools.sources.model_facts import ModelFacts, facts_of

if TYPE_CHECKING:
    import torch

# Architectures that have the same names in files and in memory; for them transformers need not be
# imported, which takes as long as the extraction of a small model.
SAME_NAMES = (
    "bert",
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "roberta",
    "smollm3",
    "xlm-roberta",
)
# Layers whose weights, or settings, their model reads without calling them: PEFT's layers around
# them would be passed by, or are no match for it.
_READ = {
    "deberta": re.compile(r"rel_embeddings$"),
    "deberta-v2": re.compile(r"rel_embeddings$"),
    "falcon_mamba": re.compile(r"mixer\.dt_proj$"),
    "jamba": re.compile(r"mamba\.dt_proj$"),
    "longcat_flash": re.compile(r"router\.classifier$"),
    "mamba": re.compile(r"mixer\.dt_proj$"),
    "mobilebert": re.compile(r"predictions\.(dense|decoder)$"),
    "prophetnet": re.compile(r"ngram_embeddings$"),
    "wavlm": re.compile(r"attention\.([qkv]|out)_proj$"),
    "whisper": re.compile(r"encoder\.(conv[12]|embed_positions)$"),
}
# Those of them that call such layers all the same where the model is quantized.
_CALLED_IN_FOUR_BITS = ("falcon_mamba", "jamba")
# Names of old files that transformers changes whatever the architecture.
_LEGACY = re.compile(r"LayerNorm\.(gamma|beta)|\.weight_[gv]$|language_model\.model\.")


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedTensor:
    """A tensor in memory.

    Attributes:
        spec: name and shape there; the dtype it is stored in.
        pieces: what it is made of, one above the other.
        layer: "linear", "conv1d", "embedding" or "conv" where it is the weight of one that PEFT can
            stand beside, "" where it is not the weight of a module, else None.
        groups: of a convolution.
        converted: more was done than to give it another name.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    layer: str | None = ""
    groups: int = 1
    converted: bool = False


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        by: the library and its version.
        tensors: by name in memory.
        tied: weights that are not stored → the one in memory that each is, too.
        other: stored tensors that are changed in ways that are not told here, or not loaded.
        facts: what the model says of its parts.
    """

    by: str
    tensors: Mapping[str, LoadedTensor]
    tied: Mapping[str, str]
    other: tuple[str, ...]
    facts: ModelFacts | None = None


def loaded(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Loaded | None:
    """What becomes of tensors with this ``config.json``, by the class that it names; None where
    they keep their names, or where transformers 5 is not there or does not know the class."""
    return None if keeps_names(config, specs) else look(config, specs)[0]


def keeps_names(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> bool:
    """Whether it is known without transformers that it makes nothing else of the tensors."""
    return config.get("model_type") in SAME_NAMES and not any(map(_LEGACY.search, specs))


def is_read_past(module: str, config: Mapping[str, Any]) -> bool:
    """Whether its model, by config.json, reads a module's weight instead of calling the module."""
    read = _READ.get(str(config.get("model_type")))
    return read is not None and read.search(module) is not None


def calls_in_four_bits(config: Mapping[str, Any]) -> bool:
    """Whether that model calls such modules where it is loaded quantized."""
    return config.get("model_type") in _CALLED_IN_FOUR_BITS


def why_unknown(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> str:
    """Why ``loaded`` knows nothing of a model that may have other names, or ""."""
    if keeps_names(config, specs) or not config.get("architectures"):
        return ""
    return look(config, specs)[1]


# The model and the tensors that were looked at last, and what was found: a plan asks several times,
# and to walk through hundreds of thousands takes seconds.
_last: tuple[Any, dict[str, TensorSpec], Loaded] | None = None


def look(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> tuple[Loaded | None, str]:
    """What transformers makes of the tensors, whatever their architecture; or None, and why nothing
    is known."""
    global _last
    model, why = model_of(config, specs)
    if model is None:
        return None, why
    last = _last
    if last is not None and last[0] is model and last[1] == specs:
        return last[2], ""
    import transformers

    try:
        tensors, other = convert(model, specs)
        facts = facts_of(model, model.state_dict(keep_vars=True))
    except Exception as error:  # an older transformers
        return None, f"transformers cannot make a {type(model).__name__} ({_said(error)})"
    by = f"transformers {transformers.__version__}"
    found = Loaded(by, tensors, _tied(facts, tensors), other, facts)
    _last = model, dict(specs), found
    return found, ""


def model_of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> tuple[Any | None, str]:
    """The model of a checkpoint with these tensors on the meta device; or None, and why not."""
    name = class_name(config)
    if not name:
        return None, "config.json names no class"
    if find_spec("transformers") is None:
        return None, NO_TRANSFORMERS
    if _most_layers(config) > max(len(specs), 1000):
        return None, "config.json has more layers than there are tensors"
    try:
        return weightless(name, config), ""
    except Exception as error:  # an older transformers, a class that it does not know, …
        return None, f"transformers cannot make a {name} ({_said(error)})"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _tied(facts: ModelFacts, tensors: Mapping[str, LoadedTensor]) -> dict[str, str]:
    """Weights that are not stored → the one that each is, too."""
    tied = {}
    for group in facts.groups:
        there = [name for name in group if name in tensors]
        if there and group[0].endswith(".weight"):
            tied.update({name: there[0] for name in group if name not in tensors})
    return tied


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of stored tensors → those that they have in a live transformers model; none for a
    model of another kind."""
    try:
        from transformers.core_model_loading import rename_source_key

        transforms, prefix = _transforms(model), model.base_model_prefix
    except (ImportError, AttributeError):
        return {}
    state = model.state_dict(keep_vars=True)
    found = {}
    for name in names:
        new, _ = rename_source_key(name, *transforms, prefix, state)
        if new in state:
            found[name] = new
    return found


def weightless(name: str, config: Mapping[str, Any]) -> Any:
    """A model on the meta device, not to be changed. Raises what transformers does, TypeError where
    it is no model, ValueError where it would have too many parts."""
    if said := too_many(config):
        raise ValueError(said)
    return _weightless(name, json.dumps(config, default=str))


@functools.lru_cache(maxsize=2)  # as it is, and as an adapter makes it: each is asked several times
def _weightless(name: str, config: str) -> Any:
    import torch
    import transformers
    import transformers.conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quietly(), torch.device("meta"):
        kind = getattr(transformers, name)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise TypeError(f"{name} is not a model of transformers")
        settings = json.loads(config, object_hook=without_kernels)
        config_class = CONFIG_MAPPING[settings["model_type"]]
        # Infinity is {"__float__": "Infinity"} in a file.
        decoded = getattr(config_class, "_decode_special_floats", dict)(settings)
        return kind(config_class.from_dict(decoded))


def _most_layers(config: Mapping[str, Any]) -> int:
    """The largest number that a config gives of layers."""
    found = [0]
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.append(_most_layers(value))
        elif type(value) is int and re.search("layer|depth|block", key):
            found.append(value)
    return max(found)


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """Renamings and converters, as the loading function sorts them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model)
    return (
        [t for t in found if isinstance(t, WeightRenaming)],
        [t for t in found if isinstance(t, WeightConverter)],
    )


def convert(
    model: Any, specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, LoadedTensor], tuple[str, ...]]:
    """Tensors in memory by name, and those that nothing is made of, as
    ``convert_and_load_state_dict_in_model`` of transformers' core_model_loading does it."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _transforms(model)
    state, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    tensors: dict[str, LoadedTensor] = {}
    joined: dict[str, list[tuple[str, str]]] = {}
    other = []
    for name in sorted(specs, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = rename_source_key(name, [], [], prefix, state)
        if new not in state:
            other.append(name)
        elif pattern is None:
            spec, whole = specs[name], (Piece(name, 0, rows_of(specs[name])),)
            # Of another vocabulary than the config says, it has its own shape.
            tensors[new] = _tensor(model, new, spec.dtype, spec.shape, whole)
        else:
            joined.setdefault(new, []).append((name, pattern))
    for new, found in joined.items():
        sources, numbers = [name for name, _ in found], _Rows(specs)
        converter = deepcopy(by_pattern[found[0][1]])
        for name, pattern in found:
            converter.add_tensor(new, name, pattern, numbers.of(name))
        made = _run(converter, new, model)
        parts = {
            name: numbers.pieces(tensor, tuple(state[name].shape))
            for name, tensor in made.items()
            if name in state
        }
        if not parts or None in parts.values() or len({specs[s].dtype for s in sources}) > 1:
            other += sources
            continue
        for name, pieces in parts.items():
            assert pieces is not None
            dtype, shape = specs[sources[0]].dtype, tuple(state[name].shape)
            made_of = _tensor(model, name, dtype, shape, pieces)
            tensors[name] = dataclasses.replace(made_of, converted=True)
    return tensors, tuple(other)


def _run(converter: Any, name: str, model: Any) -> dict[str, torch.Tensor]:
    try:
        made = converter.convert(name, model=model, config=model.config)
    except Exception:  # what works on whole tensors may not on the numbers of their rows
        return {}
    return {key: t[0] if isinstance(t, list) else t for key, t in made.items()}


def _tensor(
    model: Any, name: str, dtype: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]
) -> LoadedTensor:
    return LoadedTensor(TensorSpec(name, dtype, shape), pieces, *_layer(model, name))


def _layer(model: Any, name: str) -> tuple[str | None, int]:
    """The kind of layer that a tensor is the weight of, and its groups."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        return "", 1
    layer = model.get_submodule(module)
    if is_read_past(module, {"model_type": model.config.model_type}):
        return None, 1
    if isinstance(layer, nn.Embedding) and not hasattr(layer, "embed_scale"):
        # PEFT looks rows up itself, whatever a subclass does (it knows of a scale).
        return "embedding" if type(layer).forward is nn.Embedding.forward else None, 1
    if isinstance(layer, nn.Linear) and not _stands_beside(layer):
        return None, 1
    for kind, form in ((nn.Linear, "linear"), (nn.Embedding, "embedding"), (Conv1D, "conv1d")):
        if isinstance(layer, kind):
            return form, 1
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv", layer.groups
    return None, 1


def _stands_beside(layer: torch.nn.Linear) -> bool:
    """Whether a layer of PEFT's can: not beside what MultiheadAttention reads without calling it,
    nor beside a router that gives more than one tensor."""
    import torch
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    if type(layer).forward is torch.nn.Linear.forward:
        return True
    try:
        found = layer(torch.empty(1, layer.in_features, device="meta", dtype=layer.weight.dtype))
    except Exception:  # it is called with something else
        return True
    return isinstance(found, torch.Tensor)


class _Rows:
    """Stored tensors as the numbers of their rows."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = specs
        self._at: dict[str, int] = {}
        self._names: list[str] = []
        self._starts: list[int] = []
        self._next = 0

    def of(self, name: str) -> torch.Tensor:
        """The tensor with its last dimension 1 (a vector: as it is) and numbers of its own."""
        import torch

        shape, rows = self._specs[name].shape, rows_of(self._specs[name])
        self._names.append(name)
        self._starts.append(self._next)
        numbers = torch.arange(self._next, self._next + rows)
        self._next += rows + 1  # rows of two tensors never follow upon each other
        return numbers.reshape(*shape[:-1], 1) if len(shape) > 1 else numbers

    def pieces(self, numbers: torch.Tensor, shape: tuple[int, ...]) -> tuple[Piece, ...] | None:
        """Where the rows of a tensor of that shape come from; None where it is not made of rows."""
        import bisect

        if tuple(numbers.shape) != (*shape[:-1], 1) and (len(shape) > 1 or numbers.dim() > 1):
            return None
        numbers, found = numbers.flatten(), []
        heads = [0, *(1 + (numbers.diff() != 1).nonzero().flatten()).tolist()][: len(numbers)]
        ends = [*heads[1:], len(numbers)]
        for head, end, number in zip(heads, ends, numbers[heads].tolist(), strict=True):
            i = bisect.bisect_right(self._starts, number) - 1
            found.append(Piece(self._names[i], number - self._starts[i], end - head))
        return tuple(found)
