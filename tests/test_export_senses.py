"""Graphs that take sound, or images beside texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lora_tools
from lora_tools.errors import CheckpointError

from . import models, sweep_models
from .sweep import base_of

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def test_sound_of_any_length(tmp_path: Path) -> None:
    base = base_of("Wav2Vec2", tmp_path / "base")
    report = lora_tools.export(base, tmp_path / "out")
    assert report.totals["verified"]
    assert [fate.reason for fate in report.plan if fate.action == "graph"] == ["ctc"]
    model = transformers.Wav2Vec2ForCTC.from_pretrained(base).eval()
    graph = session(tmp_path / "out")
    for shape in ((1, 3217), (4, 901)):  # neither traced nor checked
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = model(sound).logits
        [found] = graph.run(None, {"input_values": sound.numpy()})
        assert found.shape == wanted.shape
        assert np.abs(found - wanted.numpy()).max() < 1e-4


def test_images_beside_more_texts(tmp_path: Path) -> None:
    base = base_of("CLIP", tmp_path / "base")
    report = lora_tools.export(base, tmp_path / "out")
    assert report.totals["verified"]
    model = transformers.CLIPModel.from_pretrained(base).eval()
    graph = session(tmp_path / "out")
    assert [i.name for i in graph.get_inputs()] == ["input_ids", "attention_mask", "pixel_values"]
    dice = np.random.default_rng(0)
    size = model.config.vision_config.image_size
    given = {
        "input_ids": dice.integers(3, 90, (5, 9)),
        "attention_mask": np.ones((5, 9), np.int64),
        "pixel_values": dice.standard_normal((2, 3, size, size)).astype(np.float32),
    }
    given["attention_mask"][0, 6:] = 0
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(value) for name, value in given.items()})
    for value, found in zip(graph.get_outputs(), graph.run(None, given), strict=True):
        assert np.abs(found - wanted[value.name].numpy()).max() < 1e-4, value.name
    assert wanted.logits_per_image.shape == (2, 5)


def test_code_that_takes_one_length_is_told_plainly(tmp_path: Path) -> None:
    """Not by the names that torch.export made."""
    base = models.save(models.quietly(sweep_models.ALL["Longformer"][1]).eval(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="known only when it runs; try another") as caught:
        lora_tools.export(base, tmp_path / "out")
    assert "longformer.encoder.layer.0.attention.self" in str(caught.value)
    assert not (tmp_path / "out").exists()
