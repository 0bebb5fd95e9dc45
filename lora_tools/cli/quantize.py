"""``loratools quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

_FORMAT = "Four bits"


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Store CHECKPOINT in four bits (NF4, bitsandbytes).",
    epilog="Example: loratools quantize base --adapter style=0.7 -o base-nf4",
)
@click.argument("checkpoint", type=click.Path())
@option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    group="Adapters",
    help="Merge this PEFT adapter, times its WEIGHT (1), before quantizing; repeatable.",
)
@options.unmatched_option
@options.other_base_option
@options.include_option
@options.exclude_option
@option(
    "--lm-head",
    is_flag=True,
    group=options.TENSORS,
    help="Quantize the output head as well, where it is not tied to the input embedding.",
)
@option(
    "--quant-type",
    type=click.Choice(["nf4", "fp4"]),
    default="nf4",
    show_default=True,
    group=_FORMAT,
    help="The codebook.",
)
@option(
    "--blocksize",
    type=int,
    metavar="N",
    default=64,
    show_default=True,
    group=_FORMAT,
    help="Numbers that share a scale: a power of two from 32 to 4096.",
)
@option(
    "--double-quant/--no-double-quant",
    default=True,
    show_default=True,
    group=_FORMAT,
    help="Store the scales in eight bits.",
)
@option(
    "--compute-dtype",
    metavar="DTYPE",
    default="bfloat16",
    show_default=True,
    group=_FORMAT,
    help="What a loader computes in, for quantization_config.",
)
@option(
    "--quant-storage",
    type=click.Choice(["uint8", "float16", "bfloat16", "float32"]),
    default="uint8",
    show_default=True,
    group=_FORMAT,
    help="The dtype whose elements hold the packed bytes (FSDP wants the model's).",
)
@option(
    "--scale-search",
    is_flag=True,
    group=_FORMAT,
    help="Search each block's scale for the least error: up to ten times slower, some 9 % less "
    "error, the same format.",
)
@option(
    "--compensate",
    type=int,
    metavar="RANK",
    group=_FORMAT,
    help="Put an adapter of this rank into OUT/loftq_init that makes up for part of the error "
    "(LoftQ). Adapters given are then stacked in it as they are, not merged.",
)
@option(
    "--compensate-iterations",
    type=int,
    metavar="N",
    group=_FORMAT,
    help="Quantize what the adapter leaves and fit it anew, N times in all (default 1).",
)
@options.out_option
@options.dtype_option("each tensor keeps its own")
@options.shard_size_option
@options.max_error_option("a tensor")
@options.verb
def quantize(checkpoint: str, out: Path, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Write CHECKPOINT with its linear layers in four bits, as bitsandbytes and transformers do.

    CHECKPOINT is a Hugging Face folder, a .safetensors file or a hub id (org/name[@revision]);
    --out loads with from_pretrained as it is. Embeddings, norms and heads stay as they are.
    """
    from lora_tools.verbs.quantize import quantize as work

    return work(checkpoint, out, progress=progress, **rest)
