"""``verify`` of merged checkpoints with adapters of every format and every kind of part: what is
right, and which scale was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools
from lora_tools.errors import QualityGateError
from lora_tools.formats.adapters.table import FORMATS

from . import iotools, models
from .test_layers_peft import PLAIN, net, store, trained

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 4, "lora_alpha": 6},
    "rslora": {"target_modules": ["k_proj", "up_proj"], "r": 3, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_dora": True},
    "bias": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 4},
    "saved": {"target_modules": ["v_proj"], "r": 4, "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["v_proj"], "r": 4, "trainable_token_indices": [3, 9]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("verify")
    base = models.save(models.make("llama").bfloat16(), top / "base")
    for name, config in CONFIGS.items():
        models.train(base, top / name, config, save_embedding_layers=False)
    models.save(models.make("llama", 7).bfloat16(), top / "other")
    return top


def holds(root: Path, merged: Path, *adapters: Any) -> lora_tools.Report:
    report = lora_tools.verify(merged, base=root / "base", adapters=adapters)
    assert report.totals["verdict"].startswith("base + adapter")
    return report


def refused(root: Path, merged: Path, *adapters: Any, base: str = "base") -> str:
    with pytest.raises(QualityGateError) as caught:
        lora_tools.verify(merged, base=root / base, adapters=adapters)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_adapters_of_every_format(root: Path, tmp_path: Path, form: str) -> None:
    """Merged from PEFT's, verified by another format's; and the other way round at twice the
    scale."""
    kinds = ["plain", *(["dora"] if "dora" in FORMATS[form].keeps else [])]
    for kind in kinds:
        other = tmp_path / kind
        lora_tools.convert(root / kind, other, to=form, base=root / "base")
        lora_tools.merge(root / "base", [root / kind], tmp_path / f"{kind}-1")
        holds(root, tmp_path / f"{kind}-1", other)
        lora_tools.merge(root / "base", [(other, 2)], tmp_path / f"{kind}-2")
        assert "the adapter is applied twice" in refused(root, tmp_path / f"{kind}-2", other)
        assert "the adapter is applied twice" in refused(root, tmp_path / f"{kind}-2", root / kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_part_of_an_adapter(root: Path, tmp_path: Path, kind: str) -> None:
    """Each tensor that it acts on is missed where it is left as in the base."""
    made = lora_tools.merge(root / "base", [root / kind], tmp_path / "m")
    report = holds(root, tmp_path / "m", root / kind)
    assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"] > 0
    assert "another base" in refused(root, tmp_path / "m", root / kind, base="other")
    assert "the same as in the base, without the adapter" in refused(
        root, root / "base", root / kind
    )
    base = models.tensors(root / "base")
    for name in [fate.tensor for fate in made.plan if fate.action == "merge"]:
        folder = iotools.checkpoint(
            tmp_path / name, models.tensors(tmp_path / "m") | {name: base[name]}
        )
        said = refused(root, folder, root / kind)
        assert "1 different" in said
        assert f"{name}: the same as in the base, without the adapter" in said


def test_tied_weights(tmp_path: Path) -> None:
    """An adapter on the embedding alone parts it from the head; a merged model that is not told so
    is found, and so is a head that lost its place."""
    base = models.save(models.make("llama-tied").bfloat16(), tmp_path / "base")
    config = {"target_modules": ["embed_tokens", "v_proj"], "r": 4}
    models.train(base, tmp_path / "a", config, save_embedding_layers=False)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    holds(tmp_path, tmp_path / "m", tmp_path / "a")
    tensors = models.tensors(tmp_path / "m")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name, change, tied, says in (
        ("told", {}, True, "config.json still ties it"),
        ("lost", {head: None}, False, f"{head}: it is in the base"),
        ("both", {head: tensors[embedding]}, False, f"worst is {head}"),
        ("neither", {embedding: tensors[head]}, False, f"worst is {embedding}"),
    ):
        kept = {n: t.clone() for n, t in (tensors | change).items() if t is not None}
        folder = iotools.checkpoint(tmp_path / name, kept)
        text = json.loads((tmp_path / "m" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": tied}))
        assert says in refused(tmp_path, folder, tmp_path / "a"), name


def test_convolutions(tmp_path: Path) -> None:
    store(net(), tmp_path / "base")
    for name, config in (
        ("plain", {}),
        ("dora", {"use_dora": True}),
        ("rslora", {"use_rslora": True}),
    ):
        trained(net(), tmp_path / name, target_modules=PLAIN, **config)
        lora_tools.merge(tmp_path / "base", [tmp_path / name], tmp_path / f"{name}-m")
        report = holds(tmp_path, tmp_path / f"{name}-m", tmp_path / name)
        assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"] == len(PLAIN)
        lora_tools.merge(tmp_path / "base", [(tmp_path / name, 3)], tmp_path / f"{name}-3")
        assert "the adapter is applied at 3 times its scale" in refused(
            tmp_path, tmp_path / f"{name}-3", tmp_path / name
        )


@pytest.mark.parametrize("layout", ["merged:3", "merged:3/101", "merged:8,16/01"])
def test_weights_of_several_blocks(tmp_path: Path, layout: str) -> None:
    """What loralib calls MergedLinear, one of its blocks without the adapter."""
    torch.manual_seed(0)
    base = {"a.qkv.weight": torch.randn(24, 8), "a.out.weight": torch.randn(8, 8)}
    change = torch.randn(24, 1) @ torch.randn(1, 8)
    tuned = base | {"a.qkv.weight": base["a.qkv.weight"] + 0.1 * change}
    for name, tensors in (("base", base), ("tuned", tuned)):
        iotools.checkpoint(tmp_path / name, tensors)
    lora_tools.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=2, layout=[f"qkv={layout}"]
    )
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    holds(tmp_path, tmp_path / "m", tmp_path / "a")
    spoilt = models.tensors(tmp_path / "m")
    spoilt["a.qkv.weight"][16:] = base["a.qkv.weight"][16:]
    iotools.checkpoint(tmp_path / "s", spoilt)
    said = refused(tmp_path, tmp_path / "s", tmp_path / "a")
    assert "worst is a.qkv.weight" in said
    assert " of 192 elements differ by more" in said
