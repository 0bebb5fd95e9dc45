"""The file that ``--report`` names: refused before the work, and there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_tools.errors import OutputError, UsageError
from lora_tools.formats.output import real, staged
from lora_tools.formats.synced import write_synced
from lora_tools.records import Report


def plain(report: Report[Any]) -> dict[str, Any]:
    """The report as strict JSON: numbers that are not finite become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return value

    result: dict[str, Any] = clean(report.to_dict())
    return result


def check_report_file(file: Path) -> None:
    """Raises UsageError where no report can be written there."""
    target = real(file)
    if target.is_dir():
        raise UsageError(f"--report {file}: is a folder; name a file")
    if not target.parent.is_dir():
        raise UsageError(f"--report {file}: its folder does not exist")
    if target.exists() and not os.access(target, os.W_OK):
        raise UsageError(f"--report {file}: cannot be written")
    if _takes_a_stream(target):
        return
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"--report {file}: cannot be written ({error.strerror})") from None


def write_report(report: Report[Any], file: Path) -> None:
    """Write it; a link is followed, and what was there stays until the new one is complete.

    Raises:
        OutputError: it cannot be written after all.
    """
    target = real(file)
    text = json.dumps(plain(report), indent=2, ensure_ascii=False) + "\n"
    try:
        if (number := _printed_to(target)) is not None:
            with os.fdopen(os.dup(number), "w", encoding="utf-8") as stream:
                stream.write(text)
        elif _takes_a_stream(target):
            _write_stream(target, text)
        else:
            with staged(target, force=True) as staging:
                write_synced(staging / "out", text.encode())
    except OSError as error:
        raise OutputError(f"--report {file}: {error.strerror or error}") from None


def _write_stream(target: Path, text: str) -> None:
    """Raises OSError where it is a pipe that nobody reads: it would wait for ever."""
    number = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(number, True)
    with os.fdopen(number, "w", encoding="utf-8") as stream:
        stream.write(text)


def _takes_a_stream(target: Path) -> bool:
    """Whether a pipe or a terminal is there, in whose place nothing is put, or the file that this
    process prints to."""
    return target.exists() and (not target.is_file() or _printed_to(target) is not None)


def _printed_to(target: Path) -> int | None:
    """The number that a file is open as for what this process prints (``/dev/stdout``)."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # closed, or nothing there
            if os.path.samestat(os.fstat(number), target.stat()):
                return number
    return None
