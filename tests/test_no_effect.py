"""Adapters without an effect, by an alpha of 0 or by zeros: formats and verbs keep it so, and say
so."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.formats.adapters.table import FORMATS

from . import models

CONFIGS: dict[str, dict[str, Any]] = {
    "all zero": {"lora_alpha": 0},
    "all zero, rslora": {"lora_alpha": 0, "use_rslora": True},
    "some zero": {"lora_alpha": 6, "alpha_pattern": {"q_proj": 0}},
    "some zero, ranks": {
        "lora_alpha": 6,
        "alpha_pattern": {"q_proj": 0},
        "rank_pattern": {"k_proj": 2},
    },
    "some zero, rslora": {"lora_alpha": 6, "alpha_pattern": {"k_proj": 0}, "use_rslora": True},
    "zeros in lora_B": {"lora_alpha": 6},
}
# Ways to choose a rank anew, for either verb.
RANKS: tuple[dict[str, Any], ...] = ({}, {"rank": 1}, {"energy": 0.9})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no-effect")
    base = models.save(models.make("llama"), folder / "base")
    for name, config in CONFIGS.items():
        given = {"target_modules": ["q_proj", "k_proj"], "r": 4, **config}
        models.train(base, folder / name, given)
        if name.startswith("zeros"):
            file = folder / name / "adapter_model.safetensors"
            factors = load_file(file)
            save_file({k: v * ("lora_A" in k) for k, v in factors.items()}, file)
        lora_tools.merge(base, [folder / name], folder / f"{name}, merged")
    return folder


def assert_same_effect(root: Path, name: str, adapter: Path, out: Path, error: float) -> None:
    lora_tools.merge(root / "base", [adapter], out)
    found, wanted = models.tensors(out), models.tensors(root / f"{name}, merged")
    base = models.tensors(root / "base")
    for key, tensor in wanted.items():
        moved = (tensor - base[key]).norm()
        assert (found[key] - tensor).norm() <= error * moved + 1e-6 * tensor.norm() * bool(moved)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMATS)
def test_convert_keeps_it(form: str, name: str, root: Path, tmp_path: Path) -> None:
    for i, ranks in enumerate(RANKS if name in ("all zero", "some zero, ranks") else RANKS[:1]):
        there, back = tmp_path / f"there{i}", tmp_path / f"back{i}"
        report = lora_tools.convert(root / name, there, to=form, base=root / "base", **ranks)
        lora_tools.convert(there, back, to="peft", base=root / "base")
        assert_same_effect(root, name, back, tmp_path / f"merged{i}", 1.0 if ranks else 0.0)
        said = [note for note in report.notes if "have lora_alpha 0" in note]
        assert bool(said) == (name != "zeros in lora_B")
        assert any("zeros" in note for note in said) == bool(said and (form != "peft" or ranks))
    if name == "some zero, ranks":
        models.attach_strictly(models.load(root / "base"), tmp_path / "back0")


@pytest.mark.sweep(6)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 4},
        {"scale": 3.0},
        {"rslora": True},
        {"rank": 2},
        {"energy": 0.9, "alpha": 2},
        {"budget": "900"},
        {"consumer": "vllm"},
        {"consumer": "llama.cpp", "alpha": 3},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_rescale_keeps_it(options: dict[str, Any], name: str, root: Path, tmp_path: Path) -> None:
    report = lora_tools.rescale(root / name, tmp_path / "r", **options)
    cut = {"rank", "energy", "budget"} & options.keys()
    if not (name.startswith("some") and (cut or "scale" in options or "dtype" in options)):
        assert_same_effect(root, name, tmp_path / "r", tmp_path / "m", 1e-6)
    factors = load_file(tmp_path / "r" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    zero = "k_proj" if name == "some zero, rslora" else "q_proj"
    for key, tensor in factors.items():
        if "lora_B" in key and (zero in key or name.startswith(("all", "zeros"))):
            alphas = {config["lora_alpha"], *config["alpha_pattern"].values()}
            assert not tensor.any() or 0 in alphas, key
    said = [note for note in report.notes if "lora_alpha 0" in note]
    assert bool(said) == (name != "zeros in lora_B")
    if name.startswith("all zero"):
        assert "the effect is kept" not in report.notes
    if options == {"alpha": 4} and said:
        assert "lora_B is zero now" in said[0]


def test_an_alpha_set_with_the_effect_is_said_to_give_one(root: Path, tmp_path: Path) -> None:
    report = lora_tools.rescale(root / "all zero", tmp_path / "r", alpha=4, effect="change")
    assert any("now have one" in note for note in report.notes)
    lora_tools.merge(root / "base", [tmp_path / "r"], tmp_path / "m")
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(models.tensors(tmp_path / "m")[q], models.tensors(root / "base")[q])


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties"])
def test_combine_adds_nothing(method: Any, root: Path, tmp_path: Path) -> None:
    density = {"density": 1.0} if method == "ties" else {}
    for name in ("all zero", "zeros in lora_B"):
        out = tmp_path / name
        lora_tools.combine([root / name], out, method=method, **density)
        assert_same_effect(root, name, out, tmp_path / f"{name}, m", 0.0)


def test_inspect_shows_it(root: Path) -> None:
    report = lora_tools.inspect(root / "all zero")
    assert {(s.alpha, s.scaling, s.norm) for s in report.spectra} == {(0.0, 0.0, 0.0)}
    assert all(math.isnan(s.stable_rank) for s in report.spectra)


def test_an_alpha_of_0_in_a_file_is_read_as_its_library_does(root: Path, tmp_path: Path) -> None:
    """LyCORIS takes the rank for it. sd-scripts merges nothing then, which is what PEFT does."""
    q = "model_layers_0_self_attn_q_proj"
    factors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)}
    for prefix, alpha in itertools.product(("lycoris_", "lora_unet_"), (0.0, 2.0)):
        keys = {f"{prefix}{q}.{k}": v for k, v in factors.items()}
        keys[f"{prefix}{q}.alpha"] = torch.tensor(alpha)
        save_file(keys, tmp_path / f"{prefix}{alpha}.safetensors")
    read = [tmp_path / f"lycoris_{alpha}.safetensors" for alpha in (0.0, 2.0)]
    for path in read:
        lora_tools.convert(path, path.with_suffix(""), to="peft", base=root / "base")
    one, other = (path.with_suffix("") / "adapter_model.safetensors" for path in read)
    assert one.read_bytes()[-512:] == other.read_bytes()[-512:]
    config = json.loads((one.parent / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    lora_tools.convert(
        tmp_path / "lora_unet_2.0.safetensors", tmp_path / "k", to="peft", base=root / "base"
    )
    zero = tmp_path / "lora_unet_0.0.safetensors"
    report = lora_tools.convert(zero, tmp_path / "z", to="peft", base=root / "base")
    assert any(
        "1 of 1 modules have an alpha of 0, so they have no effect" in n for n in report.notes
    )
    lora_tools.merge(root / "base", [zero], tmp_path / "m")
    before, after = (load_file(p / "model.safetensors") for p in (root / "base", tmp_path / "m"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert any(float(t.scaling) == 0 for t in lora_tools.inspect(zero).spectra)
