"""Which layers the loader of transformers puts into four bits (bitsandbytes), by the model's class:
those that are exactly an nn.Linear, or a Conv1D, and are loaded as they are stored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.loaded_in_four_bits import loader_skips
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import keeps_names, look

# Names that linear layers have, of every architecture that is known to have them.
_LINEAR = re.compile(
    r"\w*proj|[qkvo]|[qkvo]_?lin|w[iq123kvo](_[01])?|fc\d?|\w*dense\w*|(in|out)_?proj\w*|query|key"
    r"|value|qkv\w*|query_key_value|c_attn|c_proj|c_fc|q_attn|lin\d?|linear\w*|Wqkv|W[qkvio]|to_[qkv]"
    r"|to_out|lm_head|dense_h_to_4h|dense_4h_to_h|up|down|x_proj|dt_proj|ff\d?"
)
# Architectures whose linear layers are of a class of their own, or are rescaled in place.
_OWN_LINEARS = ("falcon", "rwkv")
# Architectures whose fused experts the loader looks for one by one.
_PARTED_EXPERTS = ("llama4", "llama4_text")


@dataclasses.dataclass(frozen=True)
class FourBitLayers:
    """What the loader makes of a checkpoint's weights.

    Attributes:
        modules: of those that it would read in four bits, the layer's name in memory; its list of
            modules to skip goes by that.
        transposed: those among them that a plain checkpoint stores as (in, out).
        kept: those among them that must stay → why, or that it leaves alone in any case.
        absent: such layers, by their names in memory, whose weight is not stored.
        kin: layers of subclasses of nn.Linear, which it leaves alone and other loaders do not.
        parted: fused experts that it looks for one by one, by other names, where it loads a
            checkpoint in four bits.
    """

    modules: Mapping[str, str]
    transposed: frozenset[str]
    kept: Mapping[str, str]
    absent: frozenset[str]
    parted: tuple[str, ...]
    kin: frozenset[str] = frozenset()


def four_bit_layers(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> FourBitLayers | None:
    """By the names of the stored tensors; None where transformers is not asked, since names tell,
    or does not know the class."""
    how = None if keeps_names(config, specs) else look(config, specs)[0]
    if how is None or how.facts is None:
        return None
    linears = how.facts.linears
    modules = {
        tensor.pieces[0].stored: split_tensor(name)[0]
        for name, tensor in how.tensors.items()
        if name.endswith(".weight") and split_tensor(name)[0] in linears and not tensor.converted
    }
    kept = {}
    for name, module in modules.items():
        if loader_skips(module, how.facts.kept):
            kept[name] = "kept in full precision by transformers"
        elif module in how.facts.read:
            kept[name] = "read by another layer, which would use the codes as numbers"
        elif module in how.facts.rescaled:
            kept[name] = "rescaled by its model, which would round the codes again"
    return FourBitLayers(
        modules,
        frozenset(name for name, module in modules.items() if linears[module]),
        kept,
        frozenset(linears.keys() - set(modules.values())),
        how.facts.parted,
        how.facts.kin,
    )


def experts_by_name(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """``FourBitLayers.parted`` of a class that nobody knows."""
    known = config.get("model_type") in _PARTED_EXPERTS
    return tuple(n for n in specs if known and n.endswith(".experts.gate_up_proj"))


def is_surely_linear(name: str, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a weight of a class that nobody knows is that of a plain linear layer, by its name
    and what lies beside it: an attention of torch's own projects its output otherwise."""
    module = split_tensor(name)[0]
    place, _, last = module.rpartition(".")
    own = config.get("model_type") in _OWN_LINEARS or f"{place}.in_proj_weight" in specs
    return bool(_LINEAR.fullmatch(last)) and not own
