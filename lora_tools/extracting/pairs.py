"""The plan of an extraction: which tensor of the tuned side answers which of the base, and the
fate of each. Names, shapes and dtypes decide; no tensor is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from lora_tools.errors import MismatchError, UsageError
from lora_tools.extracting.otherwise import refuse_stored_otherwise
from lora_tools.formats.alignment import align
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.linalg.layouts import Layout
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import Action, Fate, TensorSpec
from lora_tools.sources.transformers_names import is_read_past
from lora_tools.sources.weights import kind_of

# What is done with a pair if its two tensors turn out to differ.
Treatment = Literal["decompose", "save", "bias", "skip", "refuse"]
_WHEN_CHANGED: dict[Treatment, Action] = {
    "decompose": Action.DECOMPOSE_IF_CHANGED,
    "save": Action.SAVE_WHOLE_IF_CHANGED,
    "bias": Action.SAVE_WHOLE_IF_CHANGED,
    "skip": Action.SKIP,
    "refuse": Action.REFUSE_IF_CHANGED,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor of either side.

    Attributes:
        name: its name in the adapter (that of ``Plan.names_of``'s side).
        base, tuned: its spec on each side, or None where it lacks there.
        action: what to do if the two differ.
        layout: its layer kind, for "decompose".
        reason: why this action.
        followed_by: modules whose weight is tied to this one, such as the output head of an input
            embedding: what is done to the one is done to the others.
        outside: it is of a module that no PEFT adapter acts on: sentence-transformers' others than
            the transformer.
    """

    name: str
    base: TensorSpec | None
    tuned: TensorSpec | None
    action: Treatment
    layout: Layout | None = None
    reason: str = ""
    followed_by: tuple[str, ...] = ()
    outside: bool = False

    @property
    def spec(self) -> TensorSpec:
        spec = self.tuned or self.base
        assert spec is not None
        return spec

    @property
    def module(self) -> str:
        return split_tensor(self.name)[0]

    @property
    def parameter(self) -> str:
        return split_tensor(self.name)[1]

    @property
    def target(self) -> str:
        """What factors are for: a module, or a parameter that a module of experts holds."""
        return self.module if self.parameter == "weight" else self.name


@dataclasses.dataclass(frozen=True)
class Plan:
    """All pairs, fates that need no reading, and what the user should be told."""

    pairs: tuple[Pair, ...]
    settled: tuple[Fate, ...]
    modules: frozenset[str]
    notes: tuple[str, ...]

    def fates(self, rule: RankRule) -> tuple[Fate, ...]:
        """Every tensor's fate as far as it is known before anything is read."""
        return (
            *(
                Fate(p.name, _WHEN_CHANGED[p.action], p.reason, upper_bound(p, rule))
                for p in self.pairs
            ),
            *self.settled,
        )


def upper_bound(pair: Pair, rule: RankRule) -> int:
    """The most bytes this pair can take in the adapter, at two-sided rank and the base's dtype."""
    if pair.followed_by:
        alone = upper_bound(dataclasses.replace(pair, followed_by=()), rule)
        return (1 + len(pair.followed_by)) * alone
    if pair.action in ("save", "bias"):
        return pair.spec.nbytes
    if pair.action != "decompose":
        return 0
    assert pair.layout is not None
    sides = [(at.rows, at.cols) for at in pair.layout.regions(pair.spec.shape)]
    return one_direction(pair, None) * max(rule.ceiling(*side) for side in sides)


def one_direction(pair: Pair, dtype: str | None, in_bytes: bool = True) -> int:
    """Bytes, or numbers, that one more rank costs in the factors; ``dtype`` is theirs, by default
    the base's. A tied head that follows takes bytes of its own, and no numbers of its own."""
    assert pair.base is not None
    assert pair.layout is not None
    spec = dataclasses.replace(pair.base, dtype=dtype or pair.base.dtype)
    shapes = pair.layout.shapes(spec.shape, 1)
    numbers = sum(map(math.prod, shapes))
    each = spec.nbytes // spec.numel * (1 + len(pair.followed_by))
    return numbers * each if in_bytes else numbers


_OF_REST: dict[str, Treatment] = {"save": "save", "skip": "skip", "error": "refuse"}


@dataclasses.dataclass(frozen=True)
class _Treat:
    """What is asked of pairs that differ; see ``make_plan``."""

    embeddings: str
    rest: str
    chosen: Callable[[str], bool]
    unread: Callable[[str], bool]
    outside: Collection[str]


