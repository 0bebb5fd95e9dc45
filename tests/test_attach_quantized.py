"""Adapters on live models whose weights are codes: refused, by the scheme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_tools.nn as lora_nn
from lora_tools.errors import UnsupportedAdapter
from tests.iotools import adapter

F8 = torch.float8_e4m3fn


class Layer(nn.Module):
    """A layer with these buffers, as libraries hold their codes."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


class Coded(nn.Parameter):
    """Says that it is of bfloat16, and holds something else."""


def plain_linear(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def scaled(weight: torch.Tensor) -> nn.Module:
    layer = plain_linear(weight)
    layer.register_buffer("weight_scale_inv", torch.ones(1, 1))
    return layer


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gptq": (
        lambda: Layer(
            qweight=ints(1, 8), qzeros=ints(1, 1), scales=torch.ones(1, 8), g_idx=ints(8)
        ),
        "quantized as GPTQ",
    ),
    "awq": (
        lambda: Layer(qweight=ints(8, 1), qzeros=ints(1, 1), scales=torch.ones(1, 8)),
        "quantized as AWQ or GPTQ",
    ),
    "fp8": (lambda: scaled(torch.ones(8, 8).to(F8)), "quantized as FP8 with block scales"),
    "codes in bfloat16": (lambda: scaled(torch.ones(8, 8).bfloat16()), "quantized as FP8 with"),
    "int8": (
        lambda: Layer(weight=ints(8, 8, dtype=torch.int8), SCB=torch.ones(8)),
        "quantized as bitsandbytes int8",
    ),
    "four bits": (
        lambda: Layer(weight=ints(32, 1, dtype=torch.uint8)),
        "quantized as whole numbers in",
    ),
    "a class of its own": (lambda: Layer(), "q: a tests.test_attach_quantized.Coded, not a plain"),
}


@pytest.mark.parametrize("put_on", [lora_nn.attach, lora_nn.merge_])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_is_added_to_codes(
    kind: str, put_on: Callable[..., nn.Module], tmp_path: Path
) -> None:
    make, says = LAYERS[kind]
    model = nn.Module()
    model.q = make()
    if kind == "a class of its own":
        model.q = nn.Linear(8, 8, bias=False)
        model.q.weight = Coded(torch.ones(8, 8).bfloat16(), requires_grad=False)
        says = says.replace("q:", "q.weight:")
    before = dict(model.state_dict(keep_vars=True))
    with pytest.raises(UnsupportedAdapter, match=says):
        put_on(model, adapter(tmp_path / "a", {"q": (8, 8)}))
    assert all(model.state_dict(keep_vars=True)[name] is t for name, t in before.items())


def test_a_config_that_says_so(tmp_path: Path) -> None:
    model = nn.Module()
    model.q = nn.Linear(8, 8, bias=False)
    path = adapter(tmp_path / "a", {"q": (8, 8)})
    lora_nn.detach(lora_nn.attach(model, path))
    model.config = type("Config", (), {"to_dict": lambda _: {"quantization_config": {"bits": 4}}})()
    with pytest.raises(UnsupportedAdapter, match=r"quantization_config in config\.json"):
        lora_nn.attach(model, path)
