"""What a decoder keeps of each layer from one call to the next, as its own code makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_tools.errors import CheckpointError

Side = tuple[int, int]  # heads, and the size of one


def cache_shapes(model: nn.Module, kept: Mapping[int, int]) -> list[tuple[Side, Side]]:
    """Of each layer, heads and their sizes of keys and of values: (B, heads, positions, size).

    The model is run on tensors without numbers: its config does not tell whether one key serves
    all heads (Falcon), or whether what is kept is compressed (DeepSeek). The config is taken where
    the model does not run so.

    Args:
        kept: how many layers are left of a stack that had so many.

    Raises:
        CheckpointError: a layer keeps something else, such as the state of a state-space model.
    """
    from torch._subclasses import FakeTensorMode
    from transformers import DynamicCache

    cache, tokens = DynamicCache(), torch.ones(1, 2, dtype=torch.int64)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(input_ids=tokens, attention_mask=tokens, past_key_values=cache, use_cache=True)
    except Exception:  # the model's own code, which is named where it does not trace either
        return _by_config(model, kept)
    found = [(_side(layer, "keys"), _side(layer, "values")) for layer in cache.layers]
    if not found:
        raise _stateful(type(model).__name__)
    return found


def _side(layer: Any, name: str) -> Side:
    tensor = getattr(layer, name, None)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
        raise _stateful(type(layer).__name__)
    return tensor.shape[1], tensor.shape[3]


def _by_config(model: Any, kept: Mapping[int, int]) -> list[tuple[Side, Side]]:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise _stateful(type(model).__name__)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    side = (getattr(config, "num_key_value_heads", None) or heads, size)
    layers = config.num_hidden_layers
    return [(side, side)] * kept.get(layers, layers)


def _stateful(kind: str) -> CheckpointError:
    return CheckpointError(
        f"{kind}: keeps another kind of state than keys and values, which a graph cannot have; try "
        "--no-cache, which exports it without a state"
    )
