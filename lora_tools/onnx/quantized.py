"""Linear layers of a graph over quantized weights: ONNX Runtime's MatMulBnb4 and MatMulNBits.

Both take the weight as (out, in), in blocks: MatMulBnb4 (https://github.com/microsoft/onnxruntime,
docs/ContribOperators.md) the bytes that bitsandbytes stores, in blocks over the flattened weight,
with one float32 absmax for each; MatMulNBits whole numbers, in blocks along each row. A quantized
weight keeps its name in the graph; what belongs to it has that name and an ending.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import onnx
import torch

from lora_tools.errors import MismatchError, NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.bitsandbytes import ABSMAX, QUANT_MAP, find_quantized
from lora_tools.formats.quantized.loaded_in_four_bits import reason_to_keep
from lora_tools.formats.tensors import as_bytes
from lora_tools.formats.weights import weight_of
from lora_tools.linalg import nf4
from lora_tools.linalg.codebooks import CODEBOOKS
from lora_tools.linalg.error_feedback import Errors
from lora_tools.onnx import nbits
from lora_tools.onnx.linears import DOMAIN, Linear, linears
from lora_tools.onnx.schemes import AFFINE, NF4, Affine
from lora_tools.onnx.weights import Place, places
from lora_tools.records import TensorSpec
from lora_tools.sources.dequantized import stored_parts
from lora_tools.sources.schemes.bitsandbytes import four_bit_scales

# The operator's numbers for the codebooks that it knows.
BNB4_TYPES = {"fp4": 0, "nf4": 1}
_BNB4_BLOCKS = (16, 32, 64, 128, 256)


class Packing(Protocol):
    """One scheme: which weights it holds, by which operator, and their bytes; and those that were
    error-fed in this."""

    operator: str
    fed: Mapping[str, Errors]

    def takes(self, linear: Linear) -> bool:
        """Whether the layer's weight is quantized."""

    def attributes(self, linear: Linear) -> dict[str, int]:
        """The operator's, but for the sizes N and K."""

    def specs(self, linear: Linear) -> tuple[TensorSpec, ...]:
        """The operator's inputs after the first, the weight itself the first of them."""

    def places(self, weights: Collection[str]) -> dict[str, Place]:
        """Those that lie in files of the output already."""

    def read(self, name: str) -> memoryview:
        """The bytes of one that does not, asked for in the order of ``specs``."""


class Bnb4:
    """Weights of a four-bit checkpoint of bitsandbytes, as they are; absmax in float32."""

    operator = "MatMulBnb4"

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored
        self.fed: Mapping[str, Errors] = {}
        self._quantized = find_quantized(stored.specs, stored.raw, stored.config)
        for name, tensor in self._quantized.items():
            state = tensor.state
            if state.blocksize not in _BNB4_BLOCKS:
                raise MismatchError(
                    f"{name}: has blocks of {state.blocksize}, but ONNX Runtime's MatMulBnb4 takes "
                    f"at most {_BNB4_BLOCKS[-1]}; quantize it again with `loratools quantize "
                    "--blocksize 64`"
                )
            if state.quant_type not in BNB4_TYPES:
                raise MismatchError(
                    f"{name}: is in {state.quant_type}, but ONNX Runtime's MatMulBnb4 takes "
                    f"{' and '.join(BNB4_TYPES)}; make it plain with `loratools dequantize`"
                )
            parts = stored_parts(stored, tensor)
            if not np.array_equal(parts[QUANT_MAP].numpy(), CODEBOOKS[state.quant_type].table):
                raise MismatchError(f"{name}: its quant_map is not that of {state.quant_type}")

    def takes(self, linear: Linear) -> bool:
        """Whether the folder holds its weight in four bits."""
        return linear.weight in self._quantized

    def attributes(self, linear: Linear) -> dict[str, int]:
        """Blocks and codebook. Raises MismatchError where the shapes differ."""
        state = self._quantized[linear.weight].state
        sizes = (linear.out_features, linear.in_features)
        if state.shape != sizes:
            raise MismatchError(
                f"{linear.weight}: quantized as {list(state.shape)}, the graph has {list(sizes)}"
            )
        kind = BNB4_TYPES[state.quant_type]
        return {"block_size": state.blocksize, "quant_type": kind}

    def specs(self, linear: Linear) -> tuple[TensorSpec, ...]:
        """Packed codes, and the absmax of each block."""
        state = self._quantized[linear.weight].state
        return (
            TensorSpec(linear.weight, "U8", (nf4.packed_size(state.numel),)),
            TensorSpec(linear.weight + ABSMAX, "F32", (state.blocks,)),
        )

    def places(self, weights: Collection[str]) -> dict[str, Place]:
        """In the folder: the codes, and absmax where it is stored in float32."""
        plain = [name for name in weights if not self._quantized[name].state.nested]
        found = places(self._stored, [*weights, *(name + ABSMAX for name in plain)])
        for name in weights:  # whatever dtype's elements hold the bytes
            size = found[name].spec.nbytes
            found[name] = dataclasses.replace(found[name], spec=TensorSpec(name, "U8", (size,)))
        return found

    def read(self, name: str) -> memoryview:
        """Codes as stored; absmax in float32."""
        weight = name.removesuffix(ABSMAX)
        if name == weight or not self._quantized[weight].state.nested:
            return self._stored.raw(name)
        quantized = self._quantized[weight]
        scales = four_bit_scales(quantized, stored_parts(self._stored, quantized))
        return as_bytes(torch.from_numpy(scales))


