"""The linear layers of a graph: which weight each multiplies with, and by which nodes.

A linear layer is what torch.onnx makes of one: the stored weight, a Cast where it is not stored in
float32, a Transpose where it is stored as (out, in), and then a MatMul; or a Gemm, which transposes
and adds the bias itself. In a decoder the output head may be the input embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx

from lora_tools.onnx.weights import weights_of

DOMAIN = "com.microsoft"
QUANTIZED = ("MatMulBnb4", "MatMulNBits")  # of that domain: linear layers over quantized weights
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


@dataclasses.dataclass(frozen=True)
class Linear:
    """One use of a weight W by a linear layer: output = input · Wᵀ (+ bias), W as (out, in).

    Attributes:
        weight: name of the initializer, which is the checkpoint's key.
        node: the MatMul or Gemm, of the graph that was walked.
        cast: from the stored dtype to float32, or None.
        transpose: what makes (in, out) of a weight stored as (out, in), or None: a Gemm does it
            itself, and GPT-2's Conv1D stores (in, out). Other layers may use the same one.
        input, output: names of the values that go in, (…, in_features), and come out.
        bias: name of the value that a Gemm adds; "" where there is none, or an Add follows.
        in_features, out_features: sizes.
        out_first: stored as (out, in); False: as (in, out).
        tied: an embedding looks rows up in the same weight.
    """

    weight: str
    node: onnx.NodeProto
    cast: onnx.NodeProto | None
    transpose: onnx.NodeProto | None
    input: str
    output: str
    bias: str
    in_features: int
    out_features: int
    out_first: bool
    tied: bool


def linears(model: onnx.ModelProto) -> Iterator[Linear]:
    """Every linear layer, in the order of the nodes; a weight used twice is yielded twice.

    Args:
        model: a graph of ``onnx.trace``, bare or with its weights attached.
    """
    shapes = {name: shape for name, shape in weights_of(model).items() if len(shape) == 2}
    made = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Cast" or (node.op_type == "Transpose" and _swaps(node))
    }
    rows = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for node in model.graph.node:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            continue
        flips = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        if node.op_type == "Gemm" and any(
            _attribute(node, name, value) != value for name, value in _PLAIN_GEMM.items()
        ):
            continue
        name, cast, transpose = _back(node.input[1], made)
        if name not in shapes:
            continue
        out_first = flips != (transpose is not None)
        shape = shapes[name] if out_first else shapes[name][::-1]
        yield Linear(
            name,
            node,
            cast,
            transpose,
            node.input[0],
            node.output[0],
            node.input[2] if len(node.input) > 2 else "",
            shape[1],
            shape[0],
            out_first,
            name in rows or (cast is not None and cast.output[0] in rows),
        )


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether linear layers of a graph are over quantized weights, and so not found here."""
    return any(node.domain == DOMAIN and node.op_type in QUANTIZED for node in model.graph.node)


def _back(
    value: str, made: dict[str, onnx.NodeProto]
) -> tuple[str, onnx.NodeProto | None, onnx.NodeProto | None]:
    """From what is multiplied with back to the stored weight: its name, the Cast, the Transpose."""
    found: dict[str, onnx.NodeProto] = {}
    while (node := made.get(value)) is not None and node.op_type not in found:
        found[node.op_type] = node
        value = node.input[0]
    return value, found.get("Cast"), found.get("Transpose")


def _swaps(node: onnx.NodeProto) -> bool:
    return list(_attribute(node, "perm", (1, 0))) == [1, 0]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
