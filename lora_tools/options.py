"""What a user asks for: ranks, modules, layer kinds, consumers."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.consumers import CONSUMERS, Consumer
from lora_tools.formats.checkpoint_writer import parse_size
from lora_tools.linalg.layouts import Layout, named
from lora_tools.linalg.ranks import POLICIES, RankRule


def need(*modules: str) -> None:
    """Raises UsageError where one of the modules that ONNX takes is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}: install with pip install 'loratools[onnx]'"
        )


def rank_rule(
    given: Mapping[str, float | bool | None], max_rank: int | None, default: int | None = None
) -> RankRule | None:
    """The rule that at most one option named as a policy, and ``--max-rank``, describe.

    Raises:
        UsageError: several options, or a number that the policy does not know.
    """
    chosen = {
        name: value for name, value in given.items() if value is not None and value is not False
    }
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(map(_flag, chosen))} exclude each other: give one")
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"--max-rank {max_rank}: at least 1 is needed")
    if not chosen:
        if default is None:
            if max_rank is not None:
                raise UsageError("--max-rank goes with an option that chooses a rank")
            return None
        return RankRule("rank", default, max_rank)
    [(name, value)] = chosen.items()
    if name in POLICIES and value is not True and not POLICIES[name].allows(value):
        raise UsageError(f"{_flag(name)} {value:g}: a number {POLICIES[name].range} is needed")
    return RankRule(name, float(value), max_rank)


def refuse_shared(rule: RankRule | None, consumer: Consumer) -> None:
    """Raises UsageError where ranks differ by module and the consumer reads one for all."""
    if rule is not None and rule.shared and not consumer.patterns:
        raise UsageError(
            f"--{rule.policy} gives each module its own rank, and {consumer.name} "
            "reads one for all: use --rank"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def most_factors(text: str) -> tuple[int, bool]:
    """``50MB`` → (50000000, True), bytes; ``10M`` → (10000000, False), numbers. Raises
    UsageError."""
    match = re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]?(I?B)?\s*", text.upper())
    if match is None:
        raise UsageError(
            f"--budget {text!r}: a size such as 50MB, or a count such as 10M, is needed"
        )
    return parse_size(text), match[2] is not None


def read_text(path: Path) -> str:
    """A UTF-8 file that an option names. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None


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
                f"--budget {self.most} bytes: tensors saved whole and the file's header take more; "
                "allow more, or leave such tensors out with --rest skip"
            )
        return left