class NBits:
    """Weights rounded to whole numbers by ONNX Runtime's own quantizer, one at a time.

    Args:
        config: the checkpoint's ``config.json``.
        tensor: a weight as it is stored, by its name in the graph.
        factor: (weight, inputs): that of the inputs' second moment, where rounding errors are to be
            fed forward.

    Attributes:
        fed: weights whose errors were, and what that came to.
    """

    operator = "MatMulNBits"

    def __init__(
        self,
        scheme: Affine,
        config: Mapping[str, Any],
        tensor: Callable[[str], torch.Tensor],
        factor: nbits.FactorOf | None = None,
    ) -> None:
        self._scheme, self._config, self._tensor = scheme, config, tensor
        self._factor = factor
        self.fed: Mapping[str, Errors] = {}
        self._shapes: dict[str, Linear] = {}
        self._last: dict[str, memoryview] = {}

    def takes(self, linear: Linear) -> bool:
        """Whether ``quantize`` would take the weight, were it a checkpoint's."""
        sizes = (linear.out_features, linear.in_features)
        stored = sizes if linear.out_first else sizes[::-1]
        spec = TensorSpec(linear.weight, "F32", stored)
        return not reason_to_keep(weight_of(spec, self._config), self._config, head=False)[0]

    def attributes(self, linear: Linear) -> dict[str, int]:
        """Bits and blocks, and how it multiplies."""
        scheme = self._scheme
        return {"bits": scheme.bits, "block_size": scheme.block, "accuracy_level": scheme.accuracy}

    def specs(self, linear: Linear) -> tuple[TensorSpec, ...]:
        """Codes, scales and zero points."""
        self._shapes[linear.weight] = linear
        return self._scheme.specs(linear.weight, linear.out_features, linear.in_features)

    def places(self, weights: Collection[str]) -> dict[str, Place]:
        """None: all are made here."""
        return {}

    def read(self, name: str) -> memoryview:
        """What ONNX Runtime's quantizer makes of the weight, which is read once."""
        if name not in self._last:  # the first of a weight's tensors; the others follow
            self._last = self._quantize(self._shapes[name])
        return self._last[name]

    def _quantize(self, linear: Linear) -> dict[str, memoryview]:
        quantizer = quantizer_of(self._scheme)
        stored = self._tensor(linear.weight)
        turned = stored.T if linear.out_first else stored
        weight = turned.to(torch.float32).contiguous().numpy()
        if not np.isfinite(weight).all():
            raise NonFiniteError(
                f"{linear.weight}: holds an inf or a NaN, which cannot be quantized"
            )
        made = quantizer.qbits_block_quant(weight)
        by = self._factor(linear.weight, linear.in_features) if self._factor else None
        if by is not None:
            rows = np.ascontiguousarray(weight.T)
            bits, block = self._scheme.bits, self._scheme.block
            codes, errors = nbits.feed(rows, made, bits, block, by)
            made, self.fed = (codes, *made[1:]), {**self.fed, linear.weight: errors}
        return {
            spec.name: memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            for spec, array in zip(self.specs(linear), made, strict=True)
        }


