"""A digest of an object and of all that it refers to, the same for the same content in whichever
process: by it a task is known again.

What an object holds is told as ``pickle`` is told it: files by path and stamp, functions by name.
What it has only computed so far (``functools.cached_property``) is left out. An object may say by
``memo_key`` what stands for it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import struct
import types
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

from lora_tools.watch.places import said_of

_SIZE = 16
_LARGE = 40  # parts


class Unknown(Exception):
    """Something that cannot be told from others of its kind, such as a function without a name."""


def digest_of(*parts: bytes) -> bytes:
    """Of parts, each told from the next."""
    state = hashlib.blake2b(digest_size=_SIZE)
    for part in parts:
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return state.digest()


class Canonical:
    """Digests of objects that stay as they are meanwhile: what is large is gone through once,
    however many refer to it. Raises Unknown. From any thread."""

    def __init__(self) -> None:
        # By id; the object is kept, so that no other gets its id.
        self._known: dict[int, tuple[object, bytes]] = {}

    def __call__(self, *values: Any) -> bytes:
        return _Walk(self._known).all("", values)


class _Walk:
    def __init__(self, known: dict[int, tuple[object, bytes]]) -> None:
        self._known, self._count = known, 0
        self._above: dict[int, int] = {}  # what is being gone through, by id, and how deep it lies

    def all(self, tag: str, values: Iterable[Any]) -> bytes:
        return digest_of(tag.encode(), *map(self._one, values))

    def _one(self, value: Any) -> bytes:
        self._count += 1
        kind, above, before = type(value), self._above, self._count
        if kind in _PLAIN:
            return digest_of(kind.__name__.encode(), _PLAIN[kind](value))
        if (known := self._known.get(id(value))) is not None:
            return known[1]
        if id(value) in above:  # a circle: how many steps back
            return digest_of(b"back", b"%d" % (len(above) - above[id(value)]))
        above[id(value)] = len(above)
        try:
            found = self._object(value)
        finally:
            del above[id(value)]
        if self._count - before > _LARGE:
            self._known[id(value)] = value, found
        return found

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if kind in (tuple, list):
            return self.all(kind.__name__, value)
        if kind in (dict, types.MappingProxyType):
            items = value.items()  # in whichever order: some are made of sets
            return digest_of(b"dict", *sorted(self._one(k) + self._one(each) for k, each in items))
        if kind in (set, frozenset):
            return digest_of(b"set", *sorted(map(self._one, value)))
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            return digest_of(b"name", _name(value).encode())
        if isinstance(value, enum.Enum):
            return digest_of(b"enum", _name(kind).encode(), value.name.encode())
        if isinstance(value, PurePath):
            return digest_of(b"path", said_of(value).encode(errors="surrogateescape"))
        if is_tensor(value):
            said = f"{value.dtype} {tuple(value.shape)}".encode()
            return digest_of(b"tensor", said, bytes_of(value))
        if hasattr(value, "memo_key"):
            return self.all(_name(kind), [value.memo_key()])
        return self._reduced(value)

    def _reduced(self, value: Any) -> bytes:
        kind = type(value)
        if dataclasses.is_dataclass(value) and not _is_told_otherwise(kind):
            fields = (getattr(value, field.name) for field in dataclasses.fields(value))
            return self.all(_name(kind), fields)
        if isinstance(value, types.MethodType):
            return self.all(value.__name__, [value.__self__])
        try:
            reduced = value.__reduce_ex__(4)
        except (TypeError, AttributeError) as error:
            raise Unknown(f"{kind.__qualname__}: {error}") from None
        if isinstance(reduced, str):
            return digest_of(b"name", f"{kind.__module__}.{reduced}".encode())
        made, args, *rest = reduced
        state, listed, keyed = (*rest, None, None, None)[:3]
        if isinstance(state, dict):
            state = {name: each for name, each in state.items() if not _is_cached(kind, name)}
        more = (list(listed or ()), dict(keyed or ()))
        return self.all(_name(kind), (made, args, state, *more))


def _name(value: Any) -> str:
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name:
        raise Unknown(f"{name}: has no name of its own")
    return name


def _is_told_otherwise(kind: type) -> bool:
    """Whether a class says by itself what is pickled of it."""
    own = {"__reduce__", "__reduce_ex__", "__getstate__"}
    return any(own & vars(each).keys() for each in kind.__mro__[:-1])


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), functools.cached_property)


def is_tensor(value: Any) -> bool:
    """Whether it is one of torch's, which is not imported for that."""
    return type(value).__module__ == "torch" and hasattr(value, "untyped_storage")


def bytes_of(tensor: Any) -> bytes:
    """The numbers of a tensor in row-major order."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: bytes = flat.view(torch.uint8).numpy().tobytes()
    return data


_PLAIN: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    bool: lambda value: b"%d" % value,
    int: lambda value: b"%d" % value,
    float: lambda value: struct.pack("<d", value),
    str: lambda value: value.encode(errors="surrogateescape"),
    bytes: bytes,
}
