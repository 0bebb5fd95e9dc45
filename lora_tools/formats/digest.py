"""Content hashes: of a tensor's bytes, and of a set of tensors however it is sharded.

A checkpoint's digest is the SHA-256 of the sorted lines ``name dtype shape hash``, where ``hash``
is the XXH3-128 of the tensor's bytes. It is the same for one file and for ten shards of it, and
runs at the speed of memory. It tells accidents, not attacks: XXH3 is not cryptographic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from lora_tools.formats.regular_files import open_file
from lora_tools.records import TensorSpec

PREFIX = "xxh3-128/sha256:"
BLANK = PREFIX + "0" * 64  # stands where a digest will
# Metadata that says how a file was made: it does not pass to a checkpoint that is made of the file.
PROVENANCE = (
    "loratools",
    "command",
    "base_digest",
    "tuned_digest",
    "adapter_digests",
    "adapter_settings",
)


def tensor_hash(data: memoryview) -> str:
    """XXH3-128 of the bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def digest(specs: Iterable[TensorSpec], hashes: Mapping[str, str]) -> str:
    """Digest of named tensors, independent of their order and files."""
    lines = sorted(f"{s.name} {s.dtype} {list(s.shape)} {hashes[s.name]}\n" for s in specs)
    return PREFIX + hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open_file(path) as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        state = hashlib.sha256()
        while chunk := file.read(1 << 20):
            state.update(chunk)
        return state.hexdigest()
