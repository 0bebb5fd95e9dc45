"""Content hashes: of a tensor's bytes, and of a set of tensors however it is sharded.

A digest is the SHA-256 of the sorted lines of name, dtype, shape and hash of every tensor. It is
the same for one file and for ten shards of it. What the hash of a tensor is says its prefix:

- ``xxh3-128/sha256:``, the XXH3-128 of the bytes, which runs at the speed of memory. It tells
  accidents, not attacks: XXH3 is not cryptographic, and a line is plain text.
- ``sha256/sha256:``, the SHA-256 of the bytes, and each line a JSON array, so that no name can be
  made to look like two lines: to make other tensors with that digest is not known to be possible.

Which of them is formed is said once for a call, by ``using``; threads that work for it take it
over (``engine.threads``). What was recorded in the other one is compared in that one, by ``like``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, get_args

import xxhash

from lora_tools.errors import MismatchError
from lora_tools.formats.regular_files import open_file
from lora_tools.records import TensorSpec
from lora_tools.within import holding

Kind = Literal["xxh3", "sha256"]
# Metadata that says how a file was made: it does not pass to a checkpoint that is made of the file.
PROVENANCE = (
    "loratools",
    "command",
    "base_digest",
    "tuned_digest",
    "adapter_digests",
    "adapter_settings",
)


class Hash(Protocol):
    """A hash that is formed piece by piece."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class _Form:
    prefix: str
    new: Callable[[], Hash]
    line: Callable[[TensorSpec, str], str]


def _text(s: TensorSpec, value: str) -> str:
    return f"{s.name} {s.dtype} {list(s.shape)} {value}\n"


def _array(s: TensorSpec, value: str) -> str:
    return json.dumps([s.name, s.dtype, list(s.shape), value]) + "\n"


_FORMS: dict[Kind, _Form] = {
    "xxh3": _Form("xxh3-128/sha256:", xxhash.xxh3_128, _text),
    "sha256": _Form("sha256/sha256:", hashlib.sha256, _array),
}
assert tuple(_FORMS) == get_args(Kind)
_used: contextvars.ContextVar[Kind] = contextvars.ContextVar("digest", default="xxh3")


def using(kind: Kind) -> AbstractContextManager[None]:
    """Hashes and digests of that kind within."""
    return holding(_used, kind)


def used() -> Kind:
    """The kind that is formed here."""
    return _used.get()


def kind_of(recorded: str) -> Kind:
    """The kind of a digest, by its prefix. Raises MismatchError for one that is not known here."""
    for kind, form in _FORMS.items():
        if recorded.startswith(form.prefix):
            return kind
    known = " and ".join(form.prefix for form in _FORMS.values())
    raise MismatchError(
        f"the digest {recorded!r} is of an unknown kind (known: {known}); it may come from a newer "
        "loratools or from another tool"
    )


def like(recorded: str) -> contextlib.AbstractContextManager[None]:
    """``using`` the kind of a recorded digest. Raises MismatchError as ``kind_of`` does."""
    return using(kind_of(recorded))


def new_hash() -> Hash:
    """For the bytes of one tensor, piece by piece: what ``tensor_hash`` gives of all at once."""
    return _FORMS[_used.get()].new()


def tensor_hash(data: memoryview) -> str:
    """Hash of a tensor's bytes, in hexadecimal."""
    state = new_hash()
    state.update(data)
    return state.hexdigest()


def digest(specs: Iterable[TensorSpec], hashes: Mapping[str, str]) -> str:
    """Digest of named tensors, independent of their order and files.

    Args:
        hashes: of the kind that is used here.
    """
    form = _FORMS[_used.get()]
    return sealed("".join(sorted(form.line(s, hashes[s.name]) for s in specs)))


def sealed(text: str) -> str:
    """SHA-256 of a text that holds such hashes, with the prefix of their kind."""
    return _FORMS[_used.get()].prefix + hashlib.sha256(text.encode()).hexdigest()


def blank() -> str:
    """What stands where a digest will: as long as one."""
    return _FORMS[_used.get()].prefix + "0" * 64


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open_file(path) as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        state = hashlib.sha256()
        while chunk := file.read(1 << 20):
            state.update(chunk)
        return state.hexdigest()
