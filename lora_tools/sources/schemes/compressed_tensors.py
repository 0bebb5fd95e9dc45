"""What compressed-tensors stores: a row of the table of stored number formats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
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
from lora_tools.formats.quantized.packed import AGAIN
from lora_tools.sources.schemes.row import Parts, Scheme, refuse_non_finite

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.scaled_feedback import Grid

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


def _codes(weight: CompressedWeight, parts: Parts, rows: slice) -> torch.Tensor:
    """Rows of what is stored in few bits, or of whole numbers, each by itself: (n, cols)."""
    import torch

    from lora_tools.linalg import bits

    packed = parts[next(iter(weight.specs))]
    packed = packed.reshape(-1, packed.shape[-1])[rows]
    if weight.settings.kind == "int":
        return _integers(packed, weight, weight.matrix[1]) if weight.packing else packed
    if packed.dtype == torch.float8_e4m3fn:
        return packed.view(torch.uint8)
    return bits.unpack(packed, weight.settings.bits, weight.matrix[1])


def _values(weight: CompressedWeight) -> torch.Tensor:
    """What each code of a float stands for, float32."""
    import torch

    from lora_tools.linalg import e2m1

    if weight.settings.bits == 8:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return e2m1.values() if weight.settings.bits == 4 else e2m1.six_bit_values()


def _numbers(weight: CompressedWeight, parts: Parts, rows: slice) -> torch.Tensor:
    """Rows of what is scaled, (n, cols)."""
    import torch

    from lora_tools.linalg import e2m1

    settings = weight.settings
    if settings.kind == "float" and settings.bits == 4:
        packed = parts[next(iter(weight.specs))]
        return e2m1.unpack_e2m1(packed.reshape(-1, packed.shape[-1])[rows])
    codes = _codes(weight, parts, rows)
    if settings.kind == "int":
        return codes
    if settings.bits == 8:
        return codes.view(torch.float8_e4m3fn)
    return _values(weight).index_select(0, codes.flatten().int()).view(codes.shape)


def _integers(packed: torch.Tensor, weight: CompressedWeight, count: int) -> torch.Tensor:
    """(rows, count) int8, of (rows, words) int32."""
    import torch

    from lora_tools.linalg import bits

    number = weight.settings.bits
    if weight.packing == ALIGNED:
        unsigned = bits.unpack_words(packed, number, count)
    else:
        unsigned = bits.stream(packed, number, 0, count)
    return (unsigned - (1 << (number - 1))).view(torch.int8)


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


def _decode(weight: CompressedWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """(code − zero point) · scale, as ``lifecycle.forward_helpers._dequantize`` has it. That
    computes in the dtype of the scales, and this in float32: the same where a plain weight is of
    the scales' dtype, and not rounded to it where it is wider."""
    from lora_tools.linalg import scaled
    from lora_tools.linalg.runs import row_runs

    high, last = weight.block[0], first + len(out)
    lines = slice(first // high, -(last // -high))
    scales, zeros = _scales(weight, parts, lines), _zeros(weight, parts, lines)
    groups = _groups(weight, parts) if G_IDX in weight.specs else None
    for start, stop in row_runs(*out.shape):
        run = out[start:stop]
        numbers = _numbers(weight, parts, slice(first + start, first + stop))
        if groups is None:
            at = first + start - lines.start * high
            scaled.times_scales(numbers, scales, weight.block, run, at, zeros)
        else:
            own = None if zeros is None else zeros[start:stop]
            scaled.times_indexed_scales(numbers, scales[start:stop], groups, run, own)


def _rounding(weight: CompressedWeight, parts: Parts) -> float:
    from lora_tools.linalg import noise, scaled

    every = slice(None)
    scales = _scales(weight, parts, every)
    if weight.settings.kind == "int":
        return noise.uniform_noise(scales, scaled.block_sizes(weight.matrix, weight.block))
    codes, errors = _codes(weight, parts, every), noise.errors_by_code(_values(weight))
    groups = _groups(weight, parts) if G_IDX in weight.specs else None
    if groups is not None:
        codes = codes[:, groups.argsort(stable=True)]
    return noise.codes_noise(codes, errors, scales, weight.block)


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
            f"columns each, found others; {AGAIN}"
        )
    return groups


