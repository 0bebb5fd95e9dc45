"""The bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lora_tools.cli.table import short_name
from lora_tools.printable import printable
from lora_tools.records import Progress, ProgressCallback
from lora_tools.sentences import size

_BAR, _LABEL = 24, 28  # letters; the line stays as wide as it is, whatever is worked on
_FOR_BAR, _FOR_LABEL = 76, 62  # letters of a line, below which each has no room


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[ProgressCallback | None]:
    """How far the work is; nothing in a pipe or with --quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    bar = Bar(
        TextColumn("{task.percentage:>3.0f}%"),
        *([BarColumn(_BAR)] if console.width >= _FOR_BAR else []),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        *([TextColumn("{task.description}")] if console.width >= _FOR_LABEL else []),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, steps="", speed="")

        def advance(step: Progress) -> None:
            speed = bar.tasks[0].speed
            shown = f"{size(speed)}/s" if speed and step.unit == "bytes" else ""
            bar.update(
                task,
                completed=step.done,
                total=step.total,
                description=short_name(printable(step.label), _LABEL).ljust(_LABEL),
                steps=f"{step.step:>{len(str(step.steps))}}/{step.steps}" if step.steps else "",
                speed=f"{shown:>11}",
            )

        yield advance
