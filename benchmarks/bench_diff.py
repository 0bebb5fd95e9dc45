"""diff against extract at rank 32 of the same pair, in turn.

    python benchmarks/bench_diff.py PAIR [PAIR...] [--runs 3]

PAIR is a folder with ``base`` and ``tuned`` (see fixtures/). diff looks at 64 directions of each
module and at what rounding can have put there, and writes nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from _measure import Cost, clean, compare, loratools, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    for pair in args.pairs:
        sides = [str(pair / "base"), str(pair / "tuned")]
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            extract = [loratools(), "extract", *sides, "-o", str(out), "--rank", "32", "--quiet"]
            diff = [loratools(), "diff", *sides, "--quiet"]
            a, b = compare(partial(_once, diff, out), partial(_once, extract, out), args.runs)
            print(table(f"diff, {pair.name}", "diff", a, "extract, rank 32", b), flush=True)


def _once(command: list[str], out: Path) -> Cost:
    clean(out)
    return run(command)


if __name__ == "__main__":
    main()
