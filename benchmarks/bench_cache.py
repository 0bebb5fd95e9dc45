"""Another rank or policy from a spectrum cache, against a fresh extract of the same, in turn.

    python benchmarks/bench_cache.py PAIR [PAIR...] [--runs 3]

PAIR is a folder with ``base`` and ``tuned`` (see fixtures/). The cache is filled once, which is
timed too: it looks at 128 directions of each module.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from _measure import Cost, clean, compare, loratools, run, table

WAYS = {
    "rank 16": ["--rank", "16"],
    "rank 64": ["--rank", "64"],
    "energy 0.5": ["--energy", "0.5", "--max-rank", "128"],
    "budget 20M": ["--budget", "20M"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", action="append", choices=WAYS)
    args = parser.parse_args()
    for pair in args.pairs:
        with tempfile.TemporaryDirectory(dir=args.pairs[0].parent) as scratch:
            out, cache = Path(scratch) / "out", Path(scratch) / "cache.safetensors"
            sides = [str(pair / "base"), str(pair / "tuned")]
            plain = [loratools(), "extract", *sides, "-o", str(out), "--rest", "skip", "-q"]
            kept = [*plain, "--spectrum-cache", str(cache)]
            first = _once([*kept, "--rank", "32"], out)
            size = cache.stat().st_size / 1e6
            print(
                f"### {pair.name}\n\nfilling the cache: {first.cpu:.2f} s CPU, "
                f"{first.memory:.0f} MiB; {size:.0f} MB\n",
                flush=True,
            )
            for name in args.way or WAYS:
                ours, fresh = (
                    partial(_once, [*command, *WAYS[name]], out) for command in (kept, plain)
                )
                a, b = compare(ours, fresh, args.runs, warmup=0)
                print(table(name, "from the cache", a, "anew", b), flush=True)


def _once(command: list[str], out: Path) -> Cost:
    clean(out)
    return run(command)


if __name__ == "__main__":
    main()
