"""The sidecar of ``merge --reversible`` against the entropy of what merging loses, and its time.

    python benchmarks/bench_unmerge.py [--layers 1] [--rank 16] [--change 0.17] [--runs 3]

Layers of T5-large's shapes, of normal weights, and a LoRA whose |Δ| is that share of |W|.

The bound: the merged number W' stands for an interval of the width of its unit in the last place,
and where that is 2ᵏ times the base's, the 2ᵏ numbers in it are equally likely, so that k bits are
lost. On top of that a sum formed in float32 may not be rounded as the exact one: the entropy of
whether it is, given k and where in its interval the exact sum lies (32 bins); knowing
how large the number is would lower that part by some more. It is computed from the weights alone,
in float64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lora_tools

SHAPES = [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BINS = 32


def make(folder: Path, layers: int, rank: int, change: float) -> dict[str, torch.Tensor]:
    """Bases in every dtype and the adapter; returns its changes in float64."""
    torch.manual_seed(0)
    base, factors, deltas = {}, {}, {}
    for i, (rows, cols) in enumerate(SHAPES * layers):
        W, A, B = 0.05 * torch.randn(rows, cols), torch.randn(rank, cols), torch.randn(rows, rank)
        B *= change * W.norm() / (B @ A).norm()
        base[f"l{i}.weight"] = W
        factors[f"base_model.model.l{i}.lora_A.weight"] = A
        factors[f"base_model.model.l{i}.lora_B.weight"] = B
        deltas[f"l{i}.weight"] = B.double() @ A.double()
    for name, dtype in DTYPES.items():
        save_file({k: v.to(dtype) for k, v in base.items()}, folder / f"{name}.safetensors")
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    modules = [name.removesuffix(".weight") for name in base]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def unit(x: torch.Tensor) -> torch.Tensor:
    """The unit in the last place, as a power of two; that of subnormal numbers below the rest."""
    info = torch.finfo(x.dtype)
    smallest = torch.tensor(info.smallest_normal, dtype=torch.float64)
    _, exponent = torch.frexp(x.double().abs().clamp(min=smallest))
    return exponent - 1 + torch.tensor(info.eps, dtype=torch.float64).log2()


def bound(W: torch.Tensor, merged: torch.Tensor, delta: torch.Tensor) -> float:
    """Bits of what merging lost of W."""
    k = (unit(merged) - unit(W)).clamp(0, torch.finfo(W.dtype).bits)
    p = merged.double() - delta
    cell = 2.0 ** unit(W)
    half = 2.0 ** (unit(W) + k) / 2
    within = (p - W.double()).abs() <= half
    place = ((p + half) / cell).remainder(1).mul(_BINS).long().clamp(max=_BINS - 1)
    group = (k.long() * _BINS + place).reshape(-1)
    total = torch.bincount(group).double()
    share = torch.bincount(group, weights=within.reshape(-1).double()) / total.clamp(min=1)
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    return float(k.sum() + (total * entropy).sum() / torch.log(torch.tensor(2.0)))


def fastest(work: Callable[[], object], runs: int) -> float:
    """CPU seconds."""
    best = float("inf")
    for _ in range(runs):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--change", type=float, default=0.17)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print("| base | bound, bits a weight | share | of the bound | merge | reversible | unmerge |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        deltas = make(top, args.layers, args.rank, args.change)
        adapter, out, back = [top / "adapter"], top / "m.safetensors", top / "back.safetensors"
        for name in DTYPES:
            base = top / f"{name}.safetensors"

            def merge(reversible: bool, base: Path = base) -> None:
                lora_tools.merge(base, adapter, out, reversible=reversible, force=True, jobs=1)

            plain = fastest(lambda: merge(False), args.runs)
            reversible = fastest(lambda: merge(True), args.runs)
            undo = fastest(
                lambda: lora_tools.unmerge(out, adapter, back, force=True, jobs=1), args.runs
            )
            assert back.read_bytes() == base.read_bytes()
            before, after = load_file(base), load_file(out)
            bits = sum(bound(before[n], after[n], deltas[n]) for n in deltas)
            sidecar = out.with_name(out.name + ".sidecar").stat().st_size
            print(
                f"| {name} | {bits / sum(d.numel() for d in deltas.values()):.3f} | "
                f"{sidecar / out.stat().st_size:.2%} | {8 * sidecar / bits:.2f} | {plain:.2f} s | "
                f"{reversible:.2f} s | {undo:.2f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
