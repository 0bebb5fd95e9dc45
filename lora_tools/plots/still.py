"""Pictures as files, by matplotlib."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any

from lora_tools.plots import picture as drawn
from lora_tools.plots.picture import Picture, label, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = {"solid": "-", "dash": "--", "dashdot": "-."}
_COLUMN = 11 / 48  # inches of a layer's column that has a number under it


def draw(picture: Picture, kind: str) -> bytes:
    """The picture as ``png`` or ``svg``."""
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
        data = io.BytesIO()
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(data, format=kind, dpi=150, metadata=metadata)
    return data.getvalue()


def _without_formulas(picture: Picture) -> Picture:
    """Names as they are: matplotlib takes what stands between two dollars for a formula."""

    def plain(name: str) -> str:
        return label(name).replace("$", r"\$")

    return dataclasses.replace(
        picture,
        title=label(picture.title, 110).replace("$", r"\$"),
        rows=[plain(name) for name in picture.rows],
        columns=[plain(name) for name in picture.columns],
        lines=[dataclasses.replace(line, label=plain(line.label)) for line in picture.lines],
        curves={plain(name): points for name, points in picture.curves.items()},
        marks=[(plain(name), size, error) for name, size, error in picture.marks],
    )


def _figure(picture: Picture) -> Any:
    from matplotlib.figure import Figure

    heat = _height(picture)
    columns = max(min(200 // (max((len(x.label) for x in picture.lines), default=0) + 8), 4), 1)
    legend = 0.17 * math.ceil(len(picture.lines) / columns)
    wide = max(11, 3 + _COLUMN * min(len(picture.columns), 64))
    figure = Figure(figsize=(wide, heat + 5.2 + legend), layout="constrained")
    figure.suptitle(picture.title, x=0.01, ha="left", fontsize=12)
    grid = figure.add_gridspec(2, 2, height_ratios=(heat, 4.8))
    _heat(figure.add_subplot(grid[0, :]), picture)
    spectra = figure.add_subplot(grid[1, 0])
    _spectra(spectra, picture)
    _curves(figure.add_subplot(grid[1, 1]), picture)
    figure.legend(
        *spectra.get_legend_handles_labels(),
        loc="outside lower left",
        frameon=False,
        fontsize=7.5,
        ncols=columns,
        title=drawn.LINES_TITLE if len(picture.lines) > 1 else None,
        alignment="left",
        handlelength=3,
    )
    return figure


def _height(picture: Picture) -> float:
    """Of the map, in inches."""
    return max(0.24 * len(picture.rows) + 1.6, 2.4)


def _heat(axes: Axes, picture: Picture) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    values, wide = picture.values, picture.wide
    norm = LogNorm(min(values), max(values)) if wide else Normalize(0, max(values, default=1))
    image = axes.imshow(picture.heat, aspect="auto", cmap="viridis", norm=norm)
    title = picture.heat_title
    axes.set_title(f"{title}\n{picture.note}" if picture.note else title)
    axes.set_yticks(range(len(picture.rows)), picture.rows)
    step = max(math.ceil(len(picture.columns) / 48), 1)
    axes.set_xticks(range(0, len(picture.columns), step), picture.columns[::step])
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#eeeeee")
    label, thin = picture.scale_label, 5 * _height(picture)
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.01, aspect=thin)
    if wide:
        bar.ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _spectra(axes: Axes, picture: Picture) -> None:
    for line, (dash, colour) in zip(picture.lines, styles(len(picture.lines)), strict=True):
        at = range(1, len(line.values) + 1)
        axes.plot(at, line.values, _DASHES[dash], color=colour, lw=1.4, label=line.label)
        if line.floor in picture.floors:
            axes.axhline(line.floor, color=colour, lw=0.8, ls=":")
        if line.ranked:
            assert line.rank is not None
            axes.plot(line.rank, line.values[line.rank - 1], "o", color=colour, ms=5)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(picture.directions, [str(t) for t in picture.directions])
    axes.set_xlabel("singular direction")
    axes.set_ylabel("singular value")
    axes.set_title(picture.spectra_title)


def _curves(axes: Axes, picture: Picture) -> None:
    from matplotlib.ticker import NullFormatter

    shown = {name: points for name, points in picture.curves.items() if points}
    for i, (name, points) in enumerate(shown.items()):
        dash, colour = _DASHES[drawn.CURVE_DASHES[i % 3]], styles(len(shown))[i][1]
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, dash, color=colour, lw=1.6, label=name)
    axes.set_xscale("log")
    axes.set_xlabel(drawn.CURVES_AXES[0])
    axes.set_ylabel(drawn.CURVES_AXES[1])
    axes.set_ylim(bottom=0)
    axes.set_title(drawn.CURVES_TITLE)
    if picture.marks:  # named above the frame, where no curve runs
        names, sizes, _ = zip(*picture.marks, strict=True)
        top = axes.secondary_xaxis("top")
        top.set_xticks(sizes, names, fontsize=7.5)
        top.xaxis.set_minor_formatter(NullFormatter())
        top.tick_params(which="minor", length=0)
        top.spines[:].set_visible(False)
        for size in sizes:
            axes.axvline(size, color="#cccccc", lw=0.6, zorder=0)
    axes.legend(frameon=False, loc="best")  # where no curve runs
