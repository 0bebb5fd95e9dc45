"""extract at rank 32 against mergekit-extract-lora, in the same run.

    python benchmarks/bench_extract.py PAIR [PAIR...] --mergekit VENV/bin/mergekit-extract-lora

PAIR is a folder with ``base`` and ``tuned`` (see fixtures/). mergekit 0.1.5 lives in its own
virtual environment. ``--busy`` keeps the other core busy meanwhile. The energy captured is compared
with the optimum by an exact Gram matrix, tensor by tensor, with ``--optimum``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from _measure import Cost, clean, compare, loratools, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--mergekit", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--optimum", action="store_true")
    args = parser.parse_args()
    load = multiprocessing.Process(target=_spin, daemon=True)
    if args.busy:
        load.start()
    for pair in args.pairs:
        with tempfile.TemporaryDirectory(dir=pair) as scratch:
            out = Path(scratch) / "out"
            ours = [
                loratools(),
                "extract",
                str(pair / "base"),
                str(pair / "tuned"),
                "-o",
                str(out),
                "--rank",
                str(args.rank),
                "--quiet",
            ]
            theirs = [
                args.mergekit,
                "--model",
                str(pair / "tuned"),
                "--base-model",
                str(pair / "base"),
                "--out-path",
                str(out),
                "--max-rank",
                str(args.rank),
            ]
            a, b = compare(partial(_once, ours, out), partial(_once, theirs, out), args.runs)
            title = f"extract, {pair.name}, rank {args.rank}" + (" (a busy core)" * args.busy)
            print(table(title, "loratools", a, "mergekit-extract-lora", b), flush=True)
            if args.optimum:
                clean(out)
                print(_optimum(ours, pair, args.rank))
    if args.busy:
        load.terminate()


def _once(command: list[str], out: Path) -> Cost:
    clean(out)
    return run(command, {"HF_HUB_OFFLINE": "1"})


def _spin() -> None:
    while True:
        pass


def _optimum(command: list[str], pair: Path, rank: int) -> str:
    """Energy of the written adapter over the best possible at the same rank, over all modules."""
    found = json.loads(subprocess.check_output([*command, "--json"]))
    exact_out = pair / "exact-adapter"
    clean(exact_out)
    exact = [*command, "--svd", "exact", "--dtype", "float32", "--json"]
    exact[exact.index("-o") + 1] = str(exact_out)
    best = json.loads(subprocess.check_output(exact))
    clean(exact_out)

    def energy(report: dict) -> float:
        return sum(m["energy"] * m["delta_norm"] ** 2 for m in report["modules"])

    worst = min(
        a["energy"] / b["energy"] for a, b in zip(found["modules"], best["modules"], strict=True)
    )
    return (
        f"energy captured at rank {rank}: {energy(found) / energy(best):.4%} of the optimum "
        f"(worst module {worst:.4%})\n"
    )


if __name__ == "__main__":
    main()
