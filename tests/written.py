"""A checkpoint in every stored number format that is written besides bitsandbytes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lora_tools
from lora_tools.errors import QualityGateError
from lora_tools.formats.quantized.forms import FORMS

from . import models

NEW = [name for name in FORMS if name not in ("nf4", "fp4")]
NAME = "model.layers.0.self_attn.q_proj"
Q = f"{NAME}.weight"
# The most that the relative error of normal numbers may be in each, and bits for a number.
COST = {
    "fp8-block": (0.03, 8.01),
    "fp8-channel": (0.03, 8.1),
    "nvfp4": (0.1, 4.51),
    "mxfp4": (0.12, 4.26),
    "int8": (0.01, 8.1),
    "int4": (0.12, 4.2),
}


def in_each_form(top: Path) -> Path:
    """A base with a tied head, an adapter on it, and the base in each format."""
    base = models.save(models.make("llama-tied", width=256).bfloat16(), top / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    models.train(base, top / "adapter", config)
    for scheme in NEW:
        lora_tools.quantize(base, top / scheme, scheme=scheme)
    return top


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def verified(path: Path, against: Path, adapters: list[Any]) -> Any:
    """The report, whether all is as it should be or not."""
    try:
        return lora_tools.verify(path, against=against, adapters=adapters)
    except QualityGateError as gate:
        return gate.report
