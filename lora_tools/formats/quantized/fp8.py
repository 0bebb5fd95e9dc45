"""Weights as floats of eight bits (FP8), with scales beside them or without.

``P.weight`` (or any name N, as that of fused experts) holds codes, F8_E4M3 or F8_E5M2, of the
weight's own shape; W = code · scale. Who writes which scale:

=========================  =====================================================================
``N_scale_inv``            DeepSeek-V3, Qwen3-FP8, transformers (``quant_method: fp8``): of blocks
                           (⌈out/128⌉, ⌈in/128⌉), of fused experts (E, ⌈out/128⌉, ⌈in/128⌉); without
                           ``weight_block_size`` one for all; of all experts, whose codes
                           lie one by one (``formats.quantized.fp8_experts``)
``N_scale``                fbgemm (out, 1); ModelOpt () or, of blocks, (out/128, 1, in/128, 1);
                           vLLM (); MXFP8 (out, in/32), whose scales are powers of two
``P.scale``                DeepSeek-V4, as ``N_scale_inv``
``P.qscale_weight``        Mistral, as ``N_scale_inv``
``P.scale_weight``         ComfyUI (``formats.quantized.comfy_fp8``)
=========================  =====================================================================

A scale is a float, or a power of two in one byte (F8_E8M0, or U8 of the same bits). Scales of
activations and of caches (``input_scale``, ``k_scale``, …) go with the weight that they lie by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.fp8_experts import Layout, is_gate_up, per_expert, scale_of_all
from lora_tools.formats.quantized.packed import (
    ACTIVATIONS,
    ORIGINAL,
    Packed,
    entry_of,
    plain_dtype,
    with_activations,
)
from lora_tools.records import FLOAT_DTYPES, TensorSpec

CODES, SCALE = "", "scale"
CODE_DTYPES = {
    "F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz",
}  # fmt: skip
POWERS = ("F8_E8M0", "U8")
METHODS = ("fp8", "fbgemm_fp8", "modelopt", "modelopt_mixed")
FILE = "hf_quant_config.json"  # ModelOpt's
BLOCK = (128, 128)

_SCALES = ("_scale_inv", "_scale")  # added to the weight's whole name
_SCALES_BESIDE = (".scale", ".qscale_weight", ".scale_weight")  # in place of ".weight"
# What only lies beside codes of other kinds, or changes what the codes stand for.
_OTHER_PARTS = (
    "weight_scale_2", "weight_zero_point", "weight_g_idx", "weight_shape", "pre_quant_scale",
    "weight_scalar", "weight_global_scale",
)  # fmt: skip
_NO_WEIGHTS = {
    *ACTIVATIONS, *_OTHER_PARTS, "weight_scale", "weight_scale_inv", "scale_weight",
    "qscale_weight", "scaled_fp8",
}  # fmt: skip
_BY_A_WEIGHT = ("_scale_inv", "weight_scale", "qscale_weight", "scale_weight")


@dataclasses.dataclass(frozen=True)
class FP8(Packed):
    """A weight of eight-bit floats.

    Attributes:
        grid: (stacked matrices, scales down, scales across) that the scales are seen as; None
            without them.
        block: (rows, cols) of each matrix that share a scale; the last ones may be ragged.
        is_power: scales are powers of two, whatever dtype they are of.
        own: (expert, first row of scales) in a tensor of the scales of all experts; None where its
            scales are its own.
    """

    grid: tuple[int, int, int] | None = None
    block: tuple[int, int] = (1, 1)
    is_power: bool = False
    own: tuple[int, int] | None = None

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(matrices, rows, cols) of the weight as the grid has them."""
        return matrices(self.plain.shape, self.grid[0] if self.grid else 1)


def matrices(shape: tuple[int, ...], stacked: int) -> tuple[int, int, int]:
    """(stacked, rows, cols) of a weight as that many matrices of its last dimension."""
    cols = shape[-1] if len(shape) > 1 else 1
    return stacked, math.prod(shape) // max(cols * stacked, 1), cols


def method(config: Mapping[str, Any]) -> str:
    """The scheme that config.json names, in lower case; "" where it names none."""
    said = entry_of(config)
    return str(said.get("quant_method") or said.get("quant_algo") or bool(said) * "?").lower()


