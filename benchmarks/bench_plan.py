"""What it costs to plan: a checkpoint of very many tensors, of which there are headers alone.

    python benchmarks/bench_plan.py [FOLDER] [--tensors 200000] [--shards 1000]

Makes (or finds) two models in FOLDER, whose files are sparse and take no room, and has each command
say what it would do with them (``--dry-run``): one of layers alone, which is planned by its names,
and a mixture of experts, of which transformers says what it makes (its import takes some 5 CPU
seconds and 400 MiB of these). Wanted: at most 10 CPU seconds and 500 MiB by names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import run
from lora_tools.formats.safetensors_writer import encode_header
from lora_tools.records import TensorSpec

HIDDEN, INNER, EXPERTS, HEADS, HEAD = 2048, 768, 512, 32, 128
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "head_dim": HEAD,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
KINDS = {
    "layers": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "experts": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
}


PLACES = ("base", "tuned", "adapter", "out")
COMMANDS = {
    "merge base adapter -o out": "merge",
    "merge base adapter -o out --reversible": "merge --reversible",
    "unmerge base adapter -o out": "unmerge",
    "quantize base -o out": "quantize",
    "quantize base -o out --scheme fp8-block": "quantize --scheme fp8-block",
    "extract base tuned -o out --rank 8": "extract",
}


def shapes(kind: str, count: int) -> dict[str, list[int]]:
    """At least ``count`` tensors; each expert by itself."""
    found = {"model.embed_tokens.weight": [CONFIG["vocab_size"], HIDDEN]}
    mlps = [""] if kind == "layers" else [f"experts.{i}." for i in range(EXPERTS)]
    layer = 0
    while len(found) < count:
        at = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * HEAD, HIDDEN),
            ("self_attn.k_proj", 4 * HEAD, HIDDEN),
            ("self_attn.v_proj", 4 * HEAD, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD),
            *([("mlp.gate", EXPERTS, HIDDEN)] if kind == "experts" else []),
        ):
            found[f"{at}.{name}.weight"] = [rows, columns]
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            found[f"{at}.{name}.weight"] = [HEAD]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = [HIDDEN]
        for place in mlps:
            found[f"{at}.mlp.{place}gate_proj.weight"] = [INNER, HIDDEN]
            found[f"{at}.mlp.{place}up_proj.weight"] = [INNER, HIDDEN]
            found[f"{at}.mlp.{place}down_proj.weight"] = [HIDDEN, INNER]
        layer += 1
    found["model.norm.weight"] = [HIDDEN]
    found["lm_head.weight"] = [CONFIG["vocab_size"], HIDDEN]
    return found


def hole(path: Path, dtype: str, shapes: dict[str, list[int]]) -> None:
    """A file of such tensors: its header, and nothing behind it."""
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, shape in shapes.items()]
    header, _, size = encode_header(specs)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


def make(folder: Path, kind: str, count: int, shards: int) -> int:
    """The checkpoint: headers, and holes behind them. Returns how many tensors it has."""
    folder.mkdir(parents=True)
    found = list(shapes(kind, count).items())
    weight_map: dict[str, str] = {}
    each = -(-len(found) // shards)
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        inside = dict(found[number * each : (number + 1) * each])
        hole(folder / name, "BF16", inside)
        weight_map |= dict.fromkeys(inside, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = sum(name.endswith("q_norm.weight") for name in weight_map)
    config = {**CONFIG, **KINDS[kind], "num_hidden_layers": layers, "intermediate_size": INNER}
    (folder / "config.json").write_text(json.dumps(config))
    return len(found)


def adapter(folder: Path, layers: int) -> None:
    """A LoRA adapter of rank 8 for the queries of so many layers; a hole, too."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"
    }  # fmt: skip
    factors = {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{at}.lora_A.weight"] = [8, HIDDEN]
        factors[f"{at}.lora_B.weight"] = [HEADS * HEAD, 8]
    hole(folder / "adapter_model.safetensors", "F32", factors)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Make what is needed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tensors", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=1_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        folder = given.folder or Path(spare) / "made"
        for kind in KINDS if not folder.exists() else ():
            for name in ("base", "tuned"):
                make(folder / kind / name, kind, given.tensors, given.shards)
            adapter(folder / kind / "adapter", 8)
        print("| | CPU s | wall s | peak MiB |\n|---|---|---|---|")
        for kind, (command, title) in itertools.product(KINDS, COMMANDS.items()):
            words = [str(folder / kind / w) if w in PLACES else w for w in command.split()]
            cost = run([sys.executable, "-m", "lora_tools", *words, "--dry-run", "-q"])
            figures = f"{cost.cpu:.1f} | {cost.wall:.1f} | {cost.memory:.0f}"
            print(f"| {title}, {kind} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
