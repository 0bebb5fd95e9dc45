"""Writes the table of adapter formats into README.md:  python docs/generate_formats.py"""

from __future__ import annotations

from pathlib import Path

from lora_tools.formats.adapters.format import FEATURES, Format
from lora_tools.formats.adapters.table import FORMATS

START, END = "<!-- formats -->\n", "<!-- /formats -->\n"
_ALPHA = {"module": "each module's", "one": "one", "folded": "in lora_B"}
_HEADS = {
    "embedding": "embed.",
    "conv": "conv.",
    "experts": "experts",
    "dora": "DoRA",
    "bias": "bias",
    "saved": "saved whole",
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


def insert(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + render() + END + after


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    readme.write_text(insert(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print("wrote README.md")
