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


def whole(
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
    for key, spec in file.specs.items():
        match = _FACTOR.fullmatch(key)
        names = {side: said.get(f"target_modules_bd_{side}") or [] for side in "ab"}
        hit = {
            side: bool(match) and any(name in match["last"] for name in named)  # type: ignore[index]
            for side, named in names.items()
        }
        if (
            match
            and sum(hit.values()) != 1
            and (said.get("match_strict", True) or all(hit.values()))
        ):
            raise UnsupportedAdapter(
                f"{path}: {key}: {_FIELD} does not say which of its factors is block-diagonal"
            )
        if match and hit[match["side"].lower()] and len(spec.shape) == 2:
            blocks = said["nblocks"]
            shape = (spec.shape[0], spec.shape[1] * blocks)
            spec = dataclasses.replace(spec, shape=shape)
            made.append(Made(spec, (key,), "block_diagonal", (blocks,)))
        else:
            made.append(Made(spec, (key,)))
    kept = {field: value for field, value in config.items() if field != _FIELD}
    return View(file, made, compute), kept
