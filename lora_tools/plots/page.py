"""Pictures as a page, by plotly: figures under the pointer, zoom, kinds in another order, light and
dark. The page holds all that it needs and opens without a network."""

from __future__ import annotations

import html
import json
import math
from typing import Any

from lora_tools.plots import picture as drawn
from lora_tools.plots.picture import Line, Picture, label, styles
from lora_tools.printable import printable

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 14px "Open Sans", verdana, arial, sans-serif }}
html {{ overflow-y: scroll }}
body {{ margin: 1em; background: #fff; color: #2a3f5f }}
body.dark {{ background: rgb(17, 17, 17); color: #f2f5fa; color-scheme: dark }}
body.light {{ color-scheme: light }}
h1 {{ font-size: 1.3em; overflow-wrap: anywhere; margin: 0 0 .3em }}
p {{ margin: 0 0 .6em }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34em, 100%), 1fr)) }}
.pair > div {{ min-width: 0 }}
</style>
<h1>{title}</h1>
<p>{note}</p>
<p><label>Kinds <select id="order">{orders}</select></label>
<button id="theme" type="button">light / dark</button></p>
<div id="heat"></div>
<div class="pair"><div id="spectra"></div><div id="curves"></div></div>
<noscript>This picture is drawn by JavaScript, which is in the page itself.</noscript>
<script>{library}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
const {{figures, orders, templates}} = JSON.parse(document.getElementById("figures").textContent);
const system = matchMedia("(prefers-color-scheme: dark)");
let dark = system.matches;
// Nothing leaves the page: no button that sends figures elsewhere.
const config =
  {{responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ""}};
function draw() {{
  document.body.className = dark ? "dark" : "light";
  const template = templates[dark ? "dark" : "light"];
  for (const [id, {{data, layout}}] of Object.entries(figures))
    Plotly.react(id, data, {{...layout, template}}, config);
}}
system.addEventListener("change", () => {{ dark = system.matches; draw(); }});
document.getElementById("theme").onclick = () => {{ dark = !dark; draw(); }};
document.getElementById("order").onchange = (event) => {{
  Object.assign(figures.heat.layout.yaxis, orders[event.target.value]);
  draw();
}};
draw();
</script>
"""


def draw(picture: Picture) -> bytes:
    """The page; some five megabytes, which are plotly.js."""
    from plotly.offline import get_plotlyjs

    orders = _orders(picture)
    content = {"figures": _figures(picture), "orders": orders, "templates": _templates()}
    # "<" could end the script that the text stands in.
    data = json.dumps(content, allow_nan=False, sort_keys=True).replace("<", "\\u003c")
    options = "".join(f"<option>{name}</option>" for name in orders)
    page = _PAGE.format(
        title=_text(picture.title),
        note=_text(picture.note),
        orders=options,
        library=get_plotlyjs(),
        figures=data,
    )
    return page.encode()


def _text(name: str) -> str:
    """A name as it is: plotly, too, takes some tags and entities in a text for HTML."""
    return html.escape(printable(name), quote=False)


def _label(name: str) -> str:
    return _text(label(name))


def _templates() -> dict[str, Any]:
    import plotly.io

    names = {"light": "plotly_white", "dark": "plotly_dark"}
    return {key: plotly.io.templates[name].to_plotly_json() for key, name in names.items()}


def _figures(picture: Picture) -> dict[str, Any]:
    """Checked by plotly's own classes, which refuse what its JavaScript would pass over."""
    from plotly.graph_objects import Figure

    made = {"heat": _heat(picture), "spectra": _spectra(picture), "curves": _curves(picture)}
    result = {}
    for name, (data, layout) in made.items():
        common = {"uirevision": "kept", "hoverlabel": {"align": "left", "namelength": -1}}
        Figure(data, {**layout, **common})
        result[name] = {"data": data, "layout": {**layout, **common}}
    return result


def _orders(picture: Picture) -> dict[str, Any]:
    """The axis of kinds in each order there is."""
    at = range(len(picture.rows))

    def most(row: int) -> float:
        return max((v for v in picture.heat[row] if math.isfinite(v)), default=-math.inf)

    sorts = {
        "as in the model": list(at),
        "by name": sorted(at, key=lambda i: picture.rows[i]),
        f"by largest {picture.heat_label.split(',')[0]}": sorted(at, key=most, reverse=True),
    }
    return {name: {"categoryarray": [str(i) for i in order]} for name, order in sorts.items()}


