"""Texts from files, shown to people: a name out of a header must not steer a terminal, add a line
to a log or turn the order of letters round."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional ones, too), surrogate, private use and unassigned characters; and
# what ends a line or a paragraph.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with what cannot be seen in it written as Python escapes it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(char) for char in text)


def shortened(text: str, width: int, head: int) -> str:
    """A text in ``width`` letters, without its middle: ``head`` of them are its beginning, the
    others its end, which is what tells names apart."""
    if len(text) <= width:
        return text
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _escaped(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return char.encode("unicode_escape").decode("ascii")
