"""A four-bit tensor as bitsandbytes 0.50 stores it: one weight, its keys, and a small JSON.

A quantized ``P.weight`` is (see ``linalg.nf4`` for what the numbers mean)

=============================================  ======================================
``P.weight``                                   U8 (⌈n/2⌉, 1), or as many bytes of another dtype
``P.weight.absmax``                            F32 (blocks,); U8 with double quantization
``P.weight.quant_map``                         F32 (16,), the codebook
``P.weight.nested_absmax``                     F32 (⌈blocks/256⌉,), double quantization only
``P.weight.nested_quant_map``                  F32 (256,), double quantization only
``P.weight.quant_state.bitsandbytes__nf4``     U8, the JSON of ``QuantState``
=============================================  ======================================

``shape`` in the JSON is (out, in), also for a Conv1D that a plain checkpoint stores as (in, out).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.dtypes import FLOAT_NAMES, parse_float_dtype
from lora_tools.formats.names import layout_name
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.records import DTYPE_BITS, TensorSpec

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# bnb_4bit_quant_storage: the dtype whose elements hold the packed bytes.
STORAGES = {"uint8": "U8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}

ABSMAX, QUANT_MAP = ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
STATE = ".quant_state.bitsandbytes__"
_LONGEST_FLOAT = 24  # characters of the longest float64 in JSON
_DTYPES = {
    parse_float_dtype(name): name for name in FLOAT_NAMES if name != "float64"
}  # bitsandbytes has no float64


@dataclasses.dataclass(frozen=True)
class QuantState:
    """What bitsandbytes writes as JSON beside a quantized weight.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: numbers that share one absmax.
        dtype: what the weight is dequantized to, by safetensors' name.
        shape: of the dequantized weight, (out, in).
        nested_offset: the mean taken off absmax; None without double quantization.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(self.numel // -self.blocksize)

    @property
    def nested(self) -> bool:
        return self.nested_offset is not None

    @property
    def scheme(self) -> str:
        double = "double" if self.nested else "no double"
        return f"{self.quant_type}, blocks of {self.blocksize}, {double} quantization"

    def to_json(self) -> bytes:
        """The bytes of ``json.dumps``, fields in bitsandbytes' order."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _DTYPES[self.dtype],
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            fields |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset,
            }
        return json.dumps(fields).encode()

    @property
    def most_json(self) -> int:
        """The most bytes ``to_json`` can have, whatever the offset."""
        return _most_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> QuantState:
        """Raises CheckpointError where it is none that bitsandbytes writes."""
        fields = strict_json(data)
        try:
            nested = "nested_offset" in fields
            state = cls(
                fields["quant_type"],
                fields["blocksize"],
                {name: dtype for dtype, name in _DTYPES.items()}[fields["dtype"]],
                tuple(fields["shape"]),
                float(fields["nested_offset"]) if nested else None,
            )
            honest = (
                state.quant_type in QUANT_TYPES
                and type(state.blocksize) is int
                and state.blocksize in BLOCKSIZES
                and all(type(n) is int and n >= 0 for n in state.shape)
                and math.isfinite(state.nested_offset or 0)
                and (not nested or fields["nested_blocksize"] == NESTED_BLOCKSIZE)
                and (not nested or fields["nested_dtype"] == "float32")
            )
        except (TypeError, KeyError, ValueError, OverflowError):
            honest = False
        if not honest:
            raise CheckpointError(f"not a quant_state of bitsandbytes: {data!r:.200}")
        return state


@functools.lru_cache  # weights are of few shapes
def _most_json(state: QuantState) -> int:
    if not state.nested:
        return len(state.to_json())
    return len(dataclasses.replace(state, nested_offset=0.0).to_json()) - 3 + _LONGEST_FLOAT


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One quantized weight: its tensors by the ending of their names ("" is the weight itself).

    ``transposed`` says that a plain checkpoint stores it as (in, out).
    """

    name: str
    state: QuantState
    specs: dict[str, TensorSpec]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def plain(self) -> TensorSpec:
        """The weight as a plain checkpoint stores it."""
        shape = self.state.shape[::-1] if self.transposed else self.state.shape
        return TensorSpec(self.name, self.state.dtype, shape)

    @property
    def label(self) -> str:
        """Its codebook's name."""
        return self.state.quant_type


def quantized_tensor(name: str, state: QuantState, storage: str = "U8") -> QuantizedTensor:
    """The tensors that hold a weight of that state; its JSON with the most bytes it can have.

    Raises:
        CheckpointError: the packed bytes are no whole number of elements of ``storage``.
    """
    packed, size = -(state.numel // -2), DTYPE_BITS[storage] // 8
    if packed % size:
        raise CheckpointError(
            f"{name}: its {packed} packed bytes cannot be divided into {storage} elements; leave "
            "it out with --exclude, or choose another --quant-storage"
        )
    shapes = _shapes(state, (packed // size, 1), storage).items()
    specs = {end: TensorSpec(name + end, dtype, shape) for end, (dtype, shape) in shapes}
    return QuantizedTensor(name, state, specs)


@functools.lru_cache  # weights are of few shapes
def _shapes(
    state: QuantState, packed: tuple[int, ...], storage: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by the ending of its name."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"": (storage, packed)}
    if state.nested:
        shapes[ABSMAX] = ("U8", (state.blocks,))
        shapes[NESTED_ABSMAX] = ("F32", (-(state.blocks // -NESTED_BLOCKSIZE),))
        shapes[NESTED_MAP] = ("F32", (256,))
    else:
        shapes[ABSMAX] = ("F32", (state.blocks,))
    shapes[QUANT_MAP] = ("F32", (16,))
    shapes[STATE + state.quant_type] = ("U8", (state.most_json,))
    return shapes


def find_quantized(
    specs: Mapping[str, TensorSpec], read: Callable[[str], memoryview], config: Mapping[str, Any]
) -> dict[str, QuantizedTensor]:
    """Every quantized weight of a checkpoint by name, its tensors checked against its JSON.

    Args:
        read: a tensor's bytes; asked for the JSON only.
        config: its config.json, which tells of a Conv1D.

    Raises:
        CheckpointError: a tensor is missing, left over, or not what the JSON says.
    """
    found: dict[str, QuantizedTensor] = {}
    for key, spec in specs.items():
        name, mark, quant_type = key.rpartition(STATE)
        if not mark:
            continue
        if spec.dtype != "U8" or spec.nbytes > 1 << 16:
            raise CheckpointError(
                f"{key}: {spec.dtype} {list(spec.shape)} does not hold a quant_state"
            )
        try:
            state = QuantState.from_json(bytes(read(key)))
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None
        if state.quant_type != quant_type or name in found:
            raise CheckpointError(f"{key}: says {state.quant_type}, or repeats another quant_state")
        weight = _checked(name, state, specs, key)
        turned = len(state.shape) == 2 and layout_name(weight.plain, config) == "conv1d"
        found[name] = dataclasses.replace(weight, transposed=turned)
    taken = {spec.name for tensor in found.values() for spec in tensor.specs.values()}
    ends = (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP)
    for key in specs:
        if key.endswith(ends) and key.rpartition(".")[0] in specs and key not in taken:
            raise CheckpointError(
                f"{key}: does not belong to a quantized weight; is its state missing?"
            )
    return found


def facts(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """How many weights, in which schemes, made of and read back in which dtypes, and their size."""
    numbers = sum(q.state.numel for q in quantized.values())
    states = [q.state for q in quantized.values()]
    return {
        "weights": len(quantized),
        "schemes": dict(Counter(s.scheme for s in states)),
        "dtypes": dict(Counter(s.dtype for s in states)),
        "storage": sorted({q.specs[""].dtype for q in quantized.values()}),
        "numbers": numbers,
        "bits_per_parameter": 8 * sum(q.nbytes for q in quantized.values()) / max(numbers, 1),
    }


def _checked(
    name: str, state: QuantState, specs: Mapping[str, TensorSpec], key: str
) -> QuantizedTensor:
    stored = specs.get(name)
    if stored is None or stored.dtype not in STORAGES.values():
        raise CheckpointError(f"{key}: the packed weight {name!r} is missing beside it")
    expected = quantized_tensor(name, state, stored.dtype).specs
    expected[STATE + state.quant_type] = specs[key]
    for spec in expected.values():
        actual = specs.get(spec.name)
        if actual != spec:
            raise CheckpointError(f"{name}: {spec} is expected, found {actual or 'no such tensor'}")
    return QuantizedTensor(name, state, expected)


def quantization_config(
    quant_type: str, double: bool, compute_dtype: str, storage: str, skip: Sequence[str]
) -> dict[str, Any]:
    """``config.json``'s entry, every field that transformers 5.23 writes itself.

    ``skip`` replaces the list that a loader would make for itself, so it names every linear layer
    that is not quantized. It has no field for the block size: that is in every QuantState.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": storage,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
