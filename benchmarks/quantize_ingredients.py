"""What the ingredients of error feedback bring: damping, the order of columns, the number of
tokens, the inputs of the quantized model, the scales.

    python fixtures/make_smollm2.py smol --tuned --steps 48
    python benchmarks/quantize_ingredients.py smol/tuned [--sequences 8]

One model and the texts of quantize_loss.py, against which each row is error-fed NF4 with one thing
changed: statistics of 8,192 tokens, a damping of 1 % of the mean of the diagonal, columns from the
largest of it on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import quantize_loss as table
import torch
from transformers.utils import logging

import lora_tools
from lora_tools.linalg import error_feedback

SEQUENCES = 64  # of statistics
# Which file of statistics, what is set in error_feedback, and the options.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "NF4": ("", {}, {}),
    "error-fed": ("64", {}, {}),
    "damping 0.1 %": ("64", {"DAMPING": 0.001}, {}),
    "damping 10 %": ("64", {"DAMPING": 0.1}, {}),
    "columns as they lie": ("64", {"order_of": lambda diagonal: torch.arange(len(diagonal))}, {}),
    "1,024 tokens": ("8", {}, {}),
    "4,096 tokens": ("32", {}, {}),
    "inputs of the quantized model": ("again", {}, {}),
    "searched scales": ("64", {}, {"scale_search": True}),
    "32,768 tokens": ("256", {}, {}),
}


def statistics(model: Path, work: Path, kind: str, text: Path) -> Path | None:
    """Collected when they are first asked for."""
    if not kind:
        return None
    out = work / f"{kind}.safetensors"
    if out.exists():
        return out
    source, count = model, SEQUENCES
    if kind == "again":  # of layers whose inputs come from quantized ones
        first = statistics(model, work, str(SEQUENCES), text)
        lora_tools.quantize(model, work / "four", activations=first, jobs=1, force=True)
        source = work / "plain"
        table.plainly(work / "four", source)
    else:
        count = int(kind)
    table.collect(source, text, out, count)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=8, help="of each text")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    sample, held_out = table.texts(256)
    sequences = torch.cat(table.held_out_rows(args.model, held_out, args.sequences))
    plain, base = table.losses_of(args.model, sequences), None
    print("| | added loss | share of plain NF4's |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        work = Path(scratch)
        text = work / "text.txt"
        text.write_text(sample, encoding="utf-8")
        for name, (kind, changed, options) in ROWS.items():
            stats = statistics(args.model, work, kind, text)
            with mock.patch.multiple(error_feedback, **changed) if changed else mock.MagicMock():
                lora_tools.quantize(
                    args.model, work / "four", activations=stats, jobs=1, force=True, **options
                )
            table.plainly(work / "four", work / "plain")
            d = table.losses_of(work / "plain", sequences) - plain
            base = d.mean() if base is None else base
            print(f"| {name} | {table.added(d)} | {float(d.mean() / base):.2f} |", flush=True)


if __name__ == "__main__":
    main()
