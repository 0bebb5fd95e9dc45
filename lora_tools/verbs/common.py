"""What the verbs share: options that recur, and the making of reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_tools.errors import UsageError
from lora_tools.formats.consumers import CONSUMERS, Consumer
from lora_tools.linalg.layouts import Layout, named
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import ModuleResult


def tool_version() -> str:
    """The installed version of loratools."""
    try:
        return version("loratools")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"


def rank_rule(
    rank: int | None, energy: float | None, max_rank: int | None, default: int | None = None
) -> RankRule | None:
    """The rule that ``--rank``, ``--energy`` and ``--max-rank`` describe. Raises UsageError."""
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy exclude each other: give one")
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"--max-rank {max_rank}: at least 1 is needed")
    if energy is not None:
        if not 0 < energy <= 1:
            raise UsageError(f"--energy {energy}: a share above 0 and up to 1 is needed")
        return RankRule("energy", energy, max_rank)
    rank = default if rank is None else rank
    if rank is None:
        if max_rank is not None:
            raise UsageError("--max-rank goes with --energy")
        return None
    if rank < 1:
        raise UsageError(f"--rank {rank}: at least 1 is needed")
    return RankRule("rank", rank, max_rank)


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Whether a module name is chosen: some ``include`` is found in it and no ``exclude`` is.

    Raises:
        UsageError: a pattern is not a regular expression.
    """
    try:
        wanted, unwanted = ([re.compile(p) for p in given] for given in (include, exclude))
    except re.error as error:
        raise UsageError(f"{error.pattern!r} is not a regular expression: {error}") from None

    def chosen(name: str) -> bool:
        return (not wanted or any(p.search(name) for p in wanted)) and not any(
            p.search(name) for p in unwanted
        )

    return chosen


def layer_kinds(given: Sequence[str]) -> list[tuple[re.Pattern[str], Layout | None]]:
    """``REGEX=KIND`` → the pattern on module names, and the kind. Raises UsageError."""
    kinds = []
    for text in given:
        regex, equals, kind = text.rpartition("=")
        if not (equals and regex):
            raise UsageError(f"--layout {text!r}: REGEX=KIND is needed")
        try:
            kinds.append((re.compile(regex), named(kind)))
        except re.error as error:
            raise UsageError(f"{regex!r} is not a regular expression: {error}") from None
    return kinds


def consumer_named(name: str) -> Consumer:
    """A row of the table. Raises UsageError."""
    if name not in CONSUMERS:
        raise UsageError(f"--for {name!r}: one of {', '.join(CONSUMERS)} is needed")
    return CONSUMERS[name]


def resized_totals(results: Sequence[ModuleResult]) -> dict[str, Any]:
    """Figures over modules whose rank was chosen anew, weighted by their energy."""
    energy = math.fsum(m.delta_norm**2 for m in results)
    if not energy:
        return {}
    missing = math.fsum((m.relative_error * m.delta_norm) ** 2 for m in results)
    return {
        "relative_error": math.sqrt(missing / energy),
        "energy": 1 - missing / energy,
        "rank_min": min(m.rank for m in results),
        "rank_max": max(m.rank for m in results),
    }