def _encode(weight: CompressedWeight, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the package's ``compress`` makes of x in float32, with the scales that
    ``calculate_qparams`` finds for its least and largest numbers; these are rounded to the dtype
    that they are stored in before they are used."""
    import torch

    from lora_tools.linalg import scaled
    from lora_tools.linalg.runs import row_runs

    if G_IDX in weight.specs:
        raise CheckpointError(
            f"{weight.plain.name}: its groups of columns are listed ({G_IDX}), which cannot be "
            "written again; run loratools dequantize first"
        )
    is_whole = x.numel() == weight.plain.numel
    x = x.float().reshape(-1, weight.matrix[1])
    stored, scales, zeros = _new_scales(weight, x)
    runs = []
    for start, stop in row_runs(*x.shape):
        over = scaled.over_scales(x[start:stop], scales, weight.block, zeros, start)
        runs.append(_packed(weight, over))
    stored[next(iter(weight.specs))] = torch.cat(runs)
    if SHAPE in weight.specs:
        stored[SHAPE] = torch.tensor(weight.plain.shape)
    made = {
        part: stored[part].to(torch_dtype(spec.dtype))
        for part, spec in weight.specs.items()
        if part in stored
    }
    if not is_whole:
        return made
    return {part: tensor.reshape(weight.specs[part].shape) for part, tensor in made.items()}


def _grid(weight: CompressedWeight, parts: Parts) -> Grid | None:
    """None where groups of columns lie apart."""
    import torch

    from lora_tools.linalg.scaled_feedback import Grid, finite

    if G_IDX in weight.specs:
        return None
    if weight.settings.kind == "int":
        least, most = _ends(weight.settings)
        values = torch.arange(least, most + 1, dtype=torch.float32)
    else:
        values = finite(_values(weight))
    every = slice(None)
    return Grid(values, _scales(weight, parts, every), weight.block, _zeros(weight, parts, every))


def _unit(weight: CompressedWeight) -> int:
    """Rows of blocks, where no word holds zero points of several rows, nor a scale is that of the
    whole weight and not yet known."""
    specs, (high, _) = weight.specs, weight.block
    packed_down = ZERO_POINT in specs and specs[ZERO_POINT].dtype == "I32"
    if packed_down or G_IDX in specs or (GLOBAL_SCALE in specs and weight.shared is None):
        return 0
    stacked = math.prod(weight.plain.shape[:-2])
    return 0 if stacked > 1 and weight.plain.shape[-2] % high else high


def _new_scales(
    weight: CompressedWeight, x: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """What is stored beside the codes; the scales and zero points of blocks, as they are read.
    Raises NonFiniteError."""
    import torch

    from lora_tools.linalg import e2m1, scaled

    specs, settings = weight.specs, weight.settings
    if GLOBAL_SCALE in specs:
        largest = scaled.absmax(x, weight.block)
        refuse_non_finite(weight, largest)
        own = weight.shared is None
        whole = e2m1.global_scale(largest.amax()) if own else torch.tensor([weight.shared])
        groups = e2m1.group_scales(largest, whole)
        return {GLOBAL_SCALE: whole, SCALE: groups}, groups.float() / whole, None
    if specs[SCALE].dtype in ("U8", "F8_E8M0"):
        largest = scaled.absmax(x, weight.block)
        refuse_non_finite(weight, largest)
        exponents = e2m1.shared_exponents(largest, *_EXPONENTS[settings.bits])
        as_stored = exponents.view(torch_dtype(specs[SCALE].dtype))
        return {SCALE: as_stored}, e2m1.powers(exponents), None
    low, high = scaled.extremes(x, weight.block)
    refuse_non_finite(weight, torch.maximum(-low, high))
    ends = _ends(settings)
    scales, zeros = scaled.linear_scales(low, high, ends, settings.symmetric)
    scales = scales.to(torch_dtype(specs[SCALE].dtype))
    scales[scales == 0] = torch.finfo(scales.dtype).eps
    if weight.kept is not None:
        own, own_zeros = weight.kept
        kept = scaled.still_fit(low, high, own.float(), own_zeros, ends, scales.float())
        scales = torch.where(kept, own, scales)
        zeros = None if zeros is None else torch.where(kept, own_zeros, zeros)
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
    codes.round_()
    return _in_words(codes, weight) if weight.packing else codes.to(_dtype(weight))


def _dtype(weight: CompressedWeight) -> torch.dtype:
    """Of what holds the codes."""
    return torch_dtype(next(iter(weight.specs.values())).dtype)


def _in_words(codes: torch.Tensor, weight: CompressedWeight) -> torch.Tensor:
    """The inverse of ``_integers``."""
    import torch

    from lora_tools.linalg import bits

    number = weight.settings.bits
    unsigned = (codes + (1 << (number - 1))).to(torch.uint8)
    if weight.packing == ALIGNED:
        return bits.pack_words(unsigned, number)
    return bits.to_stream(unsigned, number)


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


def _keeping(weight: CompressedWeight, parts: Parts, start: int, stop: int) -> CompressedWeight:
    """Of whole numbers: scales of floats are, to their last bits, found again."""
    if weight.settings.kind != "int":
        return weight
    high = weight.block[0]
    lines = slice(start // high, -(stop // -high))
    scales = parts[SCALE]
    scales = scales.reshape(-1, scales.shape[-1] if scales.dim() else 1)[lines]
    return dataclasses.replace(weight, kept=(scales, _zeros(weight, parts, lines)))


COMPRESSED_TENSORS = Scheme(
    "compressed-tensors",
    "compressed-tensors' formats",
    _find,
    _decode,
    encode=_encode,
    rounding=_rounding,
    unit=_unit,
    grid=_grid,
    coded=_packed,
    shared=_shared,
    shared_for=_shared_for,
    keeping=_keeping,
)
