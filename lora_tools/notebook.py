"""Records as a notebook shows them: small tables of HTML, and pandas' frames."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.printable import printable

if TYPE_CHECKING:
    from pandas import DataFrame

_FEW = 8  # of many values, so many are shown


def table(title: str, rows: Iterable[tuple[str, Any]], notes: Iterable[str] = ()) -> str:
    """A table of two columns under a title, and notes under it; all escaped, on one line each."""
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{_escaped(name)}</th>'
        f'<td style="text-align:left">{_escaped(shown(value))}</td></tr>\n'
        for name, value in rows
    )
    below = "".join(f"<li>{_escaped(note)}</li>\n" for note in notes)
    listed = f"<ul>\n{below}</ul>\n" if below else ""
    head = f'<caption style="text-align:left"><b>{_escaped(title)}</b></caption>'
    return f"<div>\n<table>{head}\n{body}</table>\n{listed}</div>"


def shown(value: Any) -> str:
    """A value in few characters: four digits, the first of many values."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return _few([f"{key}: {shown(each)}" for key, each in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _few([shown(each) for each in value])
    return str(value)


def frame(record: type[Any], rows: Sequence[Any]) -> DataFrame:
    """One row a record, one column a field, and one for each key of a field that is a dict
    (``energy.8``).

    Args:
        record: the class of the rows, whose fields are columns where there is no row, too.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("to_frame() needs pandas; pip install 'loratools[pandas]'") from None
    names = [field.name for field in dataclasses.fields(record)]
    if not rows:
        return pandas.DataFrame(columns=names)
    return pandas.json_normalize([dict(_columns(names, row)) for row in rows])


def _columns(names: Iterable[str], row: Any) -> Iterable[tuple[str, Any]]:
    for name in names:
        value = getattr(row, name)
        yield name, str(value) if isinstance(value, str) else value  # an Action is its word


def _few(texts: Sequence[str]) -> str:
    more = f", … ({len(texts)} in all)" if len(texts) > _FEW else ""
    return ", ".join(texts[:_FEW]) + more


def _escaped(text: str) -> str:
    return html.escape(printable(text))
