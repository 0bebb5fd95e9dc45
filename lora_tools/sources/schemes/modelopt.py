"""NVFP4 of ModelOpt, and FP8 beside it: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.json_file import read_object
from lora_tools.formats.quantized.fp8 import FILE, FP8, find_fp8
from lora_tools.formats.quantized.modelopt import CODES, GROUP, NVFP4, SCALE, WHOLE, find_nvfp4
from lora_tools.formats.quantized.packed import Packed
from lora_tools.formats.regular_files import is_there
from lora_tools.sources.schemes.fp8 import FLOATS
from lora_tools.sources.schemes.row import Parts, Scheme, refuse_non_finite

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, Packed]:
    """Where some weights are in NVFP4, those in FP8, too: ``MIXED_PRECISION`` has both."""
    path = stored.path / FILE
    said = read_object(path) if stored.is_folder and is_there(path) else {}
    found = find_nvfp4(stored.specs, stored.config, said)
    if not found:
        return {}
    taken = {spec.name for weight in found.values() for spec in weight.specs.values()}
    others = {name: spec for name, spec in stored.specs.items() if name not in taken}
    return {**found, **find_fp8(others, stored.config)}


def _scales(parts: Parts, rows: slice) -> torch.Tensor:
    """Rows of the scales of groups, (n, groups) float32."""
    return parts[SCALE][rows].float() * parts[WHOLE].reshape(())


def _decode(weight: Packed, parts: Parts, out: torch.Tensor, first: int) -> None:
    """code · (weight_scale · weight_scale_2), as ModelOpt 0.47's ``NVFP4QTensor.dequantize``."""
    if isinstance(weight, FP8):
        FLOATS.decode(weight, parts, out, first)
        return
    from lora_tools.linalg import e2m1, scaled
    from lora_tools.linalg.runs import row_runs

    for start, stop in row_runs(*out.shape):
        rows = slice(first + start, first + stop)
        numbers = e2m1.unpack_e2m1(parts[CODES][rows])
        scaled.times_scales(numbers, _scales(parts, rows), (1, GROUP), out[start:stop])


def _encode(weight: Packed, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """As ModelOpt 0.47's ``NVFP4QTensor.quantize``; of zeros only, ``weight_scale_2`` is 1."""
    import torch

    from lora_tools.linalg import e2m1, scaled
    from lora_tools.linalg.runs import row_runs

    if isinstance(weight, FP8):
        assert FLOATS.encode is not None
        return FLOATS.encode(weight, x)
    refuse_non_finite(weight, x)
    shared = weight.shared if isinstance(weight, NVFP4) else None
    given = None if shared is None else torch.tensor(shared)
    groups, whole = e2m1.two_scales(scaled.absmax(x, (1, GROUP)), given)
    scales = groups.float() * whole
    codes = torch.empty(len(x), weight.specs[CODES].shape[1], dtype=torch.uint8)
    for start, stop in row_runs(*x.shape):
        over = scaled.over_scales(x[start:stop], scales, (1, GROUP), None, start)
        codes[start:stop] = e2m1.pack_e2m1(e2m1.nearest_e2m1(over))
    return {CODES: codes, SCALE: groups, WHOLE: whole.reshape(weight.specs[WHOLE].shape)}


def _unit(weight: Packed) -> int:
    if isinstance(weight, FP8):
        return FLOATS.unit(weight)
    return int(isinstance(weight, NVFP4) and weight.shared is not None)


def _rounding(weight: Packed, parts: Parts) -> float:
    from lora_tools.linalg.e2m1 import e2m1_noise

    if isinstance(weight, FP8):
        return FLOATS.rounding(weight, parts) if FLOATS.rounding else 0.0
    return e2m1_noise(parts[CODES], _scales(parts, slice(None)), GROUP)


def _shared(weight: Packed, parts: Parts) -> float | None:
    return float(parts[WHOLE]) if isinstance(weight, NVFP4) else None


def _shared_for(weight: Packed, largest: float) -> float | None:
    """The ``weight_scale_2`` of layers that are put into one: loaders take the largest of theirs
    for all."""
    import torch

    from lora_tools.linalg.e2m1 import whole_scale

    return float(whole_scale(torch.tensor(largest))) if isinstance(weight, NVFP4) else None


MODELOPT = Scheme(
    "modelopt",
    "NVFP4 (ModelOpt)",
    _find,
    _decode,
    encode=_encode,
    rounding=_rounding,
    unit=_unit,
    shared=_shared,
    shared_for=_shared_for,
    files=(FILE,),
)
