"""Frozen records that travel between rooms. They know nothing of files, tensors or threads."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from lora_tools import notebook

if TYPE_CHECKING:
    from pandas import DataFrame

# Bits per element of every dtype a safetensors header may name.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# The dtypes in which weights are added and decomposed; others pass through untouched.
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


class _Shown:
    """A record that a notebook shows as a table of its fields."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of the records below
        rows = [(field.name, getattr(self, field.name)) for field in fields]
        return notebook.table(type(self).__name__, rows)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec(_Shown):
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
class Piece:
    """Rows [first, first + rows) of a stored tensor, as ``rows_of`` counts them."""

    stored: str
    first: int
    rows: int


def rows_of(spec: TensorSpec) -> int:
    """Rows of a tensor as a matrix of its last dimension; of a vector its elements."""
    return spec.numel // max(spec.shape[-1], 1) if len(spec.shape) > 1 else spec.numel


def counted(count: int, noun: str) -> str:
    """ "1 module", "2 modules"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class Action(str, enum.Enum):
    """What becomes of a tensor or key, or what was found of it; in JSON the word itself."""

    # extract, before anything is read, and after
    DECOMPOSE_IF_CHANGED = "decompose if changed"
    SAVE_WHOLE_IF_CHANGED = "save whole if changed"
    REFUSE_IF_CHANGED = "refuse if changed"
    SKIP = "skip"
    DECOMPOSED = "decomposed"
    SAVED_WHOLE = "saved whole"
    SKIPPED = "skipped"
    # extract, diff
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    ONLY_IN_BASE = "only in base"
    ONLY_IN_TUNED = "only in tuned"
    TIED = "tied"
    # what writes checkpoints
    MERGE = "merge"
    COPY = "copy"
    ADD = "add"
    UNMATCHED = "unmatched"
    RESTORE = "restore"
    SUBTRACT = "subtract"
    QUANTIZE = "quantize"
    REQUANTIZE = "requantize"
    DEQUANTIZE = "dequantize"
    # what writes adapters
    RESCALE = "rescale"
    RESIZE = "resize"
    COMBINE = "combine"
    CONVERT = "convert"
    DROP = "drop"
    # export
    KEEP = "keep"
    GRAPH = "graph"
    BRANCH = "branch"
    REPLACE = "replace"
    LEAVE_OUT = "leave out"
    FORM = "form"
    # verify
    SAME = "same"
    ROUNDED = "rounded"
    COPIED = "copied"
    DIFFERENT = "different"
    MISSING = "missing"
    EXTRA = "extra"
    COMPARED = "compared"
    LEFT_OUT = "left out"
    BROKEN = "broken"
    UNNAMED = "unnamed"
    CONSTANT = "constant"
    # collect-stats
    MEASURE = "measure"
    UNUSED = "unused"

    __str__ = str.__str__


@dataclasses.dataclass(frozen=True, slots=True)
class Fate(_Shown):
    """What happens to one tensor or adapter key, and why. A plan is a tuple of these."""

    tensor: str
    action: Action
    reason: str = ""
    nbytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleResult(_Shown):
    """The measured outcome for one module.

    Attributes:
        relative_error: ‖Δ − s·B·A‖_F / ‖Δ‖_F of the factors **as written** (after the cast).
        energy: 1 − relative_error², the share of ‖Δ‖²_F the written factors hold.
        gain_bound: upper bound on the share of ‖Δ‖²_F that the best factorisation of the same
            rank could add to what the decomposition captured before the cast.
        delta_norm: ‖Δ‖_F.
        relative_change: ‖Δ‖_F / ‖W_base‖_F.
        method: how the factorisation was found ("krylov", "gram", "dense", "resize").
        weighted_error: ‖(Δ − s·B·A)R^½‖_F / ‖ΔR^½‖_F of the factors as written, R the second
            moment of the module's inputs; NaN where no activations were given.
        quantization_noise: E‖E‖²_F / ‖Δ‖²_F, E being what rounding to a stored number format of few
            bits is expected to have put into Δ; NaN where the format does not tell, 0 where both
            sides are plain.
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
    weighted_error: float = math.nan
    quantization_noise: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleSpectrum(_Shown):
    """What one module's change looks like: tuned − base, or an adapter's own s·B·A.

    Attributes:
        norm: ‖Δ‖_F.
        relative_change: ‖Δ‖_F / ‖W_base‖_F; NaN without a base.
        stable_rank: ‖Δ‖²_F / σ₁², with the σ₁ that was found.
        energy: the share of ‖Δ‖²_F in the leading 8, 16, 32 and 64 directions, as found.
        gain_bound: the most by which each of these may be less than the true one.
        noise_floor: the singular value that rounding of the stored weights can reach; NaN for an
            adapter, which is not a difference of stored weights.
        rank: an adapter's rank. Of a change, the recommended one: what holds 90 % of the energy,
            or stands above the noise floor, whichever is less; None where it is above 64.
        spectrum: the leading singular values, 64 at most.
        alpha, scaling: of an adapter's module; else NaN.
    """

    module: str
    layout: str
    shape: tuple[int, ...]
    norm: float
    relative_change: float
    stable_rank: float
    energy: dict[str, float]
    noise_floor: float
    rank: int | None
    spectrum: tuple[float, ...]
    alpha: float = math.nan
    scaling: float = math.nan
    gain_bound: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class TensorFacts(_Shown):
    """One stored tensor; ``hash`` is that of its bytes ("" where they were not read), ``oddities``
    what is unusual."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    hash: str
    oddities: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TensorResult(_Shown):
    """The measured outcome of quantizing one tensor.

    Attributes:
        shape: as stored in the plain checkpoint.
        bits_per_parameter: all that is stored of it, tables and states counted.
        relative_error: ‖Ŵ − W‖_F / ‖W‖_F with Ŵ as a loader dequantizes what was written (the
            relative root mean square error).
        norm: ‖W‖_F.
        compensated_error: ‖Ŵ + B·A − W‖_F / ‖W‖_F with the factors as written, where an adapter
            for the error lies by; else None.
        output_error: √(tr(E R Eᵀ) / tr(W R Wᵀ)) with E = Ŵ − W and R the second moment of the
            layer's inputs: the relative error of its outputs, where statistics were given.
        output_error_unfed: the same if each number had been rounded by itself.
        compensated_output_error: the same with the adapter for the error, where one lies by.
        output_norm: √tr(W R Wᵀ).
    """

    tensor: str
    shape: tuple[int, ...]
    bits_per_parameter: float
    relative_error: float
    norm: float
    compensated_error: float | None = None
    output_error: float | None = None
    output_error_unfed: float | None = None
    compensated_output_error: float | None = None
    output_norm: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Input(_Shown):
    """An input and its content hash (see ``formats.digest``); empty where nothing was read."""

    role: str
    path: str
    digest: str = ""


T = TypeVar("T")


def _listed(value: Any) -> Any:
    """With lists for tuples, which are no type of JSON."""
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True, slots=True)
class Report(Generic[T]):
    """What a verb did, or with ``dry_run`` would do; ``T`` is the verb's own type in ``totals.py``,
    such as ``ExtractTotals``."""

    verb: str
    version: str
    inputs: tuple[Input, ...]
    output: str
    dry_run: bool
    plan: tuple[Fate, ...]
    modules: tuple[ModuleResult, ...] = ()
    totals: T = dataclasses.field(default_factory=dict)  # type: ignore[assignment]  # no key must be
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    tensors: tuple[TensorResult, ...] = ()
    spectra: tuple[ModuleSpectrum, ...] = ()
    stored: tuple[TensorFacts, ...] = ()
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, which ``report_schema`` describes. Numbers that are not
        finite stay as they are; ``--json`` and ``--report`` have null for them."""
        result: dict[str, Any] = _listed(dataclasses.asdict(self))
        for fate in result["plan"]:
            fate["action"] = str(fate["action"])
        return result

    def to_frame(
        self, part: Literal["modules", "tensors", "spectra", "stored", "plan"] | None = None
    ) -> DataFrame:
        """A part of the report as a pandas DataFrame: one row an entry, one column a field, and one
        for each key of a field that is a dict (``energy.8``).

        Args:
            part: None: the first of ``modules``, ``tensors``, ``spectra`` and ``stored`` that is
                not empty, else the plan.

        Raises:
            ImportError: pandas is not installed.
            ValueError: there is no such part.
        """
        if part is not None and part not in _PARTS:
            raise ValueError(f"to_frame({part!r}): one of {', '.join(_PARTS)} is needed")
        filled = (name for name in _PARTS if getattr(self, name) or name == "plan")
        chosen: str = part if part is not None else next(filled)
        return notebook.frame(_PARTS[chosen], getattr(self, chosen))

    def _repr_html_(self) -> str:
        counts = Counter(str(fate.action) for fate in self.plan)
        parts = {name: len(getattr(self, name)) for name in _PARTS}
        rows = [
            *((given.role, given.path) for given in self.inputs),
            *([("output", self.output)] if self.output else []),
            *self.totals.items(),  # type: ignore[attr-defined]  # T is a TypedDict
            *([("plan", dict(counts.most_common()))] if counts else []),
            *((f'to_frame("{name}")', counted(n, "row")) for name, n in parts.items() if n),
        ]
        title = f"loratools {self.verb}" + (": a plan, nothing was written" if self.dry_run else "")
        return notebook.table(title, rows, self.notes)


_PARTS: dict[str, type[Any]] = {
    "modules": ModuleResult,
    "tensors": TensorResult,
    "spectra": ModuleSpectrum,
    "stored": TensorFacts,
    "plan": Fate,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """One step done.

    Attributes:
        done, total: work, in ``unit``.
        label: what was worked on.
        step, steps: how many steps are done, of how many.
    """

    done: int
    total: int
    label: str
    step: int = 0
    steps: int = 0
    unit: str = "bytes"


ProgressCallback = Callable[[Progress], None]


def counting(progress: ProgressCallback | None, total: int, label: str) -> Callable[[int], None]:
    """What takes how many of a total are done, and says so where somebody listens."""

    def done(count: int) -> None:
        if progress is not None:
            progress(Progress(count, total, label, count, total, label))

    return done
