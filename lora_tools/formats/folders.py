"""Folders that hold no weights of their own, and what lies in them that is meant: a repository of
the hub's cache, the checkpoints of a training run, adapters that PEFT put into a folder each."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_tools.errors import LoraToolsError
from lora_tools.formats.regular_files import is_there, read_file
from lora_tools.formats.sharded import inner_parts

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_adapter")
# Files beside weights, or of what has them deeper: PEFT, diffusers, sentence-transformers, torch.
_SIGNS = (ADAPTER_CONFIG, "model_index.json", "modules.json", ".metadata")
# What a training run leaves beside weights, and where there are none.
_LEFT = re.compile(
    r"(training_args|optim|scheduler|scaler|rng_state|random_states|extra_state).*|data"
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_REPOSITORY = re.compile(r"models--.+")
_DEEPEST = 5  # a cache, a repository, its snapshot, a checkpoint, an adapter's folder


def meant(path: Path, fail: type[LoraToolsError]) -> Path:
    """The file or folder that a path stands for: itself where it holds weights, or nothing deeper
    is known to; else the one folder in it that does.

    Raises:
        fail: several do, which are named, or a repository of the hub's cache holds no snapshot.
    """
    for _ in range(_DEEPEST):
        if not os.path.isdir(path) or _holds_weights(path):  # noqa: PTH112 - see Path.exists
            break
        found = _inside(path, fail)
        if not found:
            break
        if len(found) > 1:
            raise fail(_choice(path, found))
        [path] = found
    return path


def named_adapters(folder: Path) -> list[str]:
    """Names of the folders in one that hold an adapter of PEFT each."""
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{ADAPTER_CONFIG}"))


def _holds_weights(folder: Path) -> bool:
    return any(
        path.name in _SIGNS or (path.suffix in _WEIGHTS and not _LEFT.fullmatch(path.stem))
        for path in folder.iterdir()
    )


def _inside(folder: Path, fail: type[LoraToolsError]) -> list[Path]:
    """The folders that can be meant by one, checkpoints in the order of their steps."""
    if folder.name == "snapshots":
        folder = folder.parent
    if _REPOSITORY.fullmatch(folder.name):
        return _snapshots(folder, fail)
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    runs = [path for path in folders if _CHECKPOINT.fullmatch(path.name)]
    runs = [p for p in runs if _holds_weights(p) or named_adapters(p) or inner_parts(p)]
    others = [
        path
        for path in folders
        if is_there(path / ADAPTER_CONFIG, fail) or _REPOSITORY.fullmatch(path.name)
    ]
    others = [path for path in others if path not in runs]
    others += inner_parts(folder)
    return others + sorted(runs, key=lambda path: int(path.name.rpartition("-")[2]))


def _snapshots(repository: Path, fail: type[LoraToolsError]) -> list[Path]:
    """The snapshot that the repository's ``main`` is, or all where that is not there."""
    main = repository / "refs" / "main"
    found = [path for path in sorted(repository.glob("snapshots/*")) if path.is_dir()]
    if is_there(main, fail):
        revision = read_file(main, fail).decode(errors="replace").strip()
        found = [path for path in found if path.name == revision] or found
    if not found:
        name = repository.name.removeprefix("models--").replace("--", "/")
        raise fail(
            f"{repository}: a folder of the hub's cache without a snapshot; download it with `hf "
            f"download {name}`"
        )
    return found


def _choice(folder: Path, found: list[Path]) -> str:
    names = ", ".join(path.name for path in found[:8]) + (", …" if found[8:] else "")
    last = " (the last)" if all(_CHECKPOINT.fullmatch(path.name) for path in found) else ""
    return (
        f"{folder}: has no weights itself, but {len(found)} folders in it do: {names}; give one of "
        f"them, such as {found[-1]}{last}"
    )
