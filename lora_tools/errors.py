"""The tree of errors. Every one of them is a sentence for a person, never a traceback.

::

    LoraToolsError                     exit code 1
    ├── UsageError (ValueError)        exit code 2   the call itself makes no sense
    ├── CheckpointError                              a checkpoint cannot be read as one
    │   ├── TensorNotFound (KeyError)
    │   └── UnsafeInput                              a pickle, a path that leaves its folder
    ├── AdapterError                                 an adapter cannot be read as one
    │   └── UnsupportedAdapter                       it is one, and cannot be merged soundly
    ├── MismatchError                                two inputs do not belong together
    ├── NonFiniteError                               an inf or a NaN, in or out
    ├── OutputError (OSError)                        the destination cannot be written
    └── QualityGateError               exit code 3   compared, and found different
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from lora_tools.records import Report


class LoraToolsError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class UsageError(LoraToolsError, ValueError):
    """Arguments that contradict each other or name nothing."""

    exit_code = 2


class CheckpointError(LoraToolsError):
    """A checkpoint is absent, truncated, or says something untrue of itself."""


class TensorNotFound(CheckpointError, KeyError):
    """A tensor was asked for that the checkpoint does not hold."""


class UnsafeInput(CheckpointError):
    """Reading this would run code or leave the checkpoint's folder."""


class AdapterError(LoraToolsError):
    """An adapter is absent, incomplete, or says something untrue of itself."""


class UnsupportedAdapter(AdapterError):
    """The adapter is understood, and what it asks cannot be done soundly."""


class MismatchError(LoraToolsError):
    """Two inputs do not belong together: shapes, names or hashes differ."""


class NonFiniteError(LoraToolsError):
    """An inf or a NaN in an input, or produced by the arithmetic."""


class OutputError(LoraToolsError, OSError):
    """The destination exists, is the input itself, or has no room."""


class QualityGateError(LoraToolsError):
    """The measured error exceeds what the caller allows. ``report`` holds the figures."""

    exit_code = 3

    def __init__(self, message: str, report: Report[Any] | None = None) -> None:
        super().__init__(message)
        self.report = report
