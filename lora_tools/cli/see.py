"""``loratools inspect`` and ``loratools diff``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

F = TypeVar("F", bound=Callable[..., Any])
_PICTURE = "Picture"


def _plot(what: str) -> Callable[[F], F]:
    return option(
        "--plot",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        group=_PICTURE,
        help=f"Draw {what}, as .png, .svg or .html (needs loratools[plot]).",
    )


@click.command(
    cls=GroupedCommand,
    options_metavar="[OPTIONS]",
    short_help="Say what a file or folder is.",
    epilog="Example: loratools inspect adapter --plot adapter.png",
)
@click.argument("path", type=click.Path())
@_plot("an adapter's own spectrum")
@options.reading_verb
def inspect(path: str, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Say what PATH is: kind, tensors, dtypes, sizes, hashes, metadata, and what is odd about it.

    PATH is a checkpoint (quantized or not), an adapter, a sidecar, a spectrum cache, a file of
    activation statistics, or a hub id. For an adapter: ranks, scaling, and the spectrum of each
    module.
    """
    from lora_tools.verbs.inspect import inspect as work

    return work(path, progress=progress, **rest)


@click.command(
    cls=GroupedCommand,
    options_metavar="[OPTIONS]",
    short_help="Say what a fine-tune changed, and how low-rank it is.",
    epilog="Example: loratools diff org/base ./tuned --plot change.png",
)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@options.include_option
@options.exclude_option
@option(
    "--sort",
    type=click.Choice(["change", "norm", "name"]),
    default="change",
    show_default=True,
    group=options.TENSORS,
    help="By relative change, by the norm of the change, or as in the file.",
)
@_plot("where it changed, spectra, and error against size")
@options.seed_option
@options.device_option
@options.reading_verb
def diff(base: str, tuned: str, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Say what changed from BASE to TUNED, where, and how low-rank the change is.

    For each module: its relative change, its stable rank, the energy in the leading 8, 16, 32 and
    64 directions, the noise floor that the stored dtypes set, and a recommended rank.
    """
    from lora_tools.verbs.diff import diff as work

    return work(base, tuned, progress=progress, **rest)
