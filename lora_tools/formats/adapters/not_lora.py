"""Adapters that are no low-rank deltas of weights: what they are, and why they cannot be merged.

Those of PEFT name themselves in ``peft_type``; others are known by their config or their keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter

# A pattern that a key matches → what the file is.
_KEYS = {
    r"prompt_embeddings|prompt_encoder\..*|base_model\.prompt_encoder\..*": (
        "soft prompts (prompt tuning, prefix tuning or p-tuning): vectors put before the sequence "
        "or its keys and values; no weight of the model changes"
    ),
    r".*\.adaption_(prompt|gate)": (
        "LLaMA-Adapter: prompts inside attention; no weight of the model changes"
    ),
    r".*\.(adapters?|parallel_mlp)\.(.*\.)?(adapter_down|adapter_up|down_proj|up_proj)\..*"
    r"|.*\.(adapter_down|adapter_up)\..*": (
        "a bottleneck adapter: layers of its own with a nonlinearity between, put into the model; "
        "no change of weights does the same"
    ),
    r"oft_unet_\w+\.(oft_blocks|alpha)": (
        "OFT of sd-scripts: rotations of weights, which are no low-rank change"
    ),
    r"emb_params|string_to_param|clip_[lg]|<[^>]+>|t5": (
        "textual inversion: vectors for new tokens of a text encoder"
    ),
}
_BOTTLENECK = ("reduction_factor", "mh_adapter", "output_adapter", "bottleneck_size")


def refuse_by_keys(path: Path, keys: Collection[str]) -> None:
    """Raises UnsupportedAdapter where the keys are those of such an adapter."""
    for pattern, what in _KEYS.items():
        found = [key for key in keys if re.fullmatch(pattern, key)]
        if found and len(found) * 2 >= len(keys):
            raise UnsupportedAdapter(f"{path}: {what} (it holds {min(found)!r})")


def refuse_by_config(path: Path, config: Mapping[str, Any]) -> None:
    """The same by a config of AdapterHub's ``adapters`` library."""
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    kind = str(inner.get("architecture") or "")
    if any(key in inner for key in _BOTTLENECK) and kind != "lora":
        raise UnsupportedAdapter(
            f"{path}: a bottleneck adapter of AdapterHub: layers of its own with a nonlinearity "
            "between, put into the model; no change of weights does the same"
        )
    if kind in ("prefix_tuning", "prompt_tuning"):
        raise UnsupportedAdapter(
            f"{path}: {kind.replace('_', ' ')} of AdapterHub: vectors put before the sequence; no "
            "weight of the model changes"
        )
    if kind and "version" in config:
        raise UnsupportedAdapter(
            f"{path}: an adapter of AdapterHub ({kind}), whose names are not PEFT's; save it with "
            "PEFT"
        )
