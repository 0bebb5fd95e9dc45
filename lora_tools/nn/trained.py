"""What a training with LoRA layers trains: marked in a model, and taken out of its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lora_tools.errors import UsageError
from lora_tools.nn.layers import LoRALayer

Bias = Literal["none", "all", "lora_only"]


def _is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def _branch_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases of layers with a branch, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.has_branch:
            for inner, parameter in module.named_parameters():
                if inner.rpartition(".")[2] == "bias":
                    found[f"{name}.{inner}" if name else inner] = parameter
    return found


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze every parameter but the factors and, with ``bias``, all biases or those of the layers
    with a branch.

    Raises:
        UsageError: ``bias`` is none of the three.
    """
    _check_bias(bias)
    own = set(_branch_biases(model)) if bias == "lora_only" else set()
    for name, parameter in model.named_parameters():
        wanted = name in own or (bias == "all" and name.rpartition(".")[2] == "bias")
        if wanted:
            parameter.requires_grad = True
        elif not _is_lora(name):
            parameter.requires_grad = False


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, torch.Tensor]:
    """The part of ``model.state_dict()`` that was trained, as ``mark_only_lora_as_trainable`` says.

    Raises:
        UsageError: ``bias`` is none of the three.
    """
    _check_bias(bias)
    state: Mapping[str, torch.Tensor] = model.state_dict()
    own = set(_branch_biases(model)) if bias == "lora_only" else set()
    return {
        name: tensor
        for name, tensor in state.items()
        if _is_lora(name) or name in own or (bias == "all" and name.rpartition(".")[2] == "bias")
    }


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise UsageError(f"bias {bias!r}: one of none, all, lora_only is needed")
