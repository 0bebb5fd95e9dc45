"""A weight as compressed-tensors 0.20.1 stores it: the tensors beside its module, and its settings.

A quantized ``P.weight`` (out, in) is, by the ``format`` that config.json gives, of all or by groups
of modules (``config_groups``):

============================  =====================================================================
``float-quantized``           ``weight`` F8_E4M3; ``weight_scale``
``int-quantized``             ``weight`` I8; ``weight_scale``; ``weight_zero_point`` I8
``naive-quantized``           either of these; I16 for more than 8 bits
``pack-quantized``            ``weight_packed`` I32, integers of 1 to 8 bits, lowest first, plus
                              half of their range; ``weight_scale``; ``weight_shape``;
                              ``weight_zero_point`` I32, packed likewise along its first dimension
``nvfp4-pack-quantized``      ``weight_packed`` U8, two E2M1; ``weight_scale`` F8_E4M3 for each 16;
                              ``weight_global_scale`` F32, which divides
``mxfp4-pack-quantized``      ``weight_packed`` U8, two E2M1; ``weight_scale`` U8, E8M0 for each 32
``mxfp6-pack-quantized``      ``weight_packed`` U8, E2M3 of six bits; ``weight_scale`` as MXFP4's
``mxfp8-quantized``           ``weight`` F8_E4M3; ``weight_scale`` as MXFP4's
============================  =====================================================================

A ``weight_scale`` is (1), (out, 1), (out, groups) or (blocks down, blocks across), by the strategy.
Weights of experts may be (E, out, in), their scales and packs alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.errors import UsageError
from lora_tools.formats.quantized.packed import Packed
from lora_tools.records import TensorSpec

METHOD = "compressed-tensors"
PACKED, WEIGHT, SCALE, ZERO_POINT = "weight_packed", "weight", "weight_scale", "weight_zero_point"
GLOBAL_SCALE, SHAPE, G_IDX = "weight_global_scale", "weight_shape", "weight_g_idx"
# How integers lie in words: each follows the last bit of the one before; or no integer lies in two
# words, as versions before dense packing wrote those of 3, 5, 6 and 7 bits.
DENSE, ALIGNED = "dense", "aligned"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How weights are quantized: ``weights`` of a config group, as far as it says what is stored.

    Attributes:
        form: the config group's or the config's ``format``.
        kind: "int" or "float", of ``bits`` each.
        strategy: what shares a scale: "tensor", "channel", "group", "tensor_group" or "block".
        group_size: numbers of a row that share a scale, of the strategies of groups.
        block_structure: rows and columns that do, of the strategy "block".
    """

    form: str
    kind: str
    bits: int
    strategy: str
    group_size: int = 0
    block_structure: tuple[int, int] = (0, 0)
    symmetric: bool = True

    @property
    def label(self) -> str:
        """In a word or two: "int4, groups of 128"."""
        shared = {
            "tensor": "a scale each",
            "channel": "by channels",
            "block": "blocks of {}×{}".format(*self.block_structure),
        }.get(self.strategy, f"groups of {self.group_size}")
        if self.form.startswith(("nvfp4", "mxfp")):
            return self.form.partition("-")[0].upper()
        name = f"fp{self.bits}" if self.kind == "float" else f"int{self.bits}"
        return f"{name}, {shared}" + ("" if self.symmetric else ", zero points")

    def block(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns that share a scale, of a weight as a matrix of its last dimension."""
        rows, cols = math.prod(shape[:-1]), shape[-1]
        return {
            "tensor": (max(rows, 1), max(cols, 1)),
            "channel": (1, max(cols, 1)),
            "block": self.block_structure,
        }.get(self.strategy, (1, self.group_size))


@dataclasses.dataclass(frozen=True)
class CompressedWeight(Packed):
    """A weight's tensors, by their own names behind its module's, and how they are read.

    Attributes:
        packing: ``DENSE`` or ``ALIGNED``, of integers in words; "" of others.
        shared: the global scale to encode with, in common with other layers; None: its own.
        kept: scales (n, across), and zero points or None, of the rows that are encoded: those that
            stay where the numbers still fit them. None: all are made anew.
    """

    settings: Settings
    packing: str = ""
    shared: float | None = None
    kept: tuple[Any, Any] | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, cols) that it is decoded as."""
        return math.prod(self.plain.shape[:-1]), self.plain.shape[-1]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of that matrix that share a scale."""
        return self.settings.block(self.plain.shape)


# What this tool writes: the package's own presets (``quant_scheme.PRESET_SCHEMES``) that take no
# activations, or measure them as they come, so that no data is needed.
WRITTEN: dict[str, Settings] = {
    "nvfp4": Settings("nvfp4-pack-quantized", "float", 4, "tensor_group", 16),
    "mxfp4": Settings("mxfp4-pack-quantized", "float", 4, "group", 32),
    "int4": Settings("pack-quantized", "int", 4, "group", 128),
    "int8": Settings("int-quantized", "int", 8, "channel"),
    "int8-packed": Settings("pack-quantized", "int", 8, "channel"),
    "fp8": Settings("float-quantized", "float", 8, "tensor"),
    "fp8-channel": Settings("float-quantized", "float", 8, "channel"),
    "fp8-block": Settings("float-quantized", "float", 8, "block", block_structure=(128, 128)),
}
_SCALE_DTYPES = {"nvfp4-pack-quantized": "F8_E4M3"} | dict.fromkeys(
    ("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"), "U8"
)


def settings_for(scheme: str, group_size: int | None = None) -> Settings:
    """Those of a name in ``WRITTEN``; ``group_size`` of "int4" instead of 128.

    Raises:
        UsageError: there is no such scheme, or its group size is no other.
    """
    found = WRITTEN.get(scheme)
    if found is None:
        raise UsageError(f"scheme {scheme!r} is not one of {', '.join(WRITTEN)}")
    if group_size in (None, found.group_size):
        return found
    if scheme != "int4" or not (group_size and group_size > 0):
        raise UsageError(f"a group size of {group_size} is not for {scheme}")
    return dataclasses.replace(found, group_size=group_size)


def why_not(plain: TensorSpec, settings: Settings) -> str:
    """Why a weight cannot be stored so, in a few words; "" where it can."""
    if len(plain.shape) < 2 or not plain.numel or not plain.is_float:
        return "not a matrix of floats"
    if len(plain.shape) > 2 and settings.strategy == "block":
        return "only matrices have blocks"
    if settings.group_size and plain.shape[-1] % settings.group_size:
        return f"{plain.shape[-1]} columns are not a multiple of {settings.group_size}"
    return ""


def compressed_weight(plain: TensorSpec, settings: Settings) -> CompressedWeight:
    """A weight ``P.weight`` with all tensors that will be stored of it (see ``why_not``)."""
    module = plain.name.removesuffix(WEIGHT)
    shapes = stored_shapes(plain, settings, DENSE)
    specs = {part: TensorSpec(module + part, *shape) for part, shape in shapes.items()}
    packing = DENSE if settings.form == "pack-quantized" else ""
    return CompressedWeight(plain, specs, settings.label, settings, packing)


def stored_shapes(
    plain: TensorSpec, settings: Settings, packing: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of what is stored of a weight, by the names of its parts, codes first. (The
    dtype of a scale may be another: any float's, where the form does not fix it.)"""
    *lead, rows, cols = plain.shape
    across = scale_shape(plain.shape, settings)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if settings.form == "pack-quantized":
        shapes[PACKED] = "I32", (*lead, rows, words(cols, settings.bits, packing))
    elif settings.form.endswith("pack-quantized"):
        shapes[PACKED] = "U8", (*lead, rows, cols * settings.bits // 8)
    elif settings.kind == "float":
        shapes[WEIGHT] = "F8_E4M3", plain.shape
    else:
        shapes[WEIGHT] = "I8" if settings.bits <= 8 else "I16", plain.shape
    shapes[SCALE] = _SCALE_DTYPES.get(settings.form, plain.dtype), across
    if settings.form == "nvfp4-pack-quantized":
        shapes[GLOBAL_SCALE] = "F32", (1,)
    if not settings.symmetric:
        shapes[ZERO_POINT] = "I8" if settings.kind == "int" else "F8_E4M3", across
    if settings.form != "pack-quantized":
        return shapes
    if not settings.symmetric and settings.strategy in ("group", "channel"):
        shapes[ZERO_POINT] = "I32", (*lead, words(rows, settings.bits, packing), across[-1])
    shapes[SHAPE] = "I64", (len(plain.shape),)
    return shapes


def scale_shape(shape: Sequence[int], settings: Settings) -> tuple[int, ...]:
    """That of ``weight_scale``, of a weight of this shape."""
    *lead, rows, cols = shape
    if settings.strategy == "tensor":
        return (1,)
    high, wide = settings.block(shape)
    if settings.strategy == "block":
        return (*lead, -(rows // -high), -(cols // -wide))
    return (*lead, rows, -(cols // -wide))


def words(count: int, bits: int, packing: str) -> int:
    """Words of 32 bits that so many integers are packed in."""
    return -(count // -(32 // bits)) if packing == ALIGNED else -(count * bits // -32)


def quantization_config(
    settings: Settings, ignore: Sequence[str], targets: Sequence[str] = ("Linear",)
) -> dict[str, Any]:
    """The entry ``quantization_config`` of config.json, as the package, transformers and vLLM read
    it.

    Args:
        ignore: modules among the targets that are stored as plain numbers, by their names.
        targets: classes of modules, names, or patterns after "re:".
    """
    group = {
        "targets": list(targets),
        "weights": _args(settings),
        "input_activations": _activations(settings),
        "output_activations": None,
        "format": settings.form,
    }
    return {
        "config_groups": {"group_0": group},
        "format": settings.form,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def _args(settings: Settings) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": settings.kind,
        "symmetric": settings.symmetric,
        "group_size": settings.group_size or None,
        "strategy": settings.strategy,
        "dynamic": False,
    }
    if settings.strategy == "block":
        args["block_structure"] = list(settings.block_structure)
    dtype = _SCALE_DTYPES.get(settings.form)
    if dtype is not None:
        args["scale_dtype"] = {"U8": "torch.uint8", "F8_E4M3": "torch.float8_e4m3fn"}[dtype]
    return args


def _activations(settings: Settings) -> Mapping[str, Any] | None:
    """Inputs measured as they come, of the schemes whose kernels take eight bits only."""
    if settings.form not in ("float-quantized", "int-quantized"):
        return None
    in_blocks = settings.strategy == "block"
    return {
        "num_bits": 8,
        "type": settings.kind,
        "symmetric": True,
        "group_size": settings.block_structure[1] if in_blocks else None,
        "strategy": "group" if in_blocks else "token",
        "dynamic": True,
    }
