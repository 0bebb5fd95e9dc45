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
        "The number format to write (docs/quantize.md). --activations and --calibrate work with "
        "all formats. The other options of this group work with nf4 and fp4.",
        FOUR_BITS,
        choices=schemes,
        unset="nf4",
    )
    quant_type: str | None = option(
        None, "An old name of --scheme.", FOUR_BITS, choices=quant_types, unset="--scheme"
    )
    blocksize: int = option(
        64,
        "How many numbers share a scale: a power of two from 32 to 4096.",
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
        "The dtype that quantization_config tells programs to compute in.",
        FOUR_BITS,
        metavar="DTYPE",
    )
    quant_storage: str = option(
        "uint8",
        "The dtype in which the packed bytes are stored (FSDP needs the model's dtype).",
        FOUR_BITS,
        choices=storages,
    )
    scale_search: bool = option(
        False,
        "Search for the scale of each block that gives the smallest error. This is up to ten times "
        "slower and reduces the error of the weights by about 9 %, in the same format. The model "
        "itself gets better only with --activations.",
        FOUR_BITS,
    )
    activations: str | Path | None = option(
        None,
        "Make the error of the layers' outputs small, by statistics of collect-stats: the rounding "
        "of each column makes up for the columns before it (GPTQ). Size and format stay the same, "
        "and the model loses much less.",
        FOUR_BITS,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    calibrate: str | Path | None = option(
        None,
        "First collect the statistics for --activations on this text, in the same run, one block "
        "of the model after the other.",
        FOUR_BITS,
        metavar="TEXT",
        recorded=False,
        path="input",
    )
    calibration_tokens: int | None = option(
        None,
        "How many tokens of the text to use, in sequences of 512.",
        FOUR_BITS,
        metavar="N",
        unset="five times the number of inputs of the widest layer, but at least 8,192",
    )
    calibration_seed: int | None = option(
        None,
        "Seed of the choice of sequences, if the text has more than needed (default 0).",
        FOUR_BITS,
        metavar="N",
    )
    budget: str | None = option(
        None,
        "Use so many bits per number in these layers (4.5bits), or bytes for all files (80MB). "
        "They go into the smallest blocks that fit (at most --blocksize), and then into layers "
        "that are not quantized, where four bits cost most for each byte. The cost is the error "
        "of the layers' outputs with --activations or --calibrate, and else that of the weights.",
        FOUR_BITS,
        metavar="BITS|SIZE",
    )
    compensate: int | None = option(
        None,
        "Also write an adapter of this rank to OUT/loftq_init, which makes up for part of the "
        "error. With --activations it reduces the error of the outputs (QERA), and lowers the "
        "model's loss. Without, it reduces the error of the weights (LoftQ); it is a start for "
        "training, and hardly lowers the loss. Adapters that you give are then stacked in it, not "
        "merged.",
        FOUR_BITS,
        metavar="RANK",
    )
    compensate_iterations: int | None = option(
        None,
        "Repeat N times: quantize what the adapter leaves, and fit the adapter again (default 1).",
        FOUR_BITS,
        metavar="N",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A text on which a quantized model is run beside the one before, and what it may lose."""

    eval_text: str | Path | None = option(
        None,
        "Run a decoder (causal-lm) on this text, before and after quantization, and report the "
        "increase of the loss and the KL divergence, in nats per token. Both models are in memory, "
        "in float32.",
        CHECK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    max_loss_increase: float | None = option(
        None,
        "With --eval-text: if the loss increases by more than X nats per token, exit with 3 and "
        "write nothing but the report.",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
