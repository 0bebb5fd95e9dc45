"""The .html pictures: what is in them, and what a browser makes of them."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from lora_tools.inspecting.spectrum import picture
from lora_tools.plots import MOST_LINES, Picture, draw
from lora_tools.plots.picture import label, styles
from lora_tools.records import ModuleSpectrum, Report

pytest.importorskip("plotly")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

HOSTILE = '<img src=x onerror="document.title=1">$x$&amp;</script><script>document.title=2</script>'
TURNED = "name\u202egnp.\n"


def change(module: str, size: float) -> ModuleSpectrum:
    values = tuple(size * 0.9**i for i in range(64))
    norm = math.sqrt(sum(v * v for v in values) * 1.02)
    return ModuleSpectrum(
        module, "linear", (256, 128), norm, size / 100, (norm / values[0]) ** 2,
        {"8": 0.5, "64": 0.98}, 0.01, 12, values,
    )  # fmt: skip


def of(modules: list[str], wide: float = 1.1) -> Picture:
    found = [change(name, wide ** (i % 20)) for i, name in enumerate(modules)]
    report: Report[Any] = Report("diff", "0", (), "", False, (), spectra=tuple(found))
    return picture(report, f"base → tuned {HOSTILE}", "relative change: ‖Δ‖ / ‖base‖")


def content(page: bytes) -> dict[str, Any]:
    found = re.search(rb'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture(scope="module")
def large() -> Picture:
    """80 layers and 12 kinds, two of which bear names that a page must not obey."""
    kinds = [f"mlp.part_{i}" for i in range(10)] + [HOSTILE, TURNED]
    some = [(layer, kind) for layer in range(80) for kind in (kinds[-3:] if layer > 1 else kinds)]
    return of([f"model.layers.{layer}.{kind}" for layer, kind in some])


@pytest.fixture(scope="module")
def page(large: Picture) -> bytes:
    return draw(large, ".html")


def test_every_kind_and_layer_is_there(large: Picture, page: bytes) -> None:
    figures = content(page)["figures"]
    [heat] = figures["heat"]["data"]
    assert [len(row) for row in heat["z"]] == [80] * 12
    assert len(heat["x"]) == len(set(heat["x"])) == 80
    said = "\n".join(text for row in heat["text"] for text in row)
    for words in ("model.layers.79.mlp.part_9", "relative change: 1.", "recommended rank: 12",
                  "stable rank: ", "noise floor: 0.01", "linear 256 × 128"):  # fmt: skip
        assert words in said
    lines = [t for t in figures["spectra"]["data"] if t.get("showlegend", True)]
    assert len(lines) == 12
    assert len({(t["line"]["dash"], t["line"]["color"]) for t in lines}) == 12
    assert [a["text"] for a in figures["curves"]["layout"]["annotations"]] == [
        f"rank {r}" for r in (8, 16, 32, 64)
    ]
    assert draw(large, ".html") == page, "the same bytes each time"


def test_colours_start_at_zero_or_say_that_they_are_logarithmic() -> None:
    names = [f"model.layers.{i}.q" for i in range(4)]
    [even] = content(draw(of(names), ".html"))["figures"]["heat"]["data"]
    assert even["zmin"] == 0
    assert even["zmax"] == pytest.approx(1.1**3)
    assert "logarithmic" not in even["colorbar"]["title"]["text"]
    [wide] = content(draw(of(names, wide=3), ".html"))["figures"]["heat"]["data"]
    assert wide["colorbar"]["title"]["text"] == "relative change, % (logarithmic)"
    assert wide["z"][0] == pytest.approx([i * math.log10(3) for i in range(4)])


def test_kinds_in_each_order(page: bytes) -> None:
    found = content(page)
    names = found["figures"]["heat"]["layout"]["yaxis"]["ticktext"]
    orders = {
        key: [names[int(i)] for i in order["categoryarray"]]
        for key, order in found["orders"].items()
    }
    assert list(orders) == ["as in the model", "by largest relative change", "by name"]
    assert all(sorted(order) == sorted(names) for order in orders.values())
    assert orders["by name"][-1].startswith("name")


def test_experts_are_counted_and_what_is_left_out_is_said() -> None:
    drawn = of([f"model.layers.{layer}.experts.{i}.w1" for layer in (0, 1) for i in range(30)])
    assert drawn.rows == [f"experts.{i}.w1" for i in range(30)]
    assert len(drawn.lines) == MOST_LINES
    assert drawn.spectra_title.startswith(f"Spectra, {MOST_LINES} of 30 kinds")
    assert len(set(styles(MOST_LINES))) == MOST_LINES


def test_long_names_keep_their_ends() -> None:
    name = "a" * 100 + "_end"
    assert len(label(name)) == 48
    assert label(name).endswith("_end")
    assert label("short") == "short"


LOOK = """
const heat = document.getElementById("heat"), theme = document.getElementById("theme");
const order = document.getElementById("order"), said = (id, what) =>
  [...document.querySelectorAll(`#${id} ${what}`)].map((e) => [e.getBoundingClientRect(), e])
    .sort(([a], [b]) => a.top - b.top || a.left - b.left).map(([_, e]) => e.textContent);
