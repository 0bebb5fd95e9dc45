"""A graph in half precision: its inputs and outputs, and the same graph in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx

from lora_tools.onnx.initializers import graphs_in

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
    graph, first, last = model.graph, [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type in HALVES:
            inner = f"{value.name}.half"
            first.append(_cast(value.name, inner, value.type.tensor_type.elem_type))
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            _rename(graph, lambda node: node.input, value.name, inner)
    for value in graph.output:
        if value.type.tensor_type.elem_type in HALVES:
            inner = f"{value.name}.half"
            for names in (lambda node: node.input, lambda node: node.output):
                _rename(graph, names, value.name, inner)
            last.append(_cast(inner, value.name, onnx.TensorProto.FLOAT))
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def _cast(source: str, made: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [made], name=f"as:{made}", to=to)


def _rename(
    graph: onnx.GraphProto, names: Callable[[onnx.NodeProto], list[str]], old: str, new: str
) -> None:
    for node in graph.node:
        for at, name in enumerate(names(node)):
            if name == old:
                names(node)[at] = new


def in_float32(model: onnx.ModelProto) -> bool:
    """Have everything computed in float32; weights stay as they are stored, with a Cast each.

    Returns:
        whether a constant of the graph's is a number that half precision has rounded, such as √d.
    """
    graph, rounded = model.graph, False
    casts: list[onnx.NodeProto] = []
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
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
    for tensor in graph.initializer:
        if tensor.external_data and tensor.data_type in HALVES and tensor.name not in cast:
            inner = f"{tensor.name}.{FLOAT32}"
            _rename(graph, lambda node: node.input, tensor.name, inner)
            casts.append(_cast(tensor.name, inner, onnx.TensorProto.FLOAT))
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
