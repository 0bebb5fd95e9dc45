"""Layers whose weight W is frozen and has a trained branch s · B · A beside it.

``train()`` takes the branch out of the weight and ``eval()`` folds it in, any number of times: the
sum is formed in float32 or better and rounded once, and the weight from before is kept and put
back, never found again by subtraction. A folded layer therefore holds its weight twice.

Parameters are named and shaped as in loralib 0.1.2: ``lora_A``, ``lora_B`` beside ``weight`` and
``bias``, which a convolution holds in ``conv``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lora_tools.errors import UsageError
from lora_tools.linalg.layouts import LAYOUTS, Layout
from lora_tools.linalg.merge import LowRank, merged_whole
from lora_tools.linalg.scaling import scaling


class LoRALayer(nn.Module):
    """What the layers have in common. ``r`` = 0 makes a layer without a branch, its weight trained.

    Attributes:
        r, lora_alpha, scaling: rank, alpha, and their ratio, the factor on B · A.
        merge_weights: whether ``eval()`` folds the branch in.
        merged: whether it is folded in now.
        lora_A, lora_B: the trained factors, where there is a branch.
    """

    r: int
    layout: Layout
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged = False
    _before: torch.Tensor | None
    _turned = False  # the weight is stored as (in, out)
    _folds_again = False

    def _init_lora(
        self,
        layout: Layout,
        shapes: Sequence[tuple[int, int]],
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
    ) -> None:
        """``shapes``: of lora_A and lora_B; none where there is no branch."""
        self.r, self.lora_alpha, self.layout = r, lora_alpha, layout
        self.merge_weights = merge_weights
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.register_buffer("_before", None, persistent=False)
        self.register_load_state_dict_post_hook(_fold_again)  # type: ignore[no-untyped-call]
        if shapes:
            frozen = self._frozen()
            frozen.requires_grad = False
            self.scaling = scaling(lora_alpha, r, False)
            self.lora_A = nn.Parameter(frozen.new_zeros(shapes[0]))
            self.lora_B = nn.Parameter(frozen.new_zeros(shapes[1]))
            self._reset_lora()

    @property
    def has_branch(self) -> bool:
        return "lora_A" in self._parameters

    def _frozen(self) -> nn.Parameter:
        """The weight that the branch stands beside."""
        weight = self.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _reset_lora(self) -> None:
        """B · A = 0 at the start, with A as torch draws a Linear's weight."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Draw the weight and the factors anew. The branch is then zero."""
        self._unfold()
        self._draw_weight()
        if self.has_branch:
            self._reset_lora()

    def _draw_weight(self) -> None:
        if self._turned:
            self._turn()
        super().reset_parameters()  # type: ignore[misc]
        if self._turned:
            self._turn()

    def _turn(self) -> None:
        weight = self._frozen()
        weight.data = weight.data.T.contiguous()

    def train(self: L, mode: bool = True) -> L:
        """As any module's; ``mode`` takes the branch out of the weight, its absence folds it in."""
        super().train(mode)
        if self.merge_weights:
            self._unfold() if mode else self._fold()
        return self

    @torch.no_grad()
    def _fold(self) -> None:
        if self.merged or not self.has_branch:
            return
        weight = self._frozen()
        effect = LowRank(
            self.layout,
            self.layout.blocks(self.lora_A, self.lora_B, tuple(weight.shape)),
            self.scaling,
            1.0,
        )
        self._before = weight.detach().clone()
        weight.copy_(merged_whole(weight, [effect], self.layout.matrix(tuple(weight.shape))))
        self.merged = True

    @torch.no_grad()
    def _unfold(self) -> None:
        if self.merged:
            assert self._before is not None
            self._frozen().copy_(self._before)
            self._before, self.merged = None, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is loaded is the weight without the branch, whatever the mode."""
        self._folds_again = self.merged
        self._unfold()
        super()._load_from_state_dict(*args, **kwargs)


L = TypeVar("L", bound=LoRALayer)


def _fold_again(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, LoRALayer)
    if layer._folds_again:
        layer._fold()
        layer._folds_again = False


class _Dense(LoRALayer, nn.Linear):
    """A Linear with a branch of one or more products beside it."""

    def _init_dense(
        self,
        layout: Layout,
        outputs: Sequence[int],
        fan_in_fan_out: bool,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
    ) -> None:
        """``outputs``: of each block that has a product."""
        self.fan_in_fan_out = fan_in_fan_out
        shapes = ((r * len(outputs), self.in_features), (sum(outputs), r))
        self._init_lora(
            layout, shapes if r > 0 and outputs else (), r, lora_alpha, lora_dropout, merge_weights
        )
        if fan_in_fan_out:
            self._turn()
            self._turned = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out). B · A is never formed."""
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        result = functional.linear(x, weight, self.bias)
        if self.has_branch and not self.merged:
            result = result + self._branch(self.lora_dropout(x)) * self.scaling
        return result

    def _branch(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.lora_A), self.lora_B)