const seen = {title: document.title, first: said("heat", ".ytick text"),
  layers: said("heat", ".xtick text"), traces: said("spectra", ".legendtext"),
  buttons: said("heat", ".modebar-btn[data-title*=loud]"), light: document.body.className};
theme.click();
seen.dark = document.body.className;
seen.paper = heat._fullLayout.paper_bgcolor;
order.selectedIndex = 2;
order.dispatchEvent(new Event("change"));
setTimeout(() => {
  seen.sorted = said("heat", ".ytick text");
  Plotly.Fx.hover("heat", {xval: 0, yval: 0});
  seen.hover = said("heat", ".hoverlayer .nums").join("\\n");
  seen.fetched = performance.getEntriesByType("resource").map((e) => e.name);
  seen.images = document.querySelectorAll("img").length;
  seen.end = document.title;
  const end = document.createElement("pre");
  end.id = "seen";
  end.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
  document.body.append(end);
}, 300);
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], dict[str, Any]]:
    """What a browser makes of a page, as a script in it finds."""
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("browser")

    def look(page: bytes) -> dict[str, Any]:
        file = folder / "page.html"
        file.write_bytes(page + f"<script>{LOOK}</script>".encode())
        flags = [
            "--headless",
            "--disable-gpu",
            "--window-size=1600,1200",
            "--no-first-run",
            f"--user-data-dir={folder}/user",
        ]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        flags += ["--blink-settings=preferredColorScheme=1", "--virtual-time-budget=5000"]
        done = subprocess.run(
            [BROWSER, *flags, "--dump-dom", file.as_uri()], capture_output=True, check=True
        )
        found = re.search(rb'<pre id="seen">([\w+/=]+)</pre>', done.stdout)
        assert found is not None, done.stderr.decode()[-2000:]
        seen: dict[str, Any] = json.loads(base64.b64decode(found[1]))
        return seen

    return look


def test_in_a_browser(page: bytes, browse: Callable[[bytes], dict[str, Any]]) -> None:
    """It draws without a network, hovers, sorts, turns dark, and obeys no name."""
    seen = browse(page)
    assert seen["title"] == seen["end"] == f"base → tuned {HOSTILE}", "no script of a name ran"
    assert seen["images"] == 0
    assert seen["fetched"] == []
    assert seen["buttons"] == [], "nothing is sent anywhere"
    assert set(seen["first"]) >= {"mlp.part_0", label(HOSTILE)}
    step = 1 if seen["layers"][1] == "1" else 2  # in a wide font there is room for every other one
    assert seen["layers"] == [str(i) for i in range(0, 80, step)]
    assert len(seen["traces"]) == 12
    assert (seen["light"], seen["dark"]) == ("light", "dark")
    assert seen["paper"] == "rgb(17,17,17)"
    assert seen["sorted"] != seen["first"]
    assert sorted(seen["sorted"]) == sorted(seen["first"])
    for words in ("model.layers.0.", "relative change: ", "recommended rank: 12"):
        assert words in seen["hover"]
