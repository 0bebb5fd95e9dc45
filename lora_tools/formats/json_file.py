"""A file that holds a JSON object, such as a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, LoraToolsError
from lora_tools.formats.lfs import refuse_pointer


def read_object(path: Path, fail: type[LoraToolsError] = CheckpointError) -> dict[str, Any]:
    """What it holds. Raises ``fail`` for what is no JSON object, and OSError."""
    try:
        data = path.read_bytes()
        refuse_pointer(path, data, fail)
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise fail(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise fail(f"{path}: not a JSON object")
    return found


def check_names(
    path: Path, said: Mapping[str, Any], *keys: str, fail: type[LoraToolsError] = CheckpointError
) -> None:
    """Raises ``fail`` where one of these entries is there and no list of names."""
    for key in keys:
        found = said.get(key) or []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise fail(f"{path}: {key} is {str(found)[:60]!r}, and no list of names")
