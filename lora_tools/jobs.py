"""A plan of jobs: what is done for an output piece by piece, as headers alone tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from lora_tools.records import Action, Fate, Input


class Sized(Protocol):
    """A piece of work, as far as it is to be known here."""

    @property
    def label(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Lying:
    """Some bytes of a tensor in a file, all of them or a part."""

    path: str
    tensor: str
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class JobInput:
    """What a job reads of one file: these tensors, or ``nbytes`` of them. Of a GGUF, and of an
    adapter that is not PEFT's, they have transformers' names, or PEFT's."""

    path: str
    tensors: tuple[str, ...]
    nbytes: int

    @classmethod
    def of(cls, path: str, lying: Sequence[Lying]) -> JobInput:
        """All that lies in one file."""
        if len(lying) == 1:
            return cls(path, (lying[0].tensor,), lying[0].nbytes)
        return cls(path, tuple(e.tensor for e in lying), sum(e.nbytes for e in lying))


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One piece of the work, which no other has to wait for.

    Attributes:
        name: of the tensor or module that it is about, as progress and errors call it.
        action, reason: what is done with it.
        inputs: what is read, file by file.
        output: the file that it goes into, in ``--out``.
        tensors: what is written of it; () where that is known only once it is done.
        numbers: that are worked on.
        bytes_read: of all inputs.
        bytes_written: at most.
        peak_memory: that it works in, besides what the program takes.
    """

    name: str
    action: Action
    reason: str
    inputs: tuple[JobInput, ...]
    output: str
    tensors: tuple[str, ...]
    numbers: int
    bytes_read: int
    bytes_written: int
    peak_memory: int


@dataclasses.dataclass(frozen=True, slots=True)
class JobSums:
    """Of all jobs of a plan.

    Attributes:
        bytes_read: what is read by several jobs counts for each.
        bytes_written: at most, of tensors.
        peak_memory: the largest job's.
    """

    jobs: int
    bytes_read: int
    bytes_written: int
    peak_memory: int


@dataclasses.dataclass(frozen=True, slots=True)
class JobPlan:
    """What ``--plan`` writes.

    Attributes:
        command: what artifacts record of the call.
        output: as given.
    """

    verb: str
    version: str
    command: str
    inputs: tuple[Input, ...]
    output: str
    jobs: tuple[Job, ...]
    totals: JobSums


def job(
    work: Sized,
    fate: Fate | None,
    reads: Iterable[Lying],
    output: str,
    tensors: tuple[str, ...],
    numbers: int,
    nbytes: int,
) -> Job:
    """The job that a task is.

    Args:
        fate: what becomes of the tensor, as the plan of fates has it.
        numbers: that are worked on; nbytes: of what is written.
    """
    found: dict[str, list[Lying]] = {}
    read = 0
    for each in reads:
        found.setdefault(each.path, []).append(each)
        read += each.nbytes
    inputs = tuple([JobInput.of(path, mine) for path, mine in found.items()])
    action, reason = (fate.action, fate.reason) if fate is not None else (Action.COPY, "")
    return Job(
        work.label, action, reason, inputs, output, tensors, numbers, read, nbytes, work.nbytes
    )


@dataclasses.dataclass(frozen=True)
class Copying:
    """Something that is copied as it is, and held whole meanwhile."""

    label: str
    nbytes: int
