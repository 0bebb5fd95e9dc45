"""Tasks that an earlier run has done are not done again.

A task is known again by the digest of its record, of its sources and of what its sink writes
(``canonical``); files are in that by path and stamp. Kept are its result, and where it wrote which
bytes: they are looked at before they are believed. So nothing has to be on the disk for certain
when a task ends, and a run that is killed at any moment loses what was in the making.

Results are pickled, and read back without running anything: but tensors, only records and
enumerations of this package are made.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import enum
import importlib
import io
import pickle
import threading
import time
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from lora_tools.engine.buffers import Buffers
from lora_tools.engine.canonical import Canonical, Unknown, bytes_of, digest_of, is_tensor
from lora_tools.engine.tasks import Task, perform
from lora_tools.within import holding

R = TypeVar("R")
_HOME = "lora_tools."
_one_at_a_time = threading.Lock()


class Store(Protocol):
    """Where entries are kept: ``formats.ledger``."""

    def __len__(self) -> int: ...
    def __contains__(self, key: bytes) -> bool: ...
    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, seconds: float, data: bytes) -> None: ...


@dataclasses.dataclass(frozen=True)
class Shares:
    """The work is shared out among ``count`` processes, of which this is the ``number``-th, from 1
    on; None: the one that needs what all of them have done."""

    count: int
    number: int | None = None


@dataclasses.dataclass
class Account:
    """What tasks do is kept in a store, and is not done where it is there already.

    Attributes:
        versions: of whatever else decides what comes of a task.
        shares: what becomes of the others (``engine.shares``).
        recalled: how many tasks were not done.
    """

    store: Store
    versions: tuple[str, ...]
    shares: Shares | None = None
    recalled: int = 0


_used: contextvars.ContextVar[Account | None] = contextvars.ContextVar("memo", default=None)


def using(account: Account) -> AbstractContextManager[None]:
    """The account that is kept of tasks within."""
    return holding(_used, account)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a task came to: its result, what the sink took of it, and the seconds it took."""

    result: Any
    taken: Any
    seconds: float


def do(task: Task[Any, Any, Any], sources: Any, sink: Any, buffers: Buffers) -> Done:
    """Run a task, keeping account of what it writes."""
    recording = sink.recording() if sink is not None else None
    begun = time.perf_counter()
    result = perform(task, sources, recording, buffers)
    taken = recording.taken() if recording is not None else None
    return Done(result, taken, time.perf_counter() - begun)


class Memo:
    """The tasks of one run of the engine.

    Args:
        jobs: how many are worked on at a time: a second of one is worth so much less.
    """

    def __init__(self, account: Account, sources: Any, sink: Any, jobs: int) -> None:
        self._account, self._sink, self._jobs = account, sink, jobs
        self._canonical = Canonical()
        try:
            self._shared = self._canonical(account.versions, sources, sink)
        except Unknown:
            self._shared = b""

    def key(self, task: Task[Any, Any, Any]) -> bytes:
        """By which a task is known again; empty where it is not."""
        with contextlib.suppress(Unknown):
            return digest_of(self._shared, self._canonical(task)) if self._shared else b""
        return b""

    def recall(self, key: bytes) -> Done | None:
        """What came of the task of that key, if it was done, and what it wrote is there."""
        store = self._account.store
        data = store.get(key) if key and len(store) else None
        done = _loaded(data) if data is not None else None
        if done is None or (self._sink is not None and not self._sink.confirm(done.taken)):
            return None
        with _one_at_a_time:
            self._account.recalled += 1
        return done

    def note(self, key: bytes, done: Done) -> None:
        """Keep what came of a task."""
        with contextlib.suppress(pickle.PicklingError):
            if key:
                data = _dumped(done)
                with _one_at_a_time:
                    self._account.store.put(key, done.seconds / self._jobs, data)


def account() -> Account | None:
    """The one that is kept here."""
    return _used.get()


def of_run(sources: Any, sink: Any, jobs: int) -> Memo | None:
    """For the tasks of a run that begins here; None where nothing is kept."""
    mine = account()
    return None if mine is None else Memo(mine, sources, sink, jobs)


# ------------------------------------------------------------------------------ results as bytes


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        """Of a tensor its dtype, its shape, the order in which its dimensions lie, and its bytes;
        None for all else."""
        if not is_tensor(obj):
            return None
        order = sorted(range(obj.dim()), key=obj.stride, reverse=True)
        if not obj.permute(order).is_contiguous():
            order = list(range(obj.dim()))
        lying = obj.permute(order)
        name = str(obj.dtype).removeprefix("torch.")
        return name, tuple(lying.shape), tuple(order), bytes_of(lying)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        """The tensor."""
        import torch

        name, shape, order, data = pid
        dtype = getattr(torch, name)
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)
        back = sorted(range(len(order)), key=order.__getitem__)
        return flat.view(shape).permute(back)

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for all but records and enumerations of this package."""
        if module.startswith(_HOME) and not module.endswith("__"):
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            if isinstance(found, type) and (
                dataclasses.is_dataclass(found)
                or issubclass(found, enum.Enum)
                or (issubclass(found, tuple) and hasattr(found, "_fields"))
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no record of this package")


def _dumped(done: Done) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(done)
    return file.getvalue()


def _loaded(data: bytes) -> Done | None:
    try:
        done = _Unpickler(io.BytesIO(data)).load()
    except Exception:  # pickle raises nearly anything on what is not its own
        return None
    return done if isinstance(done, Done) else None
