"""What config files say of a stored number format: config.json, and one that the library writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.json_file import read_object
from lora_tools.formats.quantized.packed import entry_of
from lora_tools.formats.regular_files import is_there

# What must not be said in two ways, since it says what codes stand for.
_OF_CODES = ("bits", "group_size", "checkpoint_format", "format", "version", "zero_point")


def settings_of(
    stored: Checkpoint, methods: Collection[str], files: Sequence[str]
) -> Mapping[str, Any] | None:
    """``quantization_config`` of config.json (or of its text) that names one of these methods, over
    what a file beside it says; None where neither is there, or another method is named.

    Args:
        files: that may lie beside it; the first need not name its method.

    Raises:
        CheckpointError: they contradict each other.
    """
    entry = entry_of(stored.config)
    if entry and str(entry.get("quant_method")).lower() not in methods:
        return None
    path, beside = _beside(stored, methods, files)
    if not entry or beside is None:
        return entry or beside
    for key in _OF_CODES:
        if key in entry and beside.get(key, entry[key]) != entry[key]:
            raise CheckpointError(
                f"{path}: says {key} {beside[key]!r}, but config.json says {entry[key]!r}; keep "
                "the one that fits the weights"
            )
    return {**beside, **entry}


def _beside(
    stored: Checkpoint, methods: Collection[str], files: Sequence[str]
) -> tuple[Path, Mapping[str, Any] | None]:
    for file in files:
        path = stored.path / file
        if stored.is_folder and is_there(path):
            said = read_object(path)
            named = said.get("quant_method", "" if file != files[0] else next(iter(methods)))
            if str(named).lower() in methods:
                return path, said
    return stored.path, None
