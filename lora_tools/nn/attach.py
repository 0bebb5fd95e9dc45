"""File adapters on live torch models: put on, folded in, and taken off again.

The model's parameters are never written to. What changes is replaced by a new parameter and the old
one is kept, so that ``detach`` leaves the model as it was, bit for bit and object for object.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lora_tools.errors import NonFiniteError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.base_names import names_of
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.quantized.signs import sign_of
from lora_tools.linalg.layouts import Block
from lora_tools.linalg.merge import Effect, LowRank, merged_whole
from lora_tools.merging.plan import MergePlan, build_effects, plan_merge
from lora_tools.merging.targets import BaseOutline, Target
from lora_tools.options.spelling import errors_for_python
from lora_tools.records import TensorSpec
from lora_tools.sources.model_facts import live_says
from lora_tools.sources.transformers_names import renamed
from lora_tools.sources.weighted import open_weighted

M = TypeVar("M", bound=nn.Module)
Adapters = str | Path | Sequence[str | Path | tuple[str | Path, float]]
_RECORD = "_lora_tools_attached"


@dataclasses.dataclass
class _Record:
    """What ``detach`` undoes: parameters that were replaced, by name, and hooks."""

    replaced: dict[str, nn.Parameter | torch.Tensor] = dataclasses.field(default_factory=dict)
    hooks: list[Any] = dataclasses.field(default_factory=list)


def attach(
    model: M, adapters: Adapters, *, allow_unmatched: bool = False, allow_pickle: bool = False
) -> M:
    """Let a model compute as if the adapters were merged into it, its Linears' and Embeddings'
    weights left alone: a plain low-rank update of such a layer runs beside it, and B · A is never
    formed. What has no such branch (DoRA, convolutions, fused experts, tensors saved whole, biases)
    is replaced, as ``merge_`` does.

    Args:
        model: a torch module, named as the adapters' base is. Its ``config``, where it has one as
            transformers' models do, tells what names and shapes leave open.
        adapters: a path or hub id, or several: ``path``, ``"path=weight"`` or ``(path, weight)``.
        allow_unmatched: leave out adapter keys that match no tensor instead of refusing.
        allow_pickle: also read .bin, .pt, .pth and .ckpt files, with weights_only=True.

    Returns:
        The model itself. ``detach`` takes them off. The branches are for inference: the factors are
        no parameters of the model.

    Raises:
        UsageError: something is attached already.
        UnsupportedAdapter: the model is quantized.
        LoraToolsError: any other of the tree; the model is as it was then.
    """
    with errors_for_python():
        return _put_on(model, adapters, allow_unmatched, allow_pickle, branches=True)


def merge_(
    model: M, adapters: Adapters, *, allow_unmatched: bool = False, allow_pickle: bool = False
) -> M:
    """Merge adapters into a live model, as ``lora_tools.merge`` does into a file: summed in float32
    or better and rounded once. ``detach`` puts the old weights back, which are kept until then.

    Arguments and errors are those of ``attach``.
    """
    with errors_for_python():
        return _put_on(model, adapters, allow_unmatched, allow_pickle, branches=False)


def detach(model: M) -> M:
    """Take off what ``attach`` or ``merge_`` put on a model, and return it.

    Raises:
        UsageError: nothing is attached.
    """
    record = model.__dict__.pop(_RECORD, None)
    if record is None:
        raise UsageError("nothing is attached to this model")
    _undo(model, record)
    return model


def _put_on(
    model: M, adapters: Adapters, allow_unmatched: bool, allow_pickle: bool, branches: bool
) -> M:
    if _RECORD in model.__dict__:
        raise UsageError(
            "this model has adapters attached; detach them first, or give all of them in one call"
        )
    if isinstance(adapters, Mapping):
        raise TypeError("adapters are given by their paths; save_pretrained writes one to a folder")
    given = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    state = model.state_dict(keep_vars=True)
    outline = _outline(model, state)
    sign = sign_of(outline.specs, outline.config, ())
    if sign is not None:
        raise UnsupportedAdapter(
            f"{outline.path}: this model is quantized as {sign.title} (by {sign.where}), and "
            "nothing can be added to its codes; run `loratools dequantize` on its folder, and "
            "load the result"
        )
    names = names_of(outline.path, outline.weights, outline.config)
    weighted = open_weighted(given, allow_pickle, names, allow_unmatched)
    plan = plan_merge(outline, weighted, allow_unmatched)
    record = _Record()
    try:
        with torch.no_grad():
            _act(model, state, plan, record, branches)
    except BaseException:
        _undo(model, record)
        raise
    model.__dict__[_RECORD] = record
    return model


def _undo(model: nn.Module, record: _Record) -> None:
    for hook in record.hooks:
        hook.remove()
    for name, parameter in record.replaced.items():
        _set(model, name, parameter)


def _outline(model: nn.Module, state: Mapping[str, torch.Tensor]) -> BaseOutline:
    """Names, dtypes and shapes as a plan wants them."""
    specs = {
        name: TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    own = functools.partial(renamed, model)
    return BaseOutline(Path(type(model).__name__), specs, to_dict(), own, live_says(model, state))


def _act(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    plan: MergePlan,
    record: _Record,
    branches: bool,
) -> None:
    # One parameter under several names stays one, unless the adapters part them.
    made: dict[int, nn.Parameter | torch.Tensor] = {}
    for target in (*plan.targets, *plan.untied):
        if not target.parts:
            continue
        name, old = target.base_name, state[target.base_name]
        _refuse_coded(name, old)
        effects = [
            _moved_to(effect, old.device) for effect in build_effects(target, state.__getitem__)
        ]
        module = model.get_submodule(name.rpartition(".")[0])
        branch = _branch(module, name, effects) if branches else None
        if branch is not None:
            record.hooks.append(module.register_forward_hook(branch))
            continue
        new = made.get(id(old)) if not plan.unties else None
        if new is None:
            new = made[id(old)] = _merged(target, old, effects)
        record.replaced[target.spec.name] = old
        _set(model, target.spec.name, new)


def _refuse_coded(name: str, tensor: torch.Tensor) -> None:
    """Raises UnsupportedAdapter for a tensor of a class of its own, which may be codes of whatever
    dtype it says (torchao, quanto, bitsandbytes)."""
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise UnsupportedAdapter(
            f"{name}: a {type(tensor).__module__}.{type(tensor).__name__}, not a plain tensor; "
            "load the model in bfloat16, and attach to that"
        )


def _merged(
    target: Target, old: torch.Tensor, effects: Sequence[Effect]
) -> nn.Parameter | torch.Tensor:
    new = merged_whole(old, effects, target.matrix(tuple(old.shape)))
    if not new.isfinite().all():
        raise NonFiniteError(
            f"{target.spec.name}: the merged tensor holds an inf or a NaN in {new.dtype}; check "
            "the model and the adapter"
        )
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _set(model: nn.Module, name: str, tensor: nn.Parameter | torch.Tensor) -> None:
    """Put a parameter or buffer in its place, past any registration of the module's own."""
    module, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    held: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
    held[last] = tensor