def is_codes(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor holds a weight's numbers in eight-bit floats, rather than scales."""
    if spec.dtype not in CODE_DTYPES or spec.name.rpartition(".")[2] in _NO_WEIGHTS:
        return False
    for ending in ("_scale_inv", "_scales", "_scale", ".scales", ".scale"):
        if spec.name.endswith(ending):
            stem = spec.name.removesuffix(ending)
            others = (stem, f"{stem}.weight", f"{stem}_packed", f"{stem}_blocks", f"{stem}.qweight")
            return not any(name in specs for name in others)
    return True


def find_fp8(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], is_scaled: bool = False
) -> dict[str, FP8]:
    """Every weight of eight-bit floats, by name; none where config.json names another scheme.

    Args:
        is_scaled: matrices are known to have scales, as they do where config.json names a scheme,
            or one of them has.

    Raises:
        CheckpointError: a scale is missing, left over, lies beside other parts, or is of a dtype
            or a shape that does not fit its weight for certain.
    """
    if method(config) not in ("", *METHODS):
        return {}
    _stated(config)
    codes = [spec for spec in specs.values() if is_codes(spec, specs)]
    scales = {spec.name: scale_of(spec, specs, config) for spec in codes}
    is_scaled = is_scaled or any(scales.values()) or bool(entry_of(config))
    dtype = plain_dtype(config)
    found = {}
    for spec in codes:
        scale = scales[spec.name]
        of_all = None if scale else scale_of_all(spec, specs, _stated(config))
        if of_all is not None:
            found[spec.name] = _one_of_all(spec, *of_all, dtype)
            continue
        if scale is None and is_scaled and len(spec.shape) > 1:
            raise CheckpointError(
                f"{spec}: its scales ({spec.name}_scale_inv or {spec.name}_scale) are missing; is "
                "the download complete?"
            )
        found[spec.name] = fp8_weight(spec, scale, dtype, config)
    found = with_activations(found, specs)
    refuse_orphans(found, specs)
    return found


