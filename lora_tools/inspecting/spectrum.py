"""What ``inspect`` and ``diff`` show of a spectrum, and the pictures' data."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UsageError
from lora_tools.formats.output import staged
from lora_tools.formats.synced import write_synced
from lora_tools.linalg import ranks
from lora_tools.linalg.ranks import Spectrum
from lora_tools.records import ModuleSpectrum, Report, T

if TYPE_CHECKING:
    from lora_tools.plots import Picture

DEPTH = 64
AT = (8, 16, 32, 64)
_POINTS = 24
STEPS = sorted({round(DEPTH ** (i / (_POINTS - 1))) for i in range(_POINTS)} | {*AT})
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
SUFFIXES = (".png", ".svg", ".html")


def summary(
    parts: Sequence[Spectrum], total: float, relative_change: float, **named: Any
) -> ModuleSpectrum:
    """The figures of one module from the spectra of its weight's regions. ``named`` holds its name,
    layout, shape and what else is known."""
    known = joined(parts)
    squared = known.squared
    held = (squared.cumsum(0) / total).clamp(max=1.0).tolist()
    energy = {
        str(r): held[min(r, len(held)) - 1] if r <= len(held) or known.complete else math.nan
        for r in AT
    }
    return ModuleSpectrum(
        norm=math.sqrt(total),
        relative_change=relative_change,
        stable_rank=total / float(squared[0]),
        energy=energy,
        noise_floor=max(map(_floor, parts)),
        spectrum=tuple(squared[:DEPTH].sqrt().tolist()),
        **named,
    )


def recommended(parts: Sequence[Spectrum]) -> int | None:
    """What holds 90 % of each region's energy or stands above its noise floor, whichever is less;
    the most of all regions, as they share a rank. None where that is more than is known."""
    found = []
    for known in parts:
        above = ranks.noise_floor(known) if known.rounding is not None else None
        found.append(
            min((r for r in (above, ranks.energy(known, 0.9)) if r is not None), default=None)
        )
    return None if None in found else max(r for r in found if r is not None)


def _floor(known: Spectrum) -> float:
    """The singular value that rounding can reach; NaN where that was not measured."""
    if known.rounding is None:
        return math.nan
    above, levels = ranks.noise_floor(known), ranks.noise_levels(known)
    return math.sqrt(float(levels[min(above if above is not None else DEPTH, len(levels) - 1)]))


def joined(parts: Sequence[Spectrum]) -> Spectrum:
    """The spectrum of a weight whose regions have these: all values in order, as far as each is
    known."""
    import torch

    if len(parts) == 1:
        return parts[0]
    values = torch.cat([s.squared for s in parts]).sort(descending=True).values
    known = max((float(s.squared[-1]) for s in parts if not s.complete), default=0.0)
    return Spectrum(
        values[values >= known], math.fsum(s.total for s in parts), all(s.complete for s in parts)
    )


def places(modules: Sequence[str]) -> dict[str, tuple[int, str]]:
    """(layer, kind) of each module: ``model.layers.3.mlp.up_proj`` → (3, ``mlp.up_proj``); layer −1
    where its name has no number. Where layers are numbered in several parts of the model, such as
    an encoder and a decoder, a kind is named in full: ``encoder.block.*.layer.0.DenseReluDense``.
    """
    matches = {module: _LAYER.search(module) for module in modules}
    several = len({m.string[: m.start(1)] for m in matches.values() if m}) > 1
    found = {}
    for module, m in matches.items():
        rest = module[m.end() :] if m else module
        kind = f"{module[: m.start(1)]}*.{rest}" if m and several else rest
        found[module] = (int(m[1]) if m else -1, kind)
    return found


def check_plot(plot: str | Path | None) -> Path | None:
    """Before the work, not after: the suffix, the folder, and the library. Raises UsageError."""
    if plot is None:
        return None
    path = Path(plot)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {plot}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {plot}: its folder does not exist")
    from lora_tools.plots import check_library

    check_library(path.suffix)
    return path


def shown(path: str | Path) -> str:
    """A path's last two names, or a hub id as it is."""
    return "/".join(Path(path).parts[-2:])


def drawn(report: Report[T], title: str, note: str, path: Path) -> Report[T]:
    """The report, drawn into a file in place of what was there, whole or not at all; one without
    any change says so."""
    from lora_tools.plots import draw

    if not any(s.norm for s in report.spectra):
        note = (
            f"no module has a low-rank change: there is nothing to draw, and {path} is not written"
        )
        return dataclasses.replace(report, notes=(*report.notes, note))
    content = draw(picture(report, title, note), path.suffix)
    with staged(path, force=True) as staging:
        write_synced(staging / "out", content)
    return dataclasses.replace(report, notes=(*report.notes, f"drew {path}"))


