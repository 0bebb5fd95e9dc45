"""merge against PEFT's merge_and_unload + save_pretrained, and against cp + sync, in the same run.

    python benchmarks/bench_merge.py BASE ADAPTER [--peft] [--runs N]

BASE is a checkpoint folder, ADAPTER a PEFT adapter for it (loratools extract makes one). ``cp``
copies the folder and then ``sync`` writes the copy to disk; the source is in the page cache for
both. ``--interpreter`` also times importing torch, to be subtracted from ours.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from _measure import clean, compare, loratools, run, table

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peft", action="store_true")
    args = parser.parse_args()
    size = sum(p.stat().st_size for p in args.base.rglob("*") if p.is_file())
    with tempfile.TemporaryDirectory(dir=args.base.parent) as scratch:
        out = Path(scratch) / "out"
        merge = [loratools(), "merge", str(args.base), str(args.adapter), "-o", str(out), "-q"]
        quoted = shlex.quote(str(out))
        copy = [
            "sh",
            "-c",
            f"cp -r {shlex.quote(str(args.base))} {quoted} && "
            f"find {quoted} -type f -exec sync {{}} +",
        ]
        peft = [sys.executable, "-c", PEFT, str(args.base), str(args.adapter), str(out)]
        start = [sys.executable, "-c", "import torch"]

        def once(command: list[str]):
            clean(out)
            return run(command, {"HF_HUB_OFFLINE": "1"})

        name = f"merge, {args.base.name}, {size / 1e9:.2f} GB"
        a, b = compare(lambda: once(merge), lambda: once(copy), args.runs)
        print(table(name, "loratools merge", a, "cp + sync", b))
        imports = [once(start) for _ in range(args.runs)]
        wall = sorted(c.wall for c in imports)[len(imports) // 2]
        mine = sorted(c.wall for c in a)[len(a) // 2]
        theirs = sorted(c.wall for c in b)[len(b) // 2]
        print(
            f"importing torch alone: {wall:.2f} s wall; merge beyond it: {mine - wall:.2f} s, "
            f"{(mine - wall) / theirs:.2f} times cp + sync\n"
        )
        if args.peft:
            a, b = compare(lambda: once(merge), lambda: once(peft), args.runs)
            print(table(name, "loratools merge", a, "PEFT merge_and_unload", b))


if __name__ == "__main__":
    main()
