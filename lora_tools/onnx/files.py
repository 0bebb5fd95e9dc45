"""Which graphs lie at a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError

if TYPE_CHECKING:
    pass


def onnx_graphs(path: str | Path) -> list[Path]:
    """The graphs at a path, a file or a folder of them."""
    given = Path(path)
    if given.is_file():
        return [given] if given.suffix == ".onnx" else []
    return sorted(given.glob("*.onnx")) if given.is_dir() else []


_SETS = (
    ("model.onnx",),
    ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"),
)


def graphs_at(path: str | Path) -> list[Path]:
    """The graphs of an ONNX model, a file or a folder; [] where it is none.

    Raises:
        UsageError: a folder with several models.
    """
    given = Path(path)
    if given.is_file():
        return [given] if given.suffix == ".onnx" else []
    found = {file.name: file for file in sorted(given.glob("*.onnx"))} if given.is_dir() else {}
    for names in _SETS:
        if names[0] in found:
            return [found[name] for name in names if name in found]
    if len(found) > 1:
        raise UsageError(f"{path}: holds several models ({', '.join(found)}); give one of them")
    return list(found.values())
