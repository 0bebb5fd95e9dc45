"""What compressed-tensors stores: a row of the table of stored number formats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.compressed_find import find_compressed
from lora_tools.formats.quantized.compressed_tensors import (
    ALIGNED,
    G_IDX,
    GLOBAL_SCALE,
    SCALE,
    SHAPE,
    ZERO_POINT,
    CompressedWeight,
    Settings,
)
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch

_ROWS = 1024  # at a time: codes are unpacked into wider numbers
# By bits of a float: the exponent of the largest, and the bits of mantissa that scales in E8M0 are
# rounded by (of E4M3, too, the package takes those of E2M1).
_EXPONENTS = {4: (2, 1), 6: (2, 3), 8: (8, 1)}


def _find(stored: Checkpoint) -> Mapping[str, CompressedWeight]:
    def read(name: str) -> list[int]:
        return [int(n) for n in stored.tensor(name).tolist()]

    try:
        return find_compressed(stored.specs, stored.config, read)
    except CheckpointError as error:
        raise CheckpointError(f"{stored.path}: {error}") from None


def _numbers(
    weight: CompressedWeight, parts: Parts, rows: slice, errors: bool = False
) -> torch.Tensor:
    """Rows of what is scaled, (n, cols): what the codes stand for, or the mean square of what
    rounding to each of them costs."""
    import torch

    from lora_tools.linalg import bits, e2m1, noise

    settings, cols = weight.settings, weight.matrix[1]
    packed = parts[next(iter(weight.specs))]
    packed = packed.reshape(-1, packed.shape[-1])[rows]
    if settings.kind == "int":
        if errors:
            return torch.full((1, 1), 1 / 12).expand(len(packed), cols)
        return _integers(packed, weight, cols) if weight.packing else packed
    if packed.dtype == torch.float8_e4m3fn:
        if not errors:
            return packed
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return noise.errors_by_code(every).float()[packed.view(torch.uint8).long()]
    table = e2m1.values() if settings.bits == 4 else e2m1.six_bit_values()
    if errors:
        table = noise.errors_by_code(table).float()
    if settings.bits == 4:
        return e2m1.unpack_e2m1(packed, table)
    return table[bits.unpack(packed, settings.bits, cols).long()]


def _integers(packed: torch.Tensor, weight: CompressedWeight, count: int) -> torch.Tensor:
    """(rows, count) int16, of (rows, words) int32."""
    import torch

    from lora_tools.linalg import bits

    number = weight.settings.bits
    if weight.packing == ALIGNED:
        unsigned = bits.unpack_words(packed, number, count)
    else:
        rows, width = packed.shape
        flat = packed.contiguous().view(-1).view(torch.uint8)  # a column's own stride is no bytes'
        unsigned = bits.unpack(flat.view(rows, 4 * width), number, count)
    return unsigned.to(torch.int16) - (1 << (number - 1))


def _scales(weight: CompressedWeight, parts: Parts, lines: slice) -> torch.Tensor:
    """Rows of the scales, (n, across) float32."""
    import torch

    from lora_tools.linalg import e2m1

    scales = parts[SCALE]
    scales = scales.reshape(-1, scales.shape[-1] if scales.dim() else 1)[lines]
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return e2m1.powers(scales.view(torch.uint8))
    if GLOBAL_SCALE in weight.specs:
        return scales.float() / parts[GLOBAL_SCALE].reshape(())
    return scales.float()


def _zeros(weight: CompressedWeight, parts: Parts, lines: slice) -> torch.Tensor | None:
    """Rows of the zero points, as ``_scales``; None where there are none."""
    import torch

    if ZERO_POINT not in weight.specs:
        return None
    zeros = parts[ZERO_POINT]
    if zeros.dtype == torch.int32:  # packed down the rows, of each expert by itself
        *_, rows, _ = weight.plain.shape
        down = zeros.transpose(-1, -2)
        across = down.shape[-2]
        whole = _integers(down.reshape(-1, down.shape[-1]), weight, rows)
        zeros = whole.view(-1, across, rows).transpose(-1, -2)
    return zeros.reshape(-1, zeros.shape[-1] if zeros.dim() else 1)[lines].float()


def _times_scales(
    weight: CompressedWeight,
    parts: Parts,
    numbers: torch.Tensor,
    out: torch.Tensor,
    first: int,
    squared: bool = False,
) -> None:
    """Rows of numbers, less their zero points, times their scales, or the squares of these."""
    from lora_tools.linalg import scaled

    block = weight.block
    rows = slice(first, first + len(out))
    lines, start = (rows, 0) if block[0] == 1 else (slice(None), first)
    scales = _scales(weight, parts, lines)
    zeros = None if squared else _zeros(weight, parts, lines)
    scales = scales.square() if squared else scales
    groups = _groups(weight, parts) if G_IDX in weight.specs else None
    if groups is None:
        scaled.times_scales(numbers, scales, block, out, start, zeros)
    else:
        scaled.times_indexed_scales(numbers, scales, groups, out, zeros)


def _decode(weight: CompressedWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """(code − zero point) · scale, as ``lifecycle.forward_helpers._dequantize`` has it. That
    computes in the dtype of the scales, and this in float32: the same where a plain weight is of
    the scales' dtype, and not rounded to it where it is wider."""
    for start in range(0, len(out), _ROWS):
        mine = out[start : start + _ROWS]
        at = first + start
        numbers = _numbers(weight, parts, slice(at, at + len(mine)))
        _times_scales(weight, parts, numbers, mine, at)


