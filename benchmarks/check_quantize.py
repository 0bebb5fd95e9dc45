"""Is ``loratools quantize`` transformers' load_in_4bit + save_pretrained, byte for byte?

    python benchmarks/check_quantize.py CHECKPOINT

CHECKPOINT is a folder with a causal language model. Every tensor of the two folders is compared by
dtype, shape and bytes; exit code 1 where any differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import loratools
from bench_quantize import TRANSFORMERS
from safetensors import safe_open


def tensors(folder: Path) -> dict[str, Path]:
    """Every tensor's file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update((name, path) for name in file.keys())  # noqa: SIM118 - no mapping
    return found


def main() -> None:
    import torch

    base = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([loratools(), "quantize", base, "-o", ours, "-q"], check=True)
        command = [sys.executable, "-c", TRANSFORMERS, base, theirs]
        subprocess.run(command, check=True, env=offline, capture_output=True)
        mine, wanted = tensors(ours), tensors(theirs)
        different = sorted(mine.keys() ^ wanted.keys())
        for name in sorted(mine.keys() & wanted.keys()):
            with safe_open(mine[name], "pt") as one, safe_open(wanted[name], "pt") as other:
                a, b = one.get_tensor(name), other.get_tensor(name)
            same = a.dtype == b.dtype and a.shape == b.shape
            if not (
                same
                and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
            ):
                different.append(name)
    print(f"{len(wanted)} tensors of transformers', {len(mine)} of ours, {len(different)} differ")
    for name in different:
        print(f"  {name}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
