"""A graph in half precision: its inputs and outputs, and the same graph in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx

from lora_tools.onnx.initializers import graphs_in, rename

FLOAT32 = "float32"
COMPUTED = "compute_dtype"  # of a graph's metadata; graphs without it compute in float32
_TYPES = {
    FLOAT32: onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
_SIMPLE = 19  # of float32's 23 bits, those that are 0 in a simple number
_LOW = 65504  # the lowest numbers, which masks are made of, are beyond it, or its negative
HALVES = {number for name, number in _TYPES.items() if name != FLOAT32}


def computed_in(model: onnx.ModelProto) -> str:
    """In what a graph computes."""
    return next((p.value for p in model.metadata_props if p.key == COMPUTED), FLOAT32)


def has_half_inputs(model: onnx.ModelProto) -> bool:
    """Whether an input or output is in half precision."""
    values = (*model.graph.input, *model.graph.output)
    return any(value.type.tensor_type.elem_type in HALVES for value in values)


def with_float32_inputs(model: onnx.ModelProto) -> None:
    """Have a graph in half precision take and give float32."""
    graph = model.graph
    given, made = (_take_float32(values) for values in (graph.input, graph.output))
    inner = {name: f"{name}.half" for name in (*given, *made)}
    rename(graph.node, inner)
    first = [_cast(name, inner[name], half) for name, half in given.items()]
    last = [_cast(inner[name], name, onnx.TensorProto.FLOAT) for name in made]
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def _cast(source: str, made: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [made], name=f"as:{made}", to=to)


def _take_float32(values: Iterable[onnx.ValueInfoProto]) -> dict[str, int]:
    """Have inputs or outputs in half precision be of float32. Returns what they were, by name."""
    were = {}
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type in HALVES:
            were[value.name] = kind.elem_type
            kind.elem_type = onnx.TensorProto.FLOAT
    return were


def in_float32(model: onnx.ModelProto) -> bool:
    """Have everything computed in float32; weights stay as they are stored, with a Cast each.

    Returns:
        whether a constant of the graph's is a number that half precision has rounded, such as √d.
    """
    graph, rounded = model.graph, False
    _take_float32((*graph.input, *graph.output))
    for each in graphs_in(graph):
        for tensor in _constants(each):
            if tensor.data_type in HALVES:
                array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                rounded |= _is_rounded(array)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        for node in each.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i in HALVES:
                    attribute.i = onnx.TensorProto.FLOAT
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    inner = {
        tensor.name: f"{tensor.name}.{FLOAT32}"
        for tensor in graph.initializer
        if tensor.external_data and tensor.data_type in HALVES and tensor.name not in cast
    }
    rename(graph.node, inner)
    casts = [_cast(name, casted, onnx.TensorProto.FLOAT) for name, casted in inner.items()]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return rounded


def _is_rounded(array: Any) -> bool:
    """Whether numbers have more bits than 0, 1, ½ or a mask's lowest number."""
    ends = np.ascontiguousarray(array).view(np.int32) & ((1 << _SIMPLE) - 1)
    return bool(((ends != 0) & (np.abs(array) < _LOW)).any())


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors with their numbers inside."""
    yield from (tensor for tensor in graph.initializer if not tensor.external_data)
    for node in graph.node:
        yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
