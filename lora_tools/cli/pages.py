"""The documentation's pages, which come with the package: help and errors name them."""

from __future__ import annotations

from pathlib import Path

import click

from lora_tools.options.fields import nearest

_INSTALLED = "share/doc/loratools"  # where pyproject.toml puts them, below an environment's top
_FOLDER = "docs"
# Of commands whose page has another name than they have.
_OTHERWISE = {
    "unmerge": "merge",
    "rescale": "ranks",
    "convert": "formats",
    "dequantize": "quantize",
    "collect-stats": "ranks",
}


def is_page(name: str) -> bool:
    """Whether it can name a page, and no command."""
    return name == _FOLDER or name.endswith(".md")


def page_of(command: str) -> str:
    """How a command's help names its page."""
    return f"More: loratools help {_FOLDER}/{_OTHERWISE.get(command, command)}.md"


def page(name: str) -> str:
    """A page as it is written, in Markdown; of ``docs`` the list of all.

    Args:
        name: ``docs/tasks/vllm.md``, and ``tasks/vllm.md`` or ``vllm.md``.

    Raises:
        click.UsageError: there is none of that name.
    """
    pages = _pages()
    if name == _FOLDER:
        return "".join(f"{_FOLDER}/{short}: {_title(path)}\n" for short, path in pages.items())
    short = name.removeprefix(f"{_FOLDER}/")
    found = [path for known, path in pages.items() if short in (known, known.rpartition("/")[2])]
    if not found:
        stems = [known.removesuffix(".md") for known in pages]
        meant = nearest(short.removesuffix(".md"), stems).replace("'?", ".md'?")
        step = meant or f"'loratools help {_FOLDER}' lists them."
        raise click.UsageError(f"No such page {name!r}. {step}")
    return found[0].read_text(encoding="utf-8")


def _pages() -> dict[str, Path]:
    """By their names below ``docs``: of the checkout that this runs from, else as installed."""
    here = Path(__file__).parents[2] / _FOLDER
    if (here / "cli.md").is_file():
        return {str(path.relative_to(here)): path for path in sorted(here.rglob("*.md"))}
    from importlib import metadata  # half of the time that help takes

    try:
        files = metadata.files("loratools") or []
    except metadata.PackageNotFoundError:
        files = []
    known = ((str(file).rpartition(f"{_INSTALLED}/")[2], file) for file in files)
    return {
        name: Path(str(file.locate()))
        for name, file in sorted(known)
        if name != str(file) and name.endswith(".md")
    }


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
