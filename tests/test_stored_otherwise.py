"""Weights in a scheme that no sign tells: what a pair of checkpoints shows of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_tools
from lora_tools.errors import MismatchError
from tests.iotools import checkpoint, extracted, moved, weights

UP = "model.layers.0.up_proj"
Tensors = dict[str, torch.Tensor]
# What lies in the place of a weight: no whole numbers that would tell at the door.
OTHERWISE: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "codes in floats": lambda w: {f"{UP}.packed": w[:, ::2].half(), f"{UP}.step": w[:1].half()},
    "weight norm": lambda w: {f"{UP}.weight_g": w[:, :1].clone(), f"{UP}.weight_v": w},
    "codes alone": lambda w: {f"{UP}.codes": (w * 9).to(torch.int8)},
    "a tensor subclass": lambda w: {f"{UP}.weight.payload": w.half()},
    "a parametrization": lambda w: {f"{UP}.weight_orig": w, f"{UP}.weight_u": w[:, 0].clone()},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(tmp_path_factory.mktemp("plain"))


def stored(to: Path, how: str, tensors: Tensors) -> Path:
    mine = dict(tensors)
    return checkpoint(to, mine | OTHERWISE[how](mine.pop(f"{UP}.weight")))


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("how", OTHERWISE)
def test_the_other_side_has_the_weight(how: str, side: str, plain: Path, tmp_path: Path) -> None:
    """By name, with what is there instead; a module that is left out is not asked."""
    base = weights(layers=1)
    odd = stored(tmp_path / "odd", how, base if side == "base" else moved(base))
    pair = (odd, plain / "tuned") if side == "base" else (plain / "base", odd)
    says = rf"^{UP}.weight: .*odd has {UP}\.\S+ .* instead, so it is stored in an unknown way"
    with pytest.raises(MismatchError, match=says):
        lora_tools.extract(*pair, tmp_path / "out", rank=1)
    with pytest.raises(MismatchError, match=says):
        lora_tools.diff(*pair)
    if side == "tuned":
        with pytest.raises(MismatchError, match=says):
            lora_tools.verify(plain / "adapter", base=plain / "base", tuned=odd)
    assert not (tmp_path / "out").exists()
    lora_tools.extract(*pair, tmp_path / "out", rank=1, exclude=["up_proj"], rest="skip")
    assert any("q_proj" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))


def test_codes_on_both_sides(plain: Path, tmp_path: Path) -> None:
    base = weights(layers=1)
    pair = [
        stored(tmp_path / name, "codes alone", tensors)
        for name, tensors in (("one", base), ("two", moved(base)))
    ]
    with pytest.raises(
        MismatchError, match=rf"{UP}.codes: I8 \[32, 16\] changed, but does not hold floats"
    ):
        lora_tools.extract(*pair, tmp_path / "out", rank=1)
    lora_tools.extract(*pair, tmp_path / "out", rank=1, exclude=["up_proj"])
    report = lora_tools.diff(*pair)
    assert (
        f"changed, and the figures do not cover them, because they are not floats: {UP}.codes"
        in report.notes
    )


def test_another_head_and_a_counter_are_as_they_were(plain: Path, tmp_path: Path) -> None:
    """A head of other modules, a bias without its weight, a counter that moved."""
    base, count = weights(layers=1), "model.bn.num_batches_tracked"
    tuned = moved(base)
    base |= {"score.weight": torch.ones(2, 16), count: torch.tensor(1), "x.bias": torch.ones(3)}
    base["x.weight"] = torch.ones(3, 16)
    tuned |= {"score.0.weight": torch.ones(2, 16), "score.2.weight": torch.ones(2, 2)}
    tuned |= {count: torch.tensor(5), "x.bias": torch.ones(3)}
    pair = checkpoint(tmp_path / "one", base), checkpoint(tmp_path / "two", tuned)
    lora_tools.extract(*pair, tmp_path / "out", rank=1)
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert saved[f"base_model.model.{count}"] == 5
    assert any("score.0" in key for key in saved)
