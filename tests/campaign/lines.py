"""Command lines of every verb that writes, with all that they read; and whether an output is
whole."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import onnx

from lora_tools.cli import run
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint
from tests import iotools

VERBS = {
    "extract": ["extract", "base", "tuned", "--rank", "4"],
    "merge": ["merge", "base", "adapter", "--reversible"],
    "unmerge": ["unmerge", "merged", "adapter"],
    "rescale": ["rescale", "adapter", "--rank", "3"],
    "combine": ["combine", "adapter", "second", "--rank", "3"],
    "convert": ["convert", "adapter", "--to", "mlx"],
    "quantize": ["quantize", "base", "--adapter", "adapter"],
    "compensate": ["quantize", "base", "--adapter", "adapter", "--compensate", "2"],
    "dequantize": ["dequantize", "packed"],
    "requantize": ["merge", "packed", "adapter", "--requantize"],
    "export": ["export", "base", "--adapter", "adapter", *iotools.EXPORT],
}


def inputs(top: Path, width: int, layers: int, shards: int) -> Path:
    """Everything that the verbs read, below a folder."""
    tensors = iotools.weights(width=width, layers=layers)
    iotools.checkpoint(top / "base", tensors, shards)
    iotools.checkpoint(top / "tuned", iotools.moved(tensors), shards)
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors), 8)
    shutil.copytree(top / "adapter", top / "second")
    iotools.graph(top / "graph", top / "base", tensors)
    before = signal.getsignal(signal.SIGTERM)
    merge = ["merge", str(top / "base"), str(top / "adapter"), "-o", str(top / "merged")]
    assert run([*merge, "--reversible", "-q"]) == 0
    assert run(["quantize", str(top / "base"), "-o", str(top / "packed"), "-q"]) == 0
    signal.signal(signal.SIGTERM, before)
    return top


def command(verb: str, top: Path, out: Path, *rest: str) -> list[str]:
    name, *words = VERBS[verb]
    given = [str(top / word) if (top / word).exists() else word for word in words]
    return [name, *given, "-o", str(out), "-q", *rest]


def is_complete(out: Path) -> bool:
    """Loadable, every file of it."""
    if (out / "adapter_config.json").exists() or (out / "adapter_model.safetensors").exists():
        adapter = open_adapter(out)
        return all(len(adapter.file.raw(name)) >= 0 for name in adapter.file.specs)
    if (out / "model.onnx").exists():
        onnx.checker.check_model(str(out / "model.onnx"))  # which looks for the weights' files
    checkpoint = open_checkpoint(out)
    return bool(checkpoint.config) and (out / "tokenizer.json").is_file()


def left_over(folder: Path, out: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path != out]
