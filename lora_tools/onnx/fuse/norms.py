"""Root-mean-square norms: x · w / √(mean(x²) + ε) as ONNX's RMSNormalization of opset 23."""

from __future__ import annotations

import onnx_ir as ir

from lora_tools.onnx.fuse.nodes import (
    add,
    attribute,
    constant,
    given,
    made_by,
    number,
    replace,
    shape,
)


def fuse_norms(graph: ir.Graph) -> None:
    """Put the operator in the place of every such norm over the last axis.

    The weight may be computed, as Gemma's 1 + w is.
    """
    for node in list(graph):
        if node.op_type != "Mul" or node.domain:
            continue
        for scaled, weight in (node.inputs, node.inputs[::-1]):
            normal = _normal(scaled)
            if normal is None:
                continue
            x, epsilon = normal
            if weight is None or weight.dtype != x.dtype:
                continue
            if not shape(x) or shape(weight) != shape(x)[-1:]:
                continue
            made = add(
                node,
                "RMSNormalization",
                [x, weight],
                {"axis": -1, "epsilon": epsilon},
                like=node.outputs[0],
            )
            replace(node.outputs[0], made.outputs[0])
            break


def _normal(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """x and ε of x / √(mean(x²) + ε); in half precision of what is computed in float32 and cast
    back, as the operator does it."""
    cast = made_by(value, "Cast")
    if cast is not None:
        found = _normal(cast.inputs[0])
        wide = made_by(found[0], "Cast") if found is not None else None
        if found is None or wide is None or value is None:
            return None
        narrow = given(wide)
        return (narrow, found[1]) if narrow.dtype == value.dtype else None
    node = made_by(value, "Mul")
    if node is None:
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        total = _one_over_root(factor)
        mean = total and made_by(total.inputs[0], "ReduceMean")
        if not total or not mean or x is None:
            continue
        epsilon = number(total.inputs[1])
        if epsilon is not None and _of_last(mean) and _square(mean.inputs[0]) is x:
            return x, epsilon
    return None


def _one_over_root(value: ir.Value | None) -> ir.Node | None:
    """The Add under a reciprocal square root, however it is written."""
    power = made_by(value, "Pow")
    if power is not None and number(power.inputs[1]) == -0.5:
        return made_by(power.inputs[0], "Add")
    reciprocal = made_by(value, "Reciprocal")
    root = made_by(reciprocal.inputs[0], "Sqrt") if reciprocal else None
    return made_by(root.inputs[0], "Add") if root else None


def _of_last(mean: ir.Node) -> bool:
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    rank = len(shape(mean.inputs[0]))
    return (
        axes is not None
        and axes.reshape(-1).tolist() in ([-1], [rank - 1])
        and attribute(mean, "keepdims", 1) == 1
    )


def _square(value: ir.Value | None) -> ir.Value | None:
    power = made_by(value, "Pow")
    if power is not None and number(power.inputs[1]) == 2:
        return power.inputs[0]
    product = made_by(value, "Mul")
    if product is not None and product.inputs[0] is product.inputs[1]:
        return product.inputs[0]
    return None
