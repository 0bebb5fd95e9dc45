"""What is fused in a graph, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx

OPSET, FUSED_OPSET = 20, 23
_OPERATORS = {
    "attention": "Attention",
    "rotary_embeddings": "RotaryEmbedding",
    "norms": "RMSNormalization",
}


def fused(models: Iterable[onnx.ModelProto]) -> dict[str, int]:
    """How many of each kind there are in these graphs, of those that there are."""
    nodes = Counter(n.op_type for model in models for n in model.graph.node if not n.domain)
    return {kind: nodes[name] for kind, name in _OPERATORS.items() if nodes[name]}


def unfused(model: onnx.ModelProto, why: str = "") -> Iterator[str]:
    """What of a graph that was to be fused is as torch traces it.

    Args:
        why: its attention is not.
    """
    graph, found = model.graph, fused([model])
    kinds = {node.op_type for node in graph.node}
    if "attention" not in found and "Softmax" in kinds:
        yield f"attention ({why or 'the code of this class is unknown'})"
    elif any(value.name.startswith("past_key_values.") for value in graph.input):
        apart = sum(node.op_type == "Attention" and len(node.input) < 6 for node in graph.node)
        if apart:
            yield f"the cache of {apart} of {found['attention']} layers"
    if "Sin" in kinds and "rotary_embeddings" not in found:
        yield "rotary embeddings (an unknown form)"
