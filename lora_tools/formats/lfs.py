"""Pointers of git-LFS: some lines of text in the place of a file that was never fetched."""

from __future__ import annotations

from pathlib import Path

from lora_tools.errors import CheckpointError, LoraToolsError

_POINTER = b"version https://git-lfs"  # the first line of each, as the specification has it
HEAD = len(_POINTER)  # bytes that tell


def is_pointer(head: bytes) -> bool:
    """Whether a file begins as a pointer does. ``head``: its first ``HEAD`` bytes, or more."""
    return head.startswith(_POINTER)


def refuse_pointer(path: Path, head: bytes, fail: type[LoraToolsError] = CheckpointError) -> None:
    """Raises ``fail`` for a pointer, told by its first bytes."""
    if is_pointer(head):
        raise fail(
            f"{path}: a git-LFS pointer, not the file itself, which was not downloaded; get it "
            f"with `git lfs pull` in {path.parent}, or `hf download`"
        )
