"""Looking around in a graph, and putting nodes into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node of one of ONNX's own operators that makes a value as its first output."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type not in operators or node.outputs[0] is not value:
        return None
    return node


def number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def constant(value: ir.Value | None) -> Any:
    """What a value always is, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, otherwise: Any = None) -> Any:
    """A node's attribute."""
    found = node.attributes.get(name)
    return otherwise if found is None else found.value


def given(node: ir.Node, at: int = 0) -> ir.Value:
    """An input that a node always has."""
    value = node.inputs[at]
    assert value is not None
    return value


def dims(value: ir.Value) -> tuple[Any, ...]:
    """Sizes as the graph has them."""
    return tuple(value.shape or ())


def shape(value: ir.Value | None) -> tuple[int | str, ...]:
    """Sizes, the dynamic ones as torch's expressions; () where they are not known."""
    if value is None or value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def add(
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: ir.Value | None = None,
    sized: Sequence[Any] | None = None,
    outputs: int = 1,
) -> ir.Node:
    """A node put in before another, of the same layer.

    Args:
        like: what has the type of the first output, and its shape unless ``sized`` says it.
    """
    node = ir.node(operator, inputs, dict(attributes or {}), num_outputs=outputs)
    node.metadata_props.update(before.metadata_props)
    if like is not None:
        node.outputs[0].type = like.type
        node.outputs[0].shape = like.shape if sized is None else ir.Shape(sized)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node


def sizes(before: ir.Node, numbers: Sequence[int]) -> ir.Value:
    """A constant of whole numbers, such as a shape."""
    tensor = ir.tensor(np.array(numbers, np.int64))
    made = add(before, "Constant", [], {"value": tensor}).outputs[0]
    made.const_value, made.shape = tensor, ir.Shape([len(numbers)])
    made.type = ir.TensorType(ir.DataType.INT64)
    return made


def replace(old: ir.Value, new: ir.Value) -> None:
    """Have everything that takes a value take another, the graph's outputs too."""
    if old.is_graph_output():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
