"""How much the hub has sent, said as a verb says its progress. huggingface_hub draws bars of its
own, for which a pipe, ``--quiet`` and a line that has a bar already have no place."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from lora_tools.records import Progress, ProgressCallback
from lora_tools.within import holding

_told: contextvars.ContextVar[ProgressCallback | None] = contextvars.ContextVar("told")


def telling(progress: ProgressCallback | None) -> AbstractContextManager[None]:
    """What is fetched within is told there."""
    return holding(_told, progress)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """huggingface_hub's own are not drawn within."""
    utils = _utils()
    if utils.are_progress_bars_disabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variable of the user's wants them always
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def bar_of(repository: str) -> type[Any]:
    """A class of bars for ``snapshot_download``: nothing is drawn, bytes are told."""
    told, most = _told.get(None), [0]

    class Bar(_utils().tqdm):  # type: ignore[misc]  # it has no types
        def __init__(self, *args: Any, **keywords: Any) -> None:
            self._bytes = keywords.get("unit") == "B"
            super().__init__(*args, **{**keywords, "disable": True})

        def update(self, n: float | None = 1) -> None:
            """tqdm's: so many more. Those that came and those that are written are counted by two
            bars, of which the fuller one is shown."""
            self.n += n or 0
            if told is not None and self._bytes and self.total and self.n > most[0]:
                most[0] = int(self.n)
                told(Progress(most[0], int(self.total), f"fetch {repository}"))

    return Bar


def _utils() -> Any:
    """Of huggingface_hub, whose functions for bars are documented and not typed."""
    import huggingface_hub.utils

    return huggingface_hub.utils
