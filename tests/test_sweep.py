"""docs/architectures.md says what becomes of every architecture: each cell is made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import page_table, sweep
from .sweep_models import ALL

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By architecture, where its model lies once it was made."""
    top = tmp_path_factory.mktemp("sweep")
    return lambda name: top / name


@pytest.mark.sweep(80)
@pytest.mark.parametrize("what", sweep.CELLS)
@pytest.mark.parametrize("name", ALL)
def test_a_cell_is_what_the_page_says(
    name: str, what: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    said = dict(zip(("kind", *sweep.CELLS), page_table.read(sweep.PAGE)[name], strict=True))
    assert sweep.cell(name, what, folder(name), tmp_path) == said[what]


# What was wrong or refused once.
MENDED = [
    ("Bart", "resized"),
    ("Marian", "resized"),
    ("Gemma-3n", "resized"),
    ("DeepSeek-V3", "linears"),
    ("SigLIP", "extract"),
    ("Phimoe", "extract"),
    ("GraniteMoeHybrid", "extract"),
    ("ProphetNet", "extract"),
    ("PaliGemma", "embedding"),
    ("SwitchTransformers", "head"),
]


@pytest.mark.parametrize(("name", "what"), MENDED)
def test_a_cell_that_was_mended(
    name: str, what: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    found = sweep.cell(name, what, folder(name), tmp_path)
    if name == "Gemma-3n":  # rows of embed_tokens_per_layer that PEFT does not save
        assert found.startswith("refused: model.embed_tokens_per_layer.weight: base has 96 rows")
    elif name == "SwitchTransformers":  # scales what goes into its head while that is tied
        assert "ForConditionalGeneration computes differently when they are not tied" in found
    else:
        assert found == "equal"


def test_the_page_counts_its_rows() -> None:
    rows = page_table.read(sweep.PAGE)
    assert list(rows) == list(ALL)
    assert [row[0] for row in rows.values()] == [kind for kind, _ in ALL.values()]
    # The libraries' versions are those that made the page.
    counts = sweep.counted(rows).partition(" With ")[0]
    assert f"\n{counts} With " in sweep.PAGE.read_text(encoding="utf-8")


def test_a_tenth_at_most_is_refused_and_nothing_is_wrong() -> None:
    cells = [
        cell for row in page_table.read(sweep.PAGE).values() for cell in row[1:] if cell != "-"
    ]
    assert not [cell for cell in cells if cell.startswith("wrong")]
    assert sum(cell.startswith("refused") for cell in cells) <= len(cells) / 10
