"""What is fused in a graph, and what of a decoder is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx

OPSET, FUSED_OPSET = 20, 23
_OPERATORS = {
    "attention": "Attention",
    "rotary_embeddings": "RotaryEmbedding",
    "norms": "RMSNormalization",
}


def fused(model: onnx.ModelProto) -> dict[str, int]:
    """How many of each kind there are, of those that there are."""
    nodes = Counter(node.op_type for node in model.graph.node if not node.domain)
    return {kind: nodes[name] for kind, name in _OPERATORS.items() if nodes[name]}


def unfused(model: onnx.ModelProto, why: str = "") -> Iterator[str]:
    """What of a decoder that was to be fused is as torch traces it.

    Args:
        why: its attention is not.
    """
    graph, found = model.graph, fused(model)
    if "attention" not in found:
        yield f"attention ({why or 'of the model class’s own code, which no rule knows'})"
    elif any(value.name.startswith("past_key_values.") for value in graph.input):
        apart = sum(node.op_type == "Attention" and len(node.input) < 6 for node in graph.node)
        if apart:
            yield f"the cache of {apart} of {found['attention']} layers"
    if any(node.op_type == "Sin" for node in graph.node) and "rotary_embeddings" not in found:
        yield "rotary embeddings (of a form that no rule knows)"
