"""Attention as one operator while a decoder is traced.

transformers' models look their attention up in a registry (``AttentionInterface``). For the time of
a trace its entry writes ONNX's own ``Attention`` of opset 23 into the graph, in place of the twenty
nodes that torch makes of it, and key and value heads are not repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

NAME = "loratools_one_operator"
# Arguments with numbers that the operator needs not: dropout is off, and positions and bounds of
# packed sequences are for kernels of GPUs.
_SILENT = {"dropout", "position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}


class Unfused(Exception):
    """Attention of a kind that the operator has no attribute for; the sentence says which."""


@contextlib.contextmanager
def one_operator(model: torch.nn.Module) -> Iterator[None]:
    """Have the model's attention traced as one operator each, where it comes from the registry.

    Raises:
        Unfused: in the trace, of attention that the operator cannot be.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs]
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    any_kind = getattr(model, "_supports_attention_backend", False)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    for name in (NAME, "sdpa"):
        ALL_ATTENTION_FUNCTIONS.register(name, _operator)
    try:
        for config, chosen in before:
            if chosen == "eager" and any_kind:
                config._attn_implementation = NAME
        yield
    finally:
        for config, chosen in before:
            config._attn_implementation = chosen
        ALL_ATTENTION_FUNCTIONS.register("sdpa", own)


def _operator(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, of query (B, H, S, D), key and value (B, K, T, D): (B, S, H, D)."""
    _refuse(module, attention_mask, position_bias, others)
    mask = attention_mask if position_bias is None else _biased(attention_mask, position_bias)
    attributes = {"scale": scaling, "softcap": softcap}
    given: dict[str, Any] = {n: float(x) for n, x in attributes.items() if x is not None}
    if query.dtype != torch.float32:
        given["softmax_precision"] = int(ir.DataType.FLOAT)
    made = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        given,
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=23,
    )
    return made.transpose(1, 2), None


def translations() -> dict[Any, Any]:
    """How torch's own attention is written, which models call that ask no registry: of one key for
    all heads, too, on which torch's own translation fails."""
    from onnxscript import opset23 as op

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        half = query.dtype != ir.DataType.FLOAT
        return op.Attention(
            query,
            key,
            value,
            attn_mask,
            is_causal=int(is_causal),
            scale=scale,
            softmax_precision=int(ir.DataType.FLOAT) if half else None,
        )[0]

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def _refuse(module: torch.nn.Module, mask: Any, position_bias: Any, others: dict[str, Any]) -> None:
    odd = sorted(
        name
        for name, given in others.items()
        if isinstance(given, torch.Tensor | float) and name not in _SILENT
    )
    if odd:
        raise Unfused(f"attention with {', '.join(odd)}")
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and position_bias is None and causal:
        raise Unfused("attention without a mask")


def _biased(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias
