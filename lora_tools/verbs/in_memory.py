"""Tensors in memory, where a function takes a path: each state dict is put into a file for the time
of the call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.safetensors_writer import SafetensorsWriter
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec
from lora_tools.verbs.values import in_memory, several
from lora_tools.watch.places import MEMORY, standing_for

if TYPE_CHECKING:
    from lora_tools.verbs.row import Verb


@contextlib.contextmanager
def as_files(row: Verb, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The arguments, with the path of a file for each state dict. Errors and reports call the file
    ``memory:base``, by the argument's name (``memory:adapters-2`` for the second of several).

    Raises:
        TypeError: a dict holds something else than tensors of known dtypes.
    """
    addresses: dict[Path, str] = {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def home() -> Path:
            folder = tempfile.TemporaryDirectory(prefix="loratools-")
            return Path(os.path.realpath(stack.enter_context(folder)))

        def put(name: str, tensors: Any) -> Path:
            path = home() / f"{name}.safetensors"
            _save(f"{row.name}() wants {name}", tensors, path)
            addresses[path] = f"{MEMORY}{name}"
            return path

        replaced = _replaced(row, given, put)
        with standing_for(addresses) if addresses else contextlib.nullcontext():
            yield replaced


Put = Callable[[str, Any], Path]


def _replaced(row: Verb, given: Mapping[str, Any], put: Put) -> Mapping[str, Any]:
    """The arguments, also those within records, with what ``put`` makes of tensors."""
    made = dict(given)
    for argument in row.arguments:
        if argument.takes_tensors:
            made[argument.name] = _each(row, argument.name, argument.several, given, put)
    for keyword in row.keywords:
        if keyword.takes_tensors and keyword.name in given:
            made[keyword.name] = _each(row, keyword.name, keyword.several, given, put)
    for name, record in row.records.items():
        if isinstance(whole := given.get(name), record):
            mine = [k for k in row.keywords if k.record is record and k.takes_tensors]
            values = vars(whole)
            new = {k.name: _each(row, k.name, k.several, values, put) for k in mine}
            made[name] = dataclasses.replace(whole, **new) if new else whole
    return made


def _each(row: Verb, name: str, is_several: bool, given: Mapping[str, Any], put: Put) -> Any:
    if not is_several or given[name] is None:
        return put(name, given[name]) if in_memory(given[name]) else given[name]
    values = []
    for number, value in enumerate(several(row.name, name, given[name]), 1):
        called = name if number == 1 else f"{name}-{number}"
        if in_memory(value):
            value = put(called, value)
        elif isinstance(value, tuple) and value and in_memory(value[0]):
            value = (put(called, value[0]), *value[1:])
        values.append(value)
    return tuple(values)


def _save(wants: str, held: Any, path: Path) -> None:
    """Write tensors one by one. Those that share memory are written apart, as a state dict has
    them."""
    import torch

    get = held.__getitem__ if isinstance(held, Mapping) else held.get_tensor
    specs = []
    for name in held.keys():  # noqa: SIM118 - what safetensors opens cannot be iterated
        tensor = get(name)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = type(tensor).__name__
            raise TypeError(
                f"{wants} to be a path or a state dict: {name!r} is no tensor ({found})"
            )
        specs.append(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)))
    with SafetensorsWriter(path, specs) as file:
        for spec in specs:
            file.write(spec.name, as_bytes(get(spec.name)))
