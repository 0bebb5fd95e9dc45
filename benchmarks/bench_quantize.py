"""Four bits against bitsandbytes and transformers, on one CPU thread, in turn.

    python benchmarks/bench_quantize.py [--runs N] [--checkpoint FOLDER]

A 4096 x 11008 bfloat16 matrix: quantize (blocks of 64, double quantization) and dequantize against
``bitsandbytes.functional``, and against a copy of the matrix; CPU seconds and paired ratios. With
--checkpoint, ``loratools quantize`` against transformers' load_in_4bit + save_pretrained on that
folder, a causal language model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _measure import clean, compare, loratools, run, table

TRANSFORMERS = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, out = sys.argv[1:]
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
model.save_pretrained(out)
"""


def cpu(work: Callable[[], object]) -> float:
    """CPU milliseconds of a call."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def matrix(runs: int) -> None:
    """The kernels on one matrix."""
    import bitsandbytes.functional as bnb
    import torch

    from lora_tools.linalg import codebooks, nf4
    from lora_tools.linalg.nf4_search import quantize_searched

    torch.set_num_threads(1)
    weight = (0.02 * torch.randn(4096, 11008)).bfloat16()
    flat, copy, back = weight.view(-1), torch.empty_like(weight), torch.empty_like(weight).view(-1)
    room = torch.empty(flat.numel() // 2, dtype=torch.uint8)
    book, scratch = codebooks.CODEBOOKS["nf4"], nf4.Scratch()
    ours = nf4.quantize_whole(flat, book, 64, True, room, scratch)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    works = {
        "memcpy": lambda: copy.copy_(weight),
        "quantize": lambda: nf4.quantize_whole(flat, book, 64, True, room, scratch),
        "bitsandbytes quantize": lambda: bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        ),
        "dequantize": lambda: nf4.dequantize(
            ours.packed, nf4.restore_absmax(ours.nested), book, 64, back, scratch
        ),
        "bitsandbytes dequantize": lambda: bnb.dequantize_4bit(codes, state),
        "quantize, scale search": lambda: quantize_searched(flat, book, 64, True, room, scratch),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(runs + 1):
        for name, work in works.items():
            spent = cpu(work)
            if i:  # the first round warms up
                times[name].append(spent)
    print("### 4096 x 11008 bfloat16, CPU ms\n\n| | ms |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.1f} |")
    for one, other in (
        ("bitsandbytes quantize", "quantize"),
        ("quantize", "memcpy"),
        ("bitsandbytes dequantize", "dequantize"),
        ("quantize, scale search", "quantize"),
    ):
        pairs = zip(times[one], times[other], strict=True)
        print(f"| {one} / {other} | **{statistics.median(a / b for a, b in pairs):.1f}** |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    # Whole commands first: a child's peak memory counts what this process held when it forked.
    if args.checkpoint is not None:
        checkpoint(args.checkpoint, args.runs)
    matrix(args.runs)


def checkpoint(base: Path, runs: int) -> None:
    """Whole commands on one folder."""
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        out = Path(scratch) / "out"
        mine = [loratools(), "quantize", str(base), "-o", str(out), "-q"]
        theirs = [sys.executable, "-c", TRANSFORMERS, str(base), str(out)]

        def once(command: list[str]):
            clean(out)
            return run(command, {"HF_HUB_OFFLINE": "1"})

        a, b = compare(lambda: once(mine), lambda: once(theirs), min(runs, 3), warmup=0)
        name = f"quantize, {base.name}"
        print(table(name, "loratools quantize", a, "transformers", b))
        start = once([sys.executable, "-c", "import torch"])
        print(f"importing torch alone: {start.wall:.2f} s wall, {start.memory:.0f} MiB\n")


if __name__ == "__main__":
    main()
