"""``loratools rescale``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

_STRENGTH = "Strength"


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Give an adapter another strength, alpha, rank or form.",
    epilog="Example: loratools rescale adapter -o small --energy 0.95 --max-rank 16",
)
@click.argument("adapter", type=click.Path())
@option(
    "--scale",
    type=float,
    metavar="F",
    group=_STRENGTH,
    help="Multiply the adapter's effect by F; lora_alpha changes, the factors do not.",
)
@option(
    "--alpha",
    type=float,
    metavar="A",
    group=_STRENGTH,
    help="Set lora_alpha; --effect says what follows.",
)
@option(
    "--effect",
    type=click.Choice(["keep", "change"]),
    default="keep",
    show_default=True,
    group=_STRENGTH,
    help="With --alpha: lora_B makes up for it, or the effect changes in proportion.",
)
@option(
    "--rslora/--no-rslora",
    default=None,
    group=_STRENGTH,
    help="Write use_rslora (scaling alpha/sqrt(r)) or not; the effect is kept.",
)
@options.rescale_ranks
@options.dtype_option("each factor keeps its own")
@options.consumer_option
@options.base_option
@options.out_option
@options.verb
def rescale(adapter: str, out: Path, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Write ADAPTER with another strength, alpha or rank, or as one consumer reads it.

    It stays in its format. Resizing is exact: QR of both factors and an SVD of the small core,
    never a dense product.
    """
    from lora_tools.verbs.rescale import rescale as work

    return work(adapter, out, progress=progress, **rest)