def _rounding(weight: CompressedWeight, parts: Parts) -> float:
    import torch

    rows, cols = weight.matrix
    total = 0.0
    for first in range(0, rows, _ROWS):
        chunk = slice(first, min(first + _ROWS, rows))
        costs = torch.empty(chunk.stop - first, cols)
        _times_scales(weight, parts, _numbers(weight, parts, chunk, True), costs, first, True)
        total += float(costs.sum(dtype=torch.float64))
    return total


def _groups(weight: CompressedWeight, parts: Parts) -> torch.Tensor | None:
    """(cols,) the group of each column; None where they lie side by side.

    Versions before 0.20 sort the columns by it and take ``group_size`` of them after another, which
    is the same where each group has as many; and a -1 is what they leave where it is not in use.
    """
    import torch

    groups = parts[G_IDX].long()
    if bool((groups < 0).any()):
        return None
    count = weight.matrix[1] // weight.settings.group_size
    sizes = torch.bincount(groups, minlength=count)
    if len(sizes) > count or bool((sizes != weight.settings.group_size).any()):
        raise CheckpointError(
            f"{weight.specs[G_IDX].name}: expected {count} groups of {weight.settings.group_size} "
            "columns each, found others; get the file again, or quantize the original model anew"
        )
    return groups


def _encode(weight: CompressedWeight, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the package's ``compress`` makes of x in float32, with the scales that
    ``calculate_qparams`` finds for its least and largest numbers; these are rounded to the dtype
    that they are stored in before they are used."""
    import torch

    name = weight.plain.name
    if x.numel() and not all(map(math.isfinite, torch.aminmax(x))):  # of a NaN, both are NaN
        raise NonFiniteError(f"{name}: holds an inf or a NaN, which {weight.label} cannot store")
    if G_IDX in weight.specs:
        raise CheckpointError(
            f"{name}: its groups of columns are listed ({G_IDX}), and are not found anew here; "
            "run loratools dequantize first"
        )
    x = x.float().reshape(weight.matrix)
    stored, scales, zeros = _new_scales(weight, x)
    stored[next(iter(weight.specs))] = _codes(weight, x, scales, zeros)
    if SHAPE in weight.specs:
        stored[SHAPE] = torch.tensor(weight.plain.shape)
    return {
        part: stored[part].to(torch_dtype(spec.dtype)).reshape(spec.shape)
        for part, spec in weight.specs.items()
        if part in stored
    }


def _codes(
    weight: CompressedWeight, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """What is stored for x (rows, cols), made some rows at a time: whole rows of blocks, since the
    steps on the way there are of wider numbers."""
    import torch

    from lora_tools.linalg import scaled

    spec, (high, _) = next(iter(weight.specs.values())), weight.block
    codes = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)).view(-1, spec.shape[-1])
    is_one = high >= len(x)
    step = _ROWS if is_one else max(_ROWS // high, 1) * high
    for first in range(0, len(x), step):
        mine = x[first : first + step]
        lines = slice(None) if is_one else slice(first // high, -((first + len(mine)) // -high))
        own = zeros[lines] if zeros is not None else None
        steps = scaled.over_scales(mine, scales[lines], weight.block, own)
        codes[first : first + step].copy_(_packed(weight, steps))
    return codes


def _new_scales(
    weight: CompressedWeight, x: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """What is stored beside the codes; the scales and zero points of blocks, as they are read."""
    import torch

    from lora_tools.linalg import e2m1, scaled

    specs, settings = weight.specs, weight.settings
    low, high = scaled.extremes(x, weight.block)
    largest = torch.maximum(-low, high)
    if GLOBAL_SCALE in specs:
        own = weight.shared is None
        whole = e2m1.global_scale(largest.amax()) if own else torch.tensor([weight.shared])
        groups = e2m1.group_scales(largest, whole)
        return {GLOBAL_SCALE: whole, SCALE: groups}, groups.float() / whole, None
    if specs[SCALE].dtype in ("U8", "F8_E8M0"):
        exponents = e2m1.shared_exponents(largest, *_EXPONENTS[settings.bits])
        as_stored = exponents.view(torch_dtype(specs[SCALE].dtype))
        return {SCALE: as_stored}, e2m1.powers(exponents), None
    scales, zeros = scaled.linear_scales(low, high, _ends(settings), settings.symmetric)
    scales = scales.to(torch_dtype(specs[SCALE].dtype))
    scales[scales == 0] = torch.finfo(scales.dtype).eps
    stored = {SCALE: scales}
    if ZERO_POINT in specs:
        stored[ZERO_POINT] = torch.zeros(scales.shape) if zeros is None else zeros
    if zeros is not None and specs[ZERO_POINT].dtype == "I32":
        *_, rows, _ = weight.plain.shape
        down = zeros.view(-1, rows, zeros.shape[-1]).transpose(1, 2)
        packed = _in_words(down.reshape(-1, rows), weight)
        stored[ZERO_POINT] = packed.view(len(down), -1, packed.shape[-1]).transpose(1, 2)
    return stored, scales, zeros


def _packed(weight: CompressedWeight, codes: torch.Tensor) -> torch.Tensor:
    """Numbers over their scales, not yet rounded, as they are stored."""
    import torch

    from lora_tools.linalg import bits, e2m1

    settings = weight.settings
    if settings.kind == "float" and settings.bits == 4:
        return e2m1.pack_e2m1(e2m1.nearest_e2m1(codes))
    if settings.kind == "float" and settings.bits == 6:
        return bits.pack(e2m1.nearest_e2m3(codes), settings.bits)
    codes = codes.clamp_(*_ends(settings))
    if settings.kind == "float":
        return codes.to(torch.float8_e4m3fn)
    return _in_words(codes.round_(), weight) if weight.packing else codes.round_()


def _in_words(codes: torch.Tensor, weight: CompressedWeight) -> torch.Tensor:
    """The inverse of ``_integers``."""
    import torch

    from lora_tools.linalg import bits

    number = weight.settings.bits
    unsigned = (codes + (1 << (number - 1))).to(torch.uint8)
    if weight.packing == ALIGNED:
        return bits.pack_words(unsigned, number)
    packed = bits.pack(unsigned, number)
    rows, count = packed.shape
    words = torch.zeros(rows, -(count // -4), 4, dtype=torch.uint8)
    words.view(rows, -1)[:, :count] = packed
    return words.view(torch.int32).squeeze(-1)


def _ends(settings: Settings) -> tuple[float, float]:
    """The least and the largest code."""
    if settings.kind == "float":
        return -448.0, 448.0
    half = 1 << (settings.bits - 1)
    return -half, half - 1


def _shared(weight: CompressedWeight, parts: Parts) -> float | None:
    return float(parts[GLOBAL_SCALE]) if GLOBAL_SCALE in weight.specs else None


def _shared_for(weight: CompressedWeight, largest: float) -> float | None:
    """The global scale of layers that are put into one: of q, k and v, of gate and up (vLLM takes
    the largest of theirs for all, and llm-compressor writes the least)."""
    import torch

    from lora_tools.linalg.e2m1 import global_scale

    if GLOBAL_SCALE not in weight.specs:
        return None
    return float(global_scale(torch.tensor(largest)))


COMPRESSED_TENSORS = Scheme(
    "compressed-tensors",
    "compressed-tensors' formats",
    _find,
    _decode,
    encode=_encode,
    rounding=_rounding,
    shared=_shared,
    shared_for=_shared_for,
)
