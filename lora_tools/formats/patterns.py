"""Regular expressions that come with a file, matched in bounded time.

Python's engine tries one way after another, and a short pattern can have more of them than there is
time: ``(a|a)*b``. What may have many is matched here instead by all ways at once: for each part of
the pattern and each place in the text, the set of places where it can end, found once (as a
bit mask). Both give the same answer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

LONGEST = 100_000  # characters of a pattern
_WAYS = 100_000  # of the engine's, at most: some milliseconds
_WORK = 5_000_000  # bits of sets of places: some tens of milliseconds
_MANY = 1e30
_PLAIN = re.compile(r"[\w.-]+")
_parser: Any = getattr(re, "_parser", None) or re.sre_parse  # type: ignore[attr-defined]
_compiler: Any = getattr(re, "_compiler", None) or re.sre_compile  # type: ignore[attr-defined]


def matches(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Whether ``re.match`` of these, or ``re.fullmatch``, finds something.

    Raises:
        re.error: it is no pattern, it is too long, or has what only trying finds (back references,
            atomic groups) and too many ways.
    """
    return _pattern(pattern).matches(text, whole)


def ends_with(key: str, module: str) -> bool:
    """Whether a module's name ends with a key of rank_pattern or alpha_pattern, as PEFT (0.21,
    ``get_pattern_key``) has it. Raises as ``matches`` does."""
    last = key.rpartition(".")[2]
    if _PLAIN.fullmatch(key) and not module.removesuffix("\n").endswith(last):
        return False  # most are names, and many: those of other layers need no engine
    return matches(rf"(.*\.)?({key})$", module)


@functools.lru_cache(maxsize=1 << 14)
def _pattern(pattern: str) -> _Pattern:
    if len(pattern) > LONGEST:
        raise re.error(f"has {len(pattern):,} characters; at most {LONGEST:,} are read")
    try:
        return _Pattern(re.compile(pattern), _parser.parse(pattern))
    except (RecursionError, OverflowError) as error:
        raise re.error(f"too deep ({error})") from None


class _Pattern:
    def __init__(self, engine: re.Pattern[str], parsed: Any) -> None:
        self._engine, self._parsed = engine, parsed
        self._ways = _ways(parsed)
        self._root: Any = None

    def matches(self, text: str, whole: bool) -> bool:
        if self._ways.most(len(text)) <= _WAYS:
            found = self._engine.fullmatch(text) if whole else self._engine.match(text)
            return found is not None
        try:
            if self._root is None:
                self._root = _built(self._parsed, self._parsed.state, ())
            ends = _Places(text).ends(self._root, 0)
        except RecursionError:
            raise re.error("too deep") from None
        return bool(ends >> len(text) & 1) if whole else bool(ends)


@dataclasses.dataclass(frozen=True)
class _Ways:
    """How many ways the engine may try: choices of where ``spans`` repeats end, each in order,
    times those of alternatives."""

    spans: int = 0
    choices: float = 1

    def most(self, length: int) -> float:
        return self.choices * math.comb(min(length, 10**5) + self.spans, self.spans)

    def __mul__(self, other: _Ways) -> _Ways:
        return _Ways(min(self.spans + other.spans, 9), min(self.choices * other.choices, _MANY))


def _ways(nodes: Any) -> _Ways:
    total = _Ways()
    for op, given in nodes:
        total *= _ways_of(op.name, given)
    return total


def _ways_of(op: str, given: Any) -> _Ways:
    if op == "BRANCH":
        each = [_ways(part) for part in given[1]]
        return _Ways(max(w.spans for w in each), sum(w.choices for w in each))
    if op == "SUBPATTERN":
        return _ways(given[3])
    if op in ("ASSERT", "ASSERT_NOT"):
        return _ways(given[1])
    if op == "ATOMIC_GROUP":
        return _ways(given)
    if op == "GROUPREF_EXISTS":
        return _ways(given[1]) * _ways(given[2] or ())
    if not op.endswith("_REPEAT"):
        return _Ways()
    low, high, part = given
    inner = _ways(part)
    if high <= 1:
        return _Ways(inner.spans, inner.choices + (1 - low))
    if inner == _Ways() and part.getwidth()[0] > 0:
        return _Ways(int(high > low))
    return _Ways(0, _MANY)


