"""What the options that choose ranks come to: a rule for each module, or a size for all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.checkpoint_writer import parse_size
from lora_tools.linalg.ranks import POLICIES, SHARED, RankRule
from lora_tools.options.shared import Ranks


def rank_rule(ranks: Ranks, default: int | None = None) -> RankRule | None:
    """The rule that at most one of the policies, and ``max_rank``, describe; a shared rule's number
    is what it may spend.

    Args:
        default: the rank where no policy is given; None: no rule then.

    Raises:
        UsageError: several policies, or a number that the policy does not know.
    """
    given = {name: getattr(ranks, name) for name in (*POLICIES, *SHARED)}
    chosen = {name: v for name, v in given.items() if v is not None and v is not False}
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(map(_flag, chosen))} exclude each other: give one")
    if ranks.max_rank is not None and ranks.max_rank < 1:
        raise UsageError(f"--max-rank {ranks.max_rank}: at least 1 is needed")
    if not chosen:
        if default is None:
            if ranks.max_rank is not None:
                raise UsageError("--max-rank needs an option that chooses ranks, such as --energy")
            return None
        return RankRule("rank", default, ranks.max_rank)
    [(name, value)] = chosen.items()
    if name in SHARED:
        value = most_factors(value)[0]
    elif value is not True and not POLICIES[name].allows(value):
        raise UsageError(f"{_flag(name)} {value:g}: a number {POLICIES[name].range} is needed")
    return RankRule(name, float(value), ranks.max_rank)


def refuse_shared(rule: RankRule | None, consumer: Consumer) -> None:
    """Raises UsageError where ranks differ by module and the consumer reads one for all."""
    if rule is not None and rule.shared and not consumer.patterns:
        raise UsageError(
            f"--{rule.policy} gives each module its own rank, but {consumer.name} reads one rank "
            "for all; use --rank"
        )


def refuse_bytes(ranks: Ranks, form: Format) -> None:
    """Raises UsageError for a size in bytes of another file than PEFT's."""
    size = size_of(ranks)
    if size is not None and size.in_bytes and form.name != "peft":
        raise UsageError(
            f"--budget {ranks.budget}: a size in bytes is only for PEFT's file; for {form.title} "
            "give a count of numbers, such as 10M"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def size_of(ranks: Ranks) -> Size | None:
    """What ``--budget`` allows, where it is given. Raises UsageError."""
    return None if ranks.budget is None else Size(*most_factors(ranks.budget))


def most_factors(text: str) -> tuple[int, bool]:
    """``50MB`` → (50000000, True), bytes; ``10M`` → (10000000, False), numbers. Raises
    UsageError."""
    match = re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]?(I?B)?\s*", text.upper())
    if match is None:
        raise UsageError(
            f"--budget {text!r}: a size such as 50MB, or a count such as 10M, is needed"
        )
    return parse_size(text), match[2] is not None


_HEADER_ENTRY = 150  # bytes of a safetensors header for one tensor, its name aside


@dataclasses.dataclass(frozen=True)
class Size:
    """What ``--budget`` allows: bytes of the adapter's file, or numbers in the factors."""

    most: int
    in_bytes: bool

    def left(self, others: Iterable[int], names: Iterable[str]) -> int:
        """What is left for factors, once other tensors (their bytes) and the header (the names of
        all) have theirs.

        Raises:
            UsageError: nothing.
        """
        if not self.in_bytes:
            return self.most
        left = self.most - sum(others)
        left -= sum(len(name) + _HEADER_ENTRY for name in names) + 1024
        if left <= 0:
            raise UsageError(
                f"--budget {self.most} bytes: tensors saved whole and the file's header need more; "
                "allow more, or leave such tensors out"
            )
        return left
