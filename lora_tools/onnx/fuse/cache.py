"""Attention with the cache inside, over heads that lie side by side as linear layers leave them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_tools.onnx.fuse.nodes import add, attribute, dims, given, made_by, replace, shape, sizes

_SWAP = (0, 2, 1, 3)  # (B, H, S, D) to (B, S, H, D), and back


def fuse_attention(graph: ir.Graph) -> None:
    """Give every Attention over (B, H, S, D) its past, and heads side by side.

    Masks become what is added to the scores: 0, or the lowest number, with which a row that may
    look at nothing (padding) stays finite.
    """
    biases: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention" and not node.domain and len(shape(given(node))) == 4:
            _rebuild(node, biases)


def _rebuild(node: ir.Node, biases: dict[ir.Value, ir.Value]) -> None:
    query, key, value = (given(node, at) for at in range(3))
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    heads, groups = _heads(query)[0], _heads(key)[0]
    pasts = [past for each in (key, value) if (past := _past(each)) is not None]
    # A causal operator counts positions from the past it is given, which torch's does not.
    cached = len(pasts) == 2 and not attribute(node, "is_causal", 0)
    new = [query, *(past[1] for past in pasts)] if cached else [query, key, value]
    inputs = [
        *(_side_by_side(each, node) for each in new),
        _bias(mask, query, biases) if mask is not None else None,
        *(past[0] for past in pasts if cached),
    ]
    batch, _, length, _ = dims(node.outputs[0])
    made = add(
        node,
        "Attention",
        inputs,
        {**node.attributes, "q_num_heads": heads, "kv_num_heads": groups},
        like=node.outputs[0],
        sized=[batch, length, heads * _heads(node.outputs[0])[1]],
        outputs=3 if cached else 1,
    )
    for old, present in zip((key, value), made.outputs[1:], strict=False):
        present.type, present.shape = old.type, old.shape
        replace(old, present)
    _hand_on(node, made.outputs[0])


def _heads(value: ir.Value) -> tuple[int, int]:
    """How many heads (B, H, S, D) has, and their size."""
    _, heads, _, size = shape(value)
    assert isinstance(heads, int)
    assert isinstance(size, int)
    return heads, size


def _past(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The input of a cache, and what the new tokens add to it."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or attribute(node, "axis") not in (-2, 2):
        return None
    past, new = given(node, 0), given(node, 1)
    return (past, new) if past.is_graph_input() else None


def _side_by_side(value: ir.Value, before: ir.Node) -> ir.Value:
    """(B, H, S, D) as (B, S, H · D)."""
    rotated = made_by(value, "RotaryEmbedding")
    if rotated is not None:
        flat = _side_by_side(given(rotated), before)
        options = {**rotated.attributes, "num_heads": _heads(value)[0]}
        inputs = [flat, *rotated.inputs[1:]]
        return add(before, rotated.op_type, inputs, options, like=flat).outputs[0]
    swapped = _swapped(value)
    if swapped is not None:
        return _joined(swapped, before)
    normed = made_by(value, "RMSNormalization")
    swapped = _swapped(given(normed)) if normed is not None else None
    if normed is not None and swapped is not None:
        inputs = [swapped, *normed.inputs[1:]]
        apart = add(before, normed.op_type, inputs, normed.attributes, like=swapped)
        return _joined(apart.outputs[0], before)
    sized = [dims(value)[at] for at in _SWAP]
    turned = add(before, "Transpose", [value], {"perm": _SWAP}, like=value, sized=sized)
    return _joined(turned.outputs[0], before)


def _swapped(value: ir.Value) -> ir.Value | None:
    """What a Transpose between the two orders was given."""
    node = made_by(value, "Transpose")
    return given(node) if node is not None and tuple(attribute(node, "perm")) == _SWAP else None


def _joined(value: ir.Value, before: ir.Node) -> ir.Value:
    """(B, S, H, D) as (B, S, H · D): what it was made of by a Reshape, or by one."""
    batch, length, *_ = dims(value)
    heads, size = (int(each) for each in shape(value)[2:])
    split = made_by(value, "Reshape")
    if split is not None and shape(given(split)) == (*shape(value)[:2], heads * size):
        return given(split)
    form = sizes(before, [0, 0, heads * size])
    sized = [batch, length, heads * size]
    return add(before, "Reshape", [value, form], like=value, sized=sized).outputs[0]


def _bias(mask: ir.Value, query: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """What is added to the scores for a mask of truth values, in the query's dtype; other masks are
    that already."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    if mask not in known:
        node = mask.producer()
        assert node is not None
        assert node.graph is not None
        kind = query.dtype or ir.DataType.FLOAT
        zero, lowest = (
            ir.node("Constant", [], {"value": ir.tensor(np.array(number, kind.numpy()))})
            for number in (0.0, kind.min)
        )
        chosen = ir.node("Where", [mask, zero.outputs[0], lowest.outputs[0]])
        for each in (zero, lowest, chosen):
            each.metadata_props.update(node.metadata_props)
        chosen.outputs[0].type = ir.TensorType(kind)
        chosen.outputs[0].shape = mask.shape
        node.graph.insert_after(node, [zero, lowest, chosen])
        known[mask] = chosen.outputs[0]
    return known[mask]


def _hand_on(old: ir.Node, output: ir.Value) -> None:
    """Have what follows take heads that lie side by side; where it wants them apart, as before."""
    apart = old.outputs[0]
    for user, _ in list(apart.uses()):
        if user.op_type != "Transpose" or tuple(attribute(user, "perm")) != _SWAP:
            continue
        for joins in _after_copies(user.outputs[0]):
            if joins.op_type == "Reshape" and shape(joins.outputs[0]) == shape(output):
                replace(joins.outputs[0], output)
    heads, size = _heads(apart)
    batch, _, length, _ = dims(apart)
    form = sizes(old, [0, 0, heads, size])
    sized = [batch, length, heads, size]
    split = add(old, "Reshape", [output, form], like=apart, sized=sized)
    turned = add(old, "Transpose", split.outputs, {"perm": _SWAP}, like=apart)
    replace(apart, turned.outputs[0])


def _after_copies(value: ir.Value) -> list[ir.Node]:
    """The nodes that take a value, or a copy of it."""
    found: list[ir.Node] = []
    for user, _ in value.uses():
        found += _after_copies(user.outputs[0]) if user.op_type == "Identity" else [user]
    return found
