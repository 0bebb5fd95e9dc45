"""The table of docs/onnx-architectures.md: what ``export`` makes of every architecture of
``sweep_models``.

``python -m tests.export_sweep [NAME ...]`` does these, or all of them, in some seconds each, and
writes their rows anew; ``test_export_sweep.py`` does a seeded part.
"""

from __future__ import annotations

import fcntl
import math
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import lora_tools
from lora_tools.errors import LoraToolsError

from . import page_table
from .sweep import base_of
from .sweep_models import ALL

PAGE = Path(__file__).parents[1] / "docs" / "onnx-architectures.md"
HEAD = ("architecture", "task", "outcome", "differs at most", "tokens the same", "fused")
_LONGEST = 230


def row_of(name: str) -> list[str]:
    """Its task, verified or refused and why, how near it came, its tokens, and what is fused.

    Raises:
        Exception: whatever is no error of this package's own: a traceback.
    """
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export
        base, out = base_of(name, Path(scratch, "base")), Path(scratch, "out")
        try:
            report = lora_tools.export(base, out)
        except LoraToolsError as error:
            said = _plain(str(error), scratch)
            return ["-", f"refused: {said}", "-", "-", "-"]
        finally:
            shutil.rmtree(out, ignore_errors=True)
    totals = report.totals
    task = next(fate.reason for fate in report.plan if fate.action == "graph")
    off = f"1e{math.ceil(math.log10(max(totals['max_relative_difference'], 1e-6)))}"
    tokens = "-"
    if "tokens_generated" in totals:
        tokens = f"{totals['tokens_same']} of {totals['tokens_generated']}"
    fused = ", ".join(
        f"{n} {kind.replace('_', ' ')}" for kind, n in totals.get("fused", {}).items()
    )
    return [task, "verified", off, tokens, fused or "-"]


def _plain(said: str, scratch: str) -> str:
    """An error on one line of a table: without this machine's paths and releases."""
    said = re.sub(rf"{re.escape(scratch)}/?\S*:? ?", "", " ".join(said.split()))
    said = re.sub(r"; try another .*|0x[0-9a-f]+", "", said).replace("|", "/")
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST].rstrip()} …"


def counted(rows: dict[str, list[str]]) -> str:
    """The line above the table."""
    verified = sum(row[1] == "verified" for row in rows.values())
    return (
        f"{len(rows)} architectures: {verified} verified, {len(rows) - verified} refused by name."
    )


def write_row(name: str, row: list[str]) -> None:
    """Put a row into the table; several processes may."""
    with PAGE.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = page_table.read(PAGE) | {name: row}
        ordered = {each: rows[each] for each in ALL if each in rows}
        page_table.write(PAGE, HEAD, ordered, counted(rows))


if __name__ == "__main__":
    for each in sys.argv[1:] or ALL:
        found = row_of(each)
        write_row(each, found)
        print(each, *found, sep=" | ", flush=True)
