"""One session, adapters swapped per request: tokens against torch, and what the inputs cost.

    python benchmarks/bench_runtime_adapters.py CHECKPOINT ADAPTER [ADAPTER ...] [--tokens 40]
        [--steps 60] [--rtol 1e-4]

CHECKPOINT is a decoder's folder. It is exported plain and with ``--runtime-adapters``. In one
session of the latter every adapter generates greedily, in turn with the base and twice over, and so
does transformers with the adapter merged in float32. Then single tokens are timed on one thread,
each step in both sessions in turn: CPU time of the plain graph, and the median of the ratios.
Memory is that of a process that loads one session and runs a prompt.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _measure import loratools, run

PROMPT = np.arange(1, 33)[None] * 97 % 4096
MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from bench_runtime_adapters import *
session = open_session(Path(sys.argv[2]))
options = active(sys.argv[3] if len(sys.argv) > 3 else None)
generate(session, options, 4)
status = Path("/proc/self/status").read_text()  # rusage counts what the parent had before exec
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""


def open_session(folder: Path) -> Any:
    """On one thread, without the warnings that initializers which are inputs give."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def active(file: Path | str | None) -> tuple[Any, Any]:
    """Options of a run with this adapter, and the adapter, which must outlive them."""
    options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if file is not None:
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
    return options, adapter


class State:
    """A cache that grows by what is fed."""

    def __init__(self, session: Any, options: tuple[Any, Any]) -> None:
        self.session, self.options = session, options
        self.names = [output.name for output in session.get_outputs()]
        self.past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        self.length = 0

    def step(self, ids: Any) -> int:
        """The likeliest token after these."""
        start, self.length = self.length, self.length + ids.shape[1]
        found = dict(
            zip(
                self.names,
                self.session.run(
                    None,
                    {
                        "input_ids": ids,
                        "attention_mask": np.ones((1, self.length), np.int64),
                        "position_ids": np.arange(start, self.length)[None],
                        **self.past,
                    },
                    self.options[0],
                ),
                strict=True,
            )
        )
        self.past = {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name.startswith("present")
        }
        return int(found["logits"][0, -1].argmax())


def generate(session: Any, options: tuple[Any, Any], count: int) -> list[int]:
    """Tokens, greedily."""
    state = State(session, options)
    tokens = [state.step(PROMPT)]
    while len(tokens) < count:
        tokens.append(state.step(np.array([tokens[-1:]])))
    return tokens


def in_torch(folder: Path, count: int) -> list[int]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = model.generate(
            torch.from_numpy(PROMPT), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
    return ids[0, PROMPT.shape[1] :].tolist()


def ratio(one: State, other: State, steps: int) -> tuple[float, float]:
    """Median CPU seconds of a token of the first, and of the ratio to it, step by step in turn."""
    for state in (one, other):
        state.step(PROMPT)
    pairs = []
    for number in range(steps):
        pair = []
        for state in (one, other) if number % 2 else (other, one):
            start = time.process_time()
            state.step(np.array([[7]]))
            pair.append(time.process_time() - start)
        pairs.append(pair if number % 2 else pair[::-1])
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rtol", default="1e-4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as scratch:
        plain, out, merged = (Path(scratch) / name for name in ("plain", "out", "merged"))
        run([loratools(), "export", str(args.checkpoint), "-o", str(plain), "--no-verify", "-q"])
        run(
            [
                loratools(),
                "export",
                str(args.checkpoint),
                "-o",
                str(out),
                "--runtime-adapters",
                "--graph",
                str(plain),
                "--rtol",
                args.rtol,
                *(word for adapter in args.adapters for word in ("--adapter", str(adapter))),
            ]
        )
        session = open_session(out)
        files = [out / f"{adapter.name}.onnx_adapter" for adapter in args.adapters]
        options = {file.stem: active(file) for file in files} | {"no adapter": active(None)}
        found = [
            {name: generate(session, option, args.tokens) for name, option in options.items()}
            for _ in range(2)
        ]
        print("swapped twice, the same tokens both times:", found[0] == found[1])
        for adapter in args.adapters:
            run(
                [
                    loratools(),
                    "merge",
                    str(args.checkpoint),
                    str(adapter),
                    "-o",
                    str(merged),
                    "--dtype",
                    "float32",
                    "--force",
                ]
            )
            wanted = in_torch(merged, args.tokens)
            same = sum(a == b for a, b in zip(found[0][adapter.name], wanted, strict=True))
            print(f"{adapter.name}: {same} of {args.tokens} tokens are torch's")
        wanted = in_torch(args.checkpoint, args.tokens)
        same = sum(a == b for a, b in zip(found[0]["no adapter"], wanted, strict=True))
        print(f"no adapter: {same} of {args.tokens} tokens are torch's")
        base = open_session(plain)
        for name, option in options.items():
            first = State(base, active(None))
            seconds, times = ratio(first, State(session, option), args.steps)
            print(f"{name}: {times:.3f} times the plain graph's {1000 * seconds:.1f} ms a token")
        here = str(Path(__file__).parent)
        for name, more in (
            ("plain graph", [str(plain)]),
            ("no adapter", [str(out)]),
            *((file.stem, [str(out), str(file)]) for file in files),
        ):
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, here, *more],
                capture_output=True,
                text=True,
                check=True,
            )
            print(f"{name}: {done.stdout.strip()} MiB at most")


if __name__ == "__main__":
    main()
