"""Adapters as they are named on the command line, each with its weight."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.linalg.scaling import scaling
from lora_tools.remote import urls
from lora_tools.sources.adapters import open_adapter

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Weighted:
    """An adapter and the weight it is merged with."""

    adapter: Adapter
    weight: float
    path: str

    @property
    def as_given(self) -> str:
        """As the command line has it: the path, and the weight where it is not 1."""
        return self.path if self.weight == 1 else f"{self.path}={self.weight:g}"


def input_bytes(weighted: Iterable[Weighted]) -> int:
    """Bytes of the tensors of adapters as they were given."""
    return sum(each.adapter.original.nbytes for each in weighted)


def digests_and_weights(digests: Sequence[str], weighted: Sequence[Weighted]) -> str:
    """As metadata has them: ``digest=weight digest=weight``."""
    return " ".join(f"{d}={w.weight:g}" for d, w in zip(digests, weighted, strict=True))


def settings_of(weighted: Sequence[Weighted]) -> str:
    """As metadata has them: of each adapter a hash of the numbers of its config that its effect
    depends on, and that its digest, which is of its tensors, does not cover. No names are in it,
    but the order of them: another base may put something else before all."""
    return " ".join(_settings(each.adapter) for each in weighted)


def _settings(adapter: Adapter) -> str:
    said = (
        [repr(scaling(m.alpha, m.r, adapter.use_rslora)) for m in _by_name(adapter.modules)],
        [repr((c.kind.title, sorted(c.numbers.items()))) for c in _by_name(adapter.changes)],
        [repr(m.on_input) for m in _by_name(adapter.multipliers)],
        [repr(t.indices) for t in _by_name(adapter.tokens)],
        [repr(adapter.fan_in_fan_out)],
    )
    lines = "".join(f"{' '.join(each)}\n" for each in said)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _by_name(held: Mapping[str, _T]) -> list[_T]:
    return [held[name] for name in sorted(held)]


def open_weighted(
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    allow_pickle: bool,
    base: BaseNames | Checkpoint | str | Path | None = None,
    allow_unmatched: bool | None = None,
    as_stored: bool = False,
) -> list[Weighted]:
    """``PATH``, ``PATH=WEIGHT`` or (path, weight) → open adapters. Raises UsageError.

    ``base`` has the names that some formats are resolved by; ``allow_unmatched`` as in
    ``plan_merge``, which leaves out those that are none of it; ``as_stored`` as in
    ``open_adapter``.
    """
    if not adapters:
        raise UsageError("at least one adapter is needed")
    result = []
    for given in adapters:
        path, weight = given if isinstance(given, tuple) else split_weight(str(given))
        if not math.isfinite(weight):
            raise UsageError(f"{path}: its weight is {weight}; a finite number is needed")
        adapter = open_adapter(
            path, allow_pickle, base=base, allow_unmatched=allow_unmatched, as_stored=as_stored
        )
        result.append(Weighted(adapter, weight, str(path)))
    _refuse_twice(result)
    return result


def _refuse_twice(weighted: Sequence[Weighted]) -> None:
    """Raises UsageError for an adapter that is given twice with no weight to either."""
    first: dict[Path, Weighted] = {}
    for each in weighted:
        if each.weight == 1 and first.setdefault(each.adapter.path.resolve(), each) is not each:
            raise UsageError(
                f"{each.path}: given twice, so it would be added twice; if you want that, give it "
                f"once with the weight 2: {each.path}=2"
            )


def _is_of_query(before: str) -> bool:
    """Whether what comes behind the last "=" of an address is a value in its query."""
    _, mark, query = before.partition("?")
    return bool(mark and urls.url(before)) and "=" not in query.rpartition("&")[2]


def split_weight(given: str) -> tuple[str, float]:
    """``PATH=WEIGHT`` → both; the weight is 1 where there is none. Raises UsageError."""
    path, equals, number = given.rpartition("=")
    if not equals or Path(given).exists() or _is_of_query(path):
        return given, 1.0
    try:
        return path, float(number)
    except ValueError:
        if urls.url(given):  # its query may be a signature, which is nobody's to print
            return given, 1.0
        raise UsageError(f"{given!r}: {number!r} is not a number (ADAPTER=WEIGHT)") from None
