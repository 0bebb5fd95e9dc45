"""How much of a fine-tune's gain in held-out loss an extracted adapter recovers, by rank, budget
and weighting.

    python benchmarks/loss_table.py PAIR [--sequences 24] [--calibration 64] > table.md

PAIR is what fixtures/make_smollm2.py --tuned writes. The text is the docstrings of the standard
library in the fixture's own shuffle; the fine-tune saw the start of it, held out is a part near the
end, and activations are collected on a part between. Adapters are merged in float32, so that what
the table shows is the adapter's loss and not that of rounding the merged weights.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

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


def loss_of(folder: Path, held_out: torch.Tensor) -> float:
    """Mean next-token loss in nats, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [float(model(row[None], labels=row[None]).loss) for row in held_out]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--only", default="", help="rows in whose name this regex is found")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    docs = stdlib_docstrings()
    random.Random(0).shuffle(docs)
    text = "\n\n".join(f"{d.name}\n{d.summary}\n\n{d.body}" for d in docs)
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "base")
    tail = tokenizer(text[-8 * LENGTH * args.sequences :], return_tensors="pt")["input_ids"][0]
    held_out = tail[-LENGTH * args.sequences :].view(-1, LENGTH)

    base, tuned = args.pair / "base", args.pair / "tuned"
    ends = loss_of(base, held_out), loss_of(tuned, held_out)
    print(f"{held_out.numel()} held-out tokens; loss of the base {ends[0]:.4f}, of the fine-tune "
          f"{ends[1]:.4f}\n")  # fmt: skip
    print("| what | numbers | MB | relative error | weighted error | loss | gain recovered |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.pair.parent) as scratch:
        work = Path(scratch)
        middle = len(text) // 2
        sample = text[middle : middle + 6 * LENGTH * args.calibration]
        (work / "text.txt").write_text(sample, encoding="utf-8")
        full = {"activations": work / "full.safetensors"}
        diagonal = {"activations": work / "diagonal.safetensors"}
        sizes: dict[str, int] = {}

        def row(name: str, **options: object) -> None:
            if not re.search(args.only, name):
                return
            budget = options.get("budget")
            moments = options.get("activations")
            if isinstance(moments, Path) and not moments.exists():
                lora_tools.collect_stats(
                    base, work / "text.txt", moments, kind=moments.stem, length=LENGTH,
                    max_tokens=LENGTH * args.calibration, jobs=1,
                )  # fmt: skip
            if isinstance(budget, str):
                options["budget"] = str(sizes[budget])
            report = lora_tools.extract(
                base, tuned, work / "adapter", dtype="float32", force=True, **options
            )
            lora_tools.merge(base, [work / "adapter"], work / "merged", dtype="float32", force=True)
            loss = loss_of(work / "merged", held_out)
            shutil.rmtree(work / "merged")
            sizes[name] = t = report.totals["parameters"]
            weights = [m for m in report.modules if m.weighted_error == m.weighted_error]
            weighted = max((m.weighted_error for m in weights), default=None)
            print(
                f"| {name} | {t:,} | {report.totals['bytes'] / 2e6:.1f} | "
                f"{report.totals['relative_error']:.4f} | "
                f"{'-' if weighted is None else f'{weighted:.4f} (worst)'} | {loss:.4f} | "
                f"{(ends[0] - loss) / (ends[0] - ends[1]):.3f} |",
                flush=True,
            )

        for r in (8, 16, 32, 64):
            row(f"rank {r}, linear layers", rank=r, **LINEAR)
        row("rank 32, with the embedding", rank=32, **EMBEDDING)
        row("rank 32, with the embedding and norms whole", rank=32, **SAVED)
        row("budget of rank 32, linear layers", budget="rank 32, linear layers", **LINEAR)
        row("budget of rank 32, with the embedding", budget="rank 32, with the embedding",
            **EMBEDDING)  # fmt: skip
        row("noise floor, linear layers", noise_floor=True, **LINEAR)
        row("rank 32, linear layers, activations, diagonal", rank=32, **LINEAR, **diagonal)
        row("rank 32, linear layers, activations", rank=32, **LINEAR, **full)
        row("rank 8, linear layers, activations", rank=8, **LINEAR, **full)
        row("budget of rank 32, linear layers, activations", budget="rank 32, linear layers",
            **LINEAR, **full)  # fmt: skip
        row("rank 32, with the embedding, activations", rank=32, **EMBEDDING, **full)
        row("budget of rank 32, with the embedding, activations",
            budget="rank 32, with the embedding", **EMBEDDING, **full)  # fmt: skip


if __name__ == "__main__":
    main()
