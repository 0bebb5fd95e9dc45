"""The table of changes that PEFT's types make of weights and biases: one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lora_tools.errors import LoraToolsError, MismatchError

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.changes.on import Change, On, Product, Tensors

T = TypeVar("T")


def _changes() -> dict[str, Change]:
    from lora_tools.linalg.changes import lycoris as ly
    from lora_tools.linalg.changes import of_weight as w
    from lora_tools.linalg.changes import patterns as s
    from lora_tools.linalg.changes import products as p
    from lora_tools.linalg.changes import rotations as r

    rows = (
        *(p.loha, p.lokr, p.adalora, p.vera, p.pvera, p.randlora, p.vblora, p.unilora),
        *(p.gralora, p.tinylora, p.delora),
        *(s.fourierft, s.waveft, s.c3a, s.shira, s.supertuning, s.miss, s.beft),
        *(r.oft, r.boft, r.hra, r.bat, r.road, r.road_bias),
        *(w.input_dora, w.hira, w.glora, w.glora_bias, w.deft, w.frod, w.peanut),
        *(ly.lycoris_glora, ly.lycoris_oft, ly.lycoris_boft, ly.lycoris_ia3),
    )
    return {row.__name__: row for row in rows}


def _products() -> dict[str, Callable[[Tensors, Mapping[str, Any], On], Product | None]]:
    """Of those that have factors. LoHa and LoKr have rows of their own, since their matrices come
    cheaper otherwise."""
    from lora_tools.linalg.changes import products as p

    rows = (p.adalora, p.vera, p.pvera, p.randlora, p.vblora, p.unilora, p.tinylora, p.delora)
    own = {"loha": p.loha_product, "lokr": p.lokr_product}
    return {**{row.__name__: row for row in rows}, **own}


def change(name: str, tensors: Tensors, numbers: Mapping[str, Any], on: On) -> torch.Tensor:
    """The change by a row of the table, in ``on.shape`` where that is known; in float32, or float64
    where the base's weight is.

    Raises:
        MismatchError: the tensors do not go together, or are of another layer.
        NotInstalled: what this kind takes is missing.
    """
    from lora_tools.linalg.changes.on import Product

    def made(tensors: Tensors) -> torch.Tensor:
        result = _changes()[name](tensors, numbers, on)
        matrix = result.matrix() if isinstance(result, Product) else result
        return matrix.reshape(on.shape) if on.shape else matrix

    return _refusing(made, name, tensors, on)


def product(name: str, tensors: Tensors, numbers: Mapping[str, Any], on: On) -> Product | None:
    """Exact factors of what ``change`` gives, where there are any of a rank so low that working
    with them costs less than with the matrix. Raises as that does."""
    row = _products().get(name)
    if row is None:
        return None
    found = _refusing(lambda tensors: row(tensors, numbers, on), name, tensors, on)
    return found if found is not None and on.is_small(found.left.shape[1]) else None


def _refusing(made: Callable[[Tensors], T], name: str, tensors: Tensors, on: On) -> T:
    """What is made of the tensors in float32 or better, and mistakes as ``change`` tells them."""
    import torch

    given = on.given if on.given is not None else on.given_bias
    wide = torch.float64 if given is not None and given.dtype == torch.float64 else torch.float32
    tensors = {k: x.to(wide) if x.is_floating_point() else x for k, x in tensors.items()}
    shapes = ", ".join(f"{part} {list(x.shape)}" for part, x in sorted(tensors.items()))
    try:
        return made(tensors)
    except LoraToolsError:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, ZeroDivisionError, StopIteration) as e:
        what = f" for {list(on.shape)}" if on.shape else ""
        raise MismatchError(f"{shapes} make no {name}{what} ({type(e).__name__})") from None
