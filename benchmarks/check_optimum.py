"""Folders that export wrote, opened by optimum.onnxruntime: the same outputs and tokens as torch?

    python benchmarks/check_optimum.py --optimum PYTHON [ARCHITECTURE...]

PYTHON is an interpreter with ``optimum-onnx==0.1.0 'transformers<4.58' onnxruntime``. The
architectures are those of tests/export_models.py, tiny and random.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import lora_tools
from tests import export_models

OPENED = """
import sys, warnings, numpy as np, torch, optimum.onnxruntime as ort
warnings.simplefilter("ignore")
folder, kind = sys.argv[1:]
wanted = dict(np.load(folder + "/wanted.npz"))
model = getattr(ort, "ORTModelFor" + kind).from_pretrained(folder)
given = {k[3:]: torch.from_numpy(v) for k, v in wanted.items() if k.startswith("in_")}
told = []
if "output" in wanted:
    result = model(**given)
    found = (result.logits if "logits" in result else result.last_hidden_state).detach().numpy()
    told.append(f"differs by {np.abs(found - wanted['output']).max():.0e}")
if "tokens" in wanted:
    given.pop("decoder_input_ids", None)
    found = model.generate(**given, max_new_tokens=8, do_sample=False, num_beams=1)
    same = np.array_equal(found.numpy(), wanted["tokens"])
    told.append("the same tokens" if same else "OTHER TOKENS")
print(", ".join(told))
"""
KINDS = {
    "ForCausalLM": "CausalLM",
    "LMHeadModel": "CausalLM",
    "ForMaskedLM": "MaskedLM",
    "ForSequenceClassification": "SequenceClassification",
    "ForTokenClassification": "TokenClassification",
    "ForImageClassification": "ImageClassification",
    "WhisperForConditionalGeneration": "SpeechSeq2Seq",
    "ForConditionalGeneration": "Seq2SeqLM",
    "Model": "FeatureExtraction",
}


def in_torch(folder: Path) -> tuple[str, dict[str, Any]]:
    """Optimum's class for a checkpoint, and inputs and outputs by name."""
    config = transformers.AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    kind = next(kind for end, kind in KINDS.items() if name.endswith(end))
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(2, 16).reshape(2, 7) * 5 % 90 + 3
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    if kind == "ImageClassification":
        size = getattr(config, "image_size", None) or 224
        given = {"pixel_values": torch.randn(2, 3, size, size)}
    elif kind == "SpeechSeq2Seq":
        given = {"input_features": torch.randn(2, 8, 40)}
    found = {}
    with torch.no_grad():
        if "Seq2Seq" in kind or kind == "CausalLM":
            found["tokens"] = model.generate(**given, max_new_tokens=8, do_sample=False)
        if kind == "Seq2SeqLM":
            given["decoder_input_ids"] = ids[:, :3]
        if kind != "SpeechSeq2Seq":
            result = model(**given)
            found["output"] = result["logits"] if "logits" in result else result[0]
    arrays = {**{f"in_{k}": v for k, v in given.items()}, **found}
    return kind, {name: value.numpy() for name, value in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimum", required=True, help="an interpreter with optimum-onnx")
    parser.add_argument("architectures", nargs="*", default=list(export_models.ARCHITECTURES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in args.architectures:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch) / "base", Path(scratch) / "out"
            export_models.make(name, base)
            lora_tools.export(base, out, no_verify=True)
            kind, arrays = in_torch(base)
            np.savez(out / "wanted.npz", **arrays)
            line = [args.optimum, "-c", OPENED, str(out), kind]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
            print(f"{name}: ORTModelFor{kind}: {lines[-1][:160]}", flush=True)


if __name__ == "__main__":
    main()