def make_plan(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    chosen: Callable[[str], bool],
    kinds: Sequence[tuple[re.Pattern[str], Layout | None]] = (),
    embeddings: Literal["lora", "save", "skip"],
    rest: Literal["save", "skip", "error"],
    unread: Callable[[str], bool] = lambda module: False,
    outside: Collection[str] = (),
) -> Plan:
    """Pair the tensors of both sides and settle what to do with each.

    Args:
        kinds: layer kinds of modules in whose names a pattern is found, instead of what name and
            shape tell; None for no low-rank form. The last that is found counts.
        outside: tensors that an adapter cannot hold in any form.

    Raises:
        UsageError: a kind does not fit a weight that it is named for, or is for none.
        MismatchError: little in common, ambiguous prefixes, shapes that differ, a weight that one
            side stores in a way that is not known, or one on which PEFT acts in part only.
    """
    notes = [*base.notes, *tuned.notes]
    to_base, sentence = align(list(tuned.specs), list(base.specs))
    if sentence:
        notes.append(f"tuned names: {sentence} to match the base")
    if not any(name in base.specs for name in to_base.values()):
        raise MismatchError(
            f"{base.path} and {tuned.path} have no tensor name in common "
            f"({next(iter(base.specs), '-')}, … against {next(iter(tuned.specs), '-')}, …); "
            "are they the same architecture?"
        )
    few = few_partners(base, tuned, to_base, chosen)
    notes = [few, *notes] if few else notes
    pairs: list[Pair] = []
    settled: list[Fate] = []
    # Both sides by the base's names; a spec keeps its own.
    ours, theirs = dict(base.specs), {to_base[name]: spec for name, spec in tuned.specs.items()}
    followed = _settle_ties((base, ours), (tuned, theirs), to_base, settled, notes)
    refuse_stored_otherwise(
        (base.path, ours), (tuned.path, theirs), chosen, ", or leave the module out with --exclude"
    )
    added = [name for name in theirs if name not in ours]
    # Tensors that only the tuned side has are saved under its own names: the model that can load
    # them is the tuned one. Otherwise the adapter goes on the base and takes the base's names.
    own_names = bool(added) and rest == "save"
    if own_names and sentence:
        notes.append(
            "the adapter has the names of the tuned side, because some tensors are only there"
        )
    treat = _Treat(embeddings, rest, chosen, unread, outside)
    to_tuned = {name: own for own, name in to_base.items()}
    for name, spec in ours.items():
        if name not in theirs:
            settled.append(Fate(name, Action.ONLY_IN_BASE, "the adapter leaves it as it is"))
            continue
        shown = to_tuned.get(name, name) if own_names else name
        spec = dataclasses.replace(spec, name=shown)
        weight = base.weights[name]
        followers = followed.get(name, ())
        if embeddings != "skip" and chosen(weight.module):
            _refuse_read_past(name, followers, base)
        kind = _kind(spec, kind_of(weight), kinds)
        pair = _pair(shown, (ours[name], theirs[name]), weight.is_head, kind, treat)
        pairs.append(dataclasses.replace(pair, followed_by=followers))
    _refuse_idle(kinds, pairs)
    pairs += [_one_sided(theirs[name], treat) for name in added]
    modules = {m for p in pairs if not p.outside for m in (p.module, *p.followed_by) if m}
    return Plan(tuple(pairs), tuple(settled), frozenset(modules), tuple(notes))


def few_partners(
    base: Checkpoint,
    tuned: Checkpoint,
    to_base: Mapping[str, str],
    chosen: Callable[[str], bool] | None = None,
) -> str:
    """A sentence where less than half of one side's chosen tensors are on the other, too; else "".

    One side may be a part of the other, or hold what changed only: then all of it is there.

    Raises:
        MismatchError: less than half are on either side.
    """
    ours, theirs = (
        {name for name in names if chosen is None or chosen(split_tensor(name)[0])}
        for names in (base.specs, to_base.values())
    )
    both = len(ours & theirs)
    if 2 * both >= max(len(ours), len(theirs)):
        return ""
    counted = (
        f"only {both} of the {len(ours)} tensors of {base.path} and the {len(theirs)} of "
        f"{tuned.path} are on both sides (on one side only: {min(ours - theirs, default='none')} "
        f"and {min(theirs - ours, default='none')})"
    )
    if 2 * both < min(len(ours), len(theirs)):
        raise MismatchError(
            f"{counted}; if both have the same modules under other names, rename one side"
            + ("" if chosen is None else "; if only a part is meant, name it with --include")
        )
    return f"{counted}: the figures cover only these"


