"""Heads that an adapter was trained with and that the base lacks, such as a classifier on a
language model: the class that has them, and what it makes of the base's tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats.names import TASK_CLASSES, class_name
from lora_tools.merging.brought import Brought
from lora_tools.records import TensorSpec
from lora_tools.sources.class_fit import TASKS, ClassFit, classes_of, fit_class
from lora_tools.sources.weighted import Weighted

# Heads that PEFT saves for them unasked.
_HEADS = ("classifier", "score", "qa_outputs")
_VALUE_HEAD = "v_head."


@dataclasses.dataclass(frozen=True)
class NewClass:
    """A class with the adapter's heads: how it loads base and heads, and its config.json."""

    fit: ClassFit
    config: dict[str, Any]
    heads: Mapping[str, Brought]

    def name_of(self, stored: str) -> str:
        """A tensor of the base by the name that the class's own files have for it."""
        prefix = f"{self.fit.prefix}."
        return prefix + stored if self._is_bare and not stored.startswith(prefix) else stored

    @functools.cached_property
    def _is_bare(self) -> bool:
        """Whether the base has the bare model's names, without the class's prefix."""
        tensors, prefix = self.fit.tensors, f"{self.fit.prefix}."
        return any(name == prefix + tensors[name].pieces[0].stored for name in tensors)


def heads_of_another_task(config: Mapping[str, Any], brought: Mapping[str, Brought]) -> set[str]:
    """Names of heads that the base has and that are for another task than the adapter's."""
    found = set()
    for name, each in brought.items():
        if _part(name) and _is_other_task(config, each.weighted):
            found.add(name)
    return found


def note_on_no_head(config: Mapping[str, Any], weighted: Weighted) -> list[str]:
    """A sentence where an adapter is for another task than the base, and holds no head for it:
    PEFT saves only those of a few names unasked."""
    adapter = weighted.adapter
    weights = [name for name in adapter.whole if name.endswith(".weight")]
    if weights or not _is_other_task(config, weighted):
        return []
    return [
        f"{weighted.path}: its task_type is {adapter.config['task_type']}, but it holds no head "
        f"for that. The output is a {class_name(config)}, like the base"
    ]


def _is_other_task(config: Mapping[str, Any], weighted: Weighted) -> bool:
    """Whether an adapter is for another kind of class than the config names."""
    wanted = TASK_CLASSES.get(str(weighted.adapter.config.get("task_type")))
    mine = class_name(config)
    return bool(wanted and mine) and not mine.endswith(str(wanted))


def _part(name: str) -> str:
    return next((part for part in name.split(".") if part in _HEADS), "")


def count_labels(config: Mapping[str, Any]) -> int:
    """Labels of a classifier with this config.json."""
    names, number = config.get("id2label"), config.get("num_labels")
    if isinstance(names, dict):
        return len(names)
    return number if type(number) is int else 2  # transformers' default


def with_labels(config: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The config for so many labels; their names stay where there are as many."""
    changed = dict(config)
    if count_labels(config) != number:
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(number)}
        changed["label2id"] = {f"LABEL_{i}": i for i in range(number)}
    changed["num_labels"] = number
    return changed


def class_with(
    heads: Mapping[str, Brought],
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    path: str,
) -> NewClass | None:
    """The one class of transformers that loads these tensors of the base and the heads, nothing
    missing; None where the names are not those of a head.

    Args:
        heads: by the adapter's names.
        config: of the base at ``path``; specs: its tensors, those that the heads replace left out.

    Raises:
        AdapterError: no class does, or several do.
    """
    each = next(iter(heads.values()))
    adapter, first = each.weighted.adapter, min(heads)
    task = str(adapter.config.get("task_type"))
    refused = f"{each.weighted.path}: {first} matches no tensor of {path}"
    if first.startswith(_VALUE_HEAD):
        raise AdapterError(
            f"{refused}: it is TRL's value head, which no class of transformers loads; "
            "--allow-unmatched leaves it out"
        )
    found, near, reasons = _fitting(heads, config, specs, task)
    if not found and not (task in TASKS or any(map(_part, heads))):
        return None
    if not found:
        why = reasons[0] if reasons else f"{config.get('model_type')!r} has no known class for it"
        raise AdapterError(
            f"{refused}, and it cannot be added as a head: {why}. Give a base of the class that "
            "the adapter was trained on; --allow-unmatched leaves such keys out"
        )
    names = [new.fit.name for new in found] + (near if task not in TASKS else [])
    if len(names) > 1:  # one that lacks another part may be meant all the same
        raise AdapterError(
            f"{refused}, and as a head it fits {' and '.join(names)}; set task_type in the "
            f"adapter's adapter_config.json to one of {', '.join(TASKS)}"
        )
    return found[0]


def _fitting(
    heads: Mapping[str, Brought],
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    task: str,
) -> tuple[list[NewClass], list[str], list[str]]:
    """Classes that fit; names of those that have the heads, too, and lack another part; and of all
    others why they do not."""
    everything = {**specs, **{name: each.spec for name, each in heads.items()}}
    found: list[NewClass] = []
    near: list[str] = []
    reasons: list[str] = []
    try:
        names = classes_of(str(config.get("model_type")), task if task in TASKS else None)
    except LookupError as error:
        return [], [], [str(error)]
    for name in names:
        for number in _possible_labels(heads, config):
            with_class = with_labels({**config, "architectures": [name]}, number)
            try:
                fit = fit_class(name, with_class, everything)
            except LookupError as error:
                reasons.append(str(error))
                continue
            fault = _fault(fit, heads)
            if not fault:
                found.append(NewClass(fit, with_class, heads))
                break
            reasons.append(fault)
            if fit.tensors.keys() >= heads.keys() and not fit.wanted.keys() & heads.keys():
                near.append(name)
    return found, list(dict.fromkeys(near)), reasons


def _possible_labels(heads: Mapping[str, Brought], config: Mapping[str, Any]) -> list[int]:
    """Numbers of labels that a head's rows may stand for, the config's own first."""
    rows = {each.shape[0] for each in heads.values() if each.shape}
    return sorted(rows, key=lambda number: (number != count_labels(config), number))


def _fault(fit: ClassFit, heads: Mapping[str, Brought]) -> str:
    """Why a class does not load all of it, or ""."""
    lacking = [name for name in fit.missing if name not in heads]
    if lacking:
        return (
            f"{fit.name} also has {lacking[0]}, which neither the base nor the adapter holds, so "
            "it would be random"
        )
    for name, each in heads.items():
        if name not in fit.tensors:
            return f"{fit.name} has no {name}"
        if name in fit.wanted:
            return f"{name} is {each.shape}, but must be {fit.wanted[name]} in {fit.name}"
    return ""


def notes_on(new: NewClass, left_out: Sequence[str]) -> list[str]:
    """What a user should know of a base that became another class."""
    number = new.config["num_labels"]
    notes = [f"the output is a {new.fit.name} with {number} label{'s' * (number != 1)}"]
    if left_out:
        notes.append(f"left out, because this class does not have them: {', '.join(left_out)}")
    if "ForSequenceClassification" in new.fit.name and new.config.get("pad_token_id") is None:
        notes.append("config.json has no pad_token_id: set it for batches of more than one")
    return notes
