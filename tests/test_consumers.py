"""What vLLM reads of an adapter, by the rules of its own loader (``vllm/lora/peft_helper.py``,
``lora_model.py`` and ``utils.py``): older versions read no patterns, none reads DoRA, biases or
tensors saved whole, and a name that is none of these is an error there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools

from . import models

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(lora_(?P<a>[AB])\.weight|lora_embedding_(?P<e>[AB]))"
)


def vllm_reads(folder: Path) -> dict[str, torch.Tensor]:
    """What it adds to each weight: one alpha and one r for all modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert not config.get("modules_to_save")
    assert not config["use_dora"]
    assert not config.get("lora_bias")
    assert config["bias"] == "none"
    assert config["r"] in _RANKS, "max_lora_rank is one of these"
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in models.tensors(folder).items():
        match = _KEY.fullmatch(key)
        assert match, key
        factors.setdefault(match["module"], {})[match["a"] or match["e"]] = tensor.double()
    found = {}
    for module, parts in factors.items():
        assert parts["A"].shape[0] == parts["B"].shape[1] <= config["r"]
        delta = parts["B"] @ parts["A"] * scale
        found[f"{module}.weight"] = delta.T if "embed_tokens" in module else delta
    return found


CONFIGS: dict[str, dict[str, Any]] = {
    "patterns": {
        "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 9},
        "alpha_pattern": {"q_proj": 5},
    },
    "rslora": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
    },
}


def _extracted(base: Path, given: Path, out: Path) -> None:
    lora_tools.merge(base, [given], out.with_name("tuned"))
    lora_tools.extract(base, out.with_name("tuned"), out, rank=9, consumer="vllm")


def _from_kohya(base: Path, given: Path, out: Path) -> None:
    kohya = out.with_name("kohya")
    lora_tools.convert(given, kohya, to="kohya", base=base, drop=["embedding"])
    lora_tools.rescale(kohya, out, consumer="vllm", base=base)


WAYS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "extract": _extracted,
    "rescale": lambda base, given, out: lora_tools.rescale(given, out, consumer="vllm"),
    "from kohya": _from_kohya,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_vllm(kind: str, way: str, tmp_path: Path) -> None:
    base = models.save(models.make("llama"), tmp_path / "base")
    models.train(base, tmp_path / "a", CONFIGS[kind], save_embedding_layers=False)
    WAYS[way](base, tmp_path / "a", tmp_path / "v")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m", dtype="float64")
    before, after = models.tensors(base), models.tensors(tmp_path / "m")
    wanted = {k: after[k] - before[k].double() for k in before}
    wanted = {k: v for k, v in wanted.items() if v.any()}
    if way == "from kohya":
        wanted.pop("model.embed_tokens.weight", None)  # kohya cannot store it
    models.assert_same(vllm_reads(tmp_path / "v"), wanted, 1e-5)
