"""Figures over all modules of an adapter that was given another rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_tools.records import ModuleResult


def resized_totals(results: Sequence[ModuleResult]) -> dict[str, Any]:
    """Figures over modules whose rank was chosen anew, weighted by their energy."""
    energy = math.fsum(m.delta_norm**2 for m in results)
    if not energy:
        return {}
    missing = math.fsum((m.relative_error * m.delta_norm) ** 2 for m in results)
    return {
        "relative_error": math.sqrt(missing / energy),
        "energy": 1 - missing / energy,
        "rank_min": min(m.rank for m in results),
        "rank_max": max(m.rank for m in results),
    }
