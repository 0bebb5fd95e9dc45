"""export against Optimum's exporter, onnxruntime-genai's builder and plain torch.onnx.export.

    python benchmarks/bench_export.py CHECKPOINT [--adapter ADAPTER] [--optimum PYTHON]
        [--genai PYTHON] [--runs N]

CHECKPOINT is a decoder's folder. PYTHON are interpreters of the peers' own environments
(``pip install optimum-onnx==0.1.0 'transformers<4.58' onnxruntime``; ``pip install
onnxruntime-genai onnxruntime onnx onnx_ir transformers``). Each command runs as a whole, in turn,
with ours; ours as it is (the graph checked against torch), without the check, with ``--graph``,
and with ``--adapter`` first traced, then with ``--graph``. Bytes are those of the output folder.
Every graph of CHECKPOINT then runs on 13 tokens, and on two sequences of 13 of which the second is
padded on the left by 4: the differences are the greatest from torch's logits in float32.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _measure import Cost, clean, loratools, run

PLAIN = """
import sys, pathlib, torch
from transformers import AutoModelForCausalLM, DynamicCache
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
config = model.config
shape = (2, config.num_key_value_heads, 5, config.hidden_size // config.num_attention_heads)
class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model
    def forward(self, ids, mask, positions, past):
        done = self.inner(input_ids=ids, attention_mask=mask, position_ids=positions,
                          past_key_values=DynamicCache(past), use_cache=True)
        return done.logits, *[t for x in done.past_key_values.layers for t in (x.keys, x.values)]
past = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
args = (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64),
        torch.arange(5, 8).repeat(2, 1), past)
D = torch.export.Dim.DYNAMIC
axes = ({0: D, 1: D}, {0: D, 1: D}, {0: D, 1: D}, [({0: D, 2: D}, {0: D, 2: D})] * len(past))
pathlib.Path(out).mkdir()
with torch.no_grad():
    torch.onnx.export(Flat(), args, out + "/model.onnx", dynamo=True, dynamic_shapes=axes,
                      external_data=True, optimize=False)
"""
WANTED = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
ids = torch.from_numpy(np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 13)))
mask = torch.ones_like(ids)
mask[1, :4] = 0
positions = (mask.cumsum(1) - 1).clamp(min=0)
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
config = model.config
size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
np.savez(out, ids=ids, mask=mask, positions=positions, logits=logits, size=size)
"""
FOUND = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
wanted = np.load(sys.argv[2])
for rows in (slice(0, 1), slice(0, 2)):
    given = {}
    for i in session.get_inputs():
        kind = next((k for k in ("mask", "position", "ids") if k in i.name), "")
        if kind:
            given[i.name] = wanted[kind + "s" * (kind == "position")][rows]
        else:
            given[i.name] = np.zeros(
                (rows.stop, i.shape[1], 0, int(wanted["size"])), np.float32)
    logits = session.run([session.get_outputs()[0].name], given)[0]
    seen = wanted["mask"][rows].astype(bool)
    print(f"{np.abs(logits - wanted['logits'][rows])[seen].max():.1e}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--optimum", help="an interpreter with optimum-onnx")
    parser.add_argument("--genai", help="an interpreter with onnxruntime-genai")
    parser.add_argument("--adapter", help="a PEFT adapter of the checkpoint")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    base = str(args.checkpoint)
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as scratch:
        top = Path(scratch)
        first = top / "first"
        run([loratools(), "export", base, "-o", str(first), "-q"], {"HF_HUB_OFFLINE": "1"})
        ours = [loratools(), "export", base, "-q", "-o"]
        commands: dict[str, Sequence[str]] = {
            "loratools, checked": ours,
            "loratools --no-verify": [*ours[:-1], "--no-verify", "-o"],
            "loratools --graph, checked": [*ours[:-1], "--graph", str(first), "-o"],
            "loratools --graph --no-verify": [
                *ours[:-1],
                "--no-verify",
                "--graph",
                str(first),
                "-o",
            ],
            "torch.onnx.export": [sys.executable, "-W", "ignore", "-c", PLAIN, base],
        }
        if args.optimum:
            cli = str(Path(args.optimum).with_name("optimum-cli"))
            commands["optimum-cli export onnx"] = [
                cli,
                "export",
                "onnx",
                "--model",
                base,
                "--task",
                "text-generation-with-past",
            ]
        if args.genai:
            commands["onnxruntime-genai builder"] = [
                args.genai,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                base,
                "-p",
                "fp32",
                "-e",
                "cpu",
                "-c",
                str(top / "cache"),
                "-o",
            ]
        merged = [*ours[:-1], "--no-verify", "--adapter", str(args.adapter)]
        if args.adapter:
            commands["loratools --adapter --no-verify"] = [*merged, "-o"]
            commands["the same, --graph"] = [*merged, "--graph", str(first), "-o"]
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        sizes: dict[str, int] = {}
        differences: dict[str, list[str]] = {}
        wanted = str(top / "wanted.npz")
        run([sys.executable, "-W", "ignore", "-c", WANTED, base, wanted], {"HF_HUB_OFFLINE": "1"})
        for _ in range(args.runs):
            for name, command in commands.items():
                out = top / "out"
                clean(out)
                costs[name].append(run([*command, str(out)], {"HF_HUB_OFFLINE": "1"}))
                sizes[name] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
                if name not in differences and "--adapter" not in command:
                    told = subprocess.run(
                        [sys.executable, "-c", FOUND, out / "model.onnx", wanted],
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    differences[name] = told.stdout.split()
        print(f"### export, {args.checkpoint.parent.name}/{args.checkpoint.name}\n")
        print("| | CPU s | wall s | peak MiB | MB on disk | differs | padded |")
        print("|---|---|---|---|---|---|---|")
        for name, mine in costs.items():
            cells = [
                f"{statistics.median(getattr(c, field) for c in mine):.{digits}f}"
                for field, digits in (("cpu", 1), ("wall", 1), ("memory", 0))
            ]
            cells += [f"{sizes[name] / 1e6:.0f}", *differences.get(name, ["", ""])]
            print(f"| {name} | {' | '.join(cells)} |")
        print(f"\n({args.runs} runs each, in turn; medians.)")


if __name__ == "__main__":
    main()