def _moved_to(effect: Effect, device: torch.device) -> Effect:
    """The effect with its tensors on the model's device."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, list):
            return [moved(each) for each in value]
        if isinstance(value, Block):
            return dataclasses.replace(
                value, left=value.left.to(device), right=value.right.to(device)
            )
        return value

    fields = {f.name: moved(getattr(effect, f.name)) for f in dataclasses.fields(effect)}
    return dataclasses.replace(effect, **fields)


Hook = Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]


def _branch(module: nn.Module, name: str, effects: Sequence[Effect]) -> Hook | None:
    """What adds plain updates to a layer's output, where the layer is known to do no more with its
    weight than the product. A subclass may."""
    kind = type(module)
    known = kind in (nn.Linear, nn.Embedding) or kind.__name__ == "Conv1D"
    plain = [e for e in effects if isinstance(e, LowRank) and e.magnitude is None]
    if not known or not name.endswith(".weight") or len(plain) != len(effects):
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None
    working = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    blocks = [
        Block(
            block.row,
            block.col,
            block.left.to(working) * (effect.weight * effect.scale),
            block.right.to(working),
        )
        for effect in plain
        for block in effect.blocks
    ]
    if not all(b.left.isfinite().all() and b.right.isfinite().all() for b in blocks):
        raise NonFiniteError(f"{name}: the adapter's factors for it hold an inf or a NaN")
    looks_up, transposed = isinstance(module, nn.Embedding), not isinstance(module, nn.Linear)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x, result = inputs[0], output.to(working, copy=True)
        for block in blocks:
            rows, cols = block.left.shape[0], block.right.shape[1]
            if looks_up:
                change, at = functional.embedding(x, block.left) @ block.right, block.col
            elif transposed:
                part = x[..., block.row : block.row + rows].to(working)
                change, at = part @ block.left @ block.right, block.col
            else:
                part = x[..., block.col : block.col + cols].to(working)
                change, at = part @ block.right.T @ block.left.T, block.row
            result[..., at : at + change.shape[-1]] += change
        return result.to(output.dtype)

    return hook
