"""convert --to peft of a LoHa against PEFT's save_as_lora, each a process of its own.

    python benchmarks/bench_changes_to_lora.py [--runs N] [--rank R]

The model is a Llama of 540 MB with random weights, made here; the LoHa of rank 8 is on all its
linear layers, or on those of --targets. Printed is the error of both results as well, against the
LoHa's own change.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from _measure import clean, compare, loratools, run, table

PEFT = """
import sys
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForCausalLM
base, adapter, out, rank = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
save_as_lora(out, PeftModel.from_pretrained(model, adapter), rank=int(rank))
"""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, targets: list[str]) -> None:
    """The model and the adapter, in a process of their own: what a parent holds counts as its
    children's peak."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    loha = peft.LoHaConfig(r=8, alpha=8, target_modules=targets, init_weights=False)
    peft.get_peft_model(model, loha).save_pretrained(folder / "loha")


def error(loha: Path, lora: Path) -> float:
    """‖Δ − s·B·A‖ / ‖Δ‖ over all modules."""
    from safetensors.torch import load_file

    exact = load_file(loha / "adapter_model.safetensors")
    found = load_file(lora / "adapter_model.safetensors")
    said = json.loads((lora / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"]
    off = total = 0.0
    for key in (k for k in exact if k.endswith("hada_w1_a")):
        stem = key.removesuffix(".hada_w1_a")
        w1a, w1b, w2a, w2b = (exact[f"{stem}.hada_{p}"] for p in ("w1_a", "w1_b", "w2_a", "w2_b"))
        delta = (w1a @ w1b) * (w2a @ w2b)
        product = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
        off, total = off + float((delta - product).norm()) ** 2, total + float(delta.norm()) ** 2
    return (off / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", default=LINEAR)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.targets)
        return
    with tempfile.TemporaryDirectory() as scratch:
        base, loha = str(Path(scratch) / "base"), str(Path(scratch) / "loha")
        run([sys.executable, __file__, "--make", scratch, "--targets", *args.targets])
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        rank = str(args.rank)
        mine = [loratools(), "convert", loha, "-o", str(ours), "--to", "peft", "--base", base]
        mine += ["--rank", rank, "-q"]
        peer = [sys.executable, "-W", "ignore", "-c", PEFT, base, loha, str(theirs), rank]

        def once(command: list[str], out: Path):
            clean(out)
            return run(command, {"HF_HUB_OFFLINE": "1"})

        a, b = compare(lambda: once(mine, ours), lambda: once(peer, theirs), args.runs, warmup=0)
        print(table("LoHa to LoRA", "loratools convert", a, "PEFT save_as_lora", b))
        print(f"error: {error(Path(loha), ours):.5f} here, {error(Path(loha), theirs):.5f} by PEFT")


if __name__ == "__main__":
    main()