def scale_of(
    codes: TensorSpec, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> TensorSpec | None:
    """The scale that lies beside codes, or None.

    Raises:
        CheckpointError: there are several, or parts that no row here knows the meaning of.
    """
    module, dot, last = codes.name.rpartition(".")
    names = [codes.name + ending for ending in _SCALES]
    if last == "weight":
        names += [module + ending for ending in _SCALES_BESIDE]
        for part in _OTHER_PARTS:
            if module + dot + part in specs:
                raise CheckpointError(
                    f"{codes}: {module + dot + part} is beside it, which is unknown for eight-bit "
                    f"floats; {ORIGINAL}"
                )
    found = [specs[name] for name in names if name in specs]
    if found and found[0].name == f"{module}.scale" and method(config) != "fp8":
        raise CheckpointError(
            f"{found[0]}: is beside eight-bit floats ({codes.name}), but no quantization_config "
            f"with quant_method fp8 says that they are multiplied by it; {ORIGINAL}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{codes}: has two scales, {found[0]} and {found[1]}; remove the wrong one"
        )
    return found[0] if found else None


def fp8_weight(
    codes: TensorSpec, scale: TensorSpec | None, dtype: str, config: Mapping[str, Any]
) -> FP8:
    """A weight of its codes and its scale.

    Raises:
        CheckpointError: the scale's dtype or shape does not fit.
    """
    plain, kind = dataclasses.replace(codes, dtype=dtype), f"fp8 {CODE_DTYPES[codes.dtype]}"
    if scale is None:
        return FP8(plain, {CODES: codes}, f"{kind} without scales")
    if scale.dtype not in (*FLOAT_DTYPES, *POWERS):
        raise _unfit(codes, scale, "in F32, BF16, F16, or as powers of two (F8_E8M0, U8)")
    found = _layout(codes, scale, config)
    if found is None:
        stated = _stated(config)
        size = "x".join(map(str, stated or BLOCK))
        others = "" if stated else "one for all of it, one a row, or "
        raise _unfit(codes, scale, f"as {others}one for each block of {size} numbers")
    grid, block, label = found
    if scale.dtype == "U8" and not scale.name.endswith("_scale_inv") and block != (1, 32):
        raise _unfit(codes, scale, "as floats; bytes are powers of two, of 32 numbers each")
    is_power = scale.dtype in POWERS or entry_of(config).get("scale_fmt") == "ue8m0"
    return FP8(plain, {CODES: codes, SCALE: scale}, f"{kind} {label}", grid, block, is_power)


def _one_of_all(
    codes: TensorSpec, scale: TensorSpec, layout: Layout, own: tuple[int, int], dtype: str
) -> FP8:
    """One expert's weight, whose scales are among those of all (``fp8_experts``)."""
    grid, block, label = layout
    plain = dataclasses.replace(codes, dtype=dtype)
    kind = f"fp8 {CODE_DTYPES[codes.dtype]} {label}, scales of all experts in one tensor"
    return FP8(plain, {CODES: codes, SCALE: scale}, kind, grid, block, scale.dtype in POWERS, own)


def _unfit(codes: TensorSpec, scale: TensorSpec, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{scale}: the scales of {codes} must be {wanted}; does it belong to another weight, or "
        "are this file and config.json of different checkpoints?"
    )


def _layout(codes: TensorSpec, scale: TensorSpec, config: Mapping[str, Any]) -> Layout | None:
    """Which numbers of a weight share each scale; None where that is not known for certain.

    A block size that config.json states holds for all scales but one for all that is called as
    vLLM's are, as of embeddings.
    """
    shape, given, stated = codes.shape, scale.shape, _stated(config)
    if len(shape) == 2 and len(given) == 4 and given[1] == given[3] == 1:
        given = (given[0], given[2])  # as ModelOpt keeps those of blocks
    is_one = given in ((), (1,)) and scale.name.endswith("_scale")
    if is_one or (scale.numel == 1 and stated is None):
        _, rows, cols = matrices(shape, 1)
        return (1, 1, 1), (max(rows, 1), max(cols, 1)), "per tensor"
    if stated is None:
        is_turned = method(config) == "fbgemm_fp8"
        is_whole = "weight_block_size" in entry_of(config)  # null
        found = per_expert(codes, given, is_turned, is_whole) or _per_channel(shape, given)
        if found is not None:
            return found
    if len(shape) not in (2, 3) or len(given) != len(shape) or given[:-2] != shape[:-2]:
        return None
    stacked = shape[0] if len(shape) == 3 else 1
    return _blocks(codes, stacked, (given[-2], given[-1]), stated)


def _per_channel(shape: tuple[int, ...], given: tuple[int, ...]) -> Layout | None:
    """One scale for each of the first dimension, that of outputs; of experts, of the second."""
    if len(shape) < 2:
        return None
    cols = shape[-1]
    if given in ((shape[0],), (shape[0], *[1] * (len(shape) - 1))):
        return (1, shape[0], 1), (math.prod(shape[1:-1]), cols), "per channel"
    if len(shape) == 3 and given in (shape[:2], (*shape[:2], 1)):
        return (1, shape[0] * shape[1], 1), (1, cols), "per channel"
    return None


def _blocks(
    codes: TensorSpec, stacked: int, given: tuple[int, int], stated: tuple[int, int] | None
) -> Layout | None:
    """A scale for each block. The blocks of fused ``gate_up_proj`` start anew at its second half,
    where a half is no whole number of them.

    Raises:
        CheckpointError: there are as many whether or not they do.
    """
    _, rows, cols = matrices(codes.shape, stacked)
    down, across = given
    wide = _side(cols, across, stated and stated[1])
    high = _side(rows, down, stated and stated[0])
    if is_gate_up(codes) and not (rows % 2 or down % 2):
        half = _side(rows // 2, down // 2, stated and stated[0])
        if high and half and rows // 2 % high:
            raise CheckpointError(
                f"{codes}: it is not clear whether blocks of {high}x{wide} numbers continue over "
                f"its two projections or start again in the second; {ORIGINAL}"
            )
        if not high:
            stacked, down, high = 2 * stacked, down // 2, half
    if not (high and wide) or (wide == 1 < cols and stated is None):
        return None  # a scale for each input is written by nobody: it is another's, or turned
    return (stacked, down, across), (high, wide), f"per block of {high}x{wide}"


def _stated(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that config.json states, if it does. Raises CheckpointError."""
    said = entry_of(config).get("weight_block_size")
    if said is None:
        return None
    whole = isinstance(said, list) and all(type(n) is int and n > 0 for n in said)
    if not whole or len(said) != 2:
        raise CheckpointError(
            f"config.json: weight_block_size is {said!r:.80}, but must be two positive whole "
            "numbers"
        )
    return said[0], said[1]


def _side(length: int, count: int, stated: int | None) -> int:
    """How many numbers in a line of ``length`` share one of ``count`` scales; 0: not known.

    The size that config.json states is believed; where it states none, 128 is what is written, and
    another power of two where it divides.
    """
    if not 0 < count <= length:
        return 0
    if stated is not None:
        return stated if -(length // -stated) == count else 0
    if count in (1, length):
        return length // count
    if -(length // -BLOCK[0]) == count:
        return BLOCK[0]
    size, rest = divmod(length, count)
    return size if not rest and size >= 16 and not size & (size - 1) else 0


def refuse_orphans(found: Mapping[str, FP8], specs: Mapping[str, TensorSpec]) -> None:
    """Raises CheckpointError for a scale by a weight's name that is no eight-bit weight's; what
    lies beside codes of another kind is left to their own signs."""
    taken = {spec.name for weight in found.values() for spec in weight.specs.values()}
    left = [spec for spec in specs.values() if spec.name not in taken] if found else []
    scales = [spec for spec in left if spec.name.endswith(_BY_A_WEIGHT)]
    names = {spec.name for spec in scales}
    others = {s.name.rpartition(".")[0] for s in left if not s.is_float and s.name not in names}
    for spec in scales:
        module = spec.name.rpartition(".")[0]
        if module not in others:
            lies = specs.get(f"{module}.weight") if module else None
            raise CheckpointError(
                f"{spec}: a scale without an eight-bit weight; "
                + (f"found {lies}" if lies else "is the download complete?")
            )
