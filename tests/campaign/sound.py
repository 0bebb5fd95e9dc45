"""Whole files of every kind, of which the campaign damages copies."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.formats.activations import MARK, VERSION
from tests import (
    distributed,
    forms_compressed,
    forms_fp8,
    forms_gguf,
    forms_groups,
    iotools,
    models,
)

# By file or folder: the format that the adapter is converted to, for it.
ADAPTERS = {
    "kohya.safetensors": "kohya",
    "lycoris.safetensors": "lycoris",
    "diffusers": "diffusers",
    "torchtune.safetensors": "torchtune",
    "mlx": "mlx",
    "loralib.safetensors": "loralib",
    "adapter.gguf": "gguf",
    "ort.onnx_adapter": "onnxruntime",
}
# Number formats: those that are written, and one of each mechanism of those that are read.
WRITTEN = {
    "nf4": ["--scheme", "nf4"],
    "nf4-single": ["--scheme", "nf4", "--no-double-quant"],
    "fp4": ["--scheme", "fp4"],
}
READ = {
    "gptq": forms_groups.FORMS["gptq"],
    "awq": forms_groups.FORMS["awq"],
    "bnb8": forms_groups.FORMS["int8"],
    "mlx4": forms_groups.FORMS["mlx"],
    "fp8": forms_fp8.FORMS["fp8 blocks"],
    "comfy": forms_fp8.FORMS["comfy quant"],
    "packed4": forms_compressed.FORMS["int4 with zero points"],
    "nvfp4": forms_compressed.FORMS["modelopt"],
    "mxfp4": forms_compressed.WIDE_FORMS["mxfp4"],
}


def make(top: Path) -> Path:
    """All of them, in a folder that is there. Takes some seconds."""
    model = models.make("llama", width=16)
    models.save(model, top / "base", max_shard_size="12KB")
    models.perturb(model, 0.02, seed=1)
    models.save(model, top / "tuned")
    iotools.tokenizer(top / "base", models.VOCAB)
    (top / "text.txt").write_text(" ".join(f"w{i * i % 41}" for i in range(40)))
    only = {"rank": 2, "rest": "skip", "include": ["_proj"]}
    lora_tools.extract(top / "base", top / "tuned", top / "adapter", **only)
    lora_tools.merge(top / "base", [top / "adapter"], top / "merged", reversible=True)
    for out in ("extracted", "extracted-again"):  # the second of what the first has kept
        lora_tools.extract(
            top / "base", top / "tuned", top / out, rank=2, spectrum_cache=top / "cache"
        )
    for name, form in ADAPTERS.items():
        lora_tools.convert(top / "adapter", top / name, to=form, base=top / "base")
    for name, (_, scheme, *rest) in WRITTEN.items():
        lora_tools.quantize(
            top / "base", top / name, scheme=scheme, double_quant=False if rest else None
        )
    _other_forms(top)
    _pickles(top)
    _others(top)
    return top


def _other_forms(top: Path) -> None:
    """What other programs store numbers as, and a GGUF model."""
    plain = {n: t.bfloat16() for n, t in iotools.weights(layers=1, width=32).items()}
    iotools.checkpoint(top / "plain", plain)
    iotools.adapter(top / "adapter-plain", iotools.linear_shapes(plain))
    for name, form in READ.items():
        stored, config, _ = form(plain)
        iotools.checkpoint(top / name, {n: t.contiguous() for n, t in stored.items()})
        (top / name / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    config = json.loads((top / "tuned/config.json").read_text())
    path, kind = top / "model.gguf", gguf.GGMLQuantizationType.Q8_0.name
    width = 32
    tensors = dict(models.make("llama", width=width).state_dict())
    config |= {"hidden_size": width, "intermediate_size": 3 * width // 2}
    made = forms_gguf.gguf_tensors("llama", tensors, config)
    forms_gguf.write(
        path,
        "llama",
        forms_gguf.fields_of(config),
        made,
        lambda name: kind if "attn" in name else "F16",
    )


def _pickles(top: Path) -> None:
    """The base as torch saves it: sharded pickles, a distributed checkpoint."""
    weights = load_file(top / "tuned/model.safetensors")
    names = sorted(weights)
    (top / "pickles").mkdir()
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    where = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        torch.save({n: weights[n] for n in names if where[n] == file}, top / "pickles" / file)
    index = {"metadata": {}, "weight_map": where}
    (top / "pickles/pytorch_model.bin.index.json").write_text(json.dumps(index))
    distributed.save(weights, top / "dcp")
    torch.save(load_file(top / "loralib.safetensors"), top / "loralib.pt")
    for folder in ("pickles", "dcp"):
        (top / folder / "config.json").write_bytes((top / "base/config.json").read_bytes())


def _others(top: Path) -> None:
    """Statistics, and a graph."""
    weights = load_file(top / "tuned/model.safetensors")
    iotools.graph(top / "graph", top / "tuned", weights)
    lora_tools.export(
        top / "tuned", top / "exported", graph=top / "graph", task="features", no_verify=True
    )
    moments = {}
    noise = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            x = torch.randn(64, tensor.shape[1], generator=noise)
            moments[name.removesuffix(".weight")] = x.T @ x / 64
    save_file(moments, top / "moments", {MARK: VERSION, "tokens": "64"})
