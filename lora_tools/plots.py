"""Pictures of spectra, by matplotlib: the only room that draws. It knows figures, no tensors."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UsageError
from lora_tools.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#444444")

_WIDE = 5  # colours follow the logarithm of values that spread wider than this
_DEEP = 100  # a floor that lies this far below every value is not drawn


@dataclasses.dataclass(frozen=True)
class Line:
    """One module's singular values, its noise floor (or NaN) and its rank (or None)."""

    label: str
    values: Sequence[float]
    floor: float
    rank: int | None


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn: a heat map of kinds × layers, spectra, and error against size by name."""

    title: str
    heat: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    heat_label: str
    lines: Sequence[Line]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    marks: Sequence[tuple[str, float, float]]  # named points of the curves


def check_library() -> None:
    """Raises UsageError, saying what to install, where matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'loratools[plot]'")


def draw(picture: Picture, suffix: str) -> bytes:
    """The picture as a .png, .svg or .html page with the SVG in it; always the same bytes."""
    import matplotlib

    settings = {
        "svg.hashsalt": "loratools",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(settings):
        figure = _figure(_without_formulas(picture))
        kind = "png" if suffix == ".png" else "svg"
        data = io.BytesIO()
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(data, format=kind, dpi=150, metadata=metadata)
    content = data.getvalue()
    if suffix == ".html":
        svg = content[content.index(b"<svg") :]
        title = picture.title.replace("&", "&amp;").replace("<", "&lt;").encode()
        content = (
            b'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>'
            + title
            + b"</title>\n<style>svg { max-width: 100%; height: auto }</style>\n"
            + svg
        )
    return content


def _without_formulas(picture: Picture) -> Picture:
    """Names as they are: matplotlib takes what stands between two dollars for a formula."""

    def plain(name: str) -> str:
        return printable(name).replace("$", r"\$")

    return dataclasses.replace(
        picture,
        title=plain(picture.title),
        rows=[plain(name) for name in picture.rows],
        columns=[plain(name) for name in picture.columns],
        lines=[dataclasses.replace(line, label=plain(line.label)) for line in picture.lines],
        curves={plain(name): points for name, points in picture.curves.items()},
        marks=[(plain(name), size, error) for name, size, error in picture.marks],
    )


def _figure(picture: Picture) -> Any:
    from matplotlib.figure import Figure

    tall = max(0.24 * len(picture.rows) + 1.6, 2.4)
    figure = Figure(figsize=(11, tall + 4.8), layout="constrained")
    figure.suptitle(picture.title, x=0.01, ha="left", fontsize=12)
    grid = figure.add_gridspec(2, 2, height_ratios=(tall, 4.8))
    _heat(figure.add_subplot(grid[0, :]), picture)
    spectra = figure.add_subplot(grid[1, 0])
    _spectra(spectra, picture.lines)
    _curves(figure.add_subplot(grid[1, 1]), picture)
    names = [len(line.label) for line in picture.lines]
    figure.legend(
        *spectra.get_legend_handles_labels(),
        loc="outside lower left",
        frameon=False,
        fontsize=7.5,
        ncols=max(min(200 // (max(names, default=0) + 8), 4), 1),
        title="largest change of each kind" if len(names) > 1 else None,
        alignment="left",
    )
    return figure


def _heat(axes: Axes, picture: Picture) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    values = [value for row in picture.heat for value in row if math.isfinite(value) and value > 0]
    wide = max(values, default=1) > _WIDE * min(values, default=1)
    image = axes.imshow(
        picture.heat,
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(min(values), max(values)) if wide else None,
    )
    axes.set_title(f"{picture.heat_label.split(',')[0].capitalize()}, by layer and kind of module")
    axes.set_yticks(range(len(picture.rows)), picture.rows)
    step = max(math.ceil(len(picture.columns) / 32), 1)
    axes.set_xticks(range(0, len(picture.columns), step), picture.columns[::step])
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#eeeeee")
    bar = axes.figure.colorbar(image, ax=axes, label=picture.heat_label, pad=0.01)
    if wide:
        bar.ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _spectra(axes: Axes, lines: Sequence[Line]) -> None:
    lowest = min((min(line.values) for line in lines), default=1)
    floors = [x.floor for x in lines if math.isfinite(x.floor) and x.floor > lowest / _DEEP]
    for line, colour in zip(lines, _COLOURS, strict=False):
        at = range(1, len(line.values) + 1)
        axes.plot(at, line.values, color=colour, lw=1.4, label=line.label)
        if line.floor in floors:
            axes.axhline(line.floor, color=colour, lw=0.8, ls=":")
        if line.rank and line.rank <= len(line.values):
            axes.plot(line.rank, line.values[line.rank - 1], "o", color=colour, ms=5)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64) if t <= max(len(x.values) for x in lines)]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("singular direction")
    axes.set_ylabel("singular value")
    marks = ["dot: rank"] if any(x.rank and x.rank <= len(x.values) for x in lines) else []
    known = [x for x in lines if math.isfinite(x.floor)]
    if known:
        marks.append("dotted: noise floor" if floors else "noise floor far below")
    axes.set_title("Spectra" + (f" ({'; '.join(marks)})" if marks else ""))


def _curves(axes: Axes, picture: Picture) -> None:
    curves = picture.curves
    styles = {"uniform": "-", "energy": "--", "budget": "-"}
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                styles.get(name, "-"),
                color=colour,
                lw=1.6,
                label=name,
            )
    for label, size, error in picture.marks:
        axes.plot(size, error, "o", color=_COLOURS[0], ms=4)
        axes.annotate(
            label,
            (size, error),
            (-3, -4),
            textcoords="offset points",
            fontsize=7.5,
            ha="right",
            va="top",
            zorder=0,
        )
    axes.set_xscale("log")
    axes.set_xlabel("numbers in the factors")
    axes.set_ylabel("relative error over all modules")
    axes.set_ylim(bottom=0)
    axes.set_title("Error against size: three ways to share ranks")
    axes.legend(frameon=False, loc="lower left")
