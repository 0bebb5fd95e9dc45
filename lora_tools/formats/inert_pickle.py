"""Pickles read as what they say, not as what they do: no class of theirs is imported, nothing in
them is called.

Every global that a pickle names becomes a ``Record`` of the name, the arguments and the state that
the pickle gives it. So files of any version of torch are read without torch, and what a pickle
would run stays a name. (The opcodes: ``pickletools`` of the standard library.)
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from lora_tools.errors import CheckpointError, first_line

# What else a file of tensors may name; all of torch's names are taken for what they are.
_PLAIN = {("collections", "OrderedDict"): dict, ("torch", "Size"): tuple}
_OTHERS = ("pathlib",)
_GETATTR = ("builtins.getattr", "__builtin__.getattr")  # a class within another


class Record:
    """An object that a pickle makes, unmade.

    Attributes:
        kind: the dotted name of its class or function.
        args: what that would be called with.
        state: what it would then be set to, or None.
    """

    __slots__ = ("args", "state")
    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        if cls.kind in _GETATTR:
            return _named(".".join(each if type(each) is str else kind_of(each) for each in args))
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        # Also what keeps a pickle from setting attributes of its own on this class.
        self.state = state

    @property
    def fields(self) -> dict[str, Any]:
        """The state by names: of slots, too."""
        parts = self.state if type(self.state) is tuple else (self.state,)
        return {k: v for part in parts if type(part) is dict for k, v in part.items()}


def kind_of(value: Any) -> str:
    """The dotted name of a ``Record``, or of a class or function that a pickle names; "" of all
    else."""
    if isinstance(value, Record):
        return value.kind
    return value.kind if isinstance(value, type) and issubclass(value, Record) else ""


def _named(kind: str) -> type[Record]:
    return type("Record", (Record,), {"kind": kind, "__slots__": ()})


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._persistent = persistent
        self._known: dict[tuple[str, str], Any] = dict(_PLAIN)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            kind = f"{module}.{name}"
            if module.partition(".")[0] not in ("torch", *_OTHERS) and kind not in _GETATTR:
                raise CheckpointError(
                    f"refers to {kind}, which a file of tensors does not need; nothing was run"
                )
            self._known[module, name] = _named(kind)
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise CheckpointError("refers to data outside itself")
        return self._persistent(pid)


_LINE, _LINES, _NONE = 1000, 1001, 1002  # beside the sizes of arguments
_PUT, _LONG_BINPUT, _STOP = b"pr."


@functools.cache
def _sizes() -> list[int]:
    """Of each opcode the bytes of its argument, or minus the bytes of the length before it; of what
    ends with a line, and of what is no opcode, another."""
    import pickletools

    lengths = {
        pickletools.TAKEN_FROM_ARGUMENT1: -1,
        pickletools.TAKEN_FROM_ARGUMENT4: -4,
        pickletools.TAKEN_FROM_ARGUMENT4U: -4,
        pickletools.TAKEN_FROM_ARGUMENT8U: -8,
        pickletools.UP_TO_NEWLINE: _LINE,
    }
    sizes = [_NONE] * 256
    for op in pickletools.opcodes:
        n = op.arg.n if op.arg is not None else 0
        sizes[ord(op.code)] = lengths.get(n, n)
    for code in b"ci":  # two lines: a module's, and a name's
        sizes[code] = _LINES
    return sizes


def _refuse_far_memo(data: bytes) -> None:
    """Raises CheckpointError for a pickle that numbers what it keeps beyond its own length: the
    standard library makes a list of that many places, of up to 64 GB, for five bytes."""
    sizes, at, end = _sizes(), 0, len(data)
    while at < end:
        op, size = data[at], sizes[data[at]]
        at += 1
        number = 0
        if size >= _LINE:
            if size == _NONE:  # which pickle says
                return
            line = data.find(b"\n", at)
            number = _index(data[at:line]) if op == _PUT else 0
            at = (line if size == _LINE else data.find(b"\n", line + 1)) + 1
            if line < 0 or not at:
                return
        elif size < 0:
            at += int.from_bytes(data[at : at - size], "little") - size
        else:
            number = int.from_bytes(data[at : at + 4], "little") if op == _LONG_BINPUT else 0
            at += size
        if number > end:
            raise CheckpointError(f"numbers an object {number:,} in a pickle of {end:,} bytes")
        if op == _STOP:
            return


def _index(line: bytes) -> int:
    """The number in a line; where it is none, 0, of which pickle says so."""
    short = len(line) < 20
    return (int(line) if line.strip().isdigit() else 0) if short else 1 << 64


def read_pickle(data: bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds, with ``Record`` for all that is not of Python's own plain types.

    Args:
        persistent: what stands for what the pickle says lies outside of it.

    Raises:
        CheckpointError: it is none, or names what is neither torch's nor a path.
    """
    try:
        _refuse_far_memo(data)
        return _Unpickler(data, persistent).load()
    except CheckpointError:
        raise
    except Exception as error:  # pickle raises nearly anything on malformed bytes
        raise CheckpointError(f"not a pickle of tensors ({first_line(error)})") from None
