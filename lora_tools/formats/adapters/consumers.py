"""What each program that loads adapters reads of them, one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_tools.errors import UnsupportedAdapter

# Architectures in which PEFT 0.21 refuses out_proj and conv1d as target_modules: a fused kernel
# takes their weights past PEFT's layers (``_check_lora_target_modules_mamba``).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A program that loads adapters.

    Attributes:
        patterns: reads rank_pattern and alpha_pattern. Where not, every module is padded with
            zeros to one rank, lora_alpha is that rank, and what scale is left goes into lora_B.
        ranks: the ranks it accepts, or empty for any.
        saved: reads tensors saved whole; bias: biases; dora: DoRA magnitudes.
        forms: the forms of factors it reads.
        loads: goes by the names that transformers gives modules in memory, and not by the files'.
        stacked: it reads factors of experts one by one, of all three projections; but of
            architectures of these types as PEFT has them, all experts in one, of both parameters.
        head: takes factors of an input embedding that is the output head, too. (llama.cpp has one
            tensor for both, and aborts on factors of it.)
    """

    name: str
    patterns: bool = False
    ranks: tuple[int, ...] = ()
    saved: bool = False
    bias: bool = False
    dora: bool = False
    forms: tuple[str, ...] = ("matrix", "embedding")
    loads: bool = False
    stacked: tuple[str, ...] = ()
    head: bool = True

    def refuses_factors(self, module: str, config: Mapping[str, Any]) -> bool:
        """Whether it fails on factors of that module of a model with this config.json."""
        last = module.rpartition(".")[2]
        return self.loads and config.get("model_type") in _MAMBA and last in ("out_proj", "conv1d")

    def rank_for(self, rank: int) -> int:
        """The smallest accepted rank that holds ``rank``. Raises UnsupportedAdapter."""
        fitting = [r for r in self.ranks if r >= rank] if self.ranks else [rank]
        if not fitting:
            raise UnsupportedAdapter(
                f"{self.name} reads ranks up to {self.ranks[-1]} and this adapter has {rank}; "
                "lower it with --rank or --max-rank"
            )
        return fitting[0]

    def refuse(self, what: str, instead: str) -> UnsupportedAdapter:
        """The error for a part of an adapter that this consumer does not read."""
        return UnsupportedAdapter(f"{self.name} does not read {what}; {instead}")


CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "peft",
            patterns=True,
            saved=True,
            bias=True,
            dora=True,
            loads=True,
            forms=("matrix", "embedding", "conv", "experts"),
        ),
        Consumer(
            "vllm",
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            # Its model classes with ``is_3d_moe_weight``.
            stacked=("gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text", "interns1_pro"),
        ),
        Consumer("llama.cpp", head=False),
    )
}
