"""What four bits cost a model: the loss on held-out texts that each way to quantize adds.

    python fixtures/make_smollm2.py smol --tuned --steps 48
    python benchmarks/quantize_loss.py smol/tuned [--sequences 32] [--calibration 64] [--only REGEX]

The weights of the GGUF that the fixture starts from lie on a four-bit grid themselves, so a model
that was fully fine-tuned is what is quantized. Activations are collected on docstrings of the
standard library; held out are other docstrings, the language reference (`pydoc_data.topics`) and
source code. What is measured are the numbers that a loader dequantizes, run in float32, so that the
rounding of a loader's compute dtype is not in the table. Losses are compared sequence by sequence,
with the standard error of the difference.
"""

from __future__ import annotations

import argparse
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


def texts(count: int) -> tuple[str, dict[str, str]]:
    """The text to collect activations on, and those that losses are measured on."""
    docs = stdlib_docstrings()
    random.Random(0).shuffle(docs)
    text = "\n\n".join(f"{d.name}\n{d.summary}\n\n{d.body}" for d in docs)
    middle = len(text) // 2
    topics = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    code = "\n\n".join(inspect.getsource(module) for module in (argparse, json, inspect))
    return text[middle : middle + 6 * LENGTH * count], {
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


def added(losses: torch.Tensor, plain: torch.Tensor) -> str:
    """Mean ± standard error."""
    d = losses - plain
    return f"{float(d.mean()):+.4f} ± {float(d.std()) / math.sqrt(len(d)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=32, help="of each text")
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--only", default="", help="rows in whose name this regex is found")
    parser.add_argument("--stats", type=Path, help="use these, instead of collecting them")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    sample, held_out = texts(args.calibration)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for text in held_out.values():
        tokens = tokenizer(text[: 16 * LENGTH * args.sequences], return_tensors="pt")["input_ids"]
        rows.append(tokens[0, : LENGTH * args.sequences].view(-1, LENGTH))
    sequences = torch.cat(rows)
    plain = losses_of(args.model, sequences)
    parts = plain.split([len(each) for each in rows])
    said = ", ".join(f"{n} {float(p.mean()):.4f}" for n, p in zip(held_out, parts, strict=True))
    print(f"{sequences.numel():,} held-out tokens; loss of the model: {said}\n", flush=True)
    print(f"| | of the weights | of the outputs | seconds | {' | '.join(held_out)} | all |")
    print("|---|" + "---|" * (4 + len(held_out)), flush=True)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        work = Path(scratch)
        (work / "text.txt").write_text(sample, encoding="utf-8")
        stats = args.stats or work / "stats.safetensors"
        if not stats.exists():
            most = LENGTH * args.calibration
            lora_tools.collect_stats(
                args.model, work / "text.txt", stats, length=LENGTH, max_tokens=most, jobs=1
            )
        for name, row in ROWS.items():
            if not re.search(args.only, name):
                continue
            options = {**row, "activations": stats if row.get("activations") else None}
            started = time.process_time()
            report = lora_tools.quantize(args.model, work / "four", jobs=1, force=True, **options)
            seconds = time.process_time() - started
            plainly(work / "four", work / "plain")
            losses = losses_of(work / "plain", sequences)
            each = zip(losses.split([len(r) for r in rows]), parts, strict=True)
            cells = [added(a, b) for a, b in each]
            outputs = report.totals.get("output_error")
            print(
                f"| {name} | {report.totals['quantization_error']:.4f} | "
                f"{'' if outputs is None else f'{outputs:.4f}'} | {seconds:.0f} | "
                f"{' | '.join(cells)} | {added(losses, plain)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
