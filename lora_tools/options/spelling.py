"""Errors in the words of whoever called: options for the command line, parameters for Python.

A text is written once, with options as the command line spells them, which no other word looks like
(``--rest save``). For a caller from Python each becomes the parameter that it is (``rest="save"``);
commands to be typed into a shell stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_tools.errors import LoraToolsError, errors_of_the_tree
from lora_tools.options import RECORDS
from lora_tools.options.fields import KEY, Option

_COMMAND = re.compile(r"(\bloratools [^`;]*)")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z_-]*)(?: ([\w.-]*\w))?")


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """What a flag is in Python: a parameter, and its value where the flag alone says that."""

    name: str
    value: bool | None
    kinds: tuple[Any, ...]
    option: Option

    def named(self, word: str) -> str:
        """With the word that follows the flag, as its value where it is one."""
        after = f" {word}" if word else ""
        if self.value is not None:
            return f"{self.name}={self.value}{after}"
        return f'{self.name}="{word}"' if word in self._choices() else self.name + after

    def _choices(self) -> tuple[Any, ...]:
        if self.option.choices is not None:
            return tuple(self.option.choices())
        return next((get_args(kind) for kind in self.kinds if get_origin(kind) is Literal), ())


def _parameters(record: type[Any]) -> Iterator[tuple[str, _Parameter]]:
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        option: Option | None = field.metadata.get(KEY)
        if option is None:
            continue
        kinds = (hints[field.name], *get_args(hints[field.name]))
        for flag in option.flags or ("--" + field.name.replace("_", "-"),):
            on, _, off = flag.partition("/")
            yield on, _Parameter(field.name, True if bool in kinds else None, kinds, option)
            if off:
                yield off, _Parameter(field.name, False, kinds, option)


@functools.cache
def _flags() -> Mapping[str, _Parameter]:
    out = _Parameter("out", None, (), Option("", ""))  # a positional argument of the functions
    return {"--out": out, **dict(each for record in RECORDS for each in _parameters(record))}


def for_python(text: str) -> str:
    """The text with parameters in the place of options."""

    def spelled(match: re.Match[str]) -> str:
        known = _flags().get(match[1])
        return match[0] if known is None else known.named(match[2] or "")

    parts = _COMMAND.split(text)  # every second one is a command
    parts[::2] = [_OPTION.sub(spelled, part) for part in parts[::2]]
    return "".join(parts)


@contextlib.contextmanager
def errors_for_python() -> Iterator[None]:
    """Errors that leave it are of the tree, and name parameters."""
    try:
        with errors_of_the_tree():
            yield
    except LoraToolsError as error:
        error.args = (for_python(str(error)), *error.args[1:])
        raise
