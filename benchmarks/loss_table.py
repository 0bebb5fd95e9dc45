"""How much of a fine-tune's gain in held-out loss an extracted adapter recovers, by rank, budget
and weighting.

    for i in 0 1 2; do python fixtures/make_smollm2.py smol$i --tuned --steps 48 --part $i; done
    python benchmarks/loss_table.py smol0 smol1 smol2 [--sequences 64] [--calibration 64]

The pairs are fine-tunes of one base on parts of the docstrings of the standard library that share
nothing, in the fixture's own shuffle; held out is the end of it, and activations are collected in
its middle. Adapters are merged in float32, so that what the table shows is the adapter's loss and
not that of rounding the merged weights. Losses are compared sequence by sequence: a difference
comes with its standard error over them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from _common import stdlib_docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lora_tools

LENGTH = 128
LINEAR = {"exclude": ["embed_tokens"], "rest": "skip"}
EMBEDDING = {"rest": "skip"}
SAVED: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapter: ``size_of`` names the row whose size a budget has, ``against`` the one that its
    loss is compared with."""

    name: str
    options: dict[str, Any]
    size_of: str = ""
    against: str = ""
    weighted: str = ""


ROWS = (
    *(Row(f"rank {r}, linear layers", {"rank": r, **LINEAR}) for r in (8, 16, 32, 64)),
    Row("rank 32, with the embedding", {"rank": 32, **EMBEDDING}),
    Row("rank 32, with the embedding and norms whole", {"rank": 32, **SAVED}),
    Row(
        "budget of rank 32, linear layers",
        LINEAR,
        "rank 32, linear layers",
        "rank 32, linear layers",
    ),
    Row(
        "budget of rank 32, with the embedding",
        EMBEDDING,
        "rank 32, with the embedding",
        "rank 32, with the embedding",
    ),
    Row("noise floor, linear layers", {"noise_floor": True, **LINEAR}),
    Row(
        "rank 32, linear layers, activations, diagonal",
        {"rank": 32, **LINEAR},
        "",
        "rank 32, linear layers",
        "diagonal",
    ),
    Row(
        "rank 32, linear layers, activations",
        {"rank": 32, **LINEAR},
        "",
        "rank 32, linear layers",
        "full",
    ),
    Row(
        "rank 8, linear layers, activations",
        {"rank": 8, **LINEAR},
        "",
        "rank 8, linear layers",
        "full",
    ),
    Row(
        "budget of rank 32, linear layers, activations",
        LINEAR,
        "rank 32, linear layers",
        "rank 32, linear layers, activations",
        "full",
    ),
)


def losses_of(folder: Path, held_out: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each sequence in nats, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [float(model(row[None], labels=row[None]).loss) for row in held_out]
    return torch.tensor(rows, dtype=torch.float64)


def difference(losses: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> str:
    """Mean ± standard error of the mean, over all pairs' sequences."""
    d = torch.cat([a - b for a, b in zip(losses, others, strict=True)])
    return f"{float(d.mean()):+.4f} ± {float(d.std()) / math.sqrt(len(d)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--only", default="", help="rows in whose name this regex is found")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    docs = stdlib_docstrings()
    random.Random(0).shuffle(docs)
    text = "\n\n".join(f"{d.name}\n{d.summary}\n\n{d.body}" for d in docs)
    base = args.pairs[0] / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tail = tokenizer(text[-8 * LENGTH * args.sequences :], return_tensors="pt")["input_ids"][0]
    held_out = tail[-LENGTH * args.sequences :].view(-1, LENGTH)
    rows = [row for row in ROWS if re.search(args.only, row.name)]

    before = losses_of(base, held_out)
    after = [losses_of(pair / "tuned", held_out) for pair in args.pairs]
    ends = ", ".join(f"{float(each.mean()):.4f}" for each in after)
    start = float(before.mean())
    print(
        f"{held_out.numel()} held-out tokens; loss of the base {start:.4f}, of the fine-tunes "
        f"{ends}",
        flush=True,
    )
    found: dict[str, list[torch.Tensor]] = {}
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=args.pairs[0].parent) as scratch:
        work = Path(scratch)
        middle = len(text) // 2
        sample = text[middle : middle + 6 * LENGTH * args.calibration]
        (work / "text.txt").write_text(sample, encoding="utf-8")
        for row in rows:
            options = dict(row.options)
            if row.weighted:
                options["activations"] = work / f"{row.weighted}.safetensors"
                if not options["activations"].exists():
                    lora_tools.collect_stats(
                        base,
                        work / "text.txt",
                        options["activations"],
                        kind=row.weighted,
                        length=LENGTH,
                        max_tokens=LENGTH * args.calibration,
                        jobs=1,
                    )
            for i, pair in enumerate(args.pairs):
                if row.size_of:
                    options["budget"] = str(figures[row.size_of][i]["parameters"])
                report = lora_tools.extract(
                    base, pair / "tuned", work / "adapter", dtype="float32", force=True, **options
                )
                lora_tools.merge(
                    base, [work / "adapter"], work / "merged", dtype="float32", force=True
                )
                found.setdefault(row.name, []).append(losses_of(work / "merged", held_out))
                figures.setdefault(row.name, []).append(report.totals)
                shutil.rmtree(work / "merged")
            share = shares(before, found[row.name], after)
            print(
                f"  {row.name}: {', '.join(f'{each:.4f}' for each in share)}",
                file=sys.stderr,
                flush=True,
            )
    print(
        "\n| adapter | numbers | MB | relative error | gain recovered | of each fine-tune | loss "
        "against the row named | nats |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        share, totals = shares(before, found[row.name], after), figures[row.name]
        mean = {
            key: sum(t[key] for t in totals) / len(totals)
            for key in ("parameters", "bytes", "relative_error")
        }
        other = difference(found[row.name], found[row.against]) if row.against in found else ""
        print(
            f"| {row.name} | {mean['parameters']:,.0f} | {mean['bytes'] / 2e6:.1f} | "
            f"{mean['relative_error']:.4f} | {sum(share) / len(share):.3f} | "
            f"{', '.join(f'{each:.3f}' for each in share)} | {row.against if other else ''} | "
            f"{other} |"
        )


def shares(
    before: torch.Tensor, found: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> list[float]:
    """Of each pair, the share of the gain in loss."""
    return [
        float((before - one).mean() / (before - end).mean())
        for one, end in zip(found, after, strict=True)
    ]


if __name__ == "__main__":
    main()
