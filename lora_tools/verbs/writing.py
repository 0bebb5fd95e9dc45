"""What a verb has prepared is made: beside its place, by this process, by a cluster, or by several
processes that each do a share; and put there once it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.engine import memo
from lora_tools.engine.shares import ShareDone
from lora_tools.engine.threads import elsewhere
from lora_tools.errors import LoraToolsError, UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats import model_card, shared_staging
from lora_tools.formats.ledger import Ledger
from lora_tools.formats.leftover import Way, reusable
from lora_tools.formats.output import (
    Prepared,
    check_destination,
    check_space,
    failed,
    name_instead,
    staged,
)
from lora_tools.formats.pipeline_output import write_whole
from lora_tools.formats.shared_staging import Job
from lora_tools.formats.synced import write_synced
from lora_tools.options import Running, Writing
from lora_tools.options.tables import part
from lora_tools.provenance import tool_version, version_of
from lora_tools.records import Report
from lora_tools.verbs.card import card_of
from lora_tools.verbs.row import Verb
from lora_tools.within import holding

if TYPE_CHECKING:
    from lora_tools.engine.dask import Cluster


def write(
    row: Verb, asked: Mapping[str, Any], prepared: Prepared, out_: str, command: str, nbytes: int
) -> Report[Any]:
    """Make it, or a share of it.

    Args:
        out_: the output as given.
        command: what artifacts record of the call.
        nbytes: the room that it takes.
    """
    out, writing, running = Path(out_), asked.get("writing", Writing()), asked["running"]
    made = [out / name for name in prepared.added] or [out]
    made += [out.with_name(out.name + suffix) for suffix in prepared.beside]
    way, number, count = _way_of(writing)
    for path in made:
        check_destination(path, writing.force, way)
    check_space(out, nbytes, reusable(made[0]) if way not in ("refuse", "clean") else 0)
    with _engine(running) as engine:
        work = _Work(prepared, made[0], running, engine)
        if number is not None:
            return work.do_share(number, work.job(command, count))
        shares = None
        if way == "finish":
            shares = memo.Shares(shared_staging.check(made[0], work.job(command, None)))
        with work.staged(writing.force, way, shares) as (folder, account):
            report = write_whole(prepared, folder)
            if folder.is_dir():
                _put_card(row, asked, prepared, report, folder)
    if account.recalled and way == "resume":
        said = f"{account.recalled} tasks were already done and not repeated (--resume)"
        report = dataclasses.replace(report, notes=(*report.notes, said))
    for suffix in prepared.dropped if writing.force else ():
        out.with_name(out.name + suffix).unlink(missing_ok=True)
    return report


def _way_of(writing: Writing) -> tuple[Way, int | None, int | None]:
    """What becomes of what runs before this one have left, and which share of how many this is.
    Raises UsageError."""
    given: dict[Way, bool] = {
        "clean": writing.clean,
        "resume": writing.resume,
        "share": writing.shard is not None,
        "finish": writing.finish,
    }
    ways = [way for way, is_given in given.items() if is_given]
    if len(ways) > 1:
        raise UsageError(
            "--resume continues an interrupted run, --clean deletes it, --shard does one share "
            "and --finish writes --out from all shares; give only one of them"
        )
    number, count = part(writing.shard) if writing.shard is not None else (None, None)
    return ways[0] if ways else "refuse", number, count


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is made at a destination, and how the work on it is done."""

    prepared: Prepared
    destination: Path
    running: Running
    engine: Cluster | None

    def job(self, command: str, count: int | None) -> Job:
        """What all processes must have in common that share it."""
        return shared_staging.job_of(command, self._versions(), self.prepared.inputs, count)

    @contextlib.contextmanager
    def staged(
        self, force: bool, way: Way, shares: memo.Shares | None
    ) -> Iterator[tuple[Path, memo.Account]]:
        """Where all of it is made, and what account is kept of that."""
        going_on = way in ("resume", "finish")
        with (
            staged(self.destination, force=force, going_on=going_on) as staging,
            contextlib.closing(Ledger(staging)) as ledger,
            memo.using(account := memo.Account(ledger, self._versions(), shares)),
        ):
            self._check_sees(staging)
            yield staging / "out", account

    def do_share(self, number: int, job: Job) -> Report[Any]:
        """Do a share of the tasks; the report is that of the plan.

        Raises:
            OutputError: an error of the system.
        """
        assert job.count is not None
        shares = memo.Shares(job.count, number)
        said = "all work is done; run --finish to write --out"
        hidden = shared_staging.place(self.destination)
        try:
            with (
                shared_staging.joined(self.destination, number, job) as (staging, own, name),
                contextlib.closing(Ledger(staging, name)) as ledger,
                memo.using(memo.Account(ledger, self._versions(), shares)),
            ):
                self._check_sees(staging)
                write_whole(self.prepared, own / "out")
        except ShareDone as done:
            said = (
                f"shard {number} of {job.count}: {done.done} of {done.total} tasks are done in "
                "all; when the other shards are done, run --finish"
            )
        except UsageError:  # one that names the folder means it
            raise
        except LoraToolsError as error:
            name_instead(error, hidden, self.destination)
            raise
        except OSError as error:
            raise failed(error, hidden, self.destination) from error
        plan = self.prepared.report
        return dataclasses.replace(plan, notes=(*plan.notes, said))

    def _versions(self) -> tuple[str, ...]:
        """Whatever else than a task, its sources and its sink decides what comes of it."""
        return (*_versions(), self.running.digest)

    def _check_sees(self, staging: Path) -> None:
        if self.engine is not None:
            self.engine.check_sees([*self.prepared.inputs, staging])


def _versions() -> tuple[str, str]:
    """Of what does the work: loratools and torch."""
    return tool_version(), version_of("torch")


@contextlib.contextmanager
def _engine(running: Running) -> Iterator[Cluster | None]:
    """The cluster that does the work within; None where that is done here."""
    if running.engine == "threads":
        if running.workers is not None:
            raise UsageError(f"--workers {running.workers}: needs --engine dask; see --jobs")
        yield None
        return
    from lora_tools.engine import remote
    from lora_tools.engine.dask import cluster

    setting = remote.Setting(hashing.used, hashing.using)
    with (
        cluster(running.engine, running.workers, _versions(), setting) as found,
        holding(elsewhere, found),
    ):
        yield found


def _put_card(
    row: Verb, asked: Mapping[str, Any], prepared: Prepared, report: Report[Any], folder: Path
) -> None:
    """Put the result's own card into its folder. What was copied from the input speaks of that, and
    is the right one only where that comes back."""
    place = folder / model_card.NAME
    if "no_card" not in row.by_name:
        if prepared.card is not None:
            place.unlink(missing_ok=True)
            write_synced(place, prepared.card)
        return
    place.unlink(missing_ok=True)
    if not asked["writing"].no_card:
        write_synced(place, card_of(row, asked, report, folder, prepared))
