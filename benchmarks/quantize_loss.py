"""What four bits cost a model: the loss on held-out texts that each way to quantize adds.

    for i in 0 1 2; do python fixtures/make_smollm2.py smol$i --tuned --steps 48 --part $i; done
    python benchmarks/quantize_loss.py smol?/tuned [--sequences 32] [--calibration 64]
        [--only REGEX]

The weights of the GGUF that the fixture starts from lie on a four-bit grid themselves, so models
that were fully fine-tuned are what is quantized, each on statistics of a text of its own: the table
is over all of them. Activations are collected on docstrings of the standard library; held out are
other docstrings, the language reference (`pydoc_data.topics`) and
source code. What is measured are the numbers that a loader dequantizes, run in float32, so that the
rounding of a loader's compute dtype is not in the table. Losses are compared sequence by sequence,
with the standard error of the difference, and with what plain NF4 adds to the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import pydoc_data.topics
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from _common import stdlib_docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lora_tools

LENGTH = 128
ROWS: dict[str, dict[str, Any]] = {
    "NF4": {},
    "NF4, searched scales": {"scale_search": True},
    "NF4, error-fed": {"activations": True},
    "NF4, searched scales, error-fed": {"scale_search": True, "activations": True},
    "NF4, adapter": {"compensate": 16},
    "NF4, error-fed, adapter": {"compensate": 16, "activations": True},
    "NF4, searched scales, error-fed, adapter": {
        "scale_search": True,
        "compensate": 16,
        "activations": True,
    },
    "NF4, error-fed by inputs of the quantized model": {"activations": True, "again": True},
    "NF4, error-fed, adapter of 3 turns": {
        "compensate": 16,
        "compensate_iterations": 3,
        "activations": True,
    },
    "NF4, 4.5 bits": {"budget": "4.5bits"},
    "NF4, blocks of 32, error-fed": {"blocksize": 32, "activations": True},
    "NF4, 4.5 bits, error-fed": {"budget": "4.5bits", "activations": True},
    "NF4, 5 bits, error-fed": {"budget": "5bits", "activations": True},
    "NF4, 6 bits, error-fed": {"budget": "6bits", "activations": True},
    "NF4, blocks of 32": {"blocksize": 32},
    "FP4": {"scheme": "fp4"},
    "FP4, error-fed": {"scheme": "fp4", "activations": True},
    **{
        f"{name}{', error-fed' * fed}": {"scheme": scheme, "activations": fed}
        for name, scheme in (
            ("INT4", "int4"),
            ("MXFP4", "mxfp4"),
            ("NVFP4", "nvfp4"),
            ("FP8, channels", "fp8-channel"),
            ("INT8", "int8"),
        )
        for fed in (False, True)
    },
}


def texts(count: int, draw: int = 0) -> tuple[str, dict[str, str]]:
    """The text to collect activations on, another for each draw, and those that losses are measured
    on."""
    docs = stdlib_docstrings()
    random.Random(0).shuffle(docs)
    text = "\n\n".join(f"{d.name}\n{d.summary}\n\n{d.body}" for d in docs)
    middle = len(text) // 2
    topics = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    code = "\n\n".join(inspect.getsource(module) for module in (argparse, json, inspect))
    start = middle + draw * 6 * LENGTH * count
    return text[start : start + 6 * LENGTH * count], {
        "docstrings": text[-len(text) // 8 :],
        "reference": topics,
        "code": code,
    }


def losses_of(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each sequence in nats, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = [float(model(row[None], labels=row[None]).loss) for row in rows]
    return torch.tensor(found, dtype=torch.float64)


def plainly(four: Path, out: Path) -> None:
    """The numbers that a loader works with; an adapter for their error is added in float32."""
    adapter = four / "loftq_init"
    if adapter.exists():
        lora_tools.merge(four, [adapter], out, dtype="float32", force=True)
    else:
        lora_tools.dequantize(four, out, force=True)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a row comes to for one model: errors relative to the weights and to the layers' outputs,
    CPU seconds, and of each text the loss of each sequence above that of the model."""

    weights: float
    outputs: float | None
    seconds: float
    added: list[torch.Tensor]


