"""Linear layers as Gemm, which takes a weight as it is stored, (out, in), and adds the bias.

torch makes a Transpose of the weight and a MatMul of each. A runtime carries the Transpose out when
it loads the graph, and holds such a weight twice while it does: a third of the time of loading, and
half of the memory. Gemm takes rows, (N, in), so what lies between linear layers and goes by element
or by row is computed on rows, too; elsewhere they get their leading axes back.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx_ir as ir

from lora_tools.onnx.fuse.nodes import (
    add,
    attribute,
    constant,
    dims,
    given,
    made_by,
    number,
    replace,
    shape,
    sizes,
)

_BY_ELEMENT = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Neg", "Cast", "Sqrt", "Reciprocal"),
    *("Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Softplus", "Clip", "HardSigmoid", "HardSwish"),
}
_BY_ROW = {"RMSNormalization", "LayerNormalization"}


def fuse_linears(graph: ir.Graph, weights: Collection[str]) -> None:
    """Put Gemm, over rows, in the place of every product with a transposed weight.

    Args:
        weights: names of the initializers that are weights.
    """
    _Rows(graph, weights).run()


class _Rows:
    """Values (…, width) → the same as (N, width); ``done`` are nodes that nothing needs then."""

    def __init__(self, graph: ir.Graph, weights: Collection[str]) -> None:
        self._graph, self._weights = graph, weights
        self._rows: dict[ir.Value, ir.Value] = {}
        self._flat: dict[ir.Value, ir.Value] = {}
        self._forms: dict[tuple[int | str, ...], ir.Value] = {}
        self._done: set[ir.Node] = set()

    def run(self) -> None:
        for node in list(self._graph):
            if node in self._done or node.domain:
                continue
            if node.op_type == "MatMul":
                self._linear(node)
            elif node.op_type in _BY_ELEMENT | _BY_ROW:
                self._on_rows(node)
        self._give_back()

    def _linear(self, node: ir.Node) -> None:
        turned, x = made_by(node.inputs[1], "Transpose"), given(node)
        if turned is None or tuple(attribute(turned, "perm", ())) != (1, 0) or len(shape(x)) < 2:
            return
        weight = given(turned)
        if weight.name not in self._weights or not _is_known(x):
            return
        last, bias = self._biased(node, shape(weight)[0])
        self._learn(shape(x)[:-1], x, node)
        rows = self._flattened(x, last)
        inputs = [rows, weight] if bias is None else [rows, weight, bias]
        sized = [dims(rows)[0], shape(weight)[0]]
        made = add(last, "Gemm", inputs, {"transB": 1}, like=x, sized=sized)
        self._rows[last.outputs[0]] = made.outputs[0]
        self._done |= {node, last}

    def _biased(self, node: ir.Node, size: Any) -> tuple[ir.Node, ir.Value | None]:
        """The Add that takes a product and nothing else does, and the bias in it; or the product
        and none."""
        product = node.outputs[0]
        users = [user for user, _ in product.uses()]
        if len(users) == 1 and users[0].op_type == "Add" and not product.is_graph_output():
            for each in users[0].inputs:
                if each is not None and each.name in self._weights and shape(each) == (size,):
                    return users[0], each
        return node, None

    def _on_rows(self, node: ir.Node) -> None:
        """What goes by element or by row, of rows."""
        output = node.outputs[0]
        if not any(each in self._rows for each in node.inputs):
            return
        if output.shape is None:  # inside of what torch has as one function
            _tell_shape(node)
        if len(shape(output)) < 3:
            return
        if node.op_type in _BY_ROW and not (node.inputs[0] in self._rows and _of_last(node)):
            return
        if not all(_fits(each, output) for each in node.inputs):
            return
        inputs = [
            each if each is None or _is_alike(each) else self._flattened(each, node)
            for each in node.inputs
        ]
        attributes = dict(node.attributes)
        if node.op_type in _BY_ROW:
            attributes["axis"] = ir.AttrInt64("axis", -1)
        sized = [None, shape(output)[-1]]
        made = add(node, node.op_type, inputs, attributes, like=output, sized=sized)
        self._rows[output] = made.outputs[0]
        self._done.add(node)

    def _flattened(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """A value as rows, which it may be already."""
        if len(shape(value)) == 2:
            return value
        if value in self._rows:
            return self._rows[value]
        if value not in self._flat:
            width = dims(value)[-1]
            form = sizes(user, [-1, width])
            made = add(user, "Reshape", [value, form], like=value, sized=[None, width])
            self._flat[value] = made.outputs[0]
        return self._flat[value]

    def _give_back(self) -> None:
        """Leading axes to the rows that others take; they belong to the layer of who takes them."""
        back: dict[ir.Value, ir.Value] = {}
        for node in list(self._graph):
            for at, value in enumerate(() if node in self._done else node.inputs):
                if value in self._rows:
                    assert value is not None
                    if value not in back:
                        back[value] = self._whole(value, node)
                    node.replace_input_with(at, back[value])
        for value in [each for each in self._graph.outputs if each in self._rows]:
            if value not in back:
                back[value] = self._whole(value, self._graph[-1])
                made = back[value].producer()
                if made is not None and len(shape(value)) > 2:  # of no layer
                    made.metadata_props.clear()
            replace(value, back[value])

    def _whole(self, value: ir.Value, before: ir.Node) -> ir.Value:
        rows = self._rows[value]
        if len(shape(value)) == 2:
            return rows
        form = self._form(value, before)
        return add(before, "Reshape", [rows, form], like=value).outputs[0]

    def _form(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The shape of a value made of rows: a constant where one size at most is dynamic."""
        known = [each if isinstance(each, int) else -1 for each in dims(value)]
        return self._forms[shape(value)[:-1]] if known.count(-1) > 1 else sizes(before, known)

    def _learn(self, leading: tuple[int | str, ...], x: ir.Value, before: ir.Node) -> None:
        """How to get leading axes back of which two are dynamic: from an input of the graph that
        has the same, which all layers share, or from the first that goes into a linear layer."""
        if leading in self._forms or sum(isinstance(each, str) for each in leading) < 2:
            return
        count = len(leading)
        like = next((v for v in self._graph.inputs if shape(v)[:count] == leading), None)
        at = before if like is None else self._graph[0]
        measured = add(at, "Shape", [like or x], {"start": 0, "end": count})
        made = add(at, "Concat", [measured.outputs[0], sizes(at, [-1])], {"axis": 0})
        for each in (measured, made):
            each.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            if like is not None:  # of no layer
                each.metadata_props.clear()
        self._forms[leading] = made.outputs[0]


