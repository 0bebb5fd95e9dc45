"""The weights of a checkpoint that compressed-tensors stored, each with its tensors checked."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.compressed_config import Groups, groups_of
from lora_tools.formats.quantized.compressed_tensors import (
    ALIGNED,
    DENSE,
    G_IDX,
    GLOBAL_SCALE,
    METHOD,
    PACKED,
    SCALE,
    SHAPE,
    WEIGHT,
    ZERO_POINT,
    CompressedWeight,
    Settings,
    scale_shape,
    stored_shapes,
    words,
)
from lora_tools.formats.quantized.packed import (
    ACTIVATIONS,
    AGAIN,
    plain_dtype,
    refuse_left_over,
    with_activations,
)
from lora_tools.records import FLOAT_DTYPES, TensorSpec

Read = Callable[[str], Sequence[int]]  # the whole numbers of a small tensor
Own = Mapping[str, TensorSpec]  # a module's tensors by their names in it

_CODES = ("F8_E4M3", "F8_E5M2", "I8", "I16", "I32", "U8")
_BESIDE = (SCALE, GLOBAL_SCALE, SHAPE, ZERO_POINT, G_IDX)
_PACK = "pack-quantized"


def find_compressed(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], read: Read
) -> dict[str, CompressedWeight]:
    """The weights that are stored so, by their plain names; none where config.json says nothing of
    it.

    Raises:
        CheckpointError: a weight's tensors are not all there, or not of the dtypes and shapes that
            its settings give.
    """
    groups = groups_of(config)
    if groups is None:
        return {}
    modules: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for spec in specs.values():
        module, leaf = split_tensor(spec.name)
        if leaf.startswith(WEIGHT) or leaf in ACTIVATIONS:
            modules[module][leaf] = spec
    found = [_weight(m, own, groups, config, read) for m, own in modules.items() if _is_code(own)]
    packing = _packing([weight for weight in found if weight.settings.form == _PACK])
    checked = [
        _checked(dataclasses.replace(w, packing=packing) if w.settings.form == _PACK else w)
        for w in found
    ]
    weights = {weight.plain.name: weight for weight in checked}
    refuse_left_over(weights, specs, _BESIDE, f"{WEIGHT} or {PACKED}")
    return with_activations(weights, specs)


def _is_code(own: Own) -> bool:
    """Whether a module's weight is codes, or has a scale as if it were."""
    weight = own.get(WEIGHT)
    return PACKED in own or (weight is not None and (SCALE in own or weight.dtype in _CODES))


def _weight(
    module: str, own: Own, groups: Groups, config: Mapping[str, Any], read: Read
) -> CompressedWeight:
    """A module's weight, its tensors not yet checked."""
    name = f"{module}.{WEIGHT}" if module else WEIGHT
    codes = own[PACKED if PACKED in own else WEIGHT]
    if groups.ignores(module):
        raise CheckpointError(
            f"{codes.name}: stored as codes, but config.json says that {module} is not quantized "
            f"(ignore); {AGAIN}"
        )
    settings = groups.settings_of(module)
    plain = TensorSpec(name, plain_dtype(config), _shape(codes, own, settings, read))
    return CompressedWeight(plain, own, settings.label, settings)


