"""Eight-bit floats with scales or without, and ComfyUI's: rows of the table of stored number
formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized import comfy_fp8, fp8
from lora_tools.formats.quantized.fp8 import CODES, FP8, SCALE
from lora_tools.formats.quantized.packed import entry_of
from lora_tools.formats.regular_files import is_there
from lora_tools.records import TensorSpec, counted
from lora_tools.sources.schemes.row import Parts, Scheme, refuse_non_finite

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.scaled_feedback import Grid

_INVERSES = ("_scale_inv", ".scale", ".qscale_weight")


def _find(stored: Checkpoint) -> Mapping[str, FP8]:
    if comfy_fp8.shows(stored.specs, stored.metadata):
        return {}
    by_modelopt = stored.is_folder and is_there(stored.path / fp8.FILE)
    return fp8.find_fp8(stored.specs, stored.config, by_modelopt)


def _find_comfy(stored: Checkpoint) -> Mapping[str, FP8]:
    return comfy_fp8.find_comfy(stored.specs, stored.raw, stored.config, stored.metadata)


def _matrices(weight: FP8, numbers: int) -> tuple[int, int, int]:
    """(matrices, rows, cols) of the whole weight, or of some rows of it as one matrix."""
    stacked, rows, cols = weight.matrices
    return (stacked, rows, cols) if numbers == weight.plain.numel else (1, numbers // cols, cols)


def _scales(weight: FP8, parts: Parts) -> torch.Tensor | None:
    """(matrices, down, across), powers of two in one byte as float32; None without scales."""
    import torch

    if weight.grid is None:
        return None
    scales = parts[SCALE]
    if scales.itemsize == 1:
        scales = scales.view(torch.float8_e8m0fnu).float()  # 255 is a NaN
    if weight.own is not None:
        expert, first = weight.own
        return scales[expert, None, first : first + weight.grid[1]]
    stacked = _matrices(weight, parts[CODES].numel())[0]
    return scales.reshape(stacked, -1, weight.grid[2])


def _decode(weight: FP8, parts: Parts, out: torch.Tensor, first: int) -> None:
    """W = code · scale in float32, as transformers' ``Fp8Dequantize`` computes it."""
    from lora_tools.linalg.scaled import times_scales

    _, rows, cols = _matrices(weight, parts[CODES].numel())
    n = len(out)
    codes = parts[CODES].reshape(-1, cols)[first : first + n]
    scales = _scales(weight, parts)
    if scales is None:
        out.copy_(codes)
        return
    at = 0
    while at < n:
        matrix, row = divmod(first + at, rows)
        stop = min(n, at + rows - row)
        times_scales(codes[at:stop], scales[matrix], weight.block, out[at:stop], row)
        at = stop


def _encode(weight: FP8, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales by transformers' names are made as transformers does, others as compressed-tensors and
    ModelOpt do: they differ in the last bits."""
    import torch

    from lora_tools.linalg import fp8 as linalg

    codes_spec = weight.specs[CODES]
    dtype = torch_dtype(codes_spec.dtype)
    if weight.grid is None:
        largest = torch.finfo(dtype).max
        refuse_non_finite(weight, x)
        return {CODES: x.clamp(-largest, largest).to(dtype)}
    spec = weight.specs[SCALE]
    held = torch.float8_e8m0fnu if spec.dtype in fp8.POWERS else torch_dtype(spec.dtype)
    as_blocks = weight.is_power or spec.name.endswith(_INVERSES)
    stacked, rows, cols = _matrices(weight, x.numel())
    codes = torch.empty((stacked, rows, cols), dtype=dtype)
    scales = torch.empty((stacked, -(rows // -weight.block[0]), weight.grid[2]), dtype=held)
    for i, matrix in enumerate(x.reshape(codes.shape) if x.numel() else ()):
        if as_blocks:
            found = linalg.encode_blocks(
                matrix, weight.block, dtype, held, weight.is_power, out=codes[i]
            )
        else:
            found = linalg.encode_divided(matrix, weight.block, dtype, held, out=codes[i])
        scales[i] = found[1]
    refuse_non_finite(weight, scales.float().reciprocal())
    refuse_non_finite(weight, scales.float())
    stored = scales.view(torch.uint8) if spec.dtype == "U8" else scales
    if x.numel() < weight.plain.numel:
        return {CODES: codes[0], SCALE: stored[0]}
    return {CODES: codes.reshape(codes_spec.shape), SCALE: stored.reshape(spec.shape)}


def _grid(weight: FP8, parts: Parts) -> Grid | None:
    """None of stacked matrices."""
    import torch

    from lora_tools.linalg.scaled_feedback import Grid, finite

    stacked, rows, cols = _matrices(weight, parts[CODES].numel())
    if stacked != 1:
        return None
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(weight.specs[CODES].dtype))
    values = finite(codes.float())
    scales = _scales(weight, parts)
    if scales is None:
        return Grid(values, torch.ones(1, 1), (rows, cols))
    return Grid(values, scales[0], weight.block)


def _coded(weight: FP8, values: torch.Tensor) -> torch.Tensor:
    spec = weight.specs[CODES]
    codes = values.to(torch_dtype(spec.dtype))
    return codes.reshape(spec.shape) if codes.numel() == weight.plain.numel else codes


def _unit(weight: FP8) -> int:
    """Rows of blocks, unless those lie across the ends of stacked matrices."""
    (stacked, rows, _), (high, _) = weight.matrices, weight.block
    return 0 if stacked > 1 and rows % high else high


def _rounding(weight: FP8, parts: Parts) -> float:
    import torch

    from lora_tools.linalg.fp8 import rounding_loss

    scales, block = _scales(weight, parts), weight.block
    if scales is None:
        _, rows, cols = weight.matrices
        scales, block = torch.ones(1, 1, 1), (max(rows, 1), max(cols, 1))
    stacked = parts[CODES].reshape(weight.matrices)
    return sum(rounding_loss(c, s, block) for c, s in zip(stacked, scales, strict=True))


def _faults(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], weights: Mapping[str, FP8]
) -> Sequence[str]:
    if entry_of(config) or not any(weight.grid for weight in weights.values()):
        return ()
    return ("has no quantization_config, so a program would use the codes as weights",)


def _unscaled(weights: Mapping[str, FP8]) -> Sequence[str]:
    """ComfyUI's own loader has a scale of 1 for a layer that lacks one (``scaled_fp8_ops``)."""
    names = [name for name, weight in weights.items() if weight.grid is None]
    if not names:
        return ()
    of = f"{counted(len(names), 'weight')} of {len(weights)}"
    listed = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    return (f"no scale beside {of} in FP8 ({listed}): the scale is 1, as in ComfyUI",)


FLOATS = Scheme(
    "fp8",
    "eight-bit floats (FP8)",
    _find,
    _decode,
    faults=_faults,
    encode=_encode,
    rounding=_rounding,
    unit=_unit,
    grid=_grid,
    coded=_coded,
    files=(fp8.FILE,),
)
COMFY = Scheme(
    "comfy-fp8",
    "scaled FP8 of ComfyUI",
    _find_comfy,
    _decode,
    notes=_unscaled,
    encode=_encode,
    rounding=_rounding,
    unit=_unit,
    grid=_grid,
    coded=_coded,
    metadata=(comfy_fp8.METADATA,),
)
