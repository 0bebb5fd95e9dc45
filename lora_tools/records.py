"""Frozen records that travel between rooms. They know nothing of files, tensors or threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

# Bits per element of every dtype a safetensors header may name.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# The dtypes in which weights are added and decomposed; others pass through untouched.
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (as safetensors spells it) and shape: all a plan needs to know of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * DTYPE_BITS[self.dtype] + 7) // 8

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one tensor or adapter key, and why. A plan is a tuple of these."""

    tensor: str
    action: str
    reason: str = ""
    nbytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleResult:
    """The measured outcome for one module.

    Attributes:
        relative_error: ‖Δ − s·B·A‖_F / ‖Δ‖_F of the factors **as written** (after the cast).
        energy: 1 − relative_error², the share of ‖Δ‖²_F the written factors hold.
        gain_bound: upper bound on the share of ‖Δ‖²_F that the best factorisation of the same
            rank could add to what the decomposition captured before the cast.
        delta_norm: ‖Δ‖_F.
        relative_change: ‖Δ‖_F / ‖W_base‖_F.
        method: how the factorisation was found ("krylov", "gram", "dense", "resize").
    """

    module: str
    layout: str
    shape: tuple[int, ...]
    rank: int
    relative_error: float
    energy: float
    gain_bound: float
    delta_norm: float
    relative_change: float
    method: str


@dataclasses.dataclass(frozen=True, slots=True)
class TensorResult:
    """The measured outcome of quantizing one tensor.

    Attributes:
        shape: as stored in the plain checkpoint.
        bits_per_parameter: all that is stored of it, tables and states counted.
        relative_error: ‖Ŵ − W‖_F / ‖W‖_F with Ŵ as a loader dequantizes what was written (the
            relative root mean square error).
        norm: ‖W‖_F.
        compensated_error: ‖Ŵ + B·A − W‖_F / ‖W‖_F with the factors as written, where an adapter
            for the error lies by; else None.
    """

    tensor: str
    shape: tuple[int, ...]
    bits_per_parameter: float
    relative_error: float
    norm: float
    compensated_error: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """An input and its content hash (see ``formats.digest``); empty where nothing was read."""

    role: str
    path: str
    digest: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a verb did, or with ``dry_run`` would do."""

    verb: str
    version: str
    inputs: tuple[Input, ...]
    output: str
    dry_run: bool
    plan: tuple[Fate, ...]
    modules: tuple[ModuleResult, ...] = ()
    totals: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    tensors: tuple[TensorResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """One step done: ``done`` of ``total`` units of work (bytes), and what was worked on."""

    done: int
    total: int
    label: str


ProgressCallback = Callable[[Progress], None]
