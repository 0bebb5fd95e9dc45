"""A model in float32 whose sums are rounded otherwise, at random: Monte Carlo arithmetic.

One evaluation may by luck be close to the exact one though the model amplifies what is rounded.
Several that round differently show it (D. S. Parker, "Monte Carlo Arithmetic", 1997).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lora_tools.onnx.precise import shares_memory

HALF_A_PLACE = 2.0**-24  # of float32's last place: what rounding may change
# They work element by element as well, and what counts places or looks up a bucket ends in the
# first of them: a number there that should be whole must stay so.
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


@contextlib.contextmanager
def rounded_otherwise(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """For its time all numbers but the weights that an operator adds up are off by up to half a
    unit of float32's last place.

    Operators that work element by element give the same in every sound program, and are left.
    """
    with _Operators(model, seed):
        yield


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dice = torch.Generator().manual_seed(seed)
        self._weights = {_memory(parameter) for parameter in model.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.pointwise in func.tags or func in _COPIES or shares_memory(func):
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._off, (args, kwargs))
        return func(*args, **kwargs)

    def _off(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if _memory(value) in self._weights:
            return value
        off = torch.rand(value.shape, generator=self._dice)
        off.mul_(2).sub_(1).mul_(HALF_A_PLACE).add_(1).mul_(value)
        return torch.where(off.isfinite(), off, value)  # a mask's lowest number, and inf


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
