"""What callers from Python give, as the verbs read it."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def listed(value: Any) -> bool:
    """Whether it holds several values that can be read more than once."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def in_memory(value: Any) -> bool:
    """Whether it is named tensors: a state dict, or what ``safetensors.safe_open`` opens."""
    return isinstance(value, Mapping) or hasattr(value, "get_tensor")


def one_adapter(value: Any) -> bool:
    """Whether it is an adapter, or one and its weight, where a list of them can stand."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[1], numbers.Real) and not isinstance(value[1], bool)
    return isinstance(value, str | os.PathLike) or in_memory(value)


def several(verb: str, name: str, value: Any) -> Sequence[Any]:
    """Several values, which are read more than once: what gives each only once is emptied here. One
    adapter may stand alone. Raises TypeError for another value that does."""
    if name == "adapters" and one_adapter(value):
        return (value,)
    if listed(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        hint = _next(value)
        found = type(value).__name__ if hint else repr(value)
        raise TypeError(f"{verb}() wants a list of {name}, not {found}{hint}")
    return tuple(value)


def check_place(verb: str, name: str, value: Any, takes_tensors: bool = False) -> None:
    """Raises TypeError where an input or an output is no path, and no tensors where those do."""
    if name == "adapters":
        value = value[0] if isinstance(value, tuple) and one_adapter(value) else value
    if isinstance(value, str | os.PathLike) or (takes_tensors and in_memory(value)):
        return
    kind = type(value).__name__
    wanted = "a path or a state dict" if takes_tensors else "a path"
    raise TypeError(f"{verb}() wants {name} to be {wanted}, not {kind}{_next(value)}")


def _next(value: Any) -> str:
    """What to do with a model."""
    if hasattr(value, "state_dict"):
        return "; save_pretrained writes a model to a folder: give its path"
    return ""


def dtype_name(value: Any) -> Any:
    """Of a dtype of torch its name; another value as it is."""
    if (type(value).__module__, type(value).__name__) == ("torch", "dtype"):
        return str(value).removeprefix("torch.")
    return value
