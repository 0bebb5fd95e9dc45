"""``merge --requantize``: what an adapter does not change keeps its bytes, in every stored number
format that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, UsageError
from lora_tools.linalg import scaled

from . import forms_compressed, forms_fp8, forms_groups, iotools, models
from .written import raw, verified

pytestmark = pytest.mark.filterwarnings("ignore")

# Checkpoints as other tools store them, and as this one does.
STORED = {**forms_groups.FORMS, **forms_fp8.FORMS, **forms_compressed.FORMS}
OWN = ["nf4", "fp8-block", "nvfp4", "int4"]
WHOLE_NUMBERS = [f for f in forms_compressed.FORMS if f.startswith(("int", "naive"))]
NAME = "model.layers.0.q_proj"


def stored(top: Path, form: str) -> tuple[Path, tuple[int, ...]]:
    """A base in that form, and the shape of the weight ``NAME``."""
    tensors = {
        k: v.bfloat16() for k, v in iotools.weights(width=128 if form in OWN else 16).items()
    }
    base = top / "base"
    if form in OWN:
        iotools.checkpoint(top / "plain", tensors)
        (top / "plain" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        lora_tools.quantize(top / "plain", base, scheme=form)
        return base, tuple(tensors[f"{NAME}.weight"].shape)
    made, config, plain = STORED[form](tensors)
    iotools.checkpoint(base, made)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return base, tuple(plain[f"{NAME}.weight"].shape)


def adapter(folder: Path, shape: tuple[int, ...], row: int | None, size: float = 1.0) -> Path:
    """One that moves a row of the weight ``NAME``, or nothing."""
    iotools.adapter(folder, {NAME: shape})
    path = folder / "adapter_model.safetensors"
    factors = load_file(path)
    B = factors[f"base_model.model.{NAME}.lora_B.weight"]
    moved = torch.zeros_like(B)
    if row is not None:
        moved[row] = B[row] * size
    save_file({**factors, f"base_model.model.{NAME}.lora_B.weight": moved}, path)
    return folder


def merged(base: Path, adapters: list[Any], out: Path) -> Any:
    """The report; None where the form is refused, as other tests show by name."""
    try:
        return lora_tools.merge(base, adapters, out, requantize=True)
    except (UsageError, CheckpointError):
        return None


@pytest.mark.sweep(2)
@pytest.mark.parametrize("form", [*OWN, *STORED])
def test_an_adapter_of_no_effect_leaves_every_byte(tmp_path: Path, form: str) -> None:
    base, shape = stored(tmp_path, form)
    adapters = [adapter(tmp_path / "adapter", shape, None)]
    report = merged(base, adapters, tmp_path / "out")
    if report is None:
        assert form not in OWN
        return
    before, after = (models.tensors(path) for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert raw(tensor) == raw(after[name]), name
    assert report.tensors == ()
    found = verified(tmp_path / "out", base, adapters)
    assert {f.action for f in found.plan if f.tensor == f"{NAME}.weight"} == {"copied"}


@pytest.mark.parametrize("form", ["int4", *WHOLE_NUMBERS])
def test_rows_that_an_adapter_does_not_move_stay_where_they_are(tmp_path: Path, form: str) -> None:
    """Scales made anew for whole numbers that lie on a grid would move all of them."""
    base, shape = stored(tmp_path, form)
    adapters = [adapter(tmp_path / "adapter", shape, 3, 0.1 if form == "int8 packed" else 1.0)]
    report = merged(base, adapters, tmp_path / "out")
    assert report is not None
    for path in (base, tmp_path / "out"):
        lora_tools.dequantize(path, tmp_path / f"{path.name} plain", dtype="float32")
    x, y = (models.tensors(tmp_path / f"{p} plain")[f"{NAME}.weight"] for p in ("base", "out"))
    assert (x != y).any(1).nonzero().tolist() == [[3]]
    found = verified(tmp_path / "out", base, adapters)
    assert found.totals["bit_for_bit"] == found.totals["tensors_quantized"]


@pytest.mark.parametrize("form", ["int4", "int4 with zero points", "int8"])
def test_a_change_below_the_steps_costs_no_more_than_itself(tmp_path: Path, form: str) -> None:
    """With scales made anew it cost up to sixty times that."""
    base, shape = stored(tmp_path, form)
    iotools.adapter(tmp_path / "adapter", {NAME: shape})
    report = merged(base, [(tmp_path / "adapter", 1e-5)], tmp_path / "out")
    assert report.totals["delta_error"] < 1.01


def test_scales_stay_where_numbers_fit_them() -> None:
    low = torch.tensor([-7.0, -9.0, -3.0, 0.0, 1e-3])
    high = torch.tensor([7.4, 7.0, 5.0, 0.0, 7.6])
    anew = torch.maximum(-low, high) / 7.5
    fit = scaled.still_fit(low, high, torch.ones(5), None, (-8, 7), anew)
    assert fit.tolist() == [True, False, False, True, False]
    low, high = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([14.0, 10.0, 16.0])
    zeros = torch.full((3,), -8.0)
    fit = scaled.still_fit(low, high, torch.ones(3), zeros, (-8, 7), (high - low) / 15)
    assert fit.tolist() == [True, False, False]
