"""A decoder's graph as ours and peers write it: time of a token, a prompt, load, export; bytes.

    python benchmarks/bench_serving.py CHECKPOINT [--peers PYTHON] [--optimum PYTHON]
        [--rounds 12] [--threads 1] [--exports 1] [--graphs FOLDER]

CHECKPOINT is a folder of a causal language model. PYTHON of ``--peers`` has onnxruntime-genai and
mobius-onnx, that of ``--optimum`` optimum-onnx. All graphs are opened in one process by the
onnxruntime here and timed in turn, so that a machine that slows down slows all: CPU time of the
process, medians. Loading is timed in a process of its own. ``differs`` is the greatest difference
from the first graph's logits of the last of 256 tokens. With ``--graphs`` what was exported, and
what that took, is kept there, and a later run takes it from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _measure import Cost, clean, run

PASTS, PROMPT, CALLS = (40, 640), 256, 5
LOADS = """
import resource, sys, time, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, int(sys.argv[2])
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
start = time.process_time()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


class Graph:
    """A decoder in a session: what it takes is told by its inputs' names."""

    def __init__(self, folder: Path, threads: int, heads: int, size: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        # Threads that wait for work without a pause would be counted as work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path, providers = str(folder / "model.onnx"), ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.empty = np.zeros((1, heads, 0, size), np.float32)
        self.caches: dict[int, dict[str, Any]] = {}

    def given(self, tokens: int, past: int = 0) -> dict[str, Any]:
        """Inputs of so many tokens after so many others."""
        made: dict[str, Any] = {}
        for value in self.session.get_inputs():
            if value.name == "input_ids":
                made[value.name] = np.arange(5, 5 + tokens)[None]
            elif value.name == "attention_mask":
                made[value.name] = np.ones((1, past + tokens), np.int64)
            elif value.name == "position_ids":
                made[value.name] = np.arange(past, past + tokens)[None]
            else:
                made[value.name] = self.caches[past][value.name] if past else self.empty
        return made

    def remember(self, past: int) -> None:
        """Run a prompt of that length and keep its cache."""
        found = self.run(self.given(past))
        self.caches[past] = {
            name.replace("present", "past_key_values"): value for name, value in found.items()
        }

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))


def exported(args: argparse.Namespace, top: Path) -> dict[str, list[Cost]]:
    """What writing each folder below ``top`` took."""
    base = str(args.checkpoint)
    ours = [sys.executable, "-m", "lora_tools", "export", base, "-q", "--no-verify"]
    commands: dict[str, Sequence[str]] = {
        "loratools": [*ours, "-o"],
        "loratools --weights bundled": [*ours, "--weights", "bundled", "-o"],
        "loratools --no-fuse": [*ours, "--no-fuse", "-o"],
        "loratools --int8": [*ours, "--int8", "-o"],
        "loratools --int4": [*ours, "--int4", "-o"],
    }
    if args.peers:
        builder = [args.peers, "-m", "onnxruntime_genai.models.builder", "-i", base, "-p", "fp32"]
        commands["onnxruntime-genai builder"] = [
            *(*builder, "-e", "cpu", "-c", str(top / "cache")),
            "-o",
        ]
        mobius = str(Path(args.peers).with_name("mobius"))
        commands["mobius-onnx"] = [
            mobius,
            "build",
            "--model",
            base,
            "--ep",
            "cpu",
            "--dtype",
            "f32",
        ]
    if args.optimum:
        optimum = str(Path(args.optimum).with_name("optimum-cli"))
        task = ("--task", "text-generation-with-past")
        commands["optimum-onnx"] = [optimum, "export", "onnx", "--model", base, *task]
    file = top / "costs.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    costs = {name: [Cost(*each) for each in told.get(name, [])] for name in commands}
    for number in range(args.exports):
        for name, command in commands.items():
            if len(costs[name]) > number:
                continue
            clean(top / name)
            costs[name].append(run([*command, str(top / name)], {"HF_HUB_OFFLINE": "1"}))
            told = {name: [dataclasses.astuple(each) for each in costs[name]] for name in costs}
            file.write_text(json.dumps(told))
    return costs


