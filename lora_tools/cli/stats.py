"""``loratools collect-stats``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

_TEXT = "Text"


@click.command(
    "collect-stats",
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Measure what a model's layers are given, on text.",
    epilog="Example: loratools collect-stats org/base sample.txt -o stats.safetensors",
)
@click.argument("model", type=click.Path())
@click.argument("text", type=click.Path())
@option(
    "--kind",
    type=click.Choice(["full", "diagonal"]),
    default="full",
    show_default=True,
    group=_TEXT,
    help="The whole second moment of each layer's input, or its diagonal only.",
)
@option(
    "--length",
    type=int,
    metavar="N",
    default=512,
    show_default=True,
    group=_TEXT,
    help="Tokens a sequence.",
)
@option("--max-tokens", type=int, metavar="N", group=_TEXT, help="Of the text, at most.")
@options.device_option
@options.out_option
@options.verb
def collect_stats(
    model: str, text: str, out: Path, progress: ProgressCallback | None, **rest: Any
) -> Report:
    """Run MODEL over TEXT and write the second moment of each layer's input to --out, for
    extract --activations.

    MODEL is a folder that transformers loads, with its tokenizer; TEXT is a UTF-8 file such as the
    model will be used on. Needs loratools[stats] and memory for the whole model in float32.
    """
    from lora_tools.verbs.collect_stats import collect_stats as work

    return work(model, text, out, progress=progress, **rest)
