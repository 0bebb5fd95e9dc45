"""``verify ADAPTER --base --tuned`` accounts for every tensor of both sides, however small its
change; and so do ``extract`` and ``diff``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import MismatchError
from lora_tools.records import Fate
from tests.iotools import checkpoint, extracted, moved, weights

UP = "model.layers.0.up_proj.weight"
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(tmp_path_factory.mktemp("pair"))


def fates(report: lora_tools.Report) -> dict[str, Fate]:
    return {fate.tensor: fate for fate in report.plan}


def test_what_one_side_only_has_is_named_and_counted(pair: Path, tmp_path: Path) -> None:
    base, tuned = weights(layers=1), dict(moved(weights(layers=1)))
    gone = tuned.pop("model.layers.0.norm.weight")
    base["model.old.weight"] = torch.ones(3, 3)
    tuned |= {"model.new.weight": torch.ones(2, 2), "model.zero.bias": torch.zeros(2)}
    sides = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned)
    report = lora_tools.verify(pair / "adapter", base=sides[0], tuned=sides[1])
    found = fates(report)
    assert found.keys() == base.keys() | tuned.keys()
    for name in ("model.old.weight", "model.layers.0.norm.weight"):
        assert (found[name].action, found[name].reason) == (
            "only in base",
            "the adapter leaves it as it is",
        )
    for name in ("model.new.weight", "model.zero.bias"):
        assert (found[name].action, found[name].reason) == ("left out", "only on the tuned side")
    assert report.totals["one_sided"] == 4
    assert "only in the base, and not in the figures: model.layers.0.norm.weight and 1 more" in (
        report.notes
    )
    assert report.totals["left_out_energy"] == pytest.approx(
        4 / (4 + sum(m.delta_norm**2 for m in report.modules))
    )
    assert gone.numel()


def test_what_the_adapter_acts_on_and_tuned_lacks(pair: Path, tmp_path: Path) -> None:
    tuned = dict(moved(weights(layers=1)))
    del tuned[UP]
    report = lora_tools.verify(
        pair / "adapter", base=pair / "base", tuned=checkpoint(tmp_path / "tuned", tuned)
    )
    assert fates(report)[UP].action == "only in base"
    assert fates(report)[UP].reason == "the adapter acts on it"
    assert report.totals["one_sided"] == 1


@pytest.mark.parametrize("tied", ["base", "tuned", "both"])
def test_a_head_that_is_the_embedding(tied: str, tmp_path: Path) -> None:
    """Tied on one side, stored on the other: it is compared with what it is there."""
    base = weights(layers=1)
    tuned = dict(moved(base))
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 0.5
    sides = {"base": base, "tuned": tuned}
    for side, tensors in sides.items():
        head = tensors["model.embed_tokens.weight"].clone()
        stored = {"lm_head.weight": head} if tied != side else {}
        folder = checkpoint(tmp_path / side, tensors | stored if tied != "both" else tensors)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        config["tie_word_embeddings"] = tied in (side, "both")
        (folder / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    lora_tools.extract(*(tmp_path / side for side in sides), adapter, rank=1, embeddings="save")
    report = lora_tools.verify(adapter, base=tmp_path / "base", tuned=tmp_path / "tuned")
    assert report.totals["relative_error"] < 1e-5
    assert report.totals["one_sided"] == 0
    assert ("lm_head.weight" in fates(report)) == (tied != "both")


# ---------------------------------------------------------------------------------- nothing changed


def test_nothing_changed(pair: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sides = ["--base", str(pair / "base"), "--tuned", str(pair / "base")]
    assert run(["verify", str(pair / "adapter"), *sides]) == 0
    said = capfd.readouterr()
    assert "total: nothing changed, 2 modules, rank 1" in said.out + said.err
    assert "nothing changed from base to tuned, and the adapter moves it by " in said.out + said.err
    assert "inf" not in said.out + said.err
    assert "no change" in said.out + said.err
    with pytest.raises(MismatchError, match=r"^nothing changed from BASE to"):
        lora_tools.extract(pair / "base", pair / "base", tmp_path / "a", rank=1)


# ------------------------------------------------------------------------------------ tiny changes


@pytest.mark.parametrize("width", [16, 160])  # decomposed whole, and by iteration
@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ({"rank": 2}, 1e-25),
        ({"rank": 2}, 1e-30),
        ({"rank": 2}, 1e25),
        ({"energy": 0.999}, 1e-25),
        ({"noise_floor": True}, 1e-25),
    ],
)
def test_a_change_whose_squares_float32_cannot_hold(
    rank: dict[str, float], width: int, size: float, tmp_path: Path
) -> None:
    """Of rank two: what is found of it does not depend on its size."""
    noise = torch.Generator().manual_seed(3)
    left, right = (torch.randn(width, 2, generator=noise) for _ in range(2))
    base = {UP: torch.zeros(width, width), "model.norm.weight": torch.zeros(width)}
    tuned = {UP: left @ right.T * size, "model.norm.weight": torch.full((width,), size)}
    sides = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned)
    norm = float(tuned[UP].double().norm())
    shown = lora_tools.diff(*sides)
    assert shown.totals["changed"] == 2
    assert shown.spectra[0].norm == pytest.approx(norm)
    done = lora_tools.extract(*sides, tmp_path / "a", **rank)
    [module] = done.modules
    assert module.rank == 2
    assert module.delta_norm == pytest.approx(norm)
    assert module.relative_error < 1e-5
    assert done.totals["saved_whole_energy"] > 0
    report = lora_tools.verify(tmp_path / "a", base=sides[0], tuned=sides[1])
    assert report.totals["relative_error"] < 1e-5
    assert report.modules[0].delta_norm == pytest.approx(norm)
    lora_tools.merge(sides[0], [tmp_path / "a"], tmp_path / "m")
    assert lora_tools.diff(sides[1], tmp_path / "m").totals["relative_change"] < 1e-5


def test_a_tiny_change_beside_large_weights(tmp_path: Path) -> None:
    """It is seen, where the rest of the tensor is as it was."""
    base = {UP: torch.ones(64, 64)}
    base[UP][3, :] = 0
    tuned = {UP: base[UP].clone()}
    tuned[UP][3, 5] = 1e-30
    sides = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned)
    assert lora_tools.diff(*sides).totals["changed"] == 1
    done = lora_tools.extract(*sides, tmp_path / "a", rank=1)
    assert done.modules[0].delta_norm == pytest.approx(1e-30)
    assert math.isclose(done.modules[0].relative_error, 0, abs_tol=1e-5)
