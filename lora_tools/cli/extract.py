"""``loratools extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.cli.options import ADAPTER, TENSORS
from lora_tools.records import ProgressCallback, Report

_SVD = options.DECOMPOSITION


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Make the LoRA adapter that turns BASE into TUNED.",
    epilog="Example: loratools extract org/base ./tuned -o adapter --rank 32",
)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@options.extract_ranks
@option(
    "--activations",
    type=click.Path(),
    metavar="FILE",
    group=options.RANK,
    help="Make the error of the layers' outputs small, on inputs as collect-stats saw them.",
)
@option(
    "--spectrum-cache",
    type=click.Path(),
    metavar="FILE",
    group=options.RANK,
    help="Keep the decompositions there, to the largest rank (--max-rank, or 128), and use those "
    "that are there: another rank or policy then costs seconds.",
)
@options.include_option
@options.exclude_option
@option(
    "--embeddings",
    type=click.Choice(["lora", "save", "skip"]),
    default="lora",
    show_default=True,
    group=TENSORS,
    help="Changed embeddings: decompose them, save them whole, or leave them out.",
)
@option(
    "--rest",
    type=click.Choice(["save", "skip", "error"]),
    default="save",
    show_default=True,
    group=TENSORS,
    help="Changed tensors without a low-rank form (norms, biases): save them whole, leave them "
    "out, or stop.",
)
@option(
    "--layout",
    multiple=True,
    metavar="REGEX=KIND",
    group=TENSORS,
    help="Layer kind of modules in whose name REGEX is found, where name and shape do not tell: "
    "conv:GROUPS, merged:3 (factors for each block), merged:64,16,16/101 (by size, first and last "
    "only), merged:3*12 (three in each of 12 heads), linear, conv1d, embedding, none "
    "(docs/layers.md); repeatable.",
)
@option(
    "--alpha",
    type=float,
    metavar="A",
    group=ADAPTER,
    help="lora_alpha; the effect is the same with any.  [default: each module's rank]",
)
@option("--rslora", is_flag=True, group=ADAPTER, help="Write use_rslora: scaling alpha/sqrt(r).")
@options.dtype_option("that of each base tensor, for its factors")
@options.consumer_option
@option(
    "--names",
    type=click.Choice(["loaded", "stored"]),
    default="loaded",
    show_default=True,
    group=ADAPTER,
    help="Of modules: loaded, those that the installed transformers gives them in memory, which "
    "PEFT goes by; stored, those in BASE's files, as for vllm and llama.cpp always.",
)
@option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    default="auto",
    show_default=True,
    group=_SVD,
    help="auto: iterate until --tolerance is met, small matrices exactly; exact: every matrix.",
)
@option(
    "--tolerance",
    type=float,
    metavar="X",
    default=1e-3,
    show_default=True,
    group=_SVD,
    help="The energy captured may miss the best possible at that rank by this share.",
)
@options.seed_option
@options.device_option
@options.out_option
@options.max_error_option("a module")
@options.verb
def extract(
    base: str, tuned: str, out: Path, progress: ProgressCallback | None, **rest: Any
) -> Report:
    """Write the LoRA adapter that turns BASE into TUNED, a fully fine-tuned copy of it.

    BASE and TUNED are Hugging Face folders, .safetensors files or hub ids (org/name[@revision]).
    --out becomes a folder that PEFT loads. Without --rank and --energy the rank is 32.
    """
    from lora_tools.verbs.extract import extract as work

    return work(base, tuned, out, progress=progress, **rest)
