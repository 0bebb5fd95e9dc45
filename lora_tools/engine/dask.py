"""Runs independent tasks on a Dask cluster (https://distributed.dask.org): processes of this
machine, or of others that see the same files by the same paths.

Workers open inputs by path and write into the output's own files; results, and what was written,
come back to the owner, who alone completes the files. A worker that dies has its tasks done by
another: they write the same bytes into the same places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import tempfile
import types
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.engine import memo, remote
from lora_tools.engine.tasks import K, R, S, Task
from lora_tools.engine.threads import default_jobs
from lora_tools.errors import ClusterError, UsageError, first_line, need
from lora_tools.records import Progress, ProgressCallback
from lora_tools.watch.places import said_of

if TYPE_CHECKING:
    from distributed import Client, Future

_ADDRESS = "DASK_SCHEDULER_ADDRESS"
_PATIENCE = 20  # seconds until a cluster has answered, and has a worker
_AHEAD = 2  # batches for each thread of the cluster that wait at the workers
_TOGETHER, _TOGETHER_BYTES = 64, 128 << 20  # tasks of a batch, at most, and what they work in
# Where a worker is at, a hundred times a second, holds up the work and is of use to no one here.
_QUIET = {"distributed.worker.profile.enabled": False}
# As the command line has it in its own process; Dask itself has freed memory given back at once.
_ENVIRON = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def address_of(engine: str) -> str:
    """Of the scheduler that ``dask://HOST:PORT``, or the environment, names; "" for a cluster of
    this machine."""
    place = engine.partition("://")[2] or os.environ.get(_ADDRESS, "")
    return place if not place or "://" in place else f"tcp://{place}"


@contextlib.contextmanager
def cluster(
    engine: str, workers: int | None, versions: Sequence[str], setting: remote.Setting
) -> Iterator[Cluster]:
    """A cluster that answers, while it is needed.

    Args:
        engine: ``dask``, or ``dask://`` and where its scheduler is.
        workers: processes, where it is started here.
        versions: that workers must have, of loratools and torch.

    Raises:
        NotInstalled: Dask is not there.
        UsageError: ``workers`` goes with a cluster that has its own.
        ClusterError: none answers, or it has no workers, or others than these.
    """
    need("--engine dask", "dask", "distributed")
    import distributed

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is raised
    place = address_of(engine)
    if place and workers is not None:
        raise UsageError(f"--workers {workers}: {place} has its own workers; leave --workers out")
    with contextlib.ExitStack() as stack:
        if not place:
            place = stack.enter_context(_local(workers or default_jobs()))
        try:
            client = stack.enter_context(distributed.Client(place, timeout=_PATIENCE))
            client.wait_for_workers(1, timeout=_PATIENCE)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"{place}: no Dask cluster with workers answers there ({first_line(error)}); start "
                "a scheduler and workers, or leave the address out"
            ) from None
        found = Cluster(client, setting)
        found.check(versions)
        yield found


@contextlib.contextmanager
def _local(workers: int) -> Iterator[str]:
    """The address of a cluster of this machine."""
    import dask
    import distributed

    with (
        tempfile.TemporaryDirectory(prefix="loratools-dask-", ignore_cleanup_errors=True) as own,
        dask.config.set(
            {**_QUIET, "distributed.nanny.pre-spawn-environ": _ENVIRON, "temporary-directory": own}
        ),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as here,
    ):
        yield here.scheduler_address


class Cluster:
    """The engine: ``run`` is ``threads.run`` on its workers."""

    def __init__(self, client: Client, setting: remote.Setting) -> None:
        self._client, self._setting = client, setting

    def check(self, versions: Sequence[str]) -> None:
        """Raises ClusterError where a worker has not these versions."""
        for worker, found in self._ask(_versions).items():
            if found != list(versions):
                have, need = (", ".join(map(str, each)) for each in (found, versions))
                raise ClusterError(
                    f"the worker {worker} has loratools and torch in {have}, but needs {need}; "
                    "install the same versions there"
                )

    def check_sees(self, paths: Sequence[Path]) -> None:
        """Raises ClusterError where a worker does not see one of these files and folders."""
        for worker, missing in self._ask(
            _missing, [str(path.absolute()) for path in paths]
        ).items():
            if missing:
                where = "inputs and output must lie where all machines find them by the same paths"
                if (said := said_of(Path(missing[0]))) != missing[0]:
                    where = (
                        "its small files and headers are in the folder for temporary files here; "
                        "set TMPDIR to a folder that all machines find by the same path"
                    )
                raise ClusterError(f"the worker {worker} does not see {said}; {where}")

    def _ask(self, question: types.FunctionType | Any, *args: Any) -> dict[str, Any]:
        # A worker need not have this package: the function is sent whole, as one of __main__ is.
        sent = types.FunctionType(question.__code__, {"__name__": "__main__"}, question.__name__)
        sent.__module__ = "__main__"
        found: dict[str, Any] = self._client.run(sent, *args)
        return found

    def run(
        self,
        tasks: Sequence[Task[S, K, R]],
        sources: S,
        sink: K,
        *,
        jobs: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[R]:
        """Yield the result of every task, in their order. Raises ClusterError where workers die of
        one."""
        if not tasks:
            return
        threads = max(sum(self._client.nthreads().values()), 1)
        kept = memo.of_run(sources, sink, threads)
        shared = self._client.submit(
            bytes, remote.pack(sources, sink, self._setting), pure=False, key=None
        )
        total = sum(max(task.nbytes, 1) for task in tasks)
        done, step, window = 0, 0, (1 + _AHEAD) * threads
        pending: deque[_Batch] = deque()

        def submit(batch: Sequence[Task[S, K, R]]) -> _Batch:
            keys = [kept.key(task) if kept is not None else b"" for task in batch]
            found = [kept.recall(key) if kept is not None else None for key in keys]
            lacking = [t for t, known in zip(batch, found, strict=True) if known is None]
            future = None
            if lacking:
                sent = [pickle.dumps(task) for task in lacking]
                future = self._client.submit(remote.do, shared, sent, pure=False)
            return _Batch(batch, keys, found, future)

        queue = _batches(tasks, threads)
        try:
            while True:
                while len(pending) < window and (more := next(queue, None)) is not None:
                    pending.append(submit(more))
                if not pending:
                    return
                batch = pending.popleft()
                made = iter(batch.made())
                for task, key, known in zip(batch.tasks, batch.keys, batch.found, strict=True):
                    each = known
                    if each is None:
                        each = next(made)
                        if sink is not None:
                            sink.take(each.taken)  # type: ignore[attr-defined]
                        if kept is not None:
                            kept.note(key, each)
                    done, step = done + max(task.nbytes, 1), step + 1
                    if progress is not None:
                        progress(Progress(done, total, task.label, step, len(tasks)))
                    yield each.result
        finally:
            self._client.cancel([b.future for b in pending if b.future is not None])


def _batches(tasks: Sequence[Task[S, K, R]], threads: int) -> Iterator[Sequence[Task[S, K, R]]]:
    """What is sent at a time: small tasks together, since sending costs milliseconds, and yet so
    few that all have work to the end."""
    shares = 8 * threads
    most = min(_TOGETHER, max(len(tasks) // shares, 1))
    bound = min(_TOGETHER_BYTES, sum(task.nbytes for task in tasks) // shares)
    batch: list[Task[S, K, R]] = []
    held = 0
    for task in tasks:
        if batch and (len(batch) == most or held + task.nbytes > bound):
            yield batch
            batch, held = [], 0
        batch.append(task)
        held += task.nbytes
    yield batch


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Tasks that are sent at a time, their keys, what was found done of them, and the others on
    their way."""

    tasks: Sequence[Task[Any, Any, Any]]
    keys: Sequence[bytes]
    found: Sequence[memo.Done | None]
    future: Future | None

    def made(self) -> list[memo.Done]:
        """What those that were sent came to. Raises ClusterError, and what they raise."""
        if self.future is None:
            return []
        from distributed import CancelledError, KilledWorker

        try:
            made: list[memo.Done] = pickle.loads(self.future.result())
        except (KilledWorker, CancelledError, TimeoutError) as error:
            pairs = zip(self.tasks, self.found, strict=True)
            first, *others = [task.label for task, known in pairs if known is None]
            raise ClusterError(
                f"{first}{(f' to {others[-1]}' if others else '')}: the workers that it was sent "
                f"to died or are gone ({first_line(error):.200}); give each worker more memory, or "
                "run fewer of them on a machine"
            ) from None
        self.future.release()
        return made


def _versions() -> list[str]:
    """Runs on a worker, which may have nothing of this package."""
    from importlib import metadata

    there = {(each.metadata["Name"] or "").lower(): each for each in metadata.distributions()}
    return [there[name].version if name in there else "none" for name in ("loratools", "torch")]


def _missing(paths: list[str]) -> list[str]:
    """Runs on a worker."""
    import os

    return [path for path in paths if not os.path.exists(path)]  # noqa: PTH110
