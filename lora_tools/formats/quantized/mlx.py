"""MLX's affine groups, as mlx 0.32 and mlx-lm store them:

=============  ========================================================================
``P.weight``   U32 (..., out, in · bits / 32): a stream of bits along each row, lowest first
``P.scales``   F16, BF16 or F32 (..., out, in / group_size)
``P.biases``   likewise
=============  ========================================================================

W = q · scale + bias. ``quantization`` in config.json says ``group_size`` and ``bits``, and under a
module's name what differs there. Embeddings, and fused experts (a dimension in front), likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.packed import FETCH, Packed, refuse_left_over
from lora_tools.formats.quantized.qweights import FLOATS, check
from lora_tools.records import TensorSpec

CODES, SCALES, BIASES = "weight", "scales", "biases"
BITS = (2, 3, 4, 5, 6, 8)
# What mlx takes for what an entry does not say (mlx.nn.QuantizedLinear).
_DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}
_ADVICE = "make it plain with `mlx_lm.convert --dequantize`, and give that"


@dataclasses.dataclass(frozen=True)
class MlxWeight(Packed):
    """One such weight, of ``group`` numbers a scale."""

    bits: int
    group: int


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of MLX's groups; None where it says nothing of them."""
    for key in ("quantization", "quantization_config"):
        entry = config.get(key)
        if isinstance(entry, Mapping) and "bits" in entry and "quant_method" not in entry:
            return entry
    return None


def find_mlx(specs: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> dict[str, MlxWeight]:
    """Every such weight by its name, in the dtype of its scales.

    Raises:
        CheckpointError: tensors that do not fit each other or the settings; another mode.
    """
    found: dict[str, MlxWeight] = {}
    _refuse_unknown_names(specs, settings)
    for name, codes in specs.items():
        module, _, last = name.rpartition(".")
        if last != CODES or codes.dtype != "U32":
            continue
        bits, group = _said(module, name, settings)
        parts = {CODES: codes}
        for part in (SCALES, BIASES):
            spec = specs.get(f"{module}.{part}")
            if spec is None:
                raise CheckpointError(f"{module}.{part}: missing beside {name}; {FETCH}")
            parts[part] = spec
        scales = parts[SCALES]
        shape = _shape(codes, scales, bits, group)
        groups = (*shape[:-1], shape[-1] // group)
        check(scales, FLOATS, groups)
        check(parts[BIASES], (scales.dtype,), groups)
        plain = TensorSpec(name, scales.dtype, shape)
        found[name] = MlxWeight(plain, parts, f"MLX of {bits} bits", bits, group)
    refuse_left_over(found, specs, (SCALES, BIASES), f"U32 {CODES}")
    return found


def _refuse_unknown_names(specs: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError for settings of a layer that is not there: those of another name would
    be read otherwise, and codes of 8 bits in groups of 32 have the shapes of 4 in groups of 64."""
    for module, own in settings.items():
        is_layer = isinstance(own, Mapping) and own.keys() & _DEFAULTS.keys()
        if is_layer and f"{module}.{CODES}" not in specs:
            raise CheckpointError(
                f"config.json: quantization names {module}, which is not in the files; were "
                f"tensors renamed? {FETCH}"
            )


def _shape(codes: TensorSpec, scales: TensorSpec, bits: int, group: int) -> tuple[int, ...]:
    """Of the plain weight."""
    width = codes.shape[-1] * 32 if len(codes.shape) > 1 else 0
    if not width or 0 in codes.shape or width % bits or width // bits % group:
        raise CheckpointError(
            f"{codes.name}: {codes.dtype} {list(codes.shape)} cannot be divided into groups of "
            f"{group} numbers of {bits} bits; {FETCH}"
        )
    return *codes.shape[:-1], width // bits


def _said(module: str, name: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(bits, group_size) of a module. Raises CheckpointError."""
    own = settings.get(module, True)
    if own is False:
        raise CheckpointError(f"{name}: holds codes, but config.json says that it is plain")
    said = {**_DEFAULTS, **(own if isinstance(own, Mapping) else settings)}
    bits, group, mode = said["bits"], said["group_size"], said["mode"]
    if mode != "affine":
        raise CheckpointError(f"{name}: MLX's mode {mode} cannot be read; {_ADVICE}")
    if type(bits) is not int or bits not in BITS or type(group) is not int or group < 1:
        raise CheckpointError(
            f"{name}: MLX does not have {bits!r} bits in groups of {group!r}, as config.json says; "
            f"{FETCH}"
        )
    return bits, group
