"""Adapters that are no low-rank deltas of weights: what they are, and why they cannot be merged.

Those of PEFT name themselves in ``peft_type``; others are known by their config or their keys.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter


@dataclasses.dataclass(frozen=True)
class NotLora:
    """One kind: what it is and why, and what it is told by.

    Attributes:
        what: with {kind} for what the config calls it.
        keys: a pattern that at least half of a file's keys match.
        config: whether a config of AdapterHub's ``adapters`` library, its own part and the whole of
            it, is of this kind.
    """

    what: str
    keys: str = ""
    config: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] | None = None


_BOTTLENECK = {"reduction_factor", "mh_adapter", "output_adapter", "bottleneck_size"}
# The first that matches is meant.
KINDS = (
    NotLora(
        "soft prompts (prompt tuning, prefix tuning or p-tuning): vectors before the sequence or "
        "its keys and values; they change no weight of the model",
        r"prompt_embeddings|prompt_encoder\..*|base_model\.prompt_encoder\..*",
    ),
    NotLora(
        "LLaMA-Adapter: prompts inside attention; they change no weight of the model",
        r".*\.adaption_(prompt|gate)",
    ),
    NotLora(
        "a bottleneck adapter: it adds layers with a nonlinearity to the model; no change of "
        "weights does the same",
        r".*\.(adapters?|parallel_mlp)\.(.*\.)?(adapter_down|adapter_up|down_proj|up_proj)\..*"
        r"|.*\.(adapter_down|adapter_up)\..*",
    ),
    NotLora(
        "OFT of sd-scripts: rotations of weights, which are not a low-rank change",
        r"oft_unet_\w+\.(oft_blocks|alpha)",
    ),
    NotLora(
        "textual inversion: vectors for new tokens of a text encoder",
        r"emb_params|string_to_param|clip_[lg]|<[^>]+>|t5",
    ),
    NotLora(
        "a bottleneck adapter of AdapterHub: it adds layers with a nonlinearity to the model; no "
        "change of weights does the same",
        config=lambda own, _: bool(own.keys() & _BOTTLENECK) and own.get("architecture") != "lora",
    ),
    NotLora(
        "{kind} of AdapterHub: vectors before the sequence; they change no weight of the model",
        config=lambda own, _: own.get("architecture") in ("prefix_tuning", "prompt_tuning"),
    ),
    NotLora(
        "an adapter of AdapterHub ({kind}), which has other names than PEFT's; save it with PEFT",
        config=lambda own, whole: bool(own.get("architecture")) and "version" in whole,
    ),
)


def refuse_by_keys(path: Path, keys: Collection[str]) -> None:
    """Raises UnsupportedAdapter where the keys are those of such an adapter."""
    for kind in KINDS:
        found = [key for key in keys if kind.keys and re.fullmatch(kind.keys, key)]
        if found and len(found) * 2 >= len(keys):
            raise UnsupportedAdapter(f"{path}: {kind.what} (it holds {min(found)!r})")


def refuse_by_config(path: Path, config: Mapping[str, Any]) -> None:
    """The same by a config of AdapterHub's ``adapters`` library."""
    own = config.get("config")
    if not isinstance(own, dict):
        return
    for kind in KINDS:
        if kind.config is not None and kind.config(own, config):
            called = str(own.get("architecture")).replace("_", " ")
            raise UnsupportedAdapter(f"{path}: {kind.what.replace('{kind}', called)}")
