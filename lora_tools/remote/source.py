"""One file that lies elsewhere, read by ranges of its bytes.

A connection may be cut, and an answer may be short: each range is asked for a few times. An answer
says of which object it is (its ETag, or when it was written, and its size): another one than was
found at first is an error.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator

from lora_tools.errors import CheckpointError, first_line

TRIES = 4
wait = 0.5  # seconds after the first try; twice as long after each
_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")


def tries() -> Iterator[int]:
    """The turns of a request that may fail, with pauses between them."""
    for turn in range(TRIES):
        if turn:
            time.sleep(wait * 2 ** (turn - 1))
        yield turn


def total(content_range: str) -> int | None:
    """The size of an object, by an answer's ``Content-Range``; None where that does not say it."""
    match = _RANGE.fullmatch(content_range)
    return int(match[1]) if match is not None else None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was given for a range: its bytes; the object's size and tag, where they are told."""

    data: bytes
    size: int | None = None
    tag: str = ""


class LastingError(Exception):
    """What another try does not mend; it says why, and the next step."""


class Absent(LastingError):
    """Nothing is there, or it may not be seen."""


class NotThere(CheckpointError):
    """What ``Absent`` comes out as."""


class Source:
    """One file.

    Attributes:
        shown: its address, without what is secret.
        size: in bytes; None until the first answer.
        tag: by which the object is known again: its ETag, or else its time and size.
        tells: whether answers say of which object they are; else ``check`` does, afterwards.
    """

    tells = True

    def __init__(self, shown: str, size: int | None, tag: str) -> None:
        self.shown, self.size, self.tag = shown, size, tag

    def ask(self, begin: int, end: int) -> Answer:
        """Its bytes [begin, end), as far as it has them, by one request.

        Raises:
            LastingError: they cannot be had.
            Exception: they could not be had this time.
        """
        raise NotImplementedError

    def now(self) -> str:
        """The tag as it is now, by another request."""
        raise NotImplementedError

    def read(self, begin: int, end: int) -> bytes:
        """Its bytes [begin, end), as far as it has them.

        Raises:
            CheckpointError: they cannot be had, or are another object's by now.
        """
        said = ""
        for _ in tries():
            try:
                answer = self.ask(begin, end)
            except Absent as error:
                raise NotThere(f"{self.shown}: {error}") from None
            except LastingError as error:
                raise CheckpointError(f"{self.shown}: {error}") from None
            except Exception as error:  # of whichever library asks
                said = first_line(error)
                continue
            self._check(answer)
            wanted = (end if self.size is None else min(end, self.size)) - begin
            if len(answer.data) == wanted:
                return answer.data
            said = f"{len(answer.data):,} bytes came of {wanted:,}"
        raise CheckpointError(
            f"{self.shown}: bytes {begin:,} to {end:,} could not be read in {TRIES} tries "
            f"({said}); run the command again when the connection is better"
        )

    def _check(self, answer: Answer) -> None:
        """Raises CheckpointError where an answer is of another object than the first."""
        if self.size is None:
            self.size, self.tag = answer.size, self.tag or answer.tag
        if answer.size not in (None, self.size) or (answer.tag and answer.tag != self.tag):
            raise self._changed()

    def pin(self) -> None:
        """Have the object be the one that is there now, before any of it is read. For those whose
        answers do not tell, and which may have been found by other words."""

    def check(self) -> None:
        """Raises CheckpointError where it is another object by now. For those whose answers do not
        tell."""
        try:
            now = self.now()
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.shown}: was deleted since it was opened; put it back, and run the command "
                "again"
            ) from None
        if now != self.tag:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.shown}: changed since it was opened; run the command again when nothing writes "
            "to it"
        )
