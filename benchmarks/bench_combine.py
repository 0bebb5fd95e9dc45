"""combine --method svd against PEFT's add_weighted_adapter(combination_type="svd").

    python benchmarks/bench_combine.py BASE ADAPTER ADAPTER [--runs N]

BASE is a checkpoint folder, the ADAPTERs PEFT adapters of it without DoRA and without tensors saved
whole. PEFT forms each module's dense sum and takes its full SVD; both cut to the largest rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _measure import clean, compare, loratools, run, table

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, one, two, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, one, "one")
model.load_adapter(two, "two")
rank = max(config.r for config in model.peft_config.values())
model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type="svd", svd_rank=rank)
model.save_pretrained(out, selected_adapters=["sum"], save_embedding_layers=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs=2)
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    one, two = map(str, args.adapters)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        mine = [
            loratools(),
            "combine",
            f"{one}=0.7",
            f"{two}=0.3",
            "-o",
            str(out),
            "-q",
            "--method",
            "svd",
        ]
        peft = [sys.executable, "-W", "ignore", "-c", PEFT, str(args.base), one, two, str(out)]

        def once(command: list[str]):
            clean(out)
            return run(command, {"HF_HUB_OFFLINE": "1"})

        a, b = compare(lambda: once(mine), lambda: once(peft), args.runs, warmup=0)
        print(table("combine by SVD", "loratools combine", a, "PEFT add_weighted_adapter", b))


if __name__ == "__main__":
    main()
