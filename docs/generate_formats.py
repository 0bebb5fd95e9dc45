"""Writes the table of adapter formats into docs/formats.md, and that of programs that load adapters
into docs/check.md:  python docs/generate_formats.py"""

from __future__ import annotations

from pathlib import Path

from lora_tools.formats.adapters.consumers import CONSUMERS, Consumer
from lora_tools.formats.adapters.format import FEATURES, Format
from lora_tools.formats.adapters.table import FORMATS

_ALPHA = {"module": "each module's", "one": "one", "folded": "in lora_B"}
_HEADS = {
    "embedding": "embed.",
    "conv": "conv.",
    "experts": "experts",
    "dora": "DoRA",
    "bias": "bias",
    "saved": "saved whole",
    "differences": "norms' differences",
    "tokens": "tokens",
    "head": "tied head",
}


def render() -> str:
    """The table."""
    heads = [
        "`--to`",
        "format",
        "as of",
        "read",
        "written",
        "needs `--base`",
        "alpha",
        "ranks",
        *(_HEADS[feature] for feature in FEATURES),
    ]
    rows = [heads, ["---"] * len(heads), *(_row(form) for form in FORMATS.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(form: Format) -> list[str]:
    read = "LoRA" + (f", {form.reads_besides}" if form.reads_besides else "")
    written = "folder" if form.is_folder else "file"
    written += ", MergedLinear with `--layout`" if form.own_forms else ""
    has = dict.fromkeys(form.keeps, "yes")
    if "embedding" in has and not form.tied_embedding:
        has["embedding"] = "untied"
    kept = [has.get(feature, "–") for feature in FEATURES]
    ranks = "one" if form.one_rank else "each its own"
    return [
        f"`{form.name}`",
        form.title,
        form.library,
        read,
        written,
        form.base or "–",
        _ALPHA[form.alpha],
        ranks,
        *kept,
    ]


def render_consumers() -> str:
    """The table of programs."""
    heads = ["`--for`", "as of", "opens", "made by", "names", "patterns", "rsLoRA", "ranks"]
    heads += [_HEADS[feature] for feature in FEATURES]
    rows = [heads, ["---"] * len(heads), *map(_consumer, CONSUMERS.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _consumer(row: Consumer) -> list[str]:
    made = f"`{row.command} --to {row.to}`" if row.to else f"`{row.command} --for {row.name}`"
    ranks = f"up to {row.ranks[-1]}" if row.ranks else "one for all" if row.one_rank else "any"
    kept = ["yes" if row.has(feature) else "–" for feature in FEATURES if feature != "head"]
    if row.whole:
        kept[list(FEATURES).index("saved")] = ", ".join(f"`{name}`" for name in row.whole)
    return [
        f"`{row.name}`",
        row.version,
        ", ".join(FORMATS[name].title for name in row.reads),
        made,
        "in memory" if row.loads else "of files",
        "yes" if row.patterns else "–",
        "yes" if row.rslora else "–",
        ranks,
        *kept,
        "yes" if row.head else "–",
    ]


def insert(page: str, name: str = "formats", table: str = "") -> str:
    """The page with the table between its marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return before + start + (table or render()) + end + after


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    for file, *what in (
        ("docs/formats.md", "formats", render()),
        ("docs/check.md", "consumers", render_consumers()),
    ):
        path = root / file
        path.write_text(insert(path.read_text(encoding="utf-8"), *what), encoding="utf-8")
        print(f"wrote {file}")
