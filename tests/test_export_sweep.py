"""docs/onnx-architectures.md says what export makes of every architecture: a seeded part is made
anew."""

from __future__ import annotations

import re

import pytest

from . import export_sweep, page_table
from .sweep_models import ALL

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("onnxruntime")


@pytest.mark.sweep(150)
@pytest.mark.parametrize("name", page_table.read(export_sweep.PAGE))
def test_a_row_is_what_the_page_says(name: str) -> None:
    said, found = page_table.read(export_sweep.PAGE)[name], export_sweep.row_of(name)
    assert found[:2] == said[:2]
    assert found[3:] == said[3:]
    if said[2] != "-":  # another machine sums in another order
        assert float(found[2]) <= 10 * float(said[2])


def test_the_page_counts_its_rows() -> None:
    """At least 75 that are verified, and no other outcome than the two."""
    rows = page_table.read(export_sweep.PAGE)
    text = export_sweep.PAGE.read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(export_sweep.counted(rows))}$", text, re.M)
    assert set(rows) <= set(ALL)
    outcomes = [row[1].partition(":")[0] for row in rows.values()]
    assert set(outcomes) <= {"verified", "refused"}
