"""``loratools verify``."""

from __future__ import annotations

from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

_AGAINST = "Against what"


@click.command(
    cls=GroupedCommand,
    options_metavar="--base BASE [OPTIONS]",
    short_help="Check a merged checkpoint or an adapter.",
    epilog="Example: loratools verify merged --base org/base --adapter style=0.7",
)
@click.argument("path", type=click.Path())
@option("--base", type=click.Path(), metavar="BASE", group=_AGAINST, help="The base checkpoint.")
@option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(),
    metavar="ADAPTER[=WEIGHT]",
    group=_AGAINST,
    help="PATH should be BASE with this merged; repeatable.",
)
@option(
    "--tuned",
    type=click.Path(),
    metavar="TUNED",
    group=_AGAINST,
    help="PATH is an adapter that should turn BASE into this.",
)
@option(
    "--max-error",
    type=float,
    metavar="X",
    group=_AGAINST,
    help="With --tuned: exit 3 if the relative error of a module, or of all together, exceeds X.",
)
@options.reading_verb
def verify(path: str, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Check that PATH is what it is said to be: exit code 0 if so, 3 if not, with the worst tensor
    named.

    A merged checkpoint (--base, --adapter): base + adapter to rounding, and by which rounding; or
    the adapter applied twice, at another scale, to another base, tensors left out, tied ones apart.
    An adapter (--base, --tuned): its true error, from the merged weights and not from the factors.
    """
    from lora_tools.verbs.verify import verify as work

    return work(path, progress=progress, **rest)
