"""Cases that exporters are known to get wrong in silence, on tiny random models: who is right?

    python benchmarks/show_peers.py [--genai PYTHON] [--optimum PYTHON]

PYTHON are interpreters of the peers' own environments, as for ``bench_export.py``. Each graph runs
on 21 tokens, more than twice the sliding window; what is printed is the greatest difference from
the logits of torch (with PEFT where there is an adapter), in units of the largest logit. Optimum
takes no adapter.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import torch
import transformers
from _measure import loratools

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
IDS = torch.arange(21)[None] * 7 % 93 + 3
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA, alpha pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"q_proj": 64},
    },
    "LoRA, rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "rsLoRA": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


def shaken(model: Any, trained_only: bool = False) -> Any:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not trained_only:
                new = parameter + 0.1 * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(new.abs() if "magnitude" in name else new)
    return model.eval()


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=IDS).logits.numpy()


def ran(folder: Path) -> np.ndarray:
    path = next(folder.glob("*.onnx"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, np.int64)}
    given["position_ids"] = np.arange(IDS.shape[1])[None]
    for i in session.get_inputs():
        if i.name.startswith("past"):
            given[i.name] = np.zeros((1, i.shape[1], 0, SHAPE["head_dim"]), np.float32)
    given = {i.name: given[i.name] for i in session.get_inputs()}
    return session.run(["logits"], given)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genai", help="an interpreter with onnxruntime-genai")
    parser.add_argument("--optimum", help="an interpreter with optimum-onnx")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    def attempt(command: list[Any], out: Path, wanted: np.ndarray) -> str:
        done = subprocess.run([*map(str, command), str(out)], capture_output=True, text=True)
        if done.returncode:
            return f"fails: {done.stderr.strip().splitlines()[-1][:60]}"
        return f"{np.abs(ran(out) - wanted).max() / np.abs(wanted).max():.0e}"

    def row(case: str, base: Path, wanted: np.ndarray, adapter: Path | None = None) -> None:
        mine = [loratools(), "export", base, "--no-verify", "-q"]
        mine += ["--adapter", adapter] if adapter else []
        cells = [attempt([*mine, "-o"], base.with_name(base.name + f" {case} ours"), wanted)]
        if args.genai:
            theirs = [args.genai, "-m", "onnxruntime_genai.models.builder", "-i", base, "-p"]
            theirs += ["fp32", "-e", "cpu", "-c", base.with_name("cache")]
            theirs += ["--extra_options", f"adapter_path={adapter}"] if adapter else []
            cells.append(attempt([*theirs, "-o"], base.with_name(f"{case} genai"), wanted))
        if args.optimum:
            cli = Path(args.optimum).with_name("optimum-cli")
            line = [cli, "export", "onnx", "--model", base, "--task", "text-generation-with-past"]
            out = base.with_name(f"{case} optimum")
            cells.append("-" if adapter else attempt(line, out, wanted))
        print(f"| {case} | {' | '.join(cells)} |", flush=True)

    peers = ["onnxruntime-genai builder"] * bool(args.genai) + ["Optimum"] * bool(args.optimum)
    print(f"| | {' | '.join(['loratools', *peers])} |")
    print("|---" * (len(peers) + 2) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        torch.manual_seed(0)
        mistral = transformers.MistralConfig(**SHAPE, sliding_window=8)
        model = shaken(transformers.MistralForCausalLM(mistral))
        model.save_pretrained(top / "mistral")
        tokenizer(top / "mistral")
        row("a sliding window of 8, 21 tokens", top / "mistral", logits(model))
        model = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)))
        model.save_pretrained(top / "llama")
        tokenizer(top / "llama")
        row("Llama", top / "llama", logits(model))
        for case, options in ADAPTERS.items():
            base = transformers.LlamaForCausalLM.from_pretrained(top / "llama")
            adapted = shaken(
                peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **options)), True
            )
            adapted.save_pretrained(top / case)
            row(case, top / "llama", logits(adapted), top / case)


if __name__ == "__main__":
    main()
