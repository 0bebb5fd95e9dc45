"""One run's tasks shared out among processes that know nothing of one another but a ledger.

Each does those of one stretch of the run, and stops; what it did is kept. Once all is there, a run
that recalls it all goes on to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_tools.engine import memo
from lora_tools.engine.tasks import Task
from lora_tools.errors import UsageError

_NAMED = 8  # shards


class ShareDone(Exception):
    """A share of the tasks is done, and there is nothing to go on with before the others are.

    Attributes:
        done, total: how many, of how many.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done} of {total}")
        self.done, self.total = done, total


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Whose each task is, from 1 on: stretches that follow upon each other, so that each process
    reads and writes few files, and of about the same size."""
    total, before, found = sum(sizes), 0, []
    for size in sizes:
        found.append((2 * before + size) * count // (2 * total) + 1)
        before += size
    return found


def share_of(tasks: Sequence[Task[Any, Any, Any]], sources: Any, sink: Any) -> list[int] | None:
    """The numbers of those tasks that are this process's share; None where all are to be done.

    Raises:
        UsageError: all must be there, and some are not.
    """
    account = memo.account()
    if account is None or account.shares is None:
        return None
    share = account.shares
    owner = owners([max(task.nbytes, 1) for task in tasks], share.count)
    mine = [i for i, each in enumerate(owner) if each == share.number]
    if share.number is not None and sink is not None:
        return mine
    kept = memo.Memo(account, sources, sink, 1)
    lacking = [i for i, task in enumerate(tasks) if kept.key(task) not in account.store]
    if share.number is not None:
        return mine if lacking else None  # else a step on the way
    # After a step that was done by all, one that none has begun is done here.
    if lacking and (len(lacking) < len(tasks) or not account.recalled):
        who = [f"{each}/{share.count}" for each in sorted({owner[i] for i in lacking})]
        more = ", …" if len(who) > _NAMED else ""
        raise UsageError(
            f"--finish: {len(lacking)} of {len(tasks)} tasks are not done, such as "
            f"{tasks[lacking[0]].label} (shards {', '.join(who[:_NAMED])}{more}); start those "
            "shards again, or use --resume instead, which does the rest here"
        )
    return None
