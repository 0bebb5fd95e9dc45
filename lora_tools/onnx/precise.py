"""A model in float32 computing in float64, with no second copy of its weights.

``model.double()`` would take twice the memory, and would still round where the model's own code
asks for float32 (norms, softmax, rotary embeddings). Here every operator of torch is given its
numbers in float64, one weight at a time, and what it makes stays so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_SHORT = (torch.float32, torch.float16, torch.bfloat16)
# They only pick rows of a table, which is not to be copied for it.
_PICKING = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
# They ask for equal dtypes before any operator is called.
_STRICT = tuple(
    getattr(torch, f"conv{transposed}{n}d") for transposed in ("", "_transpose") for n in (1, 2, 3)
)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """For its time operators compute in float64, whatever they are given or asked for."""
    with _Functions(), _Operators():  # type: ignore[no-untyped-call]
        yield


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _STRICT:
            args, kwargs = tree_map(_longer, (args, kwargs))
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if shares_memory(func):
            return func(*args, **kwargs)
        if func not in _PICKING:
            args, kwargs = tree_map(_longer, (args, kwargs))
        return tree_map(_longer, func(*args, **kwargs))


def shares_memory(func: Any) -> bool:
    """Whether an operator looks at, or writes to, what it is given: a copy would be lost."""
    return any(a.alias_info is not None for a in (*func._schema.arguments, *func._schema.returns))


def _longer(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _SHORT:
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORT else value
