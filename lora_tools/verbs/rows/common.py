"""What several rows say."""

from __future__ import annotations

from lora_tools.options import Running, Writing
from lora_tools.verbs.row import Argument, take

BASE, TUNED, ADAPTER, CHECKPOINT = map(Argument, ("base", "tuned", "adapter", "checkpoint"))
ADAPTERS, OUT, PATH = map(Argument, ("adapters", "out", "path"))
POLICIES = ("rank", "energy", "error", "ratio", "cumulative", "threshold")
WRITING = take(Writing, "force", "dry_run", "no_card")
RESUMING = (*WRITING, *take(Writing, "plan", "resume", "clean", "shard", "finish"))
RUNNING = take(Running, "jobs", "allow_pickle", "variant", "digest", "progress")
SPREAD = take(Running)


def gate(of: str) -> dict[str, str]:
    """A quality gate on the error of that."""
    return {
        "help": f"Quality gate: if the relative error of {of}, or of all together, is above X, "
        "exit with 3 and write nothing but the report."
    }
