"""One 4096 x 11008 float32 matrix at rank 32 against torch.linalg.svd, in the same run.

    python benchmarks/bench_svd.py [--rows 4096 --cols 11008]

The matrix has a power-law spectrum (σ_i ∝ i^-0.6 over 512 directions) plus Gaussian noise: about
0.56 of its energy lies in 32 directions. Both run on every core torch is given.
"""

from __future__ import annotations

import argparse
import time

import torch

from lora_tools.engine.threads import half_products
from lora_tools.linalg.lora import Whole, balanced_factors
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.svd import sketched, truncated
from lora_tools.linalg.truncation import sum_of_squares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    sigma = torch.arange(1, 513).float() ** -0.6
    A = (torch.randn(args.rows, 512) * sigma) @ torch.randn(512, args.cols) / 60
    A += torch.randn(args.rows, args.cols) * 0.02
    rule = RankRule("rank", args.rank)

    def ours() -> float:
        """What extract does with a delta in memory: decompose and fit float32 factors."""
        total = sum_of_squares(A)
        half = half_products("cpu")
        svd = None
        if half is not None:
            svd = sketched(A.to(half), rule, total=total, tolerance=1e-3, noise=0.0, seed=0)
        svd = svd or truncated(A, rule, total=total)
        return balanced_factors(svd, Whole(A), 1.0, torch.float32)[2].captured / total

    ours()
    times, energies = [], []
    for _ in range(5):
        started = time.perf_counter()
        energies.append(ours())
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    S = torch.linalg.svd(A, full_matrices=False)[1].double()
    full = time.perf_counter() - started
    best = float((S[: args.rank] ** 2).sum() / (S**2).sum())
    mine = sorted(times)[len(times) // 2]
    print(f"### one {args.rows} x {args.cols} matrix, rank {args.rank}\n")
    print("| | wall s | energy |\n|---|---|---|")
    print(f"| loratools | {mine:.3f} | {energies[0]:.6f} |")
    print(f"| torch.linalg.svd | {full:.2f} | {best:.6f} |")
    print(f"| **ratio** | **{full / mine:.0f}** | {energies[0] / best:.4%} of the optimum |")


if __name__ == "__main__":
    main()
