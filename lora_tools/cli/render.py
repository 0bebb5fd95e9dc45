"""Reports for people: the answer of a verb that looks to stdout, all else to stderr."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, TextIO

import click

from lora_tools.cli.tables import tables
from lora_tools.printable import printable
from lora_tools.records import Report
from lora_tools.sentences import recommendation, sentences


def show(report: Report[Any], *, verbose: bool, written: bool, answer: bool) -> None:
    """Print the report.

    Args:
        answer: what was asked for is what is printed, not what was written; it goes to stdout.
    """
    stream = sys.stdout if answer else sys.stderr
    _print(recommendation(report), stream)
    _print(tables(report, verbose, _width(stream)), stream)
    counts = Counter(fate.action for fate in report.plan)
    if counts:
        actions = ", ".join(f"{n} {action}" for action, n in counts.most_common())
        _print([f"tensors: {actions}"], stream)
    _print((f"note: {note}" for note in report.notes), sys.stderr)
    _print(sentences(report), stream)
    if report.dry_run:
        _print(["dry run: nothing was written"], stream)
    elif written and report.output:
        _print([f"wrote {report.output} in {report.seconds:.1f} s"], stream)


def _print(lines: Iterable[str], stream: TextIO) -> None:
    for line in lines:
        click.echo(printable(line), file=stream)


def _width(stream: TextIO) -> int | None:
    """Letters of a line on a terminal, COLUMNS where that is set. A pipe and a log have no width: a
    name that was cut short cannot be searched for."""
    return shutil.get_terminal_size().columns if stream.isatty() else None
