"""What each program that loads adapters reads of them, one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.format import Format

# Architectures in which PEFT 0.21 refuses out_proj and conv1d as target_modules: a fused kernel
# takes their weights past PEFT's layers (``_check_lora_target_modules_mamba``).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A program that loads adapters.

    Attributes:
        version: the one that the facts below are of; of others, and of what ``unsure`` says in
            words, they are not known.
        reads: the formats that it opens; command: the one that writes what it reads, and ``to``,
            the format that this one is told to write. (llama.cpp's own script takes PEFT's folders,
            too, if they have one rank: those ``rescale`` writes.)
        patterns: reads rank_pattern and alpha_pattern. Where not, every module is padded with
            zeros to one rank, lora_alpha is that rank, and what scale is left goes into lora_B.
        rslora: reads use_rslora.
        one_rank: fails on modules of several ranks, or mixes them up.
        ranks: the ranks it accepts, or empty for any.
        rank_option: what its server is told with of the largest rank.
        saved: reads tensors saved whole; whole: where not, the modules of which it does; bias:
            biases; dora: DoRA magnitudes.
        forms: the forms of factors it reads.
        loads: goes by the names that transformers gives modules in memory, and not by the files'.
        stacked: it reads factors of experts one by one, of all three projections; but of
            architectures of these types as PEFT has them, all experts in one, of both parameters.
        head: takes factors of an input embedding that is the output head, too. (llama.cpp has one
            tensor for both, and aborts on factors of it.)
        modules: last parts of the names of modules that it knows, or empty for any.
        pipelines: loads models of diffusers only.
        towers: takes factors of the parts of a model that read pictures or sound.
        shards: reads a file of tensors that is cut into several.
        refuses, ignores: at which findings of ``verifying.consumer`` it stops, and which it passes
            by without an error; of the others it is not known.
    """

    name: str
    version: str
    reads: tuple[str, ...] = ("peft",)
    command: str = "rescale"
    to: str = ""
    patterns: bool = False
    rslora: bool = True
    one_rank: bool = False
    ranks: tuple[int, ...] = ()
    rank_option: str = ""
    saved: bool = False
    whole: tuple[str, ...] = ()
    bias: bool = False
    dora: bool = False
    forms: tuple[str, ...] = ("matrix", "embedding")
    loads: bool = False
    stacked: tuple[str, ...] = ()
    head: bool = True
    modules: tuple[str, ...] = ()
    pipelines: bool = False
    towers: bool = True
    shards: bool = False
    refuses: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    unsure: tuple[str, ...] = ()

    def has(self, feature: str) -> bool:
        """Whether it reads one of ``format.FEATURES``, the output head aside."""
        whole = {"dora": self.dora, "bias": self.bias, "saved": self.saved, "tokens": self.saved}
        return whole.get(feature, feature in self.forms)

    def refuses_factors(self, module: str, config: Mapping[str, Any]) -> bool:
        """Whether it fails on factors of that module of a model with this config.json."""
        last = module.rpartition(".")[2]
        return self.loads and config.get("model_type") in _MAMBA and last in ("out_proj", "conv1d")

    def rank_for(self, rank: int) -> int:
        """The smallest accepted rank that holds ``rank``. Raises UnsupportedAdapter."""
        fitting = [r for r in self.ranks if r >= rank] if self.ranks else [rank]
        if not fitting:
            raise UnsupportedAdapter(
                f"{self.name} reads ranks up to {self.ranks[-1]}, and this adapter has rank "
                f"{rank}; lower it with --rank or --max-rank"
            )
        return fitting[0]

    def refuse(self, what: str, instead: str) -> UnsupportedAdapter:
        """The error for a part of an adapter that this consumer does not read."""
        return UnsupportedAdapter(f"{self.name} does not read {what}; {instead}")


def readers_of(form: Format) -> Consumer:
    """What reads a format, as far as the format tells."""
    forms = ("matrix", *(f for f in ("embedding", "conv", "experts") if f in form.keeps))
    return Consumer(
        form.title,
        "",
        patterns=True,
        saved="saved" in form.keeps,
        bias="bias" in form.keeps,
        dora="dora" in form.keeps,
        forms=forms,
        head="head" in form.keeps and form.tied_embedding,
    )


_UNREAD = frozenset(("ia3", "dora", "saved", "differences", "bias", "tokens", "conv", "experts"))
CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "peft",
            "0.21",
            command="convert",
            to="peft",
            patterns=True,
            saved=True,
            bias=True,
            dora=True,
            loads=True,
            forms=("matrix", "embedding", "conv", "experts"),
            refuses=frozenset(("format", "shards", "shapes", "vocabulary")),
            ignores=frozenset(("names", "keys", "targets")),
        ),
        Consumer(
            "vllm",
            "0.11",
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            rank_option="--max-lora-rank",
            # Its model classes with ``is_3d_moe_weight``.
            stacked=("gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text", "interns1_pro"),
            towers=False,
            refuses=_UNREAD | {"format", "shards", "shapes", "keys", "rank", "unknown"},
            ignores=frozenset(("names", "towers")),
            unsure=(
                "whether it serves this architecture with adapters, and takes factors of its "
                "embedding and head (embedding_modules of the class there)",
            ),
        ),
        Consumer(
            "llama.cpp",
            "llama-cpp-python 0.3.36",
            reads=("gguf",),
            command="convert",
            to="gguf",
            head=False,
            refuses=frozenset(("format", "names", "unknown", "head")),
            unsure=("whether its graph of this architecture asks for the factors of every tensor",),
        ),
        Consumer(
            "sglang",
            "0.5.3",
            rslora=False,
            one_rank=True,
            rank_option="--max-lora-rank",
            forms=("matrix",),
            modules=(
                *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
                *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
            ),
            towers=False,
            shards=True,
            refuses=frozenset(("embedding",)),
            unsure=(
                "factors of embed_tokens and lm_head, which later releases read",
                "whether --lora-target-modules of the server allows this adapter",
            ),
        ),
        Consumer(
            "tensorrt-llm",
            "1.0",
            rank_option="--max_lora_rank",
            whole=("embed_tokens", "lm_head"),
            dora=True,
            forms=("matrix",),
            refuses=frozenset(("format", "shards")),
            unsure=(
                "which modules the engine was built for (--lora_target_modules), DoRA with another "
                "backend than TensorRT's, and experts",
            ),
        ),
        Consumer(
            "diffusers",
            "0.42",
            reads=("diffusers", "kohya", "comfyui"),
            command="convert",
            to="diffusers",
            patterns=True,
            bias=True,
            dora=True,
            forms=("matrix", "conv"),
            pipelines=True,
            ignores=frozenset(("format", "names")),
            unsure=("which of kohya's and ComfyUI's names its converters know",),
        ),
    )
}
# Those that ``--for`` of extract and rescale makes a folder of PEFT's for.
CONFORMED = tuple(name for name, row in CONSUMERS.items() if set(row.reads) & {"peft", "gguf"})
