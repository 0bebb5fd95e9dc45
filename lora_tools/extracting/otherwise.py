"""Weights that one side has and the other stores in some way that nothing here knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from lora_tools.errors import MismatchError
from lora_tools.formats.names import split_tensor
from lora_tools.records import TensorSpec

# A checkpoint's path, and its tensors by the names that both sides share.
Named = tuple[Path, Mapping[str, TensorSpec]]


def refuse_stored_otherwise(
    one: Named, other: Named, chosen: Callable[[str], bool], next_step: str
) -> None:
    """Raises MismatchError for a matrix that a side lacks though it has something else of that
    module, which the other side has not: codes, in a scheme that no sign tells.

    Args:
        chosen: whether a module is looked at.
        next_step: what else to do, after "give the plain checkpoint".
    """
    for (_, mine), (path, theirs) in ((one, other), (other, one)):
        instead = dict(_owned(theirs.keys() - mine.keys()))
        for name, spec in mine.items():
            module, parameter = split_tensor(name)
            found = instead.get(name) or (instead.get(module) if parameter == "weight" else None)
            if name in theirs or found is None or not (spec.is_float and len(spec.shape) > 1):
                continue
            if chosen(module):
                raise MismatchError(
                    f"{name}: {path} has {theirs[found]} instead, so it is stored in an unknown "
                    f"way; give the plain checkpoint{next_step}"
                )


def _owned(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(what it may belong to, name): a module or a parameter, by a dot or an underscore."""
    for name in sorted(names):
        module, last = split_tensor(name)
        yield module, name
        stem = last
        while "_" in stem:
            stem = stem.rpartition("_")[0]
            yield f"{module}.{stem}", name
