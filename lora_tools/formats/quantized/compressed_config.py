"""What a config.json says of weights that compressed-tensors stored, module by module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.names import EMBEDDING
from lora_tools.formats.patterns import matches
from lora_tools.formats.quantized.compressed_tensors import METHOD, WRITTEN, Settings
from lora_tools.formats.quantized.packed import ENTRIES, ORIGINAL, said_in

# Formats whose name says how numbers are stored, whatever else a config says of them.
_ALONE = {
    WRITTEN["nvfp4"].form: WRITTEN["nvfp4"],
    WRITTEN["mxfp4"].form: WRITTEN["mxfp4"],
    "mxfp6-pack-quantized": Settings("mxfp6-pack-quantized", "float", 6, "group", 32),
    "mxfp8-quantized": Settings("mxfp8-quantized", "float", 8, "group", 32),
}
# By format: the kind of numbers and the most bits of one.
_MOST_BITS = {
    "pack-quantized": {"int": 8},
    "int-quantized": {"int": 16},
    "float-quantized": {"float": 8},
    "naive-quantized": {"int": 16, "float": 8},
}
_PLAIN = ("dense", "fakequant")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_CLASS = re.compile(r"[A-Z]\w*")
_NEXT = f"get the model's config.json again, or {ORIGINAL}"


@dataclasses.dataclass(frozen=True)
class Group:
    """A config group: its name, the modules that it is for, and how their weights are stored."""

    name: str
    targets: tuple[str, ...]
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Groups:
    """All groups of a config, in its order.

    Attributes:
        ignore: modules that are in none of them, by names, patterns and classes.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def ignores(self, module: str) -> bool:
        """Whether the module's weight is said to be plain, by its name or a pattern."""
        return any(_matches(module, target) for target in self.ignore)

    def settings_of(self, module: str) -> Settings:
        """How the module's weight is stored.

        A name comes before a pattern, and that before a class, as the package has it. No model is
        built, so a class is told by the module's name; where all groups store alike, none is asked.

        Raises:
            CheckpointError: the groups differ, and none of them is for this module.
        """
        if len({group.settings for group in self.groups}) == 1:
            return self.groups[0].settings
        targets = {target: group for group in self.groups for target in group.targets}
        for target in sorted(targets, key=lambda each: ("re:" in each, each)):
            if _matches(module, target):
                return targets[target].settings
        embeds = EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None
        own = targets.get("Embedding" if embeds else "Linear")
        classes = {g.settings for t, g in targets.items() if _CLASS.fullmatch(t)}
        if own is not None:
            return own.settings
        if len(classes) == 1:
            return classes.pop()
        raise CheckpointError(
            f"{module}.weight: stored by {METHOD}, but no config group in config.json covers it "
            f"({', '.join(group.name for group in self.groups)}); {_NEXT}"
        )


def _matches(module: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return matches(target.removeprefix("re:"), module)
    except re.error as error:
        raise CheckpointError(f"config.json: {target!r} is not a pattern ({error})") from None


def groups_of(config: Mapping[str, Any]) -> Groups | None:
    """What config.json says of weights in compressed-tensors' formats; None where it does not.

    Raises:
        CheckpointError: it says something that is not known, or that changes what the weights are:
            sparse forms, rotations.
    """
    entry = _entry(config)
    if entry is None or entry.get("format") in _PLAIN:
        return None
    _refuse_otherwise(entry, config)
    form = str(entry.get("format"))
    listed = entry.get("config_groups")
    if not listed and form in _ALONE:
        groups: list[Group] = [Group(form, (), _ALONE[form])]
    elif isinstance(listed, Mapping):
        groups = [g for name, body in listed.items() if (g := _group(name, body, form))]
    else:
        raise CheckpointError(
            f"config.json: quantization_config of {METHOD} has no config_groups, which give the "
            f"bits of each weight; {_NEXT}"
        )
    ignore = entry.get("ignore") or []
    if not isinstance(ignore, list):
        raise CheckpointError(f"config.json: ignore is not a list of modules; {_NEXT}")
    return Groups(tuple(groups), tuple(str(name) for name in ignore)) if groups else None


def _entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for entry in said_in(config, ENTRIES):
        if isinstance(entry, Mapping) and _is_own(entry):
            inner = entry.get("quantization_config")  # of files by sparseml
            return inner if isinstance(inner, Mapping) else entry
    return None


def _is_own(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is compressed-tensors', whose older files do not say so."""
    method = entry.get("quant_method")
    if method is None:
        return "quant_algo" not in entry and (
            "config_groups" in entry or "quantization_config" in entry
        )
    return bool(method == METHOD)


def _refuse_otherwise(entry: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what changes weights beyond their numbers' form."""
    for holder in (entry, config, config.get("compression_config")):
        sparsity = holder.get("sparsity_config") if isinstance(holder, Mapping) else None
        form = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
        if form != "dense":
            raise CheckpointError(
                f"config.json: sparsity_config says {form!r}: weights stored without their zeros "
                "cannot be read; give the model that it was compressed from"
            )
    transform = entry.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise CheckpointError(
            "config.json: transform_config: the weights are rotated to fit transforms of their "
            f"inputs, and this cannot be undone; {ORIGINAL}"
        )


def _group(name: str, body: Any, form: str) -> Group | None:
    """A config group; None of one that leaves weights plain."""
    place = f"config.json: config group {name}"
    if not isinstance(body, Mapping) or not isinstance(body.get("targets"), list):
        raise CheckpointError(f"{place} names no targets; {_NEXT}")
    weights, form = body.get("weights"), str(body.get("format") or form)
    if weights is None or form in _PLAIN:
        return None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{place}: its settings of weights are not an object; {_NEXT}")
    return Group(name, tuple(map(str, body["targets"])), _settings(place, weights, form))


def _settings(place: str, weights: Mapping[str, Any], form: str) -> Settings:
    kind, bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy")
    if strategy is None:  # as the package infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    grouped = strategy in ("group", "tensor_group")
    structure = _structure(weights.get("block_structure")) if strategy == "block" else (0, 0)
    sound = (
        type(bits) is int
        and bits > 0
        and type(symmetric) is bool
        and strategy in _STRATEGIES
        and (not grouped or (type(size) is int and size > 0))
        and structure is not None
    )
    if not sound or structure is None:
        raise CheckpointError(f"{place}: {dict(weights)} is not a way to store weights; {_NEXT}")
    if weights.get("dynamic"):
        raise CheckpointError(f"{place}: dynamic is set, which stored weights cannot have; {_NEXT}")
    of = int(size or 0) if grouped else 0
    settings = Settings(form, kind, bits, strategy, of, structure, symmetric)
    if form in _ALONE:
        alone = _ALONE[form]
        known = (kind, bits, size, symmetric) == (alone.kind, alone.bits, alone.group_size, True)
        settings = alone
    else:
        known = bits <= _MOST_BITS.get(form, {}).get(kind, 0) and (kind == "int" or bits == 8)
    if not known:
        zeros = "" if symmetric else " with zero points"
        raise CheckpointError(
            f"{place}: {form!r} of {kind}{bits} by {strategy}{zeros} cannot be read; load it with "
            "the library that made it, save it in bfloat16, and give that"
        )
    return settings


def _structure(value: Any) -> tuple[int, int] | None:
    if isinstance(value, str):  # "128x128", in older files
        value = [int(part) for part in value.split("x") if part.isdecimal()]
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    high, wide = value
    return (high, wide) if type(high) is type(wide) is int and min(value) > 0 else None
