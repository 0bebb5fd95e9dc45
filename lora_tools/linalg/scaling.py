"""The one formula that divides lora_alpha by the rank."""

from __future__ import annotations

import math


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """The factor on B·A: alpha / r (LoRA, arXiv 2106.09685), alpha / √r (rsLoRA, 2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
