"""Opening PEFT's adapter folders: the config, and the tensors in a file or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats.adapters.peft import CONFIG, IDLE_FIELDS, STEM, WEIGHTS, Adapter
from lora_tools.formats.adapters.unmergeable import refuse_unmergeable
from lora_tools.formats.checkpoint import open_weights
from lora_tools.formats.json_file import check_names, read_object
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.shards import Shards, check_index, read_index, shards_named
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.formats.wrapped_names import adapter_file

Seen = Callable[[Path, TensorFile, dict[str, Any]], tuple[TensorFile, dict[str, Any]]]


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises AdapterError where it is absent, no JSON object, or selects
    modules by something else than a pattern or names."""
    try:
        said = read_object(path, AdapterError)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent}: no {path.name} there") from None
    selects = ("target_modules", "exclude_modules", "modules_to_save")
    listed = [key for key in selects if not isinstance(said.get(key), str)]
    check_names(path, said, *listed, fail=AdapterError)
    return said


def open_peft(
    source: str | Path, folder: Path, allow_pickle: bool = False, seen: Seen | None = None
) -> Adapter:
    """Open a PEFT adapter folder, which ``source`` stands for; ``seen``: as what, if not as it is.

    Raises:
        AdapterError, UnsupportedAdapter, UnsafeInput, CheckpointError (a truncated file).
    """
    if not is_there(folder / CONFIG, AdapterError):
        raise AdapterError(f"{source}: has no {CONFIG}; is it a PEFT adapter folder?")
    config = read_config(folder / CONFIG)
    refuse_unmergeable(folder, config)
    file = _weights(folder, allow_pickle)
    plain, notes = adapter_file(folder, file)
    plain, config = seen(folder, plain, config) if seen is not None else (plain, config)
    adapter = Adapter(folder, plain, config)
    adapter.stored, adapter.notes = file, (*adapter.notes, *notes)
    adapter.config = {k: v for k, v in config.items() if k not in IDLE_FIELDS}
    return adapter


def _weights(folder: Path, allow_pickle: bool) -> TensorFile:
    """The file of tensors, or its shards; a pickle only where there is nothing else."""
    for suffix in (".safetensors", ".bin"):
        if is_there(folder / f"{STEM}{suffix}", AdapterError):
            return open_weights(folder / f"{STEM}{suffix}", allow_pickle)
        if found := shards_named(folder, STEM, suffix):
            index, files = found
            shards = Shards(index, [open_weights(file, allow_pickle) for file in files])
            if index not in files:
                check_index(shards.home, index, read_index(index))
            return shards
    raise AdapterError(f"{folder}: has no {WEIGHTS}")
