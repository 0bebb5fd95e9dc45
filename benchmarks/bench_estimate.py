"""What dry runs say that work takes on this machine, held against how long it takes.

    python benchmarks/bench_estimate.py [FOLDER] [--layers 18] [--jobs N]

Makes (or finds) a model of 2 GB and a fine-tune of it in FOLDER, asks each command how long it will
take, and runs it. The passes of ``engine.rates`` are what the last column says, with ``--jobs 1``
on a quiet machine: processor time for each number, in those of one pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import Cost, clean, run

HIDDEN, INNER, VOCABULARY, SHARDS = 2048, 5632, 32_000, 5
LINEAR = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
COMMANDS = (
    "merge base adapter",
    "merge base --dtype float16",
    "merge base adapter --reversible",
    "quantize base",
    "quantize base --scheme fp8-block",
    "quantize base --scheme int4",
    "quantize base --scheme nvfp4",
    "dequantize four",
    "merge four adapter --requantize",
    "extract base tuned --rank 16",
    "extract base tuned --rank 64",
    "unmerge merged adapter",
)


def make(folder: Path, layers: int) -> None:
    """``base`` and ``tuned``, a change of rank 16 away from it."""
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    index: dict[str, str] = {}
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps(config))
    for shard in range(SHARDS):
        held = {}
        if shard == 0:
            held["model.embed_tokens.weight"] = (0.02 * drawn(VOCABULARY, HIDDEN)).bfloat16()
            held["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
            for name, shape in LINEAR.items():
                held[f"model.layers.{layer}.{name}.weight"] = (0.02 * drawn(*shape)).bfloat16()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                held[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        index |= dict.fromkeys(held, name)
        save_file(held, folder / "base" / name, {"format": "pt"})
        for key, weight in held.items():
            if "_proj" in key:
                change = drawn(weight.shape[0], 16) @ drawn(16, weight.shape[1])
                held[key] = (weight.float() + 2e-4 * change).bfloat16()
        save_file(held, folder / "tuned" / name, {"format": "pt"})
    for side in ("base", "tuned"):
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / side / "model.safetensors.index.json").write_text(text)


def command(folder: Path, words: str, *more: str) -> list[str]:
    """As it is called, with paths in place of names."""
    names = ("base", "tuned", "adapter", "four", "merged", "tiny.safetensors")
    given = [str(folder / word) if word in names else word for word in words.split()]
    return [sys.executable, "-m", "lora_tools", *given, *more]


def prepared(folder: Path, layers: int) -> Path:
    """The folder, with all that the commands read."""
    if not (folder / "tuned" / "model.safetensors.index.json").exists():
        make(folder, layers)
    for name, words in (
        ("adapter", "extract base tuned --rank 16"),
        ("four", "quantize base"),
        ("merged", "merge base adapter --reversible"),
    ):
        if not (folder / name).exists():
            run(command(folder, words, "-o", str(folder / name), "-q"))
    return folder


def estimated(folder: Path, words: str, jobs: list[str]) -> dict[str, float]:
    """The totals of a dry run."""
    dry = command(folder, words, "-o", str(folder / "out"), "--dry-run", "--json", *jobs)
    done = subprocess.run(dry, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["totals"]


def taken(folder: Path, words: str, jobs: list[str]) -> Cost:
    """Of the run."""
    clean(folder / "out")
    cost = run(command(folder, words, "-o", str(folder / "out"), "-q", *jobs))
    clean(folder / "out")
    return cost


def one_pass() -> float:
    """Processor seconds for a number."""
    from lora_tools.engine import rates

    steps, done, begun = rates._passes(), 0, time.thread_time()
    while time.thread_time() - begun < 1:
        done += next(steps)
    return (time.thread_time() - begun) / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    jobs = ["--jobs", str(args.jobs)] if args.jobs else []
    start = run([sys.executable, "-c", "import torch"]).cpu
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared(args.folder or Path(scratch), args.layers)
        numbers = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 2
        print("| command | said, s | taken, s | times | CPU s | passes a number |")
        print("|---|---|---|---|---|---|")
        for words in COMMANDS:
            said = estimated(folder, words, jobs)["expected_seconds"]
            cost = taken(folder, words, jobs)
            passes = (cost.cpu - start) / numbers / one_pass()
            print(
                f"| {words} | {said:.1f} | {cost.wall:.1f} | {cost.wall / said:.2f} | "
                f"{cost.cpu:.1f} | {passes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
