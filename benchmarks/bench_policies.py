"""CPU seconds of the rank policies that judge the whole spectrum, one matrix at a time, on one
thread, against the exact spectrum by LAPACK.

    python benchmarks/bench_policies.py [--shape 4096x4096 --shape 4096x11008] [--exact]

The delta has rank 16 and 10⁻³ of the weights' norm, and both sides are stored in bfloat16: what
--noise-floor must find is 16. With ``--exact`` the same is asked of --svd exact as well.
"""

from __future__ import annotations

import argparse
import time

import torch

from lora_tools.linalg.delta import Delta
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.svd import truncated

POLICIES = {
    "noise_floor": 0.0,
    "gavish_donoho": 0.0,
    "ratio": 0.3,
    "cumulative": 0.5,
    "energy": 0.3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--policy", action="append")
    parser.add_argument("--exact", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for text in args.shape or ("4096x4096", "4096x11008"):
        rows, cols = map(int, text.split("x"))
        torch.manual_seed(0)
        base = (0.02 * torch.randn(rows, cols)).bfloat16()
        change = torch.randn(rows, 16) @ torch.randn(16, cols)
        change *= 1e-3 * base.float().norm() / change.norm()
        delta = Delta((base.float() + change).bfloat16(), base)
        A = torch.empty(rows, cols)
        energies = delta.fill(A, rounding=True)
        print(f"### {text}\n\n| policy | rank | method | CPU s |\n|---|---|---|---|")
        for policy, value in POLICIES.items():
            if args.policy and policy not in args.policy:
                continue
            for exact in (False, True) if args.exact else (False,):
                started = time.thread_time()
                found = truncated(
                    A,
                    RankRule(policy, value),
                    total=energies.delta,
                    exact=exact,
                    rounding=energies.rounding,
                )
                seconds = time.thread_time() - started
                name = policy + (", exact" if exact else "")
                print(f"| {name} | {found.rank} | {found.method} | {seconds:.2f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