class Linear(_Dense):
    """y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ, W (out, in), A (r, in), B (out, r).

    Args:
        r: the rank.
        lora_alpha: alpha; s = lora_alpha / r.
        lora_dropout: on the branch's input, while training.
        fan_in_fan_out: W is stored as (in, out).
        merge_weights: fold the branch in on ``eval()``.
        kwargs: those of ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        layout = LAYOUTS["conv1d" if fan_in_fan_out else "linear"]
        self._init_dense(
            layout, [out_features], fan_in_fan_out, r, lora_alpha, lora_dropout, merge_weights
        )


class MergedLinear(_Dense):
    """One Linear for several outputs side by side, such as query, key and value, some of which have
    a branch of rank r each: A (n · r, in), B (their outputs, r) for the n that are enabled.

    Args:
        enable_lora: which blocks have a branch.
        sizes: outputs of each block; by default all have the same. (loralib has equal ones only.)

    The others are those of ``Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        sizes: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.enable_lora = list(enable_lora)
        blocks = tuple(sizes) or (out_features // len(self.enable_lora),) * len(self.enable_lora)
        if len(blocks) != len(self.enable_lora) or sum(blocks) != out_features:
            raise UsageError(
                f"{len(self.enable_lora)} blocks of sizes {list(blocks)} do not make up "
                f"{out_features} outputs"
            )
        self.sizes = blocks
        layout = LAYOUTS["merged-conv1d" if fan_in_fan_out else "merged"].having(
            enabled=tuple(map(bool, self.enable_lora)), sizes=blocks
        )
        chosen = [size for size, on in zip(blocks, self.enable_lora, strict=True) if on]
        self._init_dense(layout, chosen, fan_in_fan_out, r, lora_alpha, lora_dropout, merge_weights)

    def _branch(self, x: torch.Tensor) -> torch.Tensor:
        parts = iter(self.layout.split(self.lora_A, self.lora_B))
        outputs = []
        for size, on in zip(self.sizes, self.enable_lora, strict=True):
            if on:
                B, A = next(parts)
                outputs.append(functional.linear(functional.linear(x, A), B))
            else:
                outputs.append(x.new_zeros(*x.shape[:-1], size))
        return torch.cat(outputs, -1)


class Embedding(LoRALayer, nn.Embedding):
    """Row i of W + s · (B A)ᵀ, W (vocabulary, dim), A (r, vocabulary), B (dim, r).

    ``max_norm`` renormalises the rows of W as torch does; the branch is added after it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        shapes = ((r, num_embeddings), (embedding_dim, r)) if r > 0 else ()
        self._init_lora(LAYOUTS["embedding"], shapes, r, lora_alpha, 0.0, merge_weights)

    def _reset_lora(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices (…) → (…, dim). B · A is never formed."""
        result = nn.Embedding.forward(self, input)
        if self.has_branch and not self.merged:
            inner = functional.embedding(
                input,
                self.lora_A.T,
                self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
                sparse=self.sparse,
            )
            result = result + functional.linear(inner, self.lora_B) * self.scaling
        return result


class _Conv(LoRALayer):
    """A convolution, in ``conv``, and beside it the elements of B · A in the weight's shape."""

    make: Callable[..., nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.conv: Any = type(self).make(in_channels, out_channels, kernel_size, **kwargs)
        weight = self._frozen()
        layout = LAYOUTS["reshaped-conv"].having(groups=kwargs.get("groups", 1))
        rows, cols = layout.matrix(tuple(weight.shape))
        rank = r * weight.shape[-1]
        shapes = ((rank, cols), (rows, rank)) if r > 0 else ()
        self._init_lora(layout, shapes, r, lora_alpha, lora_dropout, merge_weights)

    def _frozen(self) -> nn.Parameter:
        weight = self.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _draw_weight(self) -> None:
        self.conv.reset_parameters()

    def forward(self, x: torch.Tensor) -> Any:
        """As the convolution's, of W + s · B · A."""
        if not self.has_branch or self.merged:
            return self.conv(x)
        change = (self.lora_B @ self.lora_A).reshape(self.conv.weight.shape) * self.scaling
        if isinstance(self.lora_dropout, nn.Identity) or not self.training:
            return self.conv._conv_forward(x, self.conv.weight + change, self.conv.bias)
        return self.conv(x) + self.conv._conv_forward(self.lora_dropout(x), change, None)


class Conv1d(_Conv):
    """``torch.nn.Conv1d`` with a branch: A (r·k, in·k), B (out / groups, r·k).

    loralib's B has k times the rows, which fits a Conv2d alone; for k = 1 it is this one.
    """

    make = nn.Conv1d


class Conv2d(_Conv):
    """``torch.nn.Conv2d`` with a branch: A (r·k, in·k), B (out / groups · k, r·k), as loralib's; of
    a kernel (h, w), A (r·w, in·w) and B (out / groups · h, r·w)."""

    make = nn.Conv2d


class Conv3d(_Conv):
    """``torch.nn.Conv3d`` with a branch: A (r·k, in·k), B (out / groups · k², r·k).

    loralib's B has k times fewer rows, which fits a Conv2d alone; for k = 1 it is this one.
    """

    make = nn.Conv3d
