"""The table of docs/export.md: architectures on which export was tried, and how near it came.

``UPDATE_DOCS=1 pytest tests/test_export_table.py`` writes it anew.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_tools.onnx.tasks import TASKS

from .export_models import ARCHITECTURES
from .linear_layers import check_linears
from .traced import Traced

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
ROW = "| {:<24} | {:<20} | {:<16} | {:<20} |"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("onnxruntime")


def rows() -> dict[str, list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| (?!-|archi)(.*) \|$", text.split("<!-- table -->")[1], re.M)
    cells = [[cell.strip() for cell in row.split("|")] for row in found]
    return {row[0]: row[1:] for row in cells}


# What CI tries: those whose graphs other tests use too.
SHARED = ("BERT", "BERT, classifier", "Llama", "Whisper", "ConvNeXt")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHARED else pytest.mark.sweep(0))
        for name in ARCHITECTURES
    ],
)
def test_architecture(name: str, traced: Callable[[str], Traced]) -> None:
    made = traced(name)
    task = next(fate["reason"] for fate in made.report["plan"] if fate["action"] == "graph")
    check_linears(made.graph, TASKS[task])
    totals = made.report["totals"]
    found = totals["max_relative_difference"]
    tokens = "-"
    if "tokens_generated" in totals:
        tokens = f"{totals['tokens_same']} of {totals['tokens_generated']}"
    bound = f"1e{math.ceil(math.log10(max(found, 1e-6)))}"
    if os.environ.get("UPDATE_DOCS"):
        text = PAGE.read_text(encoding="utf-8")
        line = ROW.format(name, task, bound, tokens)
        pattern = rf"^\| {re.escape(name)} +\|.*$"
        if re.search(pattern, text, re.M):
            text = re.sub(pattern, line, text, flags=re.M)
        else:
            head, _, tail = text.rpartition("<!-- table -->")
            text = f"{head}{line}\n<!-- table -->{tail}"
        PAGE.write_text(text, encoding="utf-8")
    stated = rows()[name]
    assert stated[0] == task
    # Another machine sums in another order.
    assert found <= 10 * float(stated[1]), f"{found} is far above what the table says"
    assert stated[2] == tokens


def test_the_table_names_what_is_tried() -> None:
    assert list(rows()) == list(ARCHITECTURES)
