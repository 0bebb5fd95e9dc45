"""export of a model above 2 GB, in both ways of keeping weights: memory, bytes, and that it runs.

    python benchmarks/bench_export_large.py CHECKPOINT [--no-verify]

CHECKPOINT is a decoder's folder, such as that of ``fixtures/make_llama_pair.py``. Each export is a
command of its own, in which onnx's checker reads the graph by its path and the graph is compared
with torch; then the graph is opened and run in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import clean, loratools, run

RUN = """
import sys, numpy as np, onnx, onnxruntime, resource
path = sys.argv[1] + "/model.onnx"
onnx.checker.check_model(path)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
given = {name: np.ones((1, 5), np.int64) for name in ("input_ids", "attention_mask")}
given["position_ids"] = np.arange(5)[None]
for i in session.get_inputs():
    if i.name.startswith("past"):
        given[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
logits = session.run(["logits"], given)[0]
assert np.isfinite(logits).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(f"checker passed on the path; logits {logits.shape}; peak {peak} MiB")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--no-verify", action="store_true")
    args = parser.parse_args()
    print("| weights | CPU s | wall s | peak MiB | MB on disk | opened in ONNX Runtime |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for weights in ("shared", "bundled"):
            flags = ["--no-verify"] if args.no_verify else []
            command = [loratools(), "export", str(args.checkpoint), "-o", str(out), "-q", *flags]
            cost = run([*command, "--weights", weights], {"HF_HUB_OFFLINE": "1"})
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            opened = subprocess.run(
                [sys.executable, "-c", RUN, out], check=True, capture_output=True, text=True
            )
            print(
                f"| {weights} | {cost.cpu:.1f} | {cost.wall:.1f} | {cost.memory:.0f} | {size:.0f} "
                f"| {opened.stdout.strip()} |",
                flush=True,
            )
            clean(out)


if __name__ == "__main__":
    main()