def _built(nodes: Any, state: Any, flags: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
    """A sequence of ("run", engine), ("any", parts), ("repeat", low, high, part) and ("look",
    ahead, wanted, part, width); flags are those of the groups around it."""
    parts: list[tuple[Any, ...]] = []
    run: list[Any] = []

    def close() -> None:
        if run:
            single = _parser.SubPattern(state, list(run))
            for add, remove in reversed(flags):
                inner = (_parser.SUBPATTERN, (None, add, remove, single))
                single = _parser.SubPattern(state, [inner])
            parts.append(("run", _compiler.compile(single, state.flags)))
            run.clear()

    for op, given in nodes:
        name = op.name
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            run.append((op, given))
            continue
        close()
        if name == "SUBPATTERN":
            _, add, remove, part = given
            mine = (*flags, (add, remove)) if add or remove else flags
            parts.append(_built(part, state, mine))
        elif name == "BRANCH":
            parts.append(("any", tuple(_built(part, state, flags) for part in given[1])))
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            parts.append(("repeat", given[0], given[1], _built(given[2], state, flags)))
        elif name in ("ASSERT", "ASSERT_NOT"):
            ahead, part = given[0] > 0, _built(given[1], state, flags)
            parts.append(("look", ahead, name == "ASSERT", part, given[1].getwidth()[1]))
        elif name == "FAILURE":
            parts.append(("any", ()))
        else:
            raise re.error(f"has {name.lower()} and too many ways to match")
    close()
    return ("sequence", tuple(parts))


class _Places:
    """Where parts of a pattern can end in one text, by where they begin. Sets are bit masks."""

    def __init__(self, text: str) -> None:
        self._text, self._most = text, len(text) + 1
        self._known: dict[tuple[int, int], int] = {}
        self._left = _WORK // (len(text) + 64)

    def ends(self, node: tuple[Any, ...], start: int) -> int:
        key = (id(node), start)
        if key not in self._known:
            self._left -= 1
            if self._left < 0:
                raise re.error(f"takes too long on a name of {len(self._text):,} characters")
            self._known[key] = getattr(self, f"_{node[0]}")(start, *node[1:])
        return self._known[key]

    def _from(self, node: tuple[Any, ...], starts: int) -> int:
        found = 0
        while starts:
            lowest = starts & -starts
            found |= self.ends(node, lowest.bit_length() - 1)
            starts ^= lowest
        return found

    def _run(self, start: int, engine: re.Pattern[str]) -> int:
        match = engine.match(self._text, start)
        return 0 if match is None else 1 << match.end()

    def _sequence(self, start: int, parts: tuple[Any, ...]) -> int:
        places = 1 << start
        for part in parts:
            places = self._from(part, places)
        return places

    def _any(self, start: int, parts: tuple[Any, ...]) -> int:
        return functools.reduce(lambda found, part: found | self.ends(part, start), parts, 0)

    def _repeat(self, start: int, low: int, high: int, part: tuple[Any, ...]) -> int:
        places = 1 << start
        for _ in range(min(low, self._most)):  # after as many, one more changes nothing
            places, before = self._from(part, places), places
            if places == before:
                break
        new = found = places
        for _ in range(min(high - low, self._most)):
            new = self._from(part, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _look(
        self, start: int, ahead: bool, wanted: bool, part: tuple[Any, ...], width: int
    ) -> int:
        if ahead:
            found = bool(self.ends(part, start))
        else:
            found = start >= width and bool(self.ends(part, start - width) >> start & 1)
        return 1 << start if found == wanted else 0
