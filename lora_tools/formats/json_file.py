"""A file that holds a JSON object, such as a config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, LoraToolsError
from lora_tools.formats.lfs import refuse_pointer
from lora_tools.formats.regular_files import read_file

_MOST_NESTED = 5_000_000  # lists and objects, of some 60 bytes each in memory
_MOST_DIGITS = 300  # of a whole number: a float holds no larger one
_LONG = re.compile(rf"\d{{{_MOST_DIGITS + 1}}}")
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # of a surrogate pair, written or read


def refuse_nested(text: str) -> None:
    """Raises ValueError for JSON of more lists and objects than any is that is meant."""
    if text.count("[") + text.count("{") > _MOST_NESTED:
        raise ValueError(f"it holds more than {_MOST_NESTED:,} lists and objects")


def parse(data: bytes | str, **options: Any) -> Any:
    """JSON, with options of ``json.loads``. Raises ValueError for what is none, for lists and whole
    numbers without end, and for text that is not Unicode, which no file and no tensor can be named
    by; and RecursionError."""
    text = data.decode(json.detect_encoding(data)) if isinstance(data, bytes) else data
    refuse_nested(text)
    if _LONG.search(text):
        options = {**options, "parse_int": _whole}
    found = json.loads(text, **options)
    if _HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            part = error.object[max(error.start - 20, 0) : error.end]
            raise ValueError(f"{part!r} is not Unicode (half a surrogate pair)") from None
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def read_object(path: Path, fail: type[LoraToolsError] = CheckpointError) -> dict[str, Any]:
    """What it holds. Raises ``fail`` for what is no JSON object, or cannot be read."""
    try:
        data = read_file(path, fail)
        refuse_pointer(path, data, fail)
        found = parse(data)
    except (ValueError, RecursionError) as error:
        raise fail(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise fail(f"{path}: not a JSON object")
    return found


# What entries of config.json that are read here may be; None stands for absent.
_KINDS: Mapping[str, type] = {
    "model_type": str,
    "tie_word_embeddings": bool,
    "vocab_size": int,
    "num_labels": int,
    "id2label": dict,
    "text_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "quantization_config": dict,
    "compression_config": dict,
    "_name_or_path": str,
}
_SAID = {str: "a string", bool: "true or false", int: "a whole number", dict: "a table"}


def check_config(path: Path, said: Mapping[str, Any]) -> None:
    """Raises CheckpointError where an entry of a config.json, or of its text_config, is of a type
    that no reader of it takes."""
    check_names(path, said, "architectures")
    for key, kind in _KINDS.items():
        found = said.get(key)
        if found is not None and type(found) is not kind:
            raise CheckpointError(
                f"{path}: {key} is {str(found)[:60]!r}, but must be {_SAID[kind]}"
            )
    inner = said.get("text_config")
    if inner:
        check_config(path, inner)


def check_names(
    path: Path, said: Mapping[str, Any], *keys: str, fail: type[LoraToolsError] = CheckpointError
) -> None:
    """Raises ``fail`` where one of these entries is there and no list of names."""
    for key in keys:
        found = said.get(key) or []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise fail(f"{path}: {key} is {str(found)[:60]!r}, but must be a list of names")
