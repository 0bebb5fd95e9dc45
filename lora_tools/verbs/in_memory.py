"""State dicts, where a function takes a path: each is put into a file for the time of the call."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.safetensors_writer import SafetensorsWriter
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec
from lora_tools.watch.places import MEMORY, standing_for

if TYPE_CHECKING:
    from lora_tools.verbs.row import Verb


@contextlib.contextmanager
def as_files(row: Verb, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The arguments, with the path of a file for each state dict. Errors and reports call the file
    ``memory:base``, by the argument's name.

    Raises:
        TypeError: a dict holds something else than tensors of known dtypes.
    """
    dicts = {a.name: given[a.name] for a in row.arguments if isinstance(given[a.name], Mapping)}
    if not dicts:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        home = Path(os.path.realpath(folder))
        files = {name: home / f"{name}.safetensors" for name in dicts}
        for name, path in files.items():
            _save(f"{row.name}() wants {name}", dicts[name], path)
        with standing_for({path: f"{MEMORY}{name}" for name, path in files.items()}):
            yield {**given, **files}


def _save(wants: str, tensors: Mapping[Any, Any], path: Path) -> None:
    """Write tensors one by one. Those that share memory are written apart, as a state dict has
    them."""
    import torch

    specs = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = type(tensor).__name__
            raise TypeError(
                f"{wants} to be a path or a state dict: {name!r} is no tensor ({found})"
            )
        specs.append(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)))
    with SafetensorsWriter(path, specs) as file:
        for name, tensor in tensors.items():
            file.write(name, as_bytes(tensor))
