"""``loratools convert`` and ``loratools combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.cli.options import ADAPTER, RANK
from lora_tools.records import ProgressCallback, Report

_FORMAT, _METHOD = "Format", "Method"
FORMATS = [
    "peft",
    "kohya",
    "lycoris",
    "diffusers",
    "torchtune",
    "mlx",
    "loralib",
    "gguf",
    "onnxruntime",
]
FEATURES = ["embedding", "conv", "experts", "dora", "bias", "saved", "tokens", "head"]


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT --to FORMAT [OPTIONS]",
    short_help="Write an adapter in another format.",
    epilog="Example: loratools convert adapter -o adapter.gguf --to gguf --base base",
)
@click.argument("adapter", type=click.Path())
@option(
    "--to",
    type=click.Choice(FORMATS),
    required=True,
    group=_FORMAT,
    help="The format to write. README.md has what each one keeps.",
)
@option(
    "--from",
    "source",
    type=click.Choice(FORMATS),
    group=_FORMAT,
    help="The format of ADAPTER.  [default: its content tells]",
)
@options.base_option
@option(
    "--drop",
    type=click.Choice(FEATURES),
    multiple=True,
    group=_FORMAT,
    help="Leave this out, where the format has no place for it (or you do not want it).",
)
@option(
    "--alpha",
    type=float,
    metavar="A",
    group=ADAPTER,
    help="lora_alpha it was trained with, where its format does not keep it (loralib, torchtune).",
)
@option(
    "--enable-lora",
    metavar="1,0,1",
    group=ADAPTER,
    help="Which blocks of loralib's MergedLinear layers are adapted.",
)
@option(
    "--layout",
    multiple=True,
    metavar="REGEX=KIND",
    group=_FORMAT,
    help="With --to loralib: modules that are MergedLinear there, such as c_attn=merged:3/101.",
)
@options.rank_option
@options.energy_option
@options.max_rank_option
@options.dtype_option("each factor keeps its own")
@options.out_option
@options.verb
def convert(adapter: str, out: Path, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Write ADAPTER in another format; its effect on the weights stays.

    Numbers are renamed, turned and reordered, not changed. Where the format keeps no alpha of each
    module, the scale goes into lora_B. What it cannot hold is refused unless --drop names it.
    """
    from lora_tools.verbs.convert import convert as work

    return work(adapter, out, progress=progress, **rest)


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Make one adapter out of several.",
    epilog="Example: loratools combine style=0.7 facts=0.3 -o both --method ties --density 0.2",
)
@click.argument(
    "adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...", type=click.Path()
)
@option(
    "--method",
    type=click.Choice(
        ["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
    ),
    default="cat",
    show_default=True,
    group=_METHOD,
    help="cat, linear and svd add the changes of the weights up; the others prune them first "
    "(docs/combine.md).",
)
@option(
    "--density",
    type=float,
    metavar="SHARE",
    group=_METHOD,
    help="The share of elements that the pruning methods keep, such as 0.2.",
)
@option(
    "--majority-sign",
    type=click.Choice(["total", "frequency", "weighted"]),
    default="total",
    show_default=True,
    group=_METHOD,
    help="ties and dare_ties elect each element's sign by the sum of the changes, by their count, "
    "or by their sum with the weights (mergekit's).",
)
@option(
    "--normalize",
    is_flag=True,
    group=_METHOD,
    help="Divide by the sum of the weights (mergekit's default); of those that agree, where signs "
    "are elected.",
)
@option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    group=_METHOD,
    help="Of the random choice of dare_linear and dare_ties.",
)
@option(
    "--rank",
    type=int,
    metavar="N",
    group=RANK,
    help="Cut each module to this rank.  [default: cat and linear keep all; the others cut to the "
    "largest rank of the adapters]",
)
@options.energy_option
@options.max_rank_option
@options.base_option
@option(
    "--allow-other-base",
    is_flag=True,
    group=_METHOD,
    help="Also combine adapters whose metadata names different bases.",
)
@options.dtype_option("each factor keeps the widest of the inputs")
@options.out_option
@options.verb
def combine(
    adapters: tuple[str, ...], out: Path, progress: ProgressCallback | None, **rest: Any
) -> Report:
    """Write one PEFT adapter that does what the ADAPTERs do together, each times its WEIGHT (1).

    Every method acts on the true changes of the weights, with each adapter's scaling, rsLoRA and
    patterns applied; ranks may differ. The default, cat, is exact.
    """
    from lora_tools.verbs.combine import combine as work

    return work(adapters, out, progress=progress, **rest)
