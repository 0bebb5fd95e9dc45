"""The kind of layer of a weight, as an object that does its arithmetic."""

from __future__ import annotations

import dataclasses
import math

from lora_tools.formats.weights import Weight
from lora_tools.linalg.layouts import LAYOUTS, Conv, Layout


def kind_of(weight: Weight) -> Layout | None:
    """The layer kind, or None where the weight has no low-rank form."""
    if weight.layout is None:
        return None
    kind = LAYOUTS[weight.layout]
    if weight.groups == 1 or not isinstance(kind, Conv):
        return kind
    # Where even factors of rank 1 hold more numbers than the weight, as those of a depthwise one do
    # (PEFT's lora_A reads all channels), there is nothing to gain.
    kind = dataclasses.replace(kind, groups=weight.groups)
    a, b = kind.shapes(weight.spec.shape, 1)
    return kind if math.prod(a) + math.prod(b) < weight.spec.numel else None
