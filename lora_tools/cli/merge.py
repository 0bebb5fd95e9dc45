"""``loratools merge`` and ``loratools unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.cli.options import OUTPUT
from lora_tools.records import ProgressCallback, Report

_adapters = click.argument(
    "adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...", type=click.Path()
)


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Add adapters to the weights of BASE.",
    epilog="Example: loratools merge base style=0.7 facts -o merged",
)
@click.argument("base", type=click.Path())
@_adapters
@options.unmatched_option
@options.other_base_option
@options.out_option
@options.dtype_option("each tensor keeps its own")
@options.shard_size_option
@option(
    "--reversible",
    is_flag=True,
    group=OUTPUT,
    help="Also write a small sidecar, from which unmerge gives BASE back bit for bit.",
)
@option(
    "--requantize",
    is_flag=True,
    group=OUTPUT,
    help="Where BASE is in four bits, write four bits again; most of a small change is lost, and "
    "the report says how much.  [default: a four-bit BASE becomes plain]",
)
@options.verb
def merge(
    base: str, adapters: tuple[str, ...], out: Path, progress: ProgressCallback | None, **rest: Any
) -> Report:
    """Write BASE with the PEFT adapters added to its weights, each times its WEIGHT (1).

    BASE is a Hugging Face folder, a .safetensors file or a hub id (org/name[@revision]); --out
    becomes the same kind of thing. The sum is formed in float32 and rounded once.
    """
    from lora_tools.verbs.merge import merge as work

    return work(base, adapters, out, progress=progress, **rest)


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Get the base back out of a merged checkpoint.",
    epilog="Example: loratools unmerge merged style=0.7 facts -o base",
)
@click.argument("merged", type=click.Path())
@_adapters
@option(
    "--sidecar/--no-sidecar",
    default=None,
    group="Adapters",
    help="Refuse to go on without a sidecar, or ignore the one there is.  [default: use it if "
    "it is there]",
)
@options.unmatched_option
@option(
    "--allow-other-base",
    is_flag=True,
    group="Adapters",
    help="Without a sidecar: also subtract an adapter that MERGED's metadata does not name.",
)
@options.out_option
@options.verb
def unmerge(
    merged: str,
    adapters: tuple[str, ...],
    out: Path,
    progress: ProgressCallback | None,
    **rest: Any,
) -> Report:
    """Write the base that MERGED was made of by merging the adapters.

    With the sidecar of merge --reversible it is the base bit for bit, proved by its digest.
    Without, the adapters are subtracted, and a bound on what rounding lost is printed.
    """
    from lora_tools.verbs.unmerge import unmerge as work

    return work(merged, adapters, out, progress=progress, **rest)