def quantizer_of(scheme: Affine) -> Any:
    """ONNX Runtime's; importing it configures the root logger, which is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as its

    root.handlers[:] = handlers
    root.setLevel(level)
    config = its.DefaultWeightOnlyQuantConfig(
        block_size=scheme.block, is_symmetric=False, bits=scheme.bits
    )
    return its.DefaultWeightOnlyQuantizer(config)


def packing(
    name: str,
    stored: Checkpoint,
    config: Mapping[str, Any],
    tensor: Callable[[str], torch.Tensor],
    factor: nbits.FactorOf | None = None,
) -> Packing:
    """A scheme by its name; ``stored`` holds the weights of ``nf4``."""
    return Bnb4(stored) if name == NF4 else NBits(AFFINE[name], config, tensor, factor)


def quantize_linears(
    models: Iterable[onnx.ModelProto], how: Packing, kept: Collection[str] = ()
) -> dict[str, tuple[TensorSpec, ...]]:
    """Put the operator in the place of every linear layer whose weight ``how`` takes.

    Args:
        models: the bare graphs of one checkpoint.
        kept: weights that stay as they are.

    Returns:
        what stands in the graphs for each weight.

    Raises:
        MismatchError: there is no such layer, or a weight that is quantized is used otherwise, too.
    """
    made: dict[str, tuple[TensorSpec, ...]] = {}
    models = list(models)
    others = {name for model in models for name in _other_uses(model)}
    for model in models:
        chosen = [e for e in linears(model) if e.weight not in kept and how.takes(e)]
        if isinstance(how, NBits):
            chosen = [each for each in chosen if each.weight not in others]
        for linear in chosen:
            if linear.weight in others:
                raise MismatchError(
                    f"{linear.weight}: is quantized, but the graph does not use it in linear "
                    "layers only"
                )
            made[linear.weight] = how.specs(linear)
        _put_in(model, {each.output: each for each in chosen}, how)
    if not made:
        raise MismatchError(
            "the graph has no linear layer to quantize; --nf4 finds only layers that have the "
            "same names in the checkpoint and in transformers, --int8 and --int4 find all"
        )
    return made


def _other_uses(model: onnx.ModelProto) -> Iterator[str]:
    """Weights of linear layers that some other node reads as well."""
    found = list(linears(model))
    layers = {each.output for each in found}
    turns = {each.transpose.output[0] for each in found if each.transpose}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node.output[0])
    for each in found:
        turned = readers[each.transpose.output[0]] if each.transpose else []
        if not layers.union(turns).issuperset([*readers[each.weight], *turned]):
            yield each.weight


def _put_in(model: onnx.ModelProto, chosen: Mapping[str, Linear], how: Packing) -> None:
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        linear = chosen.get(node.output[0])
        nodes += [node] if linear is None else _layer(linear, how)
    used = {value for node in nodes for value in node.input}
    gone = {each.transpose.output[0] for each in chosen.values() if each.transpose} - used
    kept = [node for node in nodes if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    weights = {each.weight: how.specs(each) for each in chosen.values()}
    plain = [i for i in graph.initializer if i.name not in weights]
    del graph.initializer[:]
    graph.initializer.extend(plain)
    for specs in weights.values():
        graph.initializer.extend(
            onnx.TensorProto(name=spec.name, dims=spec.shape, data_type=_types(spec))
            for spec in specs
        )
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _types(spec: TensorSpec) -> int:
    return int({"U8": onnx.TensorProto.UINT8, "F32": onnx.TensorProto.FLOAT}[spec.dtype])


def _layer(linear: Linear, how: Packing) -> list[onnx.NodeProto]:
    """The operator, and the Add of a bias that a Gemm had added."""
    product = linear.output + ".product" if linear.bias else linear.output
    names = [linear.input, *(spec.name for spec in how.specs(linear))]
    sizes: dict[str, Any] = {"K": linear.in_features, "N": linear.out_features}
    sizes |= how.attributes(linear)
    nodes = [
        onnx.helper.make_node(
            how.operator, names, [product], name=linear.node.name, domain=DOMAIN, **sizes
        )
    ]
    if linear.bias:
        nodes.append(
            onnx.helper.make_node(
                "Add", [product, linear.bias], [linear.output], name=linear.node.name + ".bias"
            )
        )
    return nodes
