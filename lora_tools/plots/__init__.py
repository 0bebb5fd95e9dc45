"""Pictures of spectra: files by matplotlib, a page to move about in by plotly. The only room that
draws. It knows figures, no tensors."""

from __future__ import annotations

from lora_tools.errors import need
from lora_tools.plots.picture import MOST_LINES, Line, Picture

__all__ = ["MOST_LINES", "Line", "Picture", "check_library", "draw"]


def check_library(suffix: str) -> None:
    """Raises NotInstalled where what draws such files is missing."""
    library = "plotly" if suffix == ".html" else "matplotlib"
    need(f"--plot {suffix}", "plot", library)


def draw(picture: Picture, suffix: str) -> bytes:
    """The picture as a .png, a .svg or an .html page; always the same bytes."""
    if suffix == ".html":
        from lora_tools.plots import page

        return page.draw(picture)
    from lora_tools.plots import still

    return still.draw(picture, suffix.removeprefix("."))
