"""The tables of a report: which columns there are, and which of them matter most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lora_tools.cli.table import Column, lines
from lora_tools.records import ModuleResult, ModuleSpectrum, Report, TensorResult
from lora_tools.sentences import number

_MOST_ROWS = 40


def tables(report: Report[Any], verbose: bool, width: int | None) -> Iterator[str]:
    """Lines of all that the report has; of long ones without ``verbose`` the first rows."""
    most = None if verbose else _MOST_ROWS
    if report.modules:
        yield from _part(report.modules, most, "modules", _modules, width)
    if report.tensors:
        yield from _part(report.tensors, most, "tensors", _tensors, width)
    if report.spectra:
        yield from lines(_spectra(report.spectra[:most]), width)
        yield from _left_out(len(report.spectra), most, "modules")
    if report.stored and (verbose or not report.spectra):
        yield from lines(_stored(report, most), width)
        yield from _left_out(len(report.stored), most, "tensors")
    if verbose or report.dry_run:
        yield from lines(_fates(report), width)


def _part(
    rows: Sequence[Any], most: int | None, what: str, columns: Any, width: int | None
) -> Iterator[str]:
    """The rows of the largest errors, where there are too many."""
    shown = rows
    if most is not None and len(rows) > most:
        shown = sorted(rows, key=lambda row: -row.relative_error)[:most]
    yield from lines(columns(shown), width)
    if len(shown) < len(rows):
        yield f"({len(shown)} of {len(rows)} {what}, the largest errors first; -v shows all)"


def _left_out(count: int, most: int | None, what: str) -> Iterator[str]:
    if most is not None and count > most:
        yield f"({most} of {count} {what}; -v shows all)"


def _modules(rows: Sequence[ModuleResult]) -> list[Column]:
    def of(m: ModuleResult) -> tuple[str, str]:
        if math.isfinite(m.energy):
            return f"{m.relative_error:.4g}", f"{m.energy:.2%}"
        return "-", "no change"

    columns = [
        Column("module", [m.module for m in rows], kind="name"),
        Column("kind", [m.layout for m in rows], 5),
        Column("shape", [_shape(m.shape) for m in rows], 3),
        Column("rank", [str(m.rank) for m in rows]),
        Column("rel. error", [of(m)[0] for m in rows]),
        Column("energy", [of(m)[1] for m in rows], 1),
    ]
    # A resized adapter was not searched for, and no base is at hand to compare with.
    if any(m.method not in ("resize", "difference") for m in rows):
        columns += [
            Column("could gain", [f"{m.gain_bound:.1e}" for m in rows], 4),
            Column("rel. change", [number(m.relative_change, ".3%") for m in rows], 2),
        ]
    return columns


def _tensors(rows: Sequence[TensorResult]) -> list[Column]:
    made_up = any(t.compensated_error is not None for t in rows)
    fed = any(t.output_error is not None for t in rows)
    columns = [
        Column("tensor", [t.tensor for t in rows], kind="name"),
        Column("shape", [_shape(t.shape) for t in rows], 3),
        Column("bits", [f"{t.bits_per_parameter:.3f}" for t in rows], 2),
        Column("rel. error", [_error(t.relative_error) for t in rows]),
    ]
    if made_up:
        columns.append(Column("with adapter", [_error(t.compensated_error) for t in rows]))
    if fed:
        columns += [
            Column("of outputs", [_error(t.output_error) for t in rows]),
            Column("unfed", [_error(t.output_error_unfed) for t in rows], 1),
        ]
    if fed and made_up:
        cells = [_error(t.compensated_output_error) for t in rows]
        columns.append(Column("outputs with adapter", cells, 1))
    return columns


def _spectra(rows: Sequence[ModuleSpectrum]) -> list[Column]:
    change = not all(math.isnan(s.relative_change) for s in rows)
    columns = [
        Column("module", [s.module for s in rows], kind="name"),
        Column("kind", [s.layout for s in rows], 6),
        Column("shape", [_shape(s.shape) for s in rows], 4),
        Column("norm", [f"{s.norm:.4g}" for s in rows], 2),
        Column("stable rank", [number(s.stable_rank, ".1f") for s in rows], 3),
    ]
    for rank, place in (("8", 5), ("16", 2), ("32", 5), ("64", 5)):
        cells = [number(s.energy.get(rank, math.nan), ".1%") for s in rows]
        columns.append(Column(f"at {rank}", cells, place))
    # 64 is as deep as inspecting.spectrum.DEPTH looks.
    ranks = Column("rank", [">64" if s.rank is None else str(s.rank) for s in rows])
    if change:
        return [
            *columns,
            Column("noise floor", [number(s.noise_floor, ".2e") for s in rows], 4),
            ranks,
            Column("rel. change", [number(s.relative_change, ".3%") for s in rows]),
        ]
    return [
        *columns,
        ranks,
        Column("alpha", [f"{s.alpha:g}" for s in rows]),
        Column("scaling", [f"{s.scaling:g}" for s in rows], 1),
    ]


def _stored(report: Report[Any], most: int | None) -> list[Column]:
    rows = report.stored[:most]
    return [
        Column("tensor", [t.tensor for t in rows], kind="name"),
        Column("dtype", [t.dtype for t in rows]),
        Column("shape", [_shape(t.shape) for t in rows]),
        Column("bytes", [str(t.nbytes) for t in rows], 1),
        Column("hash", [t.hash for t in rows], 2),
    ]


def _fates(report: Report[Any]) -> list[Column]:
    rows = report.plan
    return [
        Column("tensor", [fate.tensor for fate in rows], kind="name"),
        Column("fate", [str(fate.action) for fate in rows], kind="word"),
        Column("bytes", [str(fate.nbytes or "") for fate in rows], 1),
        Column("why", [fate.reason for fate in rows], kind="text"),
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
