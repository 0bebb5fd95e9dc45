"""How a graph's linear layers may be quantized. Names and numbers: nothing here imports onnx."""

from __future__ import annotations

import dataclasses

from lora_tools.records import TensorSpec

NF4 = "nf4"


@dataclasses.dataclass(frozen=True)
class Affine:
    """Whole numbers of ``bits`` bits: w = scale · (q − zero point), both for ``block`` neighbours
    along a row of the weight as (out, in); of ONNX Runtime's operator MatMulNBits.

    ``accuracy`` is the operator's ``accuracy_level``: 4 multiplies in eight-bit integers, for which
    each block of the layer's input is rounded to eight bits. Without it the operator computes in
    float32, which takes tens of times as long for eight bits.
    """

    name: str
    bits: int
    block: int = 32
    accuracy: int = 4

    def specs(self, weight: str, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        """What is stored of a weight (rows, cols): codes under its name, scales, zero points."""
        blocks, each = -(cols // -self.block), 8 // self.bits
        return (
            TensorSpec(weight, "U8", (rows, blocks, self.block // each)),
            TensorSpec(weight + SCALES, "F32", (rows, blocks)),
            TensorSpec(weight + ZEROS, "U8", (rows, -(blocks // -each))),
        )


SCALES, ZEROS = ".scales", ".zero_points"
AFFINE = {scheme.name: scheme for scheme in (Affine("int8", 8), Affine("int4", 4))}
SCHEMES = (NF4, *AFFINE)