def _shape(codes: TensorSpec, own: Own, settings: Settings, read: Read) -> tuple[int, ...]:
    """That of the plain weight."""
    shape = codes.shape
    if settings.form == _PACK:
        spec = own.get(SHAPE)
        if spec is None or spec.dtype not in ("I64", "I32") or spec.shape not in ((2,), (3,)):
            stem = codes.name.removesuffix(PACKED).removesuffix(WEIGHT)
            raise CheckpointError(
                f"{stem}{SHAPE}: expected the two or three numbers of a shape, found {spec}; "
                f"{AGAIN}"
            )
        shape = tuple(read(spec.name))
    elif settings.form.endswith(_PACK) and shape:
        shape = (*shape[:-1], shape[-1] * 8 // settings.bits)
    if len(shape) < 2 or min(shape) < 1 or (settings.strategy == "block" and len(shape) > 2):
        raise CheckpointError(f"{codes}: a weight of the shape {list(shape)} cannot be read")
    return shape


def _packing(weights: Iterable[CompressedWeight]) -> str:
    """How all of them lie in words: one version of the library wrote them.

    Raises:
        CheckpointError: their shapes go with neither way, or with both where these differ.
    """
    possible, unsure = {DENSE, ALIGNED}, None
    for weight in weights:
        fits = {way for way in (DENSE, ALIGNED) if _lies(weight, way)}
        if len(fits) == 2 and 32 % weight.settings.bits and _crosses(weight):
            unsure = weight.specs[PACKED]
        possible &= fits or possible  # what goes with neither is refused as it is checked
        if not possible:
            name = weight.plain.name
            raise CheckpointError(f"{name}: not packed as the weights before it; {AGAIN}")
    if unsure is not None and len(possible) > 1:
        raise CheckpointError(
            f"{unsure}: packed by a version of {METHOD} before or after dense packing, and its "
            "shape does not show which; load it with the version that made it, save it in "
            "bfloat16, and give that"
        )
    return DENSE if DENSE in possible else ALIGNED


def _lies(weight: CompressedWeight, way: str) -> bool:
    """Whether the shapes of its integers go with a way of packing."""
    number, (*_, rows, cols) = weight.settings.bits, weight.plain.shape
    codes, zeros = weight.specs.get(PACKED), weight.specs.get(ZERO_POINT)
    if codes is None or codes.shape[-1:] != (words(cols, number, way),):
        return False
    is_packed = zeros is not None and zeros.dtype == "I32" and len(zeros.shape) > 1
    return not (zeros and is_packed) or zeros.shape[-2] == words(rows, number, way)


def _crosses(weight: CompressedWeight) -> bool:
    """Whether the ways of packing differ in what they make of its words."""
    *_, rows, cols = weight.plain.shape
    return max(cols, rows if ZERO_POINT in weight.specs else 0) > 32 // weight.settings.bits


def _checked(weight: CompressedWeight) -> CompressedWeight:
    """The weight with its tensors in order. Raises CheckpointError for what does not fit."""
    plain, settings, own = weight.plain, weight.settings, weight.specs
    size, cols = settings.group_size, plain.shape[-1]
    if size and cols % size:
        raise CheckpointError(
            f"{plain.name}: rows of {cols} numbers cannot be divided into groups of {size}, as "
            f"config.json says; {AGAIN}"
        )
    expected = stored_shapes(plain, settings, weight.packing)
    if ZERO_POINT in own and ZERO_POINT not in expected:  # older versions stored those that are 0
        expected[ZERO_POINT] = "I8", scale_shape(plain.shape, settings)
    if G_IDX in own and settings.strategy == "group":
        expected[G_IDX] = "I32", (cols,)
    parts = {}
    for part, (dtype, shape) in expected.items():
        spec = own.get(part)
        single = math.prod(shape) == 1 and part != SHAPE
        fits = spec is not None and (spec.shape == shape or (single and spec.numel == 1))
        if spec is None or not fits or spec.dtype not in _dtypes(part, dtype, settings):
            raise CheckpointError(
                f"{plain.name.removesuffix(WEIGHT)}{part}: expected {dtype} {list(shape)} beside a "
                f"weight {list(plain.shape)} of {weight.label}, found "
                f"{f'{spec.dtype} {list(spec.shape)}' if spec else 'none'}; {AGAIN}"
            )
        parts[part] = spec
    for part, spec in own.items():
        if part not in parts and part not in ACTIVATIONS:
            raise CheckpointError(f"{spec}: unknown beside a weight of {weight.label}; {AGAIN}")
    return dataclasses.replace(weight, specs=parts)


def _dtypes(part: str, dtype: str, settings: Settings) -> tuple[str, ...]:
    """Those that a part may be of, which the library would write as this dtype."""
    if dtype in FLOAT_DTYPES and part == SCALE:
        return FLOAT_DTYPES
    if part == SCALE:
        return (dtype, "F8_E8M0") if dtype == "U8" else (dtype,)
    if part == ZERO_POINT and dtype != "I32":
        return ("I8", "F8_E4M3", *FLOAT_DTYPES)
    return ("I64", "I32") if part in (SHAPE, G_IDX) else (dtype,)
