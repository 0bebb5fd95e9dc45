"""BD-LoRA of PEFT (arXiv 2510.23346): factors that are block-diagonal, of which the file holds the
blocks only. They are seen whole here, as any LoRA's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.outline import Compute, Made, View
from lora_tools.formats.adapters.unmergeable import is_block_diagonal
from lora_tools.formats.tensor_file import TensorFile

_FIELD = "use_bdlora"
_FACTOR = re.compile(r".*?(?P<last>[^.]+)\.lora_(?P<side>[AB])\.weight")


def seen_whole(
    path: Path, file: TensorFile, config: Mapping[str, Any], compute: Compute
) -> tuple[TensorFile, dict[str, Any]]:
    """The file with whole factors, and the config of the LoRA that it is then; both as they are
    where the config has no blocks.

    Raises:
        UnsupportedAdapter: a module is of neither kind, and PEFT would not load it.
    """
    if not is_block_diagonal(config):
        return file, dict(config)
    said, made = config[_FIELD], []
    blocks = said["nblocks"]
    for key, spec in file.specs.items():
        match = _FACTOR.fullmatch(key)
        sides = _sides(match["last"], said) if match else ""
        if match and len(sides) != 1 and (sides or said.get("match_strict", True)):
            raise UnsupportedAdapter(
                f"{path}: {key}: {_FIELD} does not say which factor is block-diagonal"
            )
        if match and match["side"] in sides and len(spec.shape) == 2:
            whole = dataclasses.replace(spec, shape=(spec.shape[0], spec.shape[1] * blocks))
            made.append(Made(whole, (key,), "block_diagonal", (blocks,)))
        else:
            made.append(Made(spec, (key,)))
    kept = {field: value for field, value in config.items() if field != _FIELD}
    return View(file, made, compute), kept


def _sides(module: str, said: Mapping[str, Any]) -> str:
    """Which factors of a module are said to be block-diagonal: some of "AB"."""
    named = {side: said.get(f"target_modules_bd_{side.lower()}") or () for side in "AB"}
    return "".join(side for side, names in named.items() if any(n in module for n in names))
