"""Rotary position embeddings as ONNX's RotaryEmbedding of opset 23.

The cosines and sines stay those that the model computes, for the positions of each call; the
operator takes half of them, since in both halves of a head they are equal.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_tools.onnx.fuse.nodes import add, attribute, constant, made_by, number, replace, shape

_ALONE = ("Cos", "Sin", "Cast", "Identity", "Neg")
_PAIRED = ("Mul", "Add", "Div")
_HEADS = 1  # the axis of heads


def fuse_rotary(graph: ir.Graph) -> None:
    """Put the operator in the place of every rotation of halves."""
    halves: dict[ir.Value, ir.Value | None] = {}
    for node in list(graph):
        rotation = _rotation(node) or _by_halves(node)
        if rotation is None:
            continue
        x, *angles = rotation
        if node.op_type == "Add":
            angles = [half for each in angles if (half := _half(each, halves)) is not None]
        if len(angles) < 2:
            continue
        made = add(node, "RotaryEmbedding", [x, *angles], like=node.outputs[0])
        replace(node.outputs[0], made.outputs[0])
    for node in list(graph):
        _widen(node)


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x (B, H, S, D), cosines and sines (B, S, D) of x · cos + rotate_half(x) · sin."""
    if node.op_type != "Add" or node.domain or len(shape(node.outputs[0])) != 4:
        return None
    one, other = (made_by(value, "Mul") for value in node.inputs)
    if one is None or other is None:
        return None
    for straight, turned in ((one, other), (other, one)):
        for x, cos in (straight.inputs, straight.inputs[::-1]):
            for rotated, sin in (turned.inputs, turned.inputs[::-1]):
                if x is not None and _turned(rotated) is x:
                    angles = _for_heads(cos), _for_heads(sin)
                    if angles[0] is not None and angles[1] is not None:
                        return x, angles[0], angles[1]
    return None


def _by_halves(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, and cosines and sines (B, S, D / 2), of (x₁ · cos − x₂ · sin, x₂ · cos + x₁ · sin)."""
    if node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
        return None
    first, second = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
    if first is None or second is None or attribute(node, "axis") not in (-1, 3):
        return None
    products = [made_by(each, "Mul") for each in (*first.inputs, *second.inputs)]
    if None in products:
        return None
    (x1, cos), (x2, sin), *rest = (each.inputs for each in products if each is not None)
    if [(x2, cos), (x1, sin)] != [tuple(each) for each in rest]:
        return None
    whole = _halves(x1, x2)
    angles = _for_heads(cos), _for_heads(sin)
    if whole is None or angles[0] is None or angles[1] is None:
        return None
    return whole, angles[0], angles[1]


def _halves(first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    """What two values are the halves of, along the last axis of four."""
    parts = _part(first), _part(second)
    if parts[0] is None or parts[1] is None or parts[0][0] is not parts[1][0]:
        return None
    whole, size = parts[0][0], int(shape(parts[0][0])[-1])
    both = (parts[0][1:], parts[1][1:])
    return whole if both == ((0, size // 2), (size // 2, size)) and size % 2 == 0 else None


def _turned(value: ir.Value | None) -> ir.Value | None:
    """x of (−x₂, x₁), its halves along the last axis."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or attribute(joined, "axis") not in (-1, 3):
        return None
    negative = made_by(joined.inputs[0], "Neg")
    return _halves(joined.inputs[1], negative.inputs[0]) if negative is not None else None


def _part(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """What a value is a slice of along the last axis of four, from where to where."""
    halved = value.producer() if value is not None else None
    if value is not None and halved is not None and halved.op_type == "Split":
        return _of_split(halved, value)
    node = made_by(value, "Slice")
    whole = node.inputs[0] if node is not None else None
    width = shape(whole)[-1:]
    if node is None or whole is None or not width or not isinstance(width[0], int):
        return None
    bounds = [number(each) for each in node.inputs[1:5]]
    if len(bounds) != 4 or None in bounds or bounds[2] not in (-1, 3) or bounds[3] != 1:
        return None
    start, stop = (_within(int(each or 0), width[0]) for each in bounds[:2])
    return whole, start, stop


def _of_split(node: ir.Node, value: ir.Value) -> tuple[ir.Value, int, int] | None:
    whole = node.inputs[0]
    widths = [shape(each)[-1] for each in node.outputs if shape(each)]
    along = attribute(node, "axis", 0) in (-1, 3) and len(shape(whole)) == 4
    if whole is None or not along or not all(isinstance(each, int) for each in widths):
        return None
    at = list(node.outputs).index(value)
    bounds = [sum(int(each) for each in widths[:n]) for n in (at, at + 1)]
    return (whole, bounds[0], bounds[1]) if len(widths) == len(node.outputs) else None


def _within(at: int, width: int) -> int:
    return max(at + width if at < 0 else min(at, width), 0)


def _for_heads(value: ir.Value | None) -> ir.Value | None:
    """(B, S, D) of what is multiplied with all heads alike."""
    node = made_by(value, "Unsqueeze")
    if node is None:
        return None
    axes, inner = constant(node.inputs[1]), node.inputs[0]
    known = shape(inner)
    alike = axes is not None and axes.reshape(-1).tolist() == [_HEADS]
    # The operator wants a row for each of the batch.
    return inner if alike and len(known) == 3 and known[0] != 1 else None


def _half(value: ir.Value, known: dict[ir.Value, ir.Value | None]) -> ir.Value | None:
    """The first half of what repeats itself along its last axis; None where that is not seen."""
    if value in known:
        return known[value]
    known[value] = None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Concat" and node.inputs[0] is node.inputs[-1] and len(node.inputs) == 2:
        if attribute(node, "axis") in (-1, len(shape(value)) - 1):
            known[value] = node.inputs[0]
        return known[value]
    inputs = [
        each if number(each) is not None or each is None else _half(each, known)
        for each in node.inputs
    ]
    if None in inputs or node.op_type not in (*_ALONE, *_PAIRED):
        return None
    if node.op_type in _PAIRED and 1 not in [_elements(each) for each in node.inputs]:
        return None
    made = add(node, node.op_type, inputs, node.attributes, like=value, sized=[]).outputs[0]
    made.shape = None
    known[value] = made
    return made


def _elements(value: ir.Value | None) -> int:
    array = constant(value)
    return array.size if array is not None else 0


def _widen(node: ir.Node) -> None:
    """A rotation of the first part of a head, with the rest put behind it, rotates the head."""
    if node.op_type != "Concat" or node.domain or attribute(node, "axis") not in (-1, 3):
        return
    rotated = made_by(node.inputs[0], "RotaryEmbedding")
    if rotated is None or len(node.inputs) != 2:
        return
    first, rest = _part(rotated.inputs[0]), _part(node.inputs[1])
    if first is None or rest is None or first[0] is not rest[0]:
        return
    whole, size = first[0], shape(first[0])[-1]
    if (first[1], first[2], rest[2]) != (0, rest[1], size):
        return
    made = add(
        node,
        "RotaryEmbedding",
        [whole, *rotated.inputs[1:]],
        {"rotary_embedding_dim": first[2]},
        like=node.outputs[0],
    )
    replace(node.outputs[0], made.outputs[0])
