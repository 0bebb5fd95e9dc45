"""Runs independent tasks on threads.

torch runs one thread per operation here and Python threads run the tasks: small operations on
several OpenMP threads cost tens of times their work on a busy machine, and torch releases the
interpreter lock while it computes.
"""

from __future__ import annotations

import contextlib
import contextvars
import heapq
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.engine import memo
from lora_tools.engine.buffers import Buffers
from lora_tools.engine.machine import free_memory, processors
from lora_tools.engine.shares import ShareDone, share_of
from lora_tools.engine.tasks import K, R, S, Task, perform
from lora_tools.errors import UsageError, named
from lora_tools.records import Progress, ProgressCallback

if TYPE_CHECKING:
    import torch

# Another engine that runs what is to be run within; ``engine.dask`` has one.
elsewhere: contextvars.ContextVar[Any] = contextvars.ContextVar("elsewhere", default=None)
# Memory besides that of the tensors in work, as measured, at most: torch and what else is imported,
# and for each thread the rows that it works on.
PROGRAM, THREAD = 500_000_000, 20_000_000
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")


class Interrupted(Exception):
    """Raised in workers once the run was given up."""


def default_jobs() -> int:
    """The processors there are for this process, eight at most: more only fight over memory."""
    return min(processors(), 8)


def _count(jobs: int | None) -> int:
    """Of threads. Raises UsageError below 1."""
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least 1 is needed")
    return jobs


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch at one thread per operation within, as it was before without."""
    with torch_threads(1):
        yield


@contextlib.contextmanager
def torch_threads(jobs: int | None) -> Iterator[None]:
    """torch at that many threads per operation within, by default the processors at hand. Raises
    UsageError below 1."""
    import torch

    before, count = torch.get_num_threads(), _count(jobs)
    torch.set_num_threads(count)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


class _MemoryGate:
    """Admits tasks while the bytes in flight stay within a budget; one always passes."""

    def __init__(self, budget: int) -> None:
        self._budget, self._used = budget, 0
        self._changed = threading.Condition()
        self.closed = False

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            while self._used and self._used + nbytes > self._budget and not self.closed:
                self._changed.wait()
            if self.closed:
                raise Interrupted
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def most_at_once(sizes: Sequence[int], jobs: int | None) -> int:
    """The working memory that tasks of these sizes take at a time, at most: on as many threads as
    there are where a quarter of the free memory is enough for that, else that of the largest one
    and a quarter of it. Raises UsageError below one job."""
    largest = heapq.nlargest(_count(jobs), sizes)
    least = min(int(1.25 * max(largest, default=0)), sum(sizes))
    return max(least, min(sum(largest), free_memory() // 4))


def run(
    tasks: Sequence[Task[S, K, R]],
    sources: S,
    sink: K,
    *,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[R]:
    """Yield the result of every task, in their order.

    Args:
        sources, sink: what the tasks share, see ``engine.tasks``.
        jobs: threads; by default the processors at hand.

    Memory follows the largest tensors, one for each thread, or one alone where memory is short
    (``most_at_once``). An exception in one, or a caller that stops iterating, ends the rest. Where
    another engine is chosen (``elsewhere``), that does the work; where it is shared out, a share is
    done (``shares``). What an earlier run has done is not done again (``memo``).
    """
    other = elsewhere.get()
    work = _run if other is None else other.run
    share = share_of(tasks, sources, sink)
    mine = tasks if share is None else [tasks[i] for i in share]
    done: Iterator[R] = work(mine, sources, sink, jobs=jobs, progress=progress)
    if share is None:
        yield from done
        return
    for _ in done:
        pass
    raise ShareDone(len(mine), len(tasks))


def _run(
    tasks: Sequence[Task[S, K, R]],
    sources: S,
    sink: K,
    *,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Iterator[R]:
    """The same, all of them, and here."""
    jobs = _count(jobs)
    sizes = [max(task.nbytes, 1) for task in tasks]
    total, done, step = sum(sizes), 0, 0
    gate, buffers = _MemoryGate(most_at_once(sizes, jobs)), Buffers()
    kept = memo.of_run(sources, sink, jobs)

    def submit(task: Task[S, K, R], size: int) -> Future[R]:
        # A thread takes over what is said for the call, such as the kind of its digests.
        return pool.submit(contextvars.copy_context().run, work, task, size)

    def work(task: Task[S, K, R], size: int) -> R:
        with gate.hold(size), one_torch_thread_here(), named(task.label):
            if kept is None:
                return perform(task, sources, sink, buffers)
            key = kept.key(task)
            if (done := kept.recall(key)) is None:
                done = memo.do(task, sources, sink, buffers)
                kept.note(key, done)
            result: R = done.result
            return result

    with one_torch_thread():
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="loratools")
        pending: deque[Future[R]] = deque()
        queue = iter(zip(tasks, sizes, strict=True))
        finished = iter(zip(tasks, sizes, strict=True))
        try:
            # A few tasks ahead keep every thread busy without holding many results.
            for task, size in queue:
                pending.append(submit(task, size))
                if len(pending) > 2 * jobs:
                    break
            while pending:
                result = pending.popleft().result()
                for task, size in queue:
                    pending.append(submit(task, size))
                    break
                task, size = next(finished)
                done, step = done + size, step + 1
                if progress is not None:
                    progress(Progress(done, total, task.label, step, len(tasks)))
                yield result
        finally:
            gate.close()
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def one_torch_thread_here() -> Iterator[None]:
    """The same for a worker thread: torch keeps the number of threads and the grad mode apart."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    with torch.no_grad():
        yield


def pick_device(name: str) -> str:
    """``cpu`` or a usable accelerator such as ``cuda`` or ``cuda:1``. Raises UsageError."""
    if name == "cpu":
        return name
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        import difflib

        reason = str(error).splitlines()[0]
        kind = name.partition(":")[0]
        close = [] if kind in _DEVICES else difflib.get_close_matches(kind, _DEVICES, 1)
        hint = f"try --device {[*close, 'cpu'][0]}"
        raise UsageError(f"--device {name}: not usable here ({reason}); {hint}") from None
    return name


def half_products(device: str) -> torch.dtype | None:
    """bfloat16 where the device multiplies it in hardware, several times faster than float32."""
    import torch

    if device == "cpu":
        return torch.bfloat16 if _CPU_BFLOAT16 & _cpu_flags() else None
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return None


_CPU_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})


def _cpu_flags() -> set[str]:
    """The processor's features as Linux names them; empty where they cannot be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
