"""The order in which a graph is fused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx_ir as ir

from lora_tools.onnx.fuse.cache import fuse_attention
from lora_tools.onnx.fuse.linears import fuse_linears
from lora_tools.onnx.fuse.norms import fuse_norms
from lora_tools.onnx.fuse.rotary import fuse_rotary


def fuse(model: ir.Model, weights: Collection[str]) -> None:
    """Fuse a traced graph of opset 23, in which every attention is one operator over (B, H, S, D).

    Args:
        weights: names of initializers that are not looked into.
    """
    graph = model.graph
    hidden = {name: graph.initializers[name].const_value for name in weights}
    for name in weights:  # folding would read them
        graph.initializers[name].const_value = None
    _simplify(model)
    fuse_norms(graph)
    fuse_rotary(graph)
    fuse_attention(graph)
    fuse_linears(graph, weights)
    _simplify(model)
    for name, tensor in hidden.items():
        if name in graph.initializers:
            graph.initializers[name].const_value = tensor


def _simplify(model: ir.Model) -> None:
    """Compute what is always the same, and drop what nothing uses."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    fold_constants(model, onnx_shape_inference=False)
    steps: tuple[Any, ...] = (CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass())
    for step in steps:
        step(model)
