"""Inputs that are to be refused, small and made in this process, and the check that they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import LoraToolsError
from lora_tools.options.spelling import for_python
from lora_tools.verbs.row import Verb

Tensors = dict[str, torch.Tensor]
Row = tuple[type[LoraToolsError], str, Callable[[Path], Any]]

WEIGHTS = "adapter_model.safetensors"
Q, UP, NORM, EMBED = ("model.q_proj", "model.up_proj", "model.norm", "model.embed_tokens")
ONES = {f"{Q}.weight": (8, 8), f"{UP}.weight": (12, 8), f"{NORM}.weight": (8,)}

# --------------------------------------------------------------------------------------- the inputs


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    """A safetensors file."""
    save_file({k: v.clone() for k, v in tensors.items()}, path, {"format": "pt"} | metadata)
    return path


def base(t: Path, name: str = "base", by: float = 0.0, **more: torch.Tensor) -> Path:
    """A folder of a little model, its numbers moved ``by`` so much; names have _ for dots."""
    noise = torch.Generator().manual_seed(1)
    shapes = {**ONES, f"{EMBED}.weight": (6, 8)}
    tensors = {k: torch.randn(s, generator=noise) + by for k, s in shapes.items()}
    (t / name).mkdir()
    (t / name / "config.json").write_text('{"model_type": "llama"}')
    save(t / name / "model.safetensors", tensors | named(more))
    return t / name


def named(tensors: Tensors) -> Tensors:
    """``q_proj_weight`` → the name it has in the model."""
    full = {"q_weight": Q, "up_weight": UP, "norm_weight": NORM, "embed_weight": EMBED}
    return {f"{full[k]}.weight": v for k, v in tensors.items()}


def bare(t: Path, name: str, **tensors: torch.Tensor) -> Path:
    """A file; names have __ for dots."""
    return save(t / f"{name}.safetensors", {k.replace("__", "."): v for k, v in tensors.items()})


def two_alike(t: Path) -> Path:
    """Two modules of one name, under prefixes that nothing tells apart."""
    return bare(t, "b", a__x__weight=X, b__x__weight=X)


def peft(t: Path, name: str = "a", tensors: Tensors | None = None, **config: Any) -> Path:
    """A PEFT adapter of one module, or of other tensors."""
    folder = t / name
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save(folder / WEIGHTS, factors() if tensors is None else tensors)
    return folder


def factors(module: str = Q, rows: int = 8, cols: int = 8, r: int = 2, by: float = 1.0) -> Tensors:
    prefix = f"base_model.model.{module}"
    A, B = torch.ones(r, cols), torch.full((rows, r), by)
    return {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}


def of_module(module: str, part: str, *shape: int) -> Tensors:
    return {f"base_model.model.{module}.{part}": torch.ones(shape)}


def whole(module: str = NORM, value: float = 2.0, *shape: int) -> Tensors:
    return {f"base_model.model.{module}.weight": torch.full(shape or (8,), value)}


def filled(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def without(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).unlink()
    return path


def merged(t: Path, adapter: Path, **options: Any) -> Path:
    lora_tools.merge(base(t), [adapter], t / "merged", **options)
    return t / "merged"


def edited(folder: Path, file: str, change: Callable[[Tensors], Any]) -> Path:
    """With the tensors of one of its files changed, its metadata kept."""
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata)
    return folder


def indexed(t: Path, weight_map: dict[str, str], **files: Tensors) -> Path:
    """A folder of shards that an index describes so."""
    (t / "shards").mkdir()
    for name, tensors in files.items():
        save(t / "shards" / f"{name}.safetensors", tensors)
    index = t / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return t / "shards"


def diff(t: Path, one: Path, other: Path | None = None) -> Any:
    return lora_tools.diff(one, other or one)


def to_peft(t: Path, path: Path, **options: Any) -> Any:
    return lora_tools.convert(path, t / "out", to="peft", **options)


def mlx(t: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    (t / "mlx").mkdir()
    (t / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    names = {k.replace("__", "."): v for k, v in tensors.items()}
    save(t / "mlx" / "adapters.safetensors", names)
    return t / "mlx"


def extract(t: Path, one: Path, other: Path, **options: Any) -> Any:
    return lora_tools.extract(one, other, t / "out", **options)


def merge(t: Path, *adapters: Path, **options: Any) -> Any:
    return lora_tools.merge(base(t), list(adapters), t / "out", **options)


X = torch.ones(4, 4)
NAN, INF = torch.full((8, 8), math.nan), torch.full((8, 8), math.inf)
BIG = torch.full((8, 8), 60000.0)


def check(row: Row, folder: Path) -> None:
    """That it is refused so, and that nothing is left of it but what a row itself wrote."""
    error, words, case = row
    with pytest.raises(error, match=for_python(words)):
        case(folder)
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".", "out"))]


def foreign_options(text: str, verb: Verb) -> list[str]:
    """Options that a refusal of a verb names, and that this verb does not take. Those of a whole
    command (`loratools merge …`) are that command's."""
    own = {"--out", "--report"}
    for keyword in verb.keywords:
        flags = keyword.option.flags if keyword.option is not None else ()
        own |= {keyword.flag, *(part for flag in flags for part in flag.split("/"))}
    said = re.sub(r"`[^`]*`|\bpip install.*|\bloratools [^`;]*", "", text)
    return [n for n in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)", said) if n not in own]


def stats(t: Path, tensors: Tensors) -> Path:
    """Activation statistics as collect-stats writes them."""
    return save(t / "stats", tensors, loratools_activations="1", tokens="9")


def made_for(t: Path) -> Path:
    """An adapter whose metadata names its base."""
    extract(t, base(t), base(t, "t", 1.0))
    return (t / "out").rename(t / "made")


def dora(t: Path, cols: int = 8) -> Path:
    magnitude = {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(cols)}
    return peft(t, tensors=factors() | magnitude, use_dora=True)


def embedding(t: Path) -> Path:
    prefix = f"base_model.model.{EMBED}.lora_embedding_"
    return peft(t, tensors={f"{prefix}A": torch.ones(2, 6), f"{prefix}B": torch.ones(8, 2)})


def sidecar_of_next_year(t: Path) -> Path:
    """A sidecar of a version that is not known yet."""
    return save(t / "loratools-unmerge.sidecar", {"header/x": X}, loratools_sidecar="99")


def loralib(t: Path, **metadata: str) -> Path:
    tensors = {"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.ones(4, 2)}
    return save(t / "l.safetensors", tensors, **metadata)


def diffusers(t: Path, said: str) -> Path:
    tensors = {f"unet.{k}": v for k, v in factors("q").items()}
    tensors = {k.replace("base_model.model.", ""): v for k, v in tensors.items()}
    return save(t / "pytorch_lora_weights.safetensors", tensors, lora_adapter_metadata=said)


def cut(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def gguf(t: Path, general: str = "adapter", adapter: str = "lora", quantized: bool = False) -> Path:
    import gguf as package

    writer = package.GGUFWriter(t / "x.gguf", "llama")
    writer.add_type(general)
    writer.add_string("adapter.type", adapter)
    for part in ("lora_a", "lora_b"):
        data = torch.ones(32, 32).numpy()
        kind = package.GGMLQuantizationType.Q8_0 if quantized else None
        values = package.quants.quantize(data, kind) if kind is not None else data
        writer.add_tensor(f"blk.0.attn_q.weight.{part}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return t / "x.gguf"