def picture(report: Report[Any], title: str, note: str = "") -> Picture:
    """What to draw of a report; ``note`` is what the title's figure is."""
    from lora_tools.plots import MOST_LINES, Line, Picture

    spectra = [s for s in report.spectra if s.spectrum and s.norm]
    at = places([s.module for s in spectra])
    layers = sorted({layer for layer, _ in at.values()})
    # Embeddings and heads first, then the layers' modules by name.
    by_place = sorted((min(layer, 0), _counted(kind), kind) for layer, kind in at.values())
    kinds = list(dict.fromkeys(kind for *_, kind in by_place))
    relative = all(math.isfinite(s.relative_change) for s in spectra)
    heat = [[math.nan] * len(layers) for _ in kinds]
    details: list[list[tuple[str, ...]]] = [[()] * len(layers) for _ in kinds]
    most: dict[str, ModuleSpectrum] = {}  # the module of each kind that changed most
    row, column = ({k: i for i, k in enumerate(keys)} for keys in (kinds, layers))
    for s in spectra:
        layer, kind = at[s.module]
        heat[row[kind]][column[layer]] = 100 * s.relative_change if relative else s.stable_rank
        details[row[kind]][column[layer]] = _figures(s)
        most[kind] = max(most.get(kind, s), s, key=lambda s: s.norm)
    lines = [Line(s.module, s.spectrum, s.noise_floor, s.rank) for s in most.values()]
    drawn = curves(spectra)
    return Picture(
        title=title,
        note=note,
        heat=heat,
        details=details,
        rows=kinds,
        columns=["none" if layer < 0 else str(layer) for layer in layers],
        heat_label="relative change, %" if relative else "stable rank",
        lines=sorted(lines, key=lambda line: -line.values[0])[:MOST_LINES],
        curves=drawn,
        marks=[
            (f"rank {r}", *at_rank)
            for r, at_rank in zip(STEPS, drawn["uniform"], strict=True)
            if r in AT and r <= max(len(s.spectrum) for s in spectra)
        ],
    )


def _counted(name: str) -> list[tuple[str, int]]:
    """A key by which the ninth expert comes before the tenth."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)([0-9]*)", name)]


def _figures(s: ModuleSpectrum) -> tuple[str, ...]:
    """What is known of a module, a line each."""
    rank = "above 64" if s.rank is None else str(s.rank)
    found = [
        ("relative change", f"{s.relative_change:.3%}", s.relative_change),
        ("norm of the change", f"{s.norm:.4g}", s.norm),
        ("stable rank", f"{s.stable_rank:.2f}", s.stable_rank),
        ("noise floor", f"{s.noise_floor:.4g}", s.noise_floor),
        ("largest singular value", f"{s.spectrum[0]:.4g}", s.spectrum[0]),
        ("scaling", f"{s.scaling:.4g}", s.scaling),
    ]
    held = [f"{r}: {share:.1%}" for r, share in s.energy.items() if math.isfinite(share)]
    return (
        s.module,
        f"{s.layout} {' × '.join(map(str, s.shape))}",
        *(f"{name}: {text}" for name, text, value in found if math.isfinite(value)),
        f"rank: {rank}" if math.isfinite(s.alpha) else f"recommended rank: {rank}",
        f"energy in the leading directions: {', '.join(held)}" if held else "",
    )


def _one_direction(s: ModuleSpectrum) -> int:
    """Numbers in the factors of one more direction; of one expert, where there are several."""
    rows, *cols = s.shape[1:] if s.layout.startswith("experts") else s.shape
    return rows + math.prod(cols)


def curves(spectra: Sequence[ModuleSpectrum]) -> dict[str, list[tuple[float, float]]]:
    """(numbers in the factors, relative error over all modules) of three ways to share ranks, as
    far as the directions that are known reach; the uniform ones at ranks ``STEPS``."""
    import torch

    values = [torch.tensor(s.spectrum, dtype=torch.float64).square() for s in spectra]
    known = [
        Spectrum(v, s.norm**2, len(v) < DEPTH or float(v.sum()) > (1 - 1e-6) * s.norm**2)
        for v, s in zip(values, spectra, strict=True)
    ]
    costs = [_one_direction(s) for s in spectra]
    total = math.fsum(s.norm**2 for s in spectra)
    most = ranks.uniform(known, costs, 10**18)

    def point(chosen: Sequence[int]) -> tuple[float, float]:
        size = sum(r * c for r, c in zip(chosen, costs, strict=True))
        return size, math.sqrt(max(1 - ranks.captured(known, chosen) / total, 0.0))

    result: dict[str, list[tuple[float, float]]] = {"uniform": [], "energy": [], "budget": []}
    for r in STEPS:
        result["uniform"].append(point([min(r, m) for m in most]))
        size = int(result["uniform"][-1][0])
        shared = ranks.budget(known, costs, size)
        if None not in shared:  # else it would take more directions than are known
            result["budget"].append(point([k or 0 for k in shared]))
    # The same share of each module's energy.
    reach = min((ranks.captured([s], [len(s.squared)]) / s.total for s in known), default=1.0)
    for i in range(1, _POINTS):
        share = reach * i / _POINTS
        result["energy"].append(point([ranks.energy(s, share) or 0 for s in known]))
    return result
