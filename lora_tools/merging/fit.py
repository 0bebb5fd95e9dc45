"""A base made ready for its adapters, as PEFT's users do before they load them: the class that has
the adapter's head, the vocabulary and the labels that it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.errors import AdapterError, MismatchError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import class_name
from lora_tools.merging.added_heads import (
    NewClass,
    class_with,
    heads_of_another_task,
    notes_on,
    with_labels,
)
from lora_tools.merging.brought import Brought, brought_whole, refuse_in_part
from lora_tools.merging.fitted import FittedBase, Made
from lora_tools.merging.vocabulary import (
    is_left_behind,
    new_vocabulary,
    resized,
    tokenizer_files,
    with_vocabulary,
)
from lora_tools.records import Action, Fate, TensorSpec
from lora_tools.sources.class_fit import ClassFit, fit_class
from lora_tools.sources.weighted import Weighted


def fit_base(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    allow_unmatched: bool = False,
    add_heads: bool = True,
) -> Checkpoint:
    """The base with the head, labels and vocabulary of its adapters; the base itself where it has
    them. Headers only are read.

    Args:
        allow_unmatched: leave out a head that cannot be added.
        add_heads: else all heads that the base lacks are left out.

    Raises:
        AdapterError: a head that no class has, or that several have.
        MismatchError: rows of a new vocabulary that no adapter brings; several sizes of one thing.
    """
    brought = brought_whole(base, adapters)
    strange = {name for name in brought if name not in base.weights}
    other = heads_of_another_task(base.config, brought)
    reshaped = {name for name, each in brought.items() if each.has_other_rows(base, name)}
    if not (strange or other or reshaped):
        return base
    fitting = _Fitting(base, brought)
    fitting.find_aliases(strange)
    if add_heads:
        fitting.take_class((strange - fitting.aliases.keys()) | other, allow_unmatched)
    if fitting.new is None:
        fitting.take_labels(reshaped)
    return fitting.result() if fitting.is_changed else base


class _Fitting:
    """A base on its way to what its adapters were trained on.

    Attributes:
        specs: its tensors with the rows that adapters bring.
        aliases: names in adapters of tensors that the base has under another.
        new: the class that has the adapters' heads, where that is not the base's own.
    """

    def __init__(self, base: Checkpoint, brought: Mapping[str, Brought]) -> None:
        self.base, self.brought = base, dict(brought)
        self.config: Mapping[str, Any] = base.config
        self.vocabulary = new_vocabulary(base, brought)
        if self.vocabulary is not None:
            self.config = with_vocabulary(self.config, self.vocabulary)
        self.specs = {name: self._as_brought(spec) for name, spec in base.specs.items()}
        self.aliases: dict[str, str] = {}
        self.new: NewClass | None = None
        self.labelled: set[str] = set()

    def _as_brought(self, spec: TensorSpec) -> TensorSpec:
        each = self.brought.get(spec.name)
        if each is None or not each.has_other_rows(self.base, spec.name):
            return spec
        return dataclasses.replace(spec, shape=each.shape)

    @property
    def is_changed(self) -> bool:
        return bool(self.vocabulary or self.aliases or self.new or self.labelled)

    def find_aliases(self, strange: set[str]) -> None:
        """Of names that the base lacks, find those that its class ties to what is stored: biases,
        such as that of BERT's output head. (Weights that are tied can be parted.)"""
        strange = {name for name in strange if not name.endswith(".weight")}
        fit = self._own_class() if strange else None
        if fit is None:
            return
        for name in sorted(strange):
            tied = fit.tensors.get(fit.ties.get(name, ""))
            if tied is not None:
                self.aliases[name] = stored = tied.pieces[0].stored
                self.brought.setdefault(stored, self.brought[name])
                self.specs[stored] = self._as_brought(self.base.specs[stored])

    def take_class(self, names: set[str], allow_unmatched: bool) -> None:
        """Become the class that has the heads of these names. Raises AdapterError."""
        heads = {self.brought[name].name: self.brought[name] for name in names}
        kept = {name: spec for name, spec in self.specs.items() if name not in names}
        try:
            if heads:
                self.new = class_with(heads, self.config, kept, str(self.base.path))
        except AdapterError:
            if not allow_unmatched:
                raise
        if self.new is not None:
            self.config = self.new.config

    def take_labels(self, reshaped: set[str]) -> None:
        """Become a classifier with other labels, where tensors of it have other rows."""
        size = self.vocabulary.old if self.vocabulary is not None else None
        self.labelled = {
            n for n in reshaped & self.specs.keys() if self.base.specs[n].shape[0] != size
        }
        numbers = {self.specs[name].shape[0] for name in self.labelled}
        if len(numbers) > 1:
            names = ", ".join(f"{name} {self.specs[name].shape}" for name in sorted(self.labelled))
            raise MismatchError(
                f"{self.base.path}: the adapters add {names}, which differ in the number of labels"
            )
        if numbers and self.config:
            self.config = with_labels(self.config, numbers.pop())

    def _own_class(self) -> ClassFit | None:
        """How the class that config.json names loads what there is; None where nobody knows."""
        name = class_name(self.config)
        try:
            return fit_class(name, self.config, self.specs) if name else None
        except LookupError:
            return None

    def result(self) -> FittedBase:
        """The base, fitted. Raises MismatchError."""
        fit = self.new.fit if self.new is not None else self._own_class()
        follow = self._of_vocabulary(fit) if self.vocabulary is not None else set[str]()
        if fit is not None:
            self._check_shapes(fit)
        heads = self.new.heads if self.new is not None else {}
        unused = set(fit.unused) if self.new is not None and fit is not None else set[str]()
        made, left_out = [], []
        for spec in self.base.specs.values():
            if spec.name in unused:
                left_out.append(spec.name)
            elif self.brought.get(spec.name) not in heads.values():
                made.append(self._made(spec, spec.name in follow))
        made += [self._added(each) for each in heads.values()]
        notes, files = [], {}
        if self.new is not None:
            notes += notes_on(self.new, left_out)
        if self.vocabulary is not None:
            files = tokenizer_files(self.vocabulary.adapter)
            notes.append(self.vocabulary.sentence(files))
        why = f"{self.new.fit.name} has none" if self.new is not None else ""
        fates = [Fate(name, Action.DROP, why) for name in left_out]
        return FittedBase(
            self.base, made, dict(self.config), self.aliases, files, tuple(notes), tuple(fates)
        )

    def _of_vocabulary(self, fit: ClassFit | None) -> set[str]:
        """Tensors of the base that take the vocabulary's rows: as the class would have them, or by
        names and shapes."""
        assert self.vocabulary is not None
        old, new = self.vocabulary.old, self.vocabulary.new
        mine = {n for n, spec in self.specs.items() if n not in self.labelled and self._grows(spec)}
        if fit is None:
            kept = (spec for name, spec in self.specs.items() if name not in mine)
            return mine | {s.name for s in kept if is_left_behind(s, self.base, self.vocabulary)}
        for name, shape in fit.wanted.items():
            stored = fit.tensors[name].pieces[0].stored
            found = fit.tensors[name].spec.shape
            if (found, shape) == ((1, old), (1, new)) or (
                found == (old, *shape[1:]) and shape[0] == new
            ):
                mine.add(stored)
        return mine

    def _grows(self, spec: TensorSpec) -> bool:
        return spec.shape != self.base.specs[spec.name].shape

    def _check_shapes(self, fit: ClassFit) -> None:
        """Raises MismatchError where what adapters bring is not of the class's shape."""
        for name, shape in fit.wanted.items():
            stored = fit.tensors[name].pieces[0].stored
            spec = self.specs.get(stored)
            if spec is not None and self._grows(spec):
                raise MismatchError(
                    f"{stored}: base is {self.base.specs[stored].shape}, "
                    f"{self.brought[stored].weighted.path} has {spec.shape} (saved whole), and "
                    f"{fit.name} needs {shape}"
                )

    def _made(self, spec: TensorSpec, follows: bool) -> Made:
        """What becomes of a tensor of the base."""
        if follows:
            assert self.vocabulary is not None
            made = resized(spec, self.base, self.brought, self.vocabulary)
        elif spec.name in self.labelled:
            made = self._whole(self.brought[spec.name], self.specs[spec.name])
        else:
            made = Made(spec, spec.name)
        if self.new is None:
            return made
        renamed = dataclasses.replace(made.spec, name=self.new.name_of(spec.name))
        return dataclasses.replace(made, spec=renamed)

    def _added(self, each: Brought) -> Made:
        """A head, in the dtype of the base's numbers."""
        dtype = next((s.dtype for s in self.base.specs.values() if s.is_float), each.spec.dtype)
        return self._whole(each, dataclasses.replace(each.spec, dtype=dtype))

    def _whole(self, each: Brought, spec: TensorSpec) -> Made:
        refuse_in_part(each, spec)
        return Made(spec, each.key, each.weighted.adapter)
