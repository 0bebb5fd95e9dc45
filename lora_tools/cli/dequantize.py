"""``loratools dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand
from lora_tools.records import ProgressCallback, Report


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Turn a four-bit CHECKPOINT into a plain one.",
    epilog="Example: loratools dequantize base-nf4 -o base --dtype bfloat16",
)
@click.argument("checkpoint", type=click.Path())
@options.out_option
@options.dtype_option("what each weight was quantized from")
@options.shard_size_option
@options.verb
def dequantize(
    checkpoint: str, out: Path, progress: ProgressCallback | None, **rest: Any
) -> Report:
    """Write the plain checkpoint that CHECKPOINT, in four bits by bitsandbytes, stands for.

    Each weight is its code's value times its block's scale in float32, rounded once.
    """
    from lora_tools.verbs.dequantize import dequantize as work

    return work(checkpoint, out, progress=progress, **rest)
