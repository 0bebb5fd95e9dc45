"""A file that holds a JSON object, such as a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, LoraToolsError
from lora_tools.formats.lfs import refuse_pointer
from lora_tools.formats.regular_files import read_file


def read_object(path: Path, fail: type[LoraToolsError] = CheckpointError) -> dict[str, Any]:
    """What it holds. Raises ``fail`` for what is no JSON object, and OSError."""
    try:
        data = read_file(path, fail)
        refuse_pointer(path, data, fail)
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise fail(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise fail(f"{path}: not a JSON object")
    return found
