"""Quantized exports: size, quality on a text, what exporting takes, and the speed of one token.

    python benchmarks/bench_export_quantized.py CHECKPOINT TEXT [--steps 60] [--only nf4,int8,int4]

CHECKPOINT is a decoder's folder. It is exported plain, which is traced, and then with each scheme,
which uses that graph again; all with --eval-text and checked. Then single tokens are decoded on one
thread, each step in every session in turn: the median CPU time of a token, and the median of the
ratios to the plain graph (float32). Memory is that of a process that opens a session and runs a
prompt of 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _measure import loratools, run
from bench_runtime_adapters import PROMPT, State, active, open_session

MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from bench_export_quantized import *
State(open_session(Path(sys.argv[2])), active(None)).step(PROMPT)
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="nf4,int8,int4")
    given = parser.parse_args()
    names = ["", *given.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name or "plain") for name in names}
        print("| | MB | perplexity | KL, nats | export CPU s | wall s | peak MiB | session MiB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for name, folder in folders.items():
            report = Path(temporary, "report.json")
            options = [f"--{name}", "--graph", str(folders[""])] if name else []
            cost = run(
                [
                    loratools(),
                    "export",
                    str(given.checkpoint),
                    "-o",
                    str(folder),
                    *options,
                    "-q",
                    "--report",
                    str(report),
                    "--eval-text",
                    str(given.text),
                ]
            )
            t = json.loads(report.read_text())["totals"]
            kinds = (".safetensors", ".onnx", ".onnx_data")
            nbytes = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in kinds)
            memory = subprocess.run(
                [sys.executable, "-c", MEMORY, str(Path(__file__).parent), str(folder)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            print(
                f"| {name or 'plain'} | {nbytes / 1e6:.1f} | {t['perplexity']:.3f} | "
                f"{t['kl_divergence']:.2g} | {cost.cpu:.1f} | {cost.wall:.1f} | {cost.memory:.0f} "
                f"| {memory} |",
                flush=True,
            )
        speed(folders, given.steps)


def speed(folders: dict[str, Path], steps: int) -> None:
    """Single tokens, in turn."""
    states = {name: State(open_session(folder), active(None)) for name, folder in folders.items()}
    for state in states.values():
        state.step(PROMPT)
    times: dict[str, list[float]] = {name: [] for name in folders}
    for step in range(steps + 5):
        for name, state in states.items():
            started = time.process_time()
            state.step(np.array([[step + 1]]))
            times[name].append(time.process_time() - started)
    print("\n| | CPU ms a token | tokens a CPU second | times the plain graph's time |")
    print("|---|---|---|---|")
    for name in folders:
        mine, plain = times[name][5:], times[""][5:]
        ratio = statistics.median(a / b for a, b in zip(mine, plain, strict=True))
        middle = statistics.median(mine)
        print(f"| {name or 'plain'} | {1e3 * middle:.1f} | {1 / middle:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
