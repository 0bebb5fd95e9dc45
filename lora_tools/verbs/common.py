"""What the verbs share: options that recur, and the making of reports."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError, UsageError
from lora_tools.formats.checkpoint_writer import parse_size
from lora_tools.formats.consumers import CONSUMERS, Consumer
from lora_tools.linalg.layouts import Layout, named
from lora_tools.linalg.ranks import POLICIES, RankRule
from lora_tools.records import ModuleResult


def tool_version() -> str:
    """The installed version of loratools."""
    try:
        return version("loratools")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"


# Options that do not decide what is written, or that stand in the metadata by a digest.
_NOT_RECORDED = {
    "out",
    "adapters",
    "base",
    "graph",
    "jobs",
    "force",
    "dry_run",
    "progress",
    "allow_pickle",
    "max_error",
    "spectrum_cache",
    "activations",
    "reversible",
    "atol",
    "rtol",
    "no_verify",
    "keep_failed",
    "eval_text",
}


def command_of(verb: Callable[..., object], given: Mapping[str, Any]) -> str:
    """The call as artifacts record it: the verb, and the options that are not as by default, but no
    paths, so that the same input gives the same bytes wherever it lies.

    Args:
        given: the verb's parameters by name, as ``locals()`` has them at its start.
    """
    parameters = inspect.signature(verb).parameters.values()
    parts = [
        f"{p.name}={given[p.name]!r}"
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_RECORDED and given[p.name] != p.default
    ]
    return " ".join([verb.__name__.replace("_", "-"), *parts])


def need(*modules: str) -> None:
    """Raises UsageError where one of the modules that ONNX takes is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}: install with pip install 'loratools[onnx]'"
        )


def handed_on(metadata: Mapping[str, str], command: str, digest: str) -> dict[str, str]:
    """The metadata of an adapter made of another: it is for the same base, and the command comes
    after those that made the other.

    Args:
        metadata, digest: of the other.
    """
    before = metadata.get("command", "")
    return {
        **{key: metadata[key] for key in ("base_digest", "tuned_digest") if key in metadata},
        "loratools": tool_version(),
        "adapter_digests": digest,
        "command": " | ".join(each for each in (before, command) if each),
    }


def check_bases(
    adapters: Iterable[tuple[str, Mapping[str, str]]], base_digest: str, made_of: str = ""
) -> None:
    """Refuse an adapter whose metadata names another base than the one with this digest.

    Args:
        adapters: each one's path, and the metadata of its file.
        made_of: the digest of what the base is another form of, which will do as well.

    Raises:
        MismatchError: naming it.
    """
    for path, metadata in adapters:
        recorded = metadata.get("base_digest", base_digest)
        if recorded not in (base_digest, made_of):
            raise MismatchError(
                f"{path}: was made for another base: its digest is {recorded}, and that of the one "
                f"given is {base_digest}; give that base, or pass --allow-other-base"
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
