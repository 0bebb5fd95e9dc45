"""Paths here that stand for what lies elsewhere or in memory, and is known by its address."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path, PurePath

from lora_tools.within import holding

MEMORY = "memory:"  # begins the address of what lies in no file

_said: ContextVar[Callable[[str], str]] = ContextVar("said", default=str)
_files: ContextVar[Mapping[Path, str]] = ContextVar("files", default={})  # noqa: B039


def saying(said: Callable[[str], str]) -> AbstractContextManager[None]:
    """Within, ``said`` puts addresses into a text where paths are that stand for them."""
    return holding(_said, said)


def said_of(path: PurePath) -> str:
    """A path as it is known elsewhere: by the address that it stands for, or as it is."""
    return _said.get()(str(path))


def standing_for(addresses: Mapping[Path, str]) -> AbstractContextManager[None]:
    """Within, files stand for what is known by those addresses."""
    return holding(_files, addresses)


def files() -> Mapping[Path, str]:
    """Those files, with their addresses."""
    return _files.get()