def _is_known(value: ir.Value) -> bool:
    """Whether every axis but the last has a size, if but by name."""
    return all(isinstance(each, int) or each.value is not None for each in dims(value)[:-1])


def _is_alike(value: ir.Value) -> bool:
    """Whether a value, of one axis or none, is the same for all rows."""
    array = constant(value)
    return (
        array.ndim < 2 if array is not None else value.shape is not None and len(shape(value)) < 2
    )


def _fits(value: ir.Value | None, like: ir.Value) -> bool:
    """Whether a value has a row for each of another's, or is the same for all."""
    if value is None or _is_alike(value):
        return True
    same = len(shape(value)) == len(shape(like)) and shape(value)[:-1] == shape(like)[:-1]
    return same and _is_known(value)


def _tell_shape(node: ir.Node) -> None:
    """What goes by element makes what its inputs are, where those are alike."""
    every = [each for each in node.inputs if each is not None]
    several = [each for each in every if not _is_alike(each)]
    numbers = all(number(each) is not None for each in every if _is_alike(each))
    if numbers and len({shape(each) for each in several}) == 1:
        node.outputs[0].shape = several[0].shape
        if node.op_type != "Cast":
            node.outputs[0].type = several[0].type


def _of_last(norm: ir.Node) -> bool:
    """Whether a norm is over the last axis alone, and gives nothing but what it made."""
    rank = len(shape(given(norm)))
    used = [each for each in norm.outputs[1:] if each.uses() or each.is_graph_output()]
    return attribute(norm, "axis", -1) in (-1, rank - 1) and not used
