"""Names of experts: one by one as ``experts.3.gate_proj.weight``, or in one tensor for all of them.

An expert has the projections "gate", "up" and "down"; some architectures have no gate. A tensor
holds one of them or, one above the other or in alternate rows, gate and up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_tools.records import TensorSpec

# The projections that a parameter or layer of this name holds: Qwen's and DeepSeek's names,
# Mixtral's, unsloth's of gpt-oss, transformers 5's for those in one tensor.
_PROJECTIONS = {
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w3": ("up",),
    "w2": ("down",),
    "gate_up_projs": ("gate", "up"),
    "down_projs": ("down",),
    "gate_up_proj": ("gate", "up"),
}
_FORMS = (
    re.compile(r"(?P<holder>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>(gate|up|down)_proj|w[123])"),
    re.compile(r"(?P<holder>.+\.experts)\.(?P<leaf>(gate_up|down)_projs)\.(?P<number>\d+)"),
)
_FUSED = re.compile(r"(?P<holder>.+\.experts)\.(?P<leaf>(gate_up|up|down)_proj)")
# What holds experts is called otherwise in files than in memory (Mixtral's ``block_sparse_moe`` is
# ``mlp`` there); the layer that it is in, is not.
_LAYER = re.compile(r"(?P<before>(?:.*\.)?)(?P<layer>\w+\.\d+)\.(?P<inside>(?:[^.]+\.)?experts)")
# Architectures whose gate and up alternate in one tensor; and others that have biases beside it.
_INTERLEAVED, _WITH_BIASES = ("gpt_oss",), ("openai_privacy_filter",)
# Architectures that hold experts as (E, in, out): those that transformers calls so
# (``is_transposed``), by which PEFT goes, and one that it does not.
TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
_HELD_TRANSPOSED = (*TRANSPOSED, "llama4", "llama4_text")
# Architectures whose experts, one by one, have Mixtral's names (in vLLM, and in files if there).
_W123 = (
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "lfm2_moe",
    "minimax",
    "minimax_m2",
    "mixtral",
    "phimoe",
)


@dataclasses.dataclass(frozen=True)
class ExpertName:
    """The name of a weight of experts.

    Attributes:
        holder: the module of all experts; number: which of them, or None for all in one tensor.
        leaf: the layer's or parameter's own name.
    """

    holder: str
    number: int | None
    leaf: str

    @property
    def projections(self) -> tuple[str, ...]:
        """What of each expert the tensor holds, in its order."""
        return _PROJECTIONS[self.leaf]

    @property
    def layer(self) -> str:
        """The layer that the experts are in, whatever stands before it; "" where none is told."""
        match = _LAYER.fullmatch(self.holder)
        return match["layer"] if match else ""

    @property
    def tensor(self) -> str:
        """The name itself."""
        if self.number is None:
            return f"{self.holder}.{self.leaf}"
        return f"{self.module}.weight"

    @property
    def module(self) -> str:
        """The layer of that one expert."""
        first, second = str(self.number), self.leaf
        if self.leaf.endswith("s"):
            first, second = second, first
        return f"{self.holder}.{first}.{second}"

    def of(self, number: int | None) -> ExpertName:
        """That of another expert."""
        return dataclasses.replace(self, number=number)

    def held_as(self, other: ExpertName) -> ExpertName:
        """This one by the name that ``other`` has in its own layer, with this one's prefix."""
        mine, theirs = _LAYER.fullmatch(self.holder), _LAYER.fullmatch(other.holder)
        holder = other.holder
        if mine and theirs:
            holder = f"{mine['before']}{mine['layer']}.{theirs['inside']}"
        return ExpertName(holder, other.number, other.leaf)


def expert_name(tensor: str) -> ExpertName | None:
    """What a tensor's name says, or None where it is no expert's."""
    for form in _FORMS:
        match = form.fullmatch(tensor.removesuffix(".weight"))
        if match and tensor.endswith(".weight"):
            return ExpertName(match["holder"], int(match["number"]), match["leaf"])
    match = _FUSED.fullmatch(tensor)
    return ExpertName(match["holder"], None, match["leaf"]) if match else None


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a checkpoint holds the experts of one layer.

    Attributes:
        count: how many.
        names: of each projection the name of the tensor that holds it, of the first expert where
            there is one for each.
    """

    count: int
    names: Mapping[str, ExpertName]

    def is_like(self, other: Experts) -> bool:
        """Whether another layer's are held in the same way, whatever stands before their names."""
        same = self.count == other.count and self.names.keys() == other.names.keys()
        return same and all(name.held_as(other.names[p]) == name for p, name in self.names.items())


def experts_by_layer(specs: Mapping[str, TensorSpec]) -> dict[str, Experts]:
    """How a checkpoint holds the experts of its layers. A layer is left out that is not told by its
    number alone: with experts in two modules that differ."""
    holders: dict[str, dict[str, ExpertName]] = {}
    counts: dict[str, int] = {}
    for tensor, spec in specs.items():
        found = expert_name(tensor)
        if found is None or not found.layer or (found.number is None and len(spec.shape) != 3):
            continue
        count, first = spec.shape[0], found
        if found.number is not None:
            count, first = found.number + 1, found.of(0)
        counts[found.holder] = max(counts.get(found.holder, 0), count)
        for projection in found.projections:
            holders.setdefault(found.holder, {})[projection] = first
    layers: dict[str, Experts] = {}
    strange = set()
    for holder, names in holders.items():
        mine = Experts(counts[holder], names)
        layer = next(iter(names.values())).layer
        if not layers.setdefault(layer, mine).is_like(mine):
            strange.add(layer)
    return {layer: mine for layer, mine in layers.items() if layer not in strange}


def interleaves(config: Mapping[str, Any], has_bias: bool) -> bool | None:
    """Whether gate and up alternate in the tensor that holds both; None where that is not known.

    transformers has them one above the other but for gpt-oss, which has biases, too.
    """
    kind = config.get("model_type")
    if kind in _INTERLEAVED:
        return True
    return None if has_bias and kind not in _WITH_BIASES else False


def holds_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the architecture has experts as (E, in, out) in memory."""
    return config.get("model_type") in _HELD_TRANSPOSED


def transposed_by_shapes(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether weights (E, 2 · I, H) and (E, H, I) are stored the other way about."""
    return gate_up[2] == 2 * down[1]


def one_by_one(name: ExpertName, projection: str, config: Mapping[str, Any]) -> ExpertName:
    """The layer of one expert's projection, as checkpoints of the architecture that store experts
    one by one call it; ``name`` is that of the experts in one tensor."""
    holder, leaf = name.holder, f"{projection}_proj"
    if config.get("model_type") in _W123:
        leaf = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
        holder = re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", holder)
    return ExpertName(holder, 0, leaf)