def timed(graphs: dict[str, Graph], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU by graph and kind of call."""
    took: dict[str, dict[str, list[float]]] = {name: {} for name in graphs}
    for number in range(rounds):
        for name, graph in graphs.items():
            for past in PASTS:
                given, start = graph.given(1, past), time.process_time()
                for _ in range(CALLS):
                    graph.run(given)
                each = (time.process_time() - start) / CALLS
                took[name].setdefault(f"past {past}", []).append(1e3 * each)
            if number % 3 == 0:
                given, start = graph.given(PROMPT), time.process_time()
                graph.run(given)
                prompt = 1e3 * (time.process_time() - start)
                took[name].setdefault(f"prompt {PROMPT}", []).append(prompt)
    return {
        name: {kind: statistics.median(each) for kind, each in kinds.items()}
        for name, kinds in took.items()
    }


def loading(folder: Path, threads: int) -> tuple[float, float]:
    """CPU seconds and peak MiB of opening a session, the middle of three."""
    line = [sys.executable, "-c", LOADS, str(folder / "model.onnx"), str(threads)]
    told = [subprocess.run(line, capture_output=True, check=True).stdout for _ in range(3)]
    seconds, memory = zip(*(map(float, line.split()) for line in told), strict=True)
    return statistics.median(seconds), statistics.median(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peers", help="an interpreter with onnxruntime-genai and mobius-onnx")
    parser.add_argument("--optimum", help="an interpreter with optimum-onnx")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exports", type=int, default=1)
    parser.add_argument("--graphs", type=Path, help="a folder for the graphs, of an earlier run")
    args = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as scratch:
        top = args.graphs or Path(scratch)
        top.mkdir(exist_ok=True)
        costs = exported(args, top)
        loads = {name: loading(top / name, args.threads) for name in costs}
        config = json.loads((args.checkpoint / "config.json").read_text())
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        cache = (config.get("num_key_value_heads") or heads, size)
        graphs = {name: Graph(top / name, args.threads, *cache) for name in costs}
        for graph in graphs.values():
            for past in PASTS:
                graph.remember(past)
        last = {n: g.run(g.given(PROMPT))["logits"][0, -1] for n, g in graphs.items()}
        first = next(iter(last.values()))
        times = timed(graphs, args.rounds)
        kinds = [f"past {past}" for past in PASTS] + [f"prompt {PROMPT}"]
        print(f"### {args.checkpoint}, {args.threads} thread(s), {args.rounds} rounds\n")
        heads = ["nodes", *(f"{kind}, ms" for kind in kinds), "load, s", "load, MiB"]
        heads += ["export CPU, s", "wall, s", "peak MiB", "MB", "differs"]
        print("| | " + " | ".join(heads) + " |")
        print("|" + "---|" * (len(heads) + 1))
        for name in graphs:
            size = sum(p.stat().st_size for p in (top / name).rglob("*") if p.is_file()) / 1e6
            cost = [
                statistics.median(getattr(c, f) for c in costs[name])
                for f in ("cpu", "wall", "memory")
            ]
            cells = [f"{nodes(top / name)}", *(f"{times[name][kind]:.1f}" for kind in kinds)]
            cells += [f"{loads[name][0]:.2f}", f"{loads[name][1]:.0f}"]
            cells += [f"{cost[0]:.1f}", f"{cost[1]:.1f}", f"{cost[2]:.0f}", f"{size:.0f}"]
            print(f"| {name} | {' | '.join(cells)} | {np.abs(last[name] - first).max():.0e} |")


def nodes(folder: Path) -> int:
    """How many a graph has."""
    import onnx

    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


if __name__ == "__main__":
    main()