def _settle_ties(
    ours: tuple[Checkpoint, dict[str, TensorSpec]],
    theirs: tuple[Checkpoint, dict[str, TensorSpec]],
    to_base: Mapping[str, str],
    settled: list[Fate],
    notes: list[str],
) -> dict[str, tuple[str, ...]]:
    """Settle weights that are one tensor, such as an output head and the input embedding.

    Where both sides tie them, the embedding speaks for the head, which follows it: returned is
    {embedding: modules of what follows}. Where one side does and the other has a head of its own,
    the embedding is put in the head's place, so that the two make a pair like any other.
    """
    mine = ours[0].weights.ties
    other = {
        to_base.get(name, name): to_base.get(source, source)
        for name, source in theirs[0].weights.ties.items()
    }
    followed: dict[str, tuple[str, ...]] = {}
    for name, source in mine.items():
        if name not in other and (name in theirs[1] or source not in other.values()):
            continue
        for _, specs in (ours, theirs):
            if specs.pop(name, None):
                settled.append(Fate(name, Action.TIED, f"the same tensor as {source}"))
        if source in theirs[1]:
            notes.append(f"{name} is tied to {source}, and so are their changes")
            followed[source] = (*followed.get(source, ()), split_tensor(name)[0])
    for ties, (_, specs), (_, others) in ((mine, ours, theirs), (other, theirs, ours)):
        for name, source in ties.items():
            if split_tensor(name)[0] not in followed.get(source, ()) and name in others:
                specs[name] = specs[source]
                notes.append(
                    f"{name} is tied to {source} on one side only: they are separate tensors now"
                )
    return followed


def _refuse_read_past(name: str, followers: Sequence[str], base: Checkpoint) -> None:
    """Raises MismatchError for a weight that one of its modules is read by, and not called: factors
    would act at its other places only."""
    for module in followers:
        if is_read_past(module, base.config):
            raise MismatchError(
                f"{name} is tied to {module}, and the model would use that weight without PEFT's "
                "change; --embeddings skip leaves it out"
            )


def _kind(
    spec: TensorSpec, own: Layout | None, kinds: Sequence[tuple[re.Pattern[str], Layout | None]]
) -> Layout | None:
    """The layer kind of a weight: as the user says, or its own."""
    module, parameter = split_tensor(spec.name)
    given = [kind for pattern, kind in kinds if pattern.search(module)]
    if not given or (parameter != "weight" and len(spec.shape) != 3):
        return own
    kind = given[-1]
    if kind is not None and not kind.suits(spec.shape):
        raise UsageError(
            f"--layout: {spec.name} has shape {spec.shape}, which is not {kind.name}'s"
        )
    return kind


def _refuse_idle(
    kinds: Sequence[tuple[re.Pattern[str], Layout | None]], pairs: Sequence[Pair]
) -> None:
    for pattern, _ in kinds:
        if not any(pattern.search(pair.module) for pair in pairs):
            raise UsageError(f"--layout {pattern.pattern}=…: matches no module name")


def _pair(
    name: str,
    sides: tuple[TensorSpec, TensorSpec],
    is_head: bool,
    kind: Layout | None,
    treat: _Treat,
) -> Pair:
    (base, tuned), (module, parameter) = sides, split_tensor(name)
    if name in treat.outside and treat.chosen(module):
        return _outside(name, sides, treat.rest)
    embedding = kind is not None and kind.name == "embedding"
    resizable = embedding or is_head
    if base.shape != tuned.shape:
        grown = base.shape[1:] == tuned.shape[1:] and resizable
        if not (grown and treat.embeddings != "lora"):
            hint = (
                "was the vocabulary resized? --embeddings save keeps the tuned one whole, "
                "--embeddings skip leaves it out"
                if grown
                else "are they the same architecture?"
            )
            raise MismatchError(f"{name}: base is {base.shape}, tuned is {tuned.shape}; {hint}")
    if not treat.chosen(module):
        return Pair(name, base, tuned, "skip", reason="left out by --include/--exclude")
    if (embedding and treat.embeddings != "lora") or base.shape != tuned.shape:
        action: Treatment = "save" if treat.embeddings == "save" else "skip"
        return Pair(name, base, tuned, action, reason=f"--embeddings {treat.embeddings}")
    form = kind if base.is_float and tuned.is_float and base.numel else None
    if form is not None and not treat.unread(module):
        return Pair(name, base, tuned, "decompose", form, form.name)
    if parameter == "bias" and treat.rest == "save":
        return Pair(name, base, tuned, "bias", reason="a bias has no low-rank form")
    action = _OF_REST[treat.rest]
    why = (
        "programs that read the format do not take factors of it"
        if form is not None
        else "no low-rank form"
    )
    return Pair(name, base, tuned, action, reason=f"{why} (--rest {treat.rest})")


def _outside(name: str, sides: tuple[TensorSpec | None, TensorSpec], rest: str) -> Pair:
    """Of a module that no adapter acts on: left out where that is asked for."""
    action: Treatment = "skip" if rest == "skip" else "refuse"
    reason = f"outside the transformer, which adapters act on (--rest {rest})"
    return Pair(name, *sides, action, reason=reason, outside=True)


def _one_sided(spec: TensorSpec, treat: _Treat) -> Pair:
    rest = treat.rest
    if spec.name in treat.outside:
        return _outside(spec.name, (None, spec), rest)
    if rest == "error":
        raise MismatchError(
            f"{spec.name}: is only on the tuned side; --rest save keeps it whole, --rest skip "
            "leaves it out"
        )
    reason = f"only on the tuned side (--rest {rest})"
    return Pair(spec.name, None, spec, "save" if rest == "save" else "skip", reason=reason)
