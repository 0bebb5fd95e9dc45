"""The quantized weights of a written graph: read back, and made again from the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from lora_tools.errors import CheckpointError
from lora_tools.linalg import codebooks, nf4
from lora_tools.onnx import nbits
from lora_tools.onnx.linears import DOMAIN, QUANTIZED
from lora_tools.onnx.quantized import BNB4_TYPES, quantizer_of
from lora_tools.onnx.schemes import Affine


def exact(model: onnx.ModelProto) -> None:
    """Let MatMulNBits compute in float32, whatever was traded for speed."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of a written graph: its operator, the operator's attributes, and the
    initializers that hold it, the one with its own name first."""

    operator: str
    attributes: Mapping[str, int]
    initializers: tuple[onnx.TensorProto, ...]

    @property
    def name(self) -> str:
        return str(self.initializers[0].name)

    @property
    def names(self) -> list[str]:
        return [str(tensor.name) for tensor in self.initializers]

    @property
    def bits(self) -> int:
        return self.attributes.get("bits", 4)

    @property
    def block(self) -> int:
        return self.attributes["block_size"]

    @property
    def is_flat(self) -> bool:
        """Whether blocks run over the flattened weight, coded by a codebook, or along its rows."""
        return self.operator == "MatMulBnb4"

    def values(self, folder: Path) -> torch.Tensor:
        """(out, in) float32, by what the operators' documentation says of the bytes."""
        return self._values(self._parts(folder))

    def again(self, weight: torch.Tensor, folder: Path) -> tuple[bool, torch.Tensor]:
        """Whether ``export`` writes just these bytes for a weight (out, in), and what the bytes it
        writes stand for."""
        there = self._parts(folder)
        if self.is_flat:
            codes, absmax = nf4.quantize(weight.reshape(-1), self._book, self.block)
            nested = nf4.restore_absmax(nf4.double_quantize(absmax))
            scales = min(absmax, nested, key=lambda s: float(np.abs(s - there[1]).max()))
            made = [codes, scales]
        else:
            quantizer = quantizer_of(Affine(self.operator, self.bits, self.block))
            turned = weight.T.to(torch.float32).contiguous().numpy()
            made = [
                np.ascontiguousarray(x).reshape(y.shape)
                for x, y in zip(quantizer.qbits_block_quant(turned), there, strict=True)
            ]
        same = all(np.array_equal(x, y) for x, y in zip(made, there, strict=True))
        return same, self._values(made)

    @property
    def _book(self) -> codebooks.Codebook:
        kind = self.attributes.get("quant_type")
        for name, number in BNB4_TYPES.items():
            if number == kind:
                return codebooks.CODEBOOKS[name]
        raise CheckpointError(
            f"{self.name}: in a MatMulBnb4 of quant_type {kind}; ONNX Runtime knows "
            f"{', '.join(f'{number} ({name})' for name, number in BNB4_TYPES.items())}"
        )

    def _parts(self, folder: Path) -> list[Any]:
        return [_array(tensor, folder) for tensor in self.initializers]

    def _values(self, parts: list[Any]) -> torch.Tensor:
        if not self.is_flat:
            a = self.attributes
            return torch.from_numpy(nbits.values(parts, self.bits, a["N"], a["K"], self.block))
        out = torch.empty(self.attributes["N"], self.attributes["K"])
        codes, absmax = parts
        nf4.dequantize(codes, absmax, self._book, self.block, out.view(-1))
        return out


def stored_weights(model: onnx.ModelProto) -> Iterator[StoredWeight]:
    """Every quantized weight of a graph, once."""
    tensors = {i.name: i for i in model.graph.initializer}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in QUANTIZED or node.input[1] in seen:
            continue
        seen.add(node.input[1])
        attributes = {each.name: each.i for each in node.attribute}
        yield StoredWeight(
            node.op_type, attributes, tuple(tensors[name] for name in node.input[1:])
        )


def dequantized(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight as (out, in) in float32) of every quantized weight of a written graph."""
    model = onnx.load(path, load_external_data=False)
    for stored in stored_weights(model):
        yield stored.name, stored.values(path.parent)


def _array(tensor: onnx.TensorProto, folder: Path) -> Any:
    """The data that an initializer points to; onnx itself refuses to read through a hard link."""
    at = {each.key: each.value for each in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(at["length"]) // dtype.itemsize
    flat = np.fromfile(folder / at["location"], dtype, count, offset=int(at["offset"]))
    return flat.reshape(tuple(tensor.dims))
