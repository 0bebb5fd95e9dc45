"""What is said once for a call, and holds for all that is done within it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """The variable has that value within."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
