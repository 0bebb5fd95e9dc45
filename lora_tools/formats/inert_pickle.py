"""Pickles read as what they say, not as what they do: no class of theirs is imported, nothing in
them is called.

Every global that a pickle names becomes a ``Record`` of the name, the arguments and the state that
the pickle gives it. So files of any version of torch are read without torch, and what a pickle
would run stays a name. (The opcodes: ``pickletools`` of the standard library.)
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from lora_tools.errors import CheckpointError

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
                    f"names {kind}, which no file of tensors needs; nothing of it was run"
                )
            self._known[module, name] = _named(kind)
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise CheckpointError("refers to data outside itself")
        return self._persistent(pid)


def read_pickle(data: bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds, with ``Record`` for all that is not of Python's own plain types.

    Args:
        persistent: what stands for what the pickle says lies outside of it.

    Raises:
        CheckpointError: it is none, or names what is neither torch's nor a path.
    """
    try:
        return _Unpickler(data, persistent).load()
    except CheckpointError:
        raise
    except Exception as error:  # pickle raises nearly anything on malformed bytes
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"not a pickle of tensors ({first})") from None
