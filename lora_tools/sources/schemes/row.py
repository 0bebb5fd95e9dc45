"""What a row of the table of stored number formats says."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.formats.quantized.signs import without_entries
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.scaled_feedback import Grid

P = TypeVar("P", bound=PackedWeight)
Parts = Mapping[str, "torch.Tensor"]


def facts(weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
    """How many weights, of which kinds, read back in which dtypes, and their size."""
    numbers = sum(weight.plain.numel for weight in weights.values())
    stored = {spec.name: spec for weight in weights.values() for spec in weight.specs.values()}
    nbytes = sum(spec.nbytes for spec in stored.values())
    return {
        "weights": len(weights),
        "schemes": dict(Counter(weight.label for weight in weights.values())),
        "dtypes": dict(Counter(weight.plain.dtype for weight in weights.values())),
        "numbers": numbers,
        "bits_per_parameter": 8 * nbytes / max(numbers, 1),
    }


def matrix_of(spec: TensorSpec) -> tuple[int, int]:
    """(rows, cols) that a weight is decoded as: its last dimension's, of a vector one a row."""
    cols = spec.shape[-1] if len(spec.shape) > 1 else 1
    return spec.numel // max(cols, 1), cols


def no_faults(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], weights: Mapping[str, PackedWeight]
) -> Sequence[str]:
    """Nothing keeps the format's library from loading them, as far as is known."""
    return ()


def no_notes(weights: Mapping[str, PackedWeight]) -> Sequence[str]:
    """Nothing that is not said of every checkpoint in the format."""
    return ()


def is_finite(x: torch.Tensor) -> bool:
    """Whether no number is an inf or a NaN, without a copy in bools."""
    import torch

    if not x.numel():
        return True
    low, high = torch.aminmax(x.float() if x.itemsize == 1 else x)  # of a NaN, both are NaN
    return math.isfinite(float(low)) and math.isfinite(float(high))


def refuse_non_finite(weight: PackedWeight, x: torch.Tensor) -> None:
    """Raises NonFiniteError for numbers that cannot be encoded."""
    if not is_finite(x):
        raise NonFiniteError(
            f"{weight.plain.name}: holds an inf or a NaN, which {weight.label} cannot store"
        )


def _always(weight: PackedWeight) -> bool:
    """Of each weight alike."""
    return True


def _alone(weight: PackedWeight, _: object) -> None:
    """No scale in common with others."""


def _anew(weight: P, parts: Parts, start: int, stop: int) -> P:
    """All scales are made anew."""
    return weight


def _no_grid(weight: PackedWeight, parts: Parts) -> None:
    """Its numbers are not codes times scales, or not known to be."""


def _whole(weight: PackedWeight) -> int:
    """No rows are encoded by themselves."""
    return 0


@dataclasses.dataclass(frozen=True)
class Scheme(Generic[P]):
    """A stored number format. What is called here are functions of modules, so that a row can be
    pickled.

    Attributes:
        name: a short one.
        title: as people call it, after "a checkpoint in".
        find: its weights in a checkpoint as it is stored, by the plain ones' names; none where it
            is not in this format. Reads headers, and what is as small. Raises CheckpointError for
            one that is broken.
        decode: (weight, its stored tensors, out, first): fills ``out`` (n, cols), of any float
            dtype, with rows [first, first + n) of the plain weight as a matrix of its last
            dimension (of a vector: cols is 1), computed in float32 and rounded once.
        facts: what ``inspect`` tells of such weights: what ``facts`` here does, at least.
        faults: (config.json, stored tensors, weights): what keeps the format's own library from
            loading them, in sentences.
        notes: what is to be known of what was read, in sentences.
        encode: (weight, x): what is stored of the weight for the numbers x, float32 of its plain
            shape, by the names of its parts, each of the dtype and shape that ``specs`` gives; None
            where this tool does not write the format. Raises NonFiniteError.
        unit: (weight): how many rows of the matrix that it is decoded as are encoded by themselves;
            0 where only all of them are. Then ``encode`` takes some rows (n, cols), from a multiple
            of it on, as well, and gives what is stored of these; and ``decode`` reads that as if it
            were the whole weight. What is stored once for all rows is given with any of them.
        grid: (weight, what ``encode`` gave of it or of some rows): the numbers that it may be, its
            scales given; None where that is not known, and none of its rounding errors is fed
            forward (``linalg.error_feedback``).
        coded: (weight, values of the grid (n, cols)): the first of its stored tensors, of these.
        rounding: (weight, its stored tensors): the square of the Frobenius norm that rounding to
            the format is expected to have cost, by the distances of the numbers that it holds near
            each code (``linalg.noise.rounding_errors``); None where that is not known.
        tells: whether ``rounding`` knows it of a weight.
        shared: (weight, its stored tensors): the scale that it may have in common with other
            layers, since loaders put them into one with one scale; None where there is none. What
            has one is a dataclass with a field ``shared``, the scale that it is encoded with.
        shared_for: (weight, largest magnitude of all that have it in common): the scale for that.
        keeping: (weight, what was stored of it, start, stop): the weight as its rows [start, stop)
            are encoded again, with the scales that they have where the numbers still fit them.
        plain_config: config.json without what it says of the format.
        files: small files that say something of the format, and do not go with plain numbers.
        metadata: keys of the files' metadata that do not, either.
        renames: whether its library has names of its own for some tensors, such as experts.
    """

    name: str
    title: str
    find: Callable[[Checkpoint], Mapping[str, P]]
    decode: Callable[[P, Parts, torch.Tensor, int], None]
    facts: Callable[[Mapping[str, P]], dict[str, Any]] = facts
    faults: Callable[
        [Mapping[str, Any], Mapping[str, TensorSpec], Mapping[str, P]], Sequence[str]
    ] = no_faults
    notes: Callable[[Mapping[str, P]], Sequence[str]] = no_notes
    encode: Callable[[P, torch.Tensor], dict[str, torch.Tensor]] | None = None
    unit: Callable[[P], int] = _whole
    grid: Callable[[P, Parts], Grid | None] = _no_grid
    coded: Callable[[P, torch.Tensor], torch.Tensor] | None = None
    rounding: Callable[[P, Parts], float] | None = None
    tells: Callable[[P], bool] = _always
    shared: Callable[[P, Parts], float | None] = _alone
    shared_for: Callable[[P, float], float | None] = _alone
    keeping: Callable[[P, Parts, int, int], P] = _anew
    plain_config: Callable[[Mapping[str, Any]], dict[str, Any]] = without_entries
    files: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    renames: bool = False
