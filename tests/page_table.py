"""A table of docs/ that a sweep makes, between two marks, with a sentence above it that counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_MARK = "<!-- table -->"


def read(page: Path) -> dict[str, list[str]]:
    """The cells of each row by its first."""
    _, table, _ = page.read_text(encoding="utf-8").split(_MARK)
    rows = [
        [cell.strip() for cell in row.split(" | ")]
        for row in re.findall(r"^\| (?!---)(.*) \|$", table, re.M)
    ]
    return {row[0]: row[1:] for row in rows[1:]}  # the first is the head


def write(page: Path, head: Sequence[str], rows: Mapping[str, Sequence[str]], said: str) -> None:
    """Put these rows into the page, and above them the sentence that begins with their number."""
    before, _, after = page.read_text(encoding="utf-8").split(_MARK)
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in rows.items())]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before = re.sub(r"^\d+ architectures.*$", lambda _: said, before, flags=re.M)
    page.write_text(f"{before}{_MARK}\n{table}\n{_MARK}{after}", encoding="utf-8")
