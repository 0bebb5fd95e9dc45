"""The tree of errors. Every one of them is a sentence for a person, never a traceback.

::

    LoraToolsError                     exit code 1
    ├── UsageError (ValueError)        exit code 2   the call itself makes no sense
    │   └── NotInstalled (ImportError)               a package that an extra brings is missing
    ├── CheckpointError                              a checkpoint cannot be read as one
    │   ├── TensorNotFound (KeyError)
    │   └── UnsafeInput                              a pickle, a path that leaves its folder
    ├── AdapterError                                 an adapter cannot be read as one
    │   └── UnsupportedAdapter                       it is one, and cannot be merged soundly
    ├── MismatchError                                two inputs do not belong together
    ├── NonFiniteError                               an inf or a NaN, in or out
    ├── OutputError (OSError)                        the destination cannot be written
    ├── ClusterError                                 a cluster is not there, or its workers die
    ├── FileError (OSError)                          the system refuses a file, or runs out of them
    └── QualityGateError               exit code 3   compared, and found different
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from lora_tools.records import Report


class LoraToolsError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: what the command line returns.
        tensor: which one was worked on, if it was one.
    """

    exit_code = 1
    tensor: str | None = None

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class UsageError(LoraToolsError, ValueError):
    """Arguments that contradict each other or name nothing."""

    exit_code = 2


class NotInstalled(UsageError, ImportError):
    """A package that only some of the work takes is missing; the message names its extra."""


def need(what: str, extra: str, *modules: str) -> None:
    """Raises NotInstalled where a module of an extra, which ``what`` takes, is missing. None is
    imported: an import that a signal interrupts is no proof of absence."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalled(f"{what} needs {', '.join(missing)}; pip install 'loratools[{extra}]'")


NO_TRANSFORMERS = "transformers is not installed (pip install 'loratools[stats]')"


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


class ClusterError(LoraToolsError):
    """The cluster that was to do the work is not there, not fit for it, or lost."""


def reason(error: OSError) -> str:
    """What the system said, and where there is one the next step."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EMFILE:
        said += "; raise the limit on open files (ulimit -n)"
    return said


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line; of one that says nothing, its kind."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class FileError(LoraToolsError, OSError):
    """The system refused something; ``errno`` and ``filename`` are as it said them."""

    @classmethod
    def of(cls, error: OSError) -> FileError:
        """The same, with the file's name in front and the next step."""
        name = error.filename
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        named = f"{name}: " if isinstance(name, str) else ""
        made = cls(named + reason(error))
        made.errno, made.filename = error.errno, error.filename
        return made


@contextlib.contextmanager
def errors_of_the_tree() -> Iterator[None]:
    """Within it an OSError that is none of the tree's becomes a FileError. A pipe that nobody reads
    any more is no fault of a file, and stays."""
    try:
        yield
    except (LoraToolsError, BrokenPipeError):
        raise
    except OSError as error:
        raise FileError.of(error) from error


def next_step(message: str) -> str | None:
    """What a message says behind its last semicolon, or what it asks: what can be done, or what was
    meant."""
    if "; " in message:
        return message.rpartition("; ")[2]
    _, asks, meant = message.partition("Did you mean ")
    return asks + meant if asks else None


@contextlib.contextmanager
def named(tensor: str) -> Iterator[None]:
    """Errors within it are of that tensor."""
    try:
        yield
    except LoraToolsError as error:
        error.tensor = error.tensor or tensor
        raise


class QualityGateError(LoraToolsError):
    """The measured error exceeds what the caller allows. ``report`` holds the figures."""

    exit_code = 3

    def __init__(self, message: str, report: Report[Any] | None = None) -> None:
        super().__init__(message)
        self.report = report
