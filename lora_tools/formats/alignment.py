"""Names of one side by those of another that has other prefixes.

A checkpoint or an adapter was saved from a part of the model, or from inside another one, or by
another release: ``model.layers.0`` is ``language_model.model.layers.0`` there. What differs is the
front of the name; which front stands for which is taken from the names themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lora_tools.errors import MismatchError
from lora_tools.formats.names import split_tensor

_DEEPEST = 4  # parts of a prefix
# Parts that stand around a language model and say nothing of which of a model's components it is.
_AROUND = {"model", "module", "base_model", "language_model", "text_model", "llm", "lm", "backbone"}
# Parts that name one of the other components, whatever else they say.
_COMPONENTS = {
    "vision": re.compile(r".*(vision|visual|image).*"),
    "audio": re.compile(r".*(audio|speech).*"),
}
_TOKENS = re.compile(r"embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|token_embedding")


class _Way(NamedTuple):
    """A prefix of their names, and what stands in its place in ours."""

    theirs: str
    ours: str

    @property
    def said(self) -> str:
        if not self.ours:
            return f"the prefix {self.theirs!r} was left out"
        if not self.theirs:
            return f"the prefix {self.ours!r} was added"
        return f"the prefix {self.theirs!r} became {self.ours!r}"


def align(theirs: Collection[str], ours: Collection[str]) -> tuple[dict[str, str], str]:
    """Map ``theirs`` onto the names of ``ours`` where the two have other prefixes.

    Names that agree stay. Of the others, one prefix is left out or put before, whatever it is, as
    makes most names agree; and prefixes are exchanged for each other that are of one component of
    the model, each component's for itself. A layer of a language model never becomes one of a
    vision or audio tower, nor the other way about.

    Returns the mapping (each of ``theirs`` to a name, perhaps unknown to ``ours``) and a sentence
    saying what was done, empty if nothing.

    Raises:
        MismatchError: two prefixes explain the names equally well.
    """
    task = _Aligning(set(ours), {name: name for name in theirs})
    said: list[str] = []
    while way := task.best(first=not said):
        task.take(way, first=not said)
        said.append(way.said)
    return task.mapping, "; ".join(said)


@dataclasses.dataclass
class _Aligning:
    ours: set[str]
    mapping: dict[str, str]

    def best(self, first: bool) -> _Way | None:
        """What makes most of the names that do not agree yet do so."""
        ways = self._ways(first)
        most = max(map(len, ways.values()), default=0)
        found = [(way, hits) for way, hits in ways.items() if len(hits) == most]
        for i, (way, hits) in enumerate(found):
            for other, theirs in found[:i]:
                apart = not hits.keys() & theirs.keys()
                if not (apart and _akin(way) and _akin(other)):
                    said = f"{other.said} or {way.said}"
                    raise MismatchError(
                        f"the names can be matched in more than one way ({said}); rename one side"
                    )
        if not found or (_crosses(found[0][0]) and any(map(_is_of_tokens, self.ours))):
            return None
        return found[0][0]

    def take(self, way: _Way, first: bool) -> None:
        """Rename by it. The first that leaves a prefix out does so in all names that have it."""
        met = set(self.mapping.values())
        for own in [own for own, name in self.mapping.items() if name not in self.ours]:
            name = way.ours + own.removeprefix(way.theirs)
            fits = name in self.ours or (first and not way.ours)
            if own.startswith(way.theirs) and fits and name not in met:
                self.mapping[own] = name

    def _ways(self, first: bool) -> dict[_Way, dict[str, str]]:
        """Prefixes for prefixes, and the names that would agree by them."""
        met = self.ours.intersection(self.mapping.values())
        waiting: dict[str, list[tuple[str, str]]] = {}
        for own, name in self.mapping.items():
            if name not in self.ours:
                for prefix, rest in _cuts(own):
                    waiting.setdefault(rest, []).append((prefix, own))
        ways: dict[_Way, dict[str, str]] = {}
        for name in sorted(self.ours - met) if waiting else ():
            for prefix, rest in _cuts(name):
                for theirs, own in waiting.get(rest, ()):
                    way = _Way(theirs, prefix)
                    if not _ends_alike(way) and (_akin(way) or (first and _is_one_prefix(way))):
                        ways.setdefault(way, {})[own] = name
        return {way: hits for way, hits in sorted(ways.items()) if _is_sound(way, hits)}


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name's prefixes of so many parts, none at first, and what comes after each."""
    parts = name.split(".")
    for n in range(min(len(parts) - 1, _DEEPEST) + 1):
        yield "".join(part + "." for part in parts[:n]), ".".join(parts[n:])


def _ends_alike(way: _Way) -> bool:
    """Whether it says no more than a way of shorter prefixes."""
    return way.theirs.split(".")[-2:] == way.ours.split(".")[-2:] or way.theirs == way.ours


def _is_one_prefix(way: _Way) -> bool:
    """Whether it leaves out, or puts before, a prefix of at most two parts."""
    return not all(way) and max(prefix.count(".") for prefix in way) <= 2


def _akin(way: _Way) -> bool:
    """Whether both prefixes are of one component."""
    return _component(way.theirs) == _component(way.ours)


def _crosses(way: _Way) -> bool:
    """Whether only one of the prefixes is that of a tower beside the language model."""
    towers = [_COMPONENTS.keys() & set(_component(prefix)) for prefix in way]
    return towers[0] != towers[1]


def _component(prefix: str) -> tuple[str, ...]:
    """Of a prefix the parts that say which component of a model it is of."""
    found: list[str] = []
    for part in prefix.split(".")[:-1]:
        kind = next((kind for kind, words in _COMPONENTS.items() if words.fullmatch(part)), part)
        if part not in _AROUND and kind not in found[-1:]:
            found.append(kind)
    return tuple(found)


def _is_sound(way: _Way, hits: dict[str, str]) -> bool:
    """Whether an exchange is more than a chance: the prefixes have parts in common, or layers are
    counted alike."""
    theirs, ours = set(way.theirs.split(".")[:-1]), set(way.ours.split(".")[:-1])
    if theirs <= ours or ours <= theirs:
        return True
    rests = (name.removeprefix(way.theirs) for name in hits)
    return any(re.search(r"[a-z]\.\d+\.", rest) for rest in rests)


def _is_of_tokens(tensor: str) -> bool:
    return bool(_TOKENS.fullmatch(split_tensor(tensor)[0].rpartition(".")[2]))
