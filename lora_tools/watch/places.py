"""Paths here that stand for what lies elsewhere, and is known by its address."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import PurePath

from lora_tools.within import holding

_said: ContextVar[Callable[[str], str]] = ContextVar("said", default=str)


def saying(said: Callable[[str], str]) -> AbstractContextManager[None]:
    """Within, ``said`` puts addresses into a text where paths are that stand for them."""
    return holding(_said, said)


def said_of(path: PurePath) -> str:
    """A path as it is known elsewhere: by the address that it stands for, or as it is."""
    return _said.get()(str(path))
