"""What ``quantize`` is asked for: a number format, and what it may cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_tools.options.fields import option
from lora_tools.options.tables import (
    CHECK,
    FOUR_BITS,
    FROM_0,
    blocksizes,
    quant_types,
    schemes,
    storages,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """How the numbers of linear layers are stored; all but the first and statistics are settings of
    the four bits of bitsandbytes (nf4, fp4)."""

    scheme: str | None = option(
        None,
        "The stored number format (docs/quantize.md). --activations and --calibrate go with all; "
        "the other options of this group with nf4 and fp4.",
        FOUR_BITS,
        choices=schemes,
        unset="nf4",
    )
    quant_type: str | None = option(
        None, "An older name of --scheme.", FOUR_BITS, choices=quant_types, unset="--scheme"
    )
    blocksize: int = option(
        64,
        "Numbers that share a scale: a power of two from 32 to 4096.",
        FOUR_BITS,
        metavar="N",
        choices=blocksizes,
    )
    double_quant: bool = option(
        True,
        "Store the scales in eight bits.",
        FOUR_BITS,
        flags=("--double-quant/--no-double-quant",),
    )
    compute_dtype: str = option(
        "bfloat16",
        "The dtype that quantization_config tells loaders to compute in.",
        FOUR_BITS,
        metavar="DTYPE",
    )
    quant_storage: str = option(
        "uint8",
        "The dtype whose elements hold the packed bytes (FSDP wants the model's).",
        FOUR_BITS,
        choices=storages,
    )
    scale_search: bool = option(
        False,
        "Search each block's scale for the least error of the weights: up to ten times slower, "
        "some 9 % less error, the same format. The model itself gains by it only with "
        "--activations.",
        FOUR_BITS,
    )
    activations: str | Path | None = option(
        None,
        "Make the error of the layers' outputs small, on inputs as collect-stats saw them: each "
        "column is rounded to make up for those before it (GPTQ). The same scales, bytes and "
        "format, and a model that loses much less.",
        FOUR_BITS,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    calibrate: str | Path | None = option(
        None,
        "Collect the statistics that --activations takes on this text first, in the same run, "
        "block after block of the model.",
        FOUR_BITS,
        metavar="TEXT",
        recorded=False,
        path="input",
    )
    calibration_tokens: int | None = option(
        None,
        "Tokens of the text to run the model over, in sequences of 512.",
        FOUR_BITS,
        metavar="N",
        unset="five times as many as the widest layer has inputs, and 8,192 at least",
    )
    calibration_seed: int | None = option(
        None,
        "Seed of the choice of sequences, where the text has more than are used (default 0).",
        FOUR_BITS,
        metavar="N",
    )
    budget: str | None = option(
        None,
        "Spend so many bits a number of these layers (4.5bits), or bytes of all files (80MB): on "
        "the smallest blocks that fit, --blocksize being the largest, then on layers that stay as "
        "they are, those that four bits cost most for each byte. By the error of the layers' "
        "outputs with --activations or --calibrate, of the weights without.",
        FOUR_BITS,
        metavar="BITS|SIZE",
    )
    compensate: int | None = option(
        None,
        "Put an adapter of this rank into OUT/loftq_init that makes up for part of the error: with "
        "--activations of the outputs' (QERA), which lowers the model's loss; without, of the "
        "weights' (LoftQ), a start for training that hardly does. Adapters given are then stacked "
        "in it as they are, not merged.",
        FOUR_BITS,
        metavar="RANK",
    )
    compensate_iterations: int | None = option(
        None,
        "Quantize what the adapter leaves and fit it anew, N times in all (default 1).",
        FOUR_BITS,
        metavar="N",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A text on which a quantized model is run beside the one before, and what it may lose."""

    eval_text: str | Path | None = option(
        None,
        "Run a decoder (causal-lm) on this text, plain and quantized, both in float32 in memory, "
        "and report the loss that is added and the KL divergence, in nats a token.",
        CHECK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    max_loss_increase: float | None = option(
        None,
        "With --eval-text: exit 3 and write nothing but the report if more than X nats a token are "
        "added.",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
