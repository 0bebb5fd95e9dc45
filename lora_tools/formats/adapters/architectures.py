"""How other formats than the Hugging Face ones name and order the weights of an architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model_type.

    Attributes:
        gguf: llama.cpp's name for it.
        interleaved: q_proj and k_proj are stored there (and in torchtune) with the two halves of
            each rotary head interleaved, as in Meta's own checkpoints.
        torchtune: whether torchtune has it under the names that ``torchtune.py`` knows.
    """

    gguf: str
    interleaved: bool = False
    torchtune: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True, torchtune=True),
    "mistral": Architecture("llama", interleaved=True, torchtune=True),
    "qwen2": Architecture("qwen2", torchtune=True),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
}


def architecture(base: BaseNames, path: Path, form: str) -> Architecture:
    """The base's row of the table. Raises UnsupportedAdapter where there is none."""
    kind = str(base.config.get("model_type", ""))
    row = ARCHITECTURES.get(kind)
    if row is None or (form == "torchtune" and not row.torchtune):
        known = ", ".join(k for k, a in ARCHITECTURES.items() if form != "torchtune" or a.torchtune)
        raise UnsupportedAdapter(
            f"{path}: it is not known how {form} names and orders the weights of a "
            f"{kind or 'nameless'} model (known: {known})"
        )
    return row


def heads(config: Mapping[str, Any], module: str) -> int:
    """Heads of q_proj, or of k_proj where the module is one."""
    queries = _count(config.get("num_attention_heads"), 1)
    if module.endswith("k_proj"):
        return _count(config.get("num_key_value_heads"), queries)
    return queries


def layers(base: BaseNames) -> int:
    """How many layers the base has; no more than it has modules, whatever its config says."""
    said = base.config.get("num_hidden_layers") or base.config.get("n_layer")
    return min(_count(said, 0), len(base.weights))


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


def is_rotated(row: Architecture, module: str) -> bool:
    """Whether that module's rows are interleaved there."""
    return row.interleaved and module.endswith(("q_proj", "k_proj"))
