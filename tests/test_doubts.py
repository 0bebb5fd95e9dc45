"""What is said of a merge that changes nothing or is not what was meant, and what is refused; and
of two checkpoints that have little in common."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError, UsageError

from . import iotools

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doubts")
    weights = iotools.weights(layers=4)
    iotools.checkpoint(folder / "base", weights)
    iotools.checkpoint(folder / "tuned", iotools.moved(weights))
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=2)
    return folder


def with_config(root: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(root / "adapter", out)
    said = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(said | config))
    return out


def edited(root: Path, out: Path, keep: str = "", times: float = 1.0) -> Path:
    """The adapter with the keys that have ``keep`` in them, and lora_B times so much."""
    shutil.copytree(root / "adapter", out)
    tensors = load_file(out / WEIGHTS)
    save_file(
        {k: v * (times if "lora_B" in k else 1) for k, v in tensors.items() if re.search(keep, k)},
        out / WEIGHTS,
    )
    return out


def notes(root: Path, adapter: Path, out: Path, **options: Any) -> str:
    return " | ".join(lora_tools.merge(root / "base", [adapter], out, **options).notes)


def test_nothing_is_said_of_a_sound_one(root: Path, tmp_path: Path) -> None:
    assert notes(root, root / "adapter", tmp_path / "a") == ""


def test_an_alpha_of_zero(root: Path, tmp_path: Path) -> None:
    said = notes(root, with_config(root, tmp_path / "a", lora_alpha=0), tmp_path / "out")
    assert "8 of 8 modules have lora_alpha 0" in said
    assert "the adapters change nothing: the result is the base, bit for bit" in said
    some = with_config(root, tmp_path / "b", alpha_pattern={r"layers.0.q_proj": 0})
    said = notes(root, some, tmp_path / "out2")
    assert "1 of 8 modules have lora_alpha 0" in said
    assert "1 of the 8 tensors that adapters act on did not change" in said


def test_factors_of_zero(root: Path, tmp_path: Path) -> None:
    said = notes(root, edited(root, tmp_path / "a", times=0.0), tmp_path / "out")
    assert "the adapters change nothing" in said


def test_a_change_below_the_dtype_s_rounding(root: Path, tmp_path: Path) -> None:
    said = notes(root, edited(root, tmp_path / "a", times=1e-12), tmp_path / "out")
    assert "the adapters change nothing" in said


def test_layers_without_their_keys(root: Path, tmp_path: Path) -> None:
    half = edited(root, tmp_path / "a", keep=r"layers\.[01]\.")
    said = notes(root, half, tmp_path / "out")
    assert "target_modules in its config select 4 more modules than it has factors for" in said
    config = json.loads((half / "adapter_config.json").read_text())
    for i, more in enumerate(
        (
            {"layers_to_transform": [0, 1]},
            {"target_modules": r".*layers\.[01]\.(q|up)_proj"},
            {"target_modules": [f"layers.{n}.{m}_proj" for n in (0, 1) for m in ("q", "up")]},
        )
    ):
        (half / "adapter_config.json").write_text(json.dumps(config | more))
        assert "more modules" not in notes(root, half, tmp_path / f"out{i}")


@pytest.mark.parametrize(
    ("said", "own", "is_another"),
    [
        ("org/other-7b", "", True),
        ("org/base", "", False),
        ("/elsewhere/base/", "", False),
        ("C:\\models\\base", "", False),
        ("org/Base-bnb-4bit", "", False),
        ("org/base-instruct", "", True),
        ("org/Model-1b", "org/model-1B", False),
        ("org/model-1b", "org/model-3b", True),
        ("/home/x/hub/models--org--base/snapshots/0a1b", "", False),
        ("", "", False),
        (None, "", False),
    ],
)
def test_another_base(
    said: str | None, own: str, is_another: bool, root: Path, tmp_path: Path
) -> None:
    adapter = with_config(root, tmp_path / "a", base_model_name_or_path=said)
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    config = {"model_type": "llama", **({"_name_or_path": own} if own else {})}
    (base / "config.json").write_text(json.dumps(config))
    report = lora_tools.merge(base, [adapter], tmp_path / "out")
    assert any("was trained on" in note for note in report.notes) == is_another


def test_what_is_undone_is_past_doubt(root: Path, tmp_path: Path) -> None:
    """The merged checkpoint is no base that was given."""
    adapter = with_config(root, tmp_path / "a", base_model_name_or_path="org/base")
    for reversible in (False, True):
        merged = tmp_path / f"merged{reversible}"
        lora_tools.merge(root / "base", [adapter], merged, reversible=reversible)
        report = lora_tools.unmerge(merged, [adapter], tmp_path / f"back{reversible}")
        assert not any("was trained on" in note for note in report.notes)


def test_a_base_in_a_cache_of_the_hub(root: Path, tmp_path: Path) -> None:
    base = tmp_path / "models--org--Model-7b" / "snapshots" / "0123"
    shutil.copytree(root / "base", base)
    for name, is_another in (("org/model-7b", False), ("org/model-8b", True)):
        adapter = with_config(root, tmp_path / name[-2:], base_model_name_or_path=name)
        report = lora_tools.merge(base, [adapter], tmp_path / f"out{name[-2:]}")
        assert any("was trained on" in note for note in report.notes) == is_another


def test_an_adapter_given_twice(root: Path, tmp_path: Path) -> None:
    adapter = root / "adapter"
    with pytest.raises(UsageError, match=r"given twice.*with the weight 2: .*=2"):
        lora_tools.merge(root / "base", [adapter, str(adapter) + "/"], tmp_path / "out")
    weighed = [(adapter, 0.5), (adapter, 1.5)]
    lora_tools.merge(root / "base", weighed, tmp_path / "out")
    shutil.copytree(adapter, tmp_path / "copy")
    report = lora_tools.merge(root / "base", [adapter, tmp_path / "copy"], tmp_path / "out2")
    assert any("hold the same tensors" in note for note in report.notes)


def test_empty_weights(root: Path, tmp_path: Path) -> None:
    weights = iotools.weights(layers=4)
    weights["model.layers.1.up_proj.weight"] = torch.zeros(0)
    weights["model.norm.weight"] = torch.zeros(0)
    base = iotools.checkpoint(tmp_path / "b", weights)
    for work in (
        lambda: lora_tools.merge(base, [root / "adapter"], tmp_path / "out"),
        lambda: lora_tools.extract(root / "base", base, tmp_path / "out"),
        lambda: lora_tools.quantize(base, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight and 1 more: .*zero_to_fp32"):
            work()
    assert lora_tools.inspect(base).notes  # which says which are empty


# ------------------------------------------------------------------------------------- few partners


def other_names(root: Path, out: Path, side: str = "tuned") -> Path:
    """A side whose layers are held by something that nobody knows."""
    tensors = load_file(root / side / "model.safetensors")
    return iotools.checkpoint(
        out, {re.sub(r"(layers\.\d+)\.", r"\1.around.", k): v for k, v in tensors.items()}
    )


def test_most_names_are_apart(root: Path, tmp_path: Path) -> None:
    tuned = other_names(root, tmp_path / "tuned")
    match = r"only 1 of.*tensors of .*base and.*17 of .*are on both sides .*rename one side"
    for work in (
        lambda: lora_tools.extract(root / "base", tuned, tmp_path / "out"),
        lambda: lora_tools.diff(root / "base", tuned),
        lambda: lora_tools.verify(root / "adapter", base=root / "base", tuned=tuned),
    ):
        with pytest.raises(MismatchError, match=match):
            work()


def test_one_side_is_a_part_of_the_other(root: Path, tmp_path: Path) -> None:
    tensors = load_file(root / "tuned" / "model.safetensors")
    part = {k: v for k, v in tensors.items() if "layers.0" in k}
    tuned = iotools.checkpoint(tmp_path / "tuned", part)
    report = lora_tools.extract(root / "base", tuned, tmp_path / "out")
    assert report.notes[0].startswith("only 4 of the 17 tensors of ")
    assert report.totals["modules"] == 2
    assert lora_tools.diff(root / "base", tuned).notes[0].startswith("only 4 of the 17")


def test_a_part_that_was_asked_for(root: Path, tmp_path: Path) -> None:
    """Of two models that share an embedding, it alone is compared."""
    tuned = other_names(root, tmp_path / "tuned")
    report = lora_tools.diff(root / "base", tuned, include=["embed_tokens"])
    assert not any("have a partner" in note for note in report.notes)