def held_out_rows(model: Path, held_out: dict[str, str], count: int) -> list[torch.Tensor]:
    """Of each text (count, LENGTH) tokens."""
    tokenizer, rows = AutoTokenizer.from_pretrained(model), []
    for text in held_out.values():
        tokens = tokenizer(text[: 16 * LENGTH * count], return_tensors="pt")["input_ids"]
        rows.append(tokens[0, : LENGTH * count].view(-1, LENGTH))
    return rows


def collect(model: Path, text: Path, out: Path, count: int) -> None:
    lora_tools.collect_stats(
        model, text, out, length=LENGTH, max_tokens=LENGTH * count, jobs=1, force=True
    )


def measure(model: Path, draw: int, args: argparse.Namespace) -> dict[str, Cost]:
    """All rows of one model."""
    sample, held_out = texts(args.calibration, draw)
    rows = held_out_rows(model, held_out, args.sequences)
    sequences, lengths = torch.cat(rows), [len(each) for each in rows]
    plain, found = losses_of(model, sequences), {}
    said = zip(held_out, plain.split(lengths), strict=True)
    print(
        f"{model}: {sequences.numel():,} held-out tokens; loss of the model: "
        f"{', '.join(f'{name} {float(part.mean()):.4f}' for name, part in said)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        work = Path(scratch)
        text, stats, again = (
            work / "text.txt",
            work / "stats.safetensors",
            work / "again.safetensors",
        )
        text.write_text(sample, encoding="utf-8")
        collect(model, text, stats, args.calibration)
        for name, row in ROWS.items():
            if not re.search(args.only, name):
                continue
            options = {**row, "activations": stats if row.get("activations") else None}
            if options.pop("again", False):  # of layers whose inputs come from quantized ones
                lora_tools.quantize(model, work / "four", jobs=1, force=True, **options)
                plainly(work / "four", work / "plain")
                collect(work / "plain", text, again, args.calibration)
                options["activations"] = again
            started = time.process_time()
            totals = lora_tools.quantize(model, work / "four", jobs=1, force=True, **options).totals
            seconds = time.process_time() - started
            plainly(work / "four", work / "plain")
            losses = losses_of(work / "plain", sequences) - plain
            found[name] = Cost(
                totals["quantization_error"],
                totals.get("output_error"),
                seconds,
                list(losses.split(lengths)),
            )
            print(f"  {name}: {added(losses)}", file=sys.stderr, flush=True)
    return found


def line(name: str, costs: list[Cost], plain: list[Cost] | None) -> str:
    """A row of the table, over all models."""

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values)

    by_text = [torch.cat(parts) for parts in zip(*(cost.added for cost in costs), strict=True)]
    outputs = [cost.outputs for cost in costs]
    cells = [
        f"{mean([cost.weights for cost in costs]):.4f}",
        "" if None in outputs else f"{mean(outputs):.4f}",
        f"{mean([cost.seconds for cost in costs]):.0f}",
        *map(added, (*by_text, torch.cat(by_text))),
    ]
    if plain is not None:
        shares = [
            float(torch.cat(one.added).mean() / torch.cat(other.added).mean())
            for one, other in zip(costs, plain, strict=True)
        ]
        worst = max(
            float(mine.mean() / torch.cat(theirs).mean())
            for mine, theirs in zip(
                by_text, zip(*(cost.added for cost in plain), strict=True), strict=True
            )
        )
        cells += [f"{mean(shares):.2f} ({', '.join(f'{s:.2f}' for s in shares)})", f"{worst:.2f}"]
    else:
        cells += ["", ""]
    return f"| {name} | {' | '.join(cells)} |"


def added(d: torch.Tensor) -> str:
    """Mean ± standard error."""
    return f"{float(d.mean()):+.4f} ± {float(d.std()) / math.sqrt(len(d)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--sequences", type=int, default=32, help="of each text")
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--only", default="", help="rows in whose name this regex is found")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = [measure(model, draw, args) for draw, model in enumerate(args.models)]
    names = list(texts(1)[1])
    print(
        f"\n| | of the weights | of the outputs | seconds | {' | '.join(names)} | all | of plain "
        "NF4's, and of each model | of each text, at most |"
    )
    print("|---|" + "---|" * (6 + len(names)))
    plain = [each["NF4"] for each in found] if "NF4" in found[0] else None
    for name in found[0]:
        print(line(name, [each[name] for each in found], plain), flush=True)


if __name__ == "__main__":
    main()