def _heat(picture: Picture) -> tuple[list[Any], dict[str, Any]]:
    values, wide = picture.values, picture.wide
    most = max(values, default=1)
    bar: dict[str, Any] = {"title": {"text": _text(picture.scale_label), "side": "right"}}
    if wide:
        ticks = [m * 10**e for e in range(-12, 13) for m in (1, 2, 3, 5)]
        ticks = [t for t in ticks if min(values) <= t <= most]
        bar |= {"tickvals": [math.log10(t) for t in ticks], "ticktext": [f"{t:g}" for t in ticks]}
    at = [str(i) for i in range(len(picture.rows))]  # two names may be shortened to one
    trace = {
        "type": "heatmap",
        "z": [[_colour(v, wide) for v in row] for row in picture.heat],
        "zmin": math.log10(min(values)) if wide else 0,
        "zmax": math.log10(most) if wide else most,
        "x": [_label(name) for name in picture.columns],
        "y": at,
        "text": [["<br>".join(map(_text, cell)) for cell in row] for row in picture.details],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "title": {"text": picture.heat_title},
        "height": 22 * len(picture.rows) + 190,
        "margin": {"t": 60, "b": 60},
        "xaxis": {"type": "category", "title": {"text": "layer"}, "showgrid": False},
        "yaxis": {
            "type": "category",
            "autorange": "reversed",
            "categoryorder": "array",
            "categoryarray": at,
            "tickvals": at,
            "ticktext": [_label(name) for name in picture.rows],
            "automargin": True,
            "ticks": "outside",
            "tickcolor": "rgba(0,0,0,0)",  # keeps names off the colours
            "showgrid": False,
        },
    }
    return [trace], layout


def _colour(value: float, wide: bool) -> float | None:
    if not math.isfinite(value) or (wide and value <= 0):
        return None
    return math.log10(value) if wide else value


def _spectra(picture: Picture) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    for line, (dash, colour) in zip(picture.lines, styles(len(picture.lines)), strict=True):
        traces += _line(line, dash, colour, line.floor in picture.floors)
    layout = {
        "title": {"text": picture.spectra_title},
        "height": 460 + 20 * len(picture.lines),
        "margin": {"t": 60, "r": 20},
        "hovermode": "closest",
        "xaxis": {
            "type": "log",
            "title": {"text": "singular direction"},
            "tickvals": picture.directions,
        },
        "yaxis": {"type": "log", "title": {"text": "singular value"}, "exponentformat": "power"},
        "legend": {
            "orientation": "h",
            "entrywidth": 1,
            "entrywidthmode": "fraction",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "maxheight": 1,
            "tracegroupgap": 0,
            "font": {"size": 11},
            "title": {"text": drawn.LINES_TITLE, "side": "top"},
        },
    }
    return traces, layout


def _line(line: Line, dash: str, colour: str, floor: bool) -> list[dict[str, Any]]:
    """The traces of one module, which its entry in the legend hides together."""
    name = _label(line.label)
    common = {"type": "scatter", "name": name, "legendgroup": name}
    whole = f"{_text(line.label)}<br>"
    at = list(range(1, len(line.values) + 1))
    traces: list[dict[str, Any]] = [
        {
            "mode": "lines",
            "x": at,
            "y": list(line.values),
            "text": [
                f"{whole}direction {i}: {v:.4g}" for i, v in zip(at, line.values, strict=True)
            ],
            "line": {"color": colour, "dash": dash, "width": 1.8},
        }
    ]
    if floor:
        traces.append(
            {
                "mode": "lines",
                "x": [1, len(line.values)],
                "y": [line.floor] * 2,
                "text": [f"{whole}noise floor: {line.floor:.4g}"] * 2,
                "line": {"color": colour, "dash": "dot", "width": 1},
                "showlegend": False,
            }
        )
    if line.ranked:
        assert line.rank is not None
        value = line.values[line.rank - 1]
        traces.append(
            {
                "mode": "markers",
                "x": [line.rank],
                "y": [value],
                "text": [f"{whole}rank {line.rank}: {value:.4g}"],
                "marker": {"color": colour, "size": 8},
                "showlegend": False,
            }
        )
    return [common | {"hovertemplate": "%{text}<extra></extra>"} | each for each in traces]


def _curves(picture: Picture) -> tuple[list[Any], dict[str, Any]]:
    shown = {name: sorted(points) for name, points in picture.curves.items() if points}
    traces = [
        {
            "type": "scatter",
            "name": _label(name),
            "mode": "lines+markers",
            "x": [size for size, _ in points],
            "y": [error for _, error in points],
            "text": [
                f"{_text(name)}<br>{size:,.0f} numbers: relative error {error:.4g}"
                for size, error in points
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": colour, "dash": drawn.CURVE_DASHES[i % 3], "width": 1.8},
            "marker": {"size": 4},
        }
        for i, ((name, points), (_, colour)) in enumerate(
            zip(shown.items(), styles(len(shown)), strict=True)
        )
    ]
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    layout = {
        "title": {"text": drawn.CURVES_TITLE},
        "height": 460,
        "margin": {"t": 80, "r": 20},
        "hovermode": "closest",
        "xaxis": {"type": "log", "title": {"text": drawn.CURVES_AXES[0]}},
        "yaxis": {"rangemode": "tozero", "title": {"text": drawn.CURVES_AXES[1]}},
        "legend": {"orientation": "h", "y": -0.2},  # below, where no curve runs
        "shapes": [
            line | {"x0": size, "x1": size, "line": {"color": "#888888", "width": 0.5}}
            for _, size, _ in picture.marks
        ],
        "annotations": [
            {
                "text": _label(name),
                "x": math.log10(size),  # of an axis by the logarithm, as annotations want it
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 11},
            }
            for name, size, _ in picture.marks
        ],
    }
    return traces, layout
