"""What a checkpoint is exported for, and what is refused before anything is read or traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools.errors import CheckpointError
from lora_tools.onnx.tasks import TASKS, refuse_kind, task_of

from . import export_models, models

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("MarianMTModel", "seq2seq"),
        ("BertGenerationDecoder", "causal-lm"),
        ("XLMWithLMHeadModel", "masked-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertModel", "features"),
        ("CLIPModel", "zero-shot-image-classification"),
        ("WavLMForCTC", "ctc"),
        ("DetrForObjectDetection", "object-detection"),
    ],
)
def test_the_task_of_a_class(name: str, task: str) -> None:
    assert task_of({"architectures": [name]}, "auto").name == task


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["Dinov2Model"], "image_size": 224}, "image-features"),
        ({"architectures": ["ResNetModel"], "num_channels": 3}, "image-features"),
        ({"architectures": ["HubertModel"], "num_conv_pos_embeddings": 128}, "audio-features"),
        ({"architectures": ["ASTModel"], "num_mel_bins": 8, "patch_size": 4}, "audio-features"),
        (
            {"architectures": ["WavLMForSequenceClassification"], "num_conv_pos_embeddings": 8},
            "audio-classification",
        ),
    ],
)
def test_the_task_by_what_the_config_has(config: dict[str, Any], task: str) -> None:
    """The names of classes of text, of images and of sound end alike."""
    assert task_of(config, "auto").name == task


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "vision_con"),
        ({"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {}}, "audio_"),
        ({"architectures": ["FlavaModel"], "vision_config": {}, "text_config": {}}, "several par"),
        ({"architectures": ["MoonForConditionalGeneration"], "model_type": "moonshine"}, "length"),
        ({"architectures": ["Lfm2ForCausalLM"], "conv_L_cache": 3}, "conv_L_cache"),
        ({"architectures": ["OddForCausalLM"], "layer_types": ["linear_attention"]}, "layer_types"),
        ({"architectures": ["TwoModel"], "model_type": "vision-encoder-decoder"}, "two models"),
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "state_size"),
        ({"architectures": ["JambaForCausalLM"], "mamba_d_state": 16}, "mamba_d_state"),
        ({"architectures": ["NewForCausalLM"], "text_config": {"ssm_state_size": 8}}, "ssm_state"),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_a_kind_without_a_graph(
    config: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, in the time of reading config.json; a plan says so, too."""
    base = export_models.one_layer("Llama", tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "own"} | config))
    monkeypatch.setattr("lora_tools.exporting.make.Export.write", lambda *_: pytest.fail("begun"))
    for dry_run in (False, True):
        with pytest.raises(CheckpointError, match=says) as caught:
            lora_tools.export(base, tmp_path / "out", dry_run=dry_run)
        assert str(caught.value).startswith(config["architectures"][0])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_kinds_that_are_exported() -> None:
    """An encoder alone, and a decoder that names what it has not."""
    refuse_kind({"architectures": ["CLIPVisionModel"], "hidden_size": 8}, TASKS["features"])
    refuse_kind({"architectures": ["LlamaForCausalLM"], "vision_config": None}, TASKS["causal-lm"])


def test_a_class_that_takes_something_else(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    base = models.save(transformers.ViTModel(config), tmp_path / "base")
    with pytest.raises(CheckpointError, match="ViTModel: takes pixel_values") as caught:
        lora_tools.export(base, tmp_path / "out", task="features")
    assert "another task" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [KeyError("rope"), ZeroDivisionError(), AttributeError("odd"), AssertionError("no")]
)
@pytest.mark.parametrize("when", ["made", "asked for its cache", "run in torch"])
def test_whatever_a_model_raises_is_told(
    when: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    from lora_tools.onnx import in_torch, parts

    base = export_models.one_layer("Qwen2", tmp_path / "base")

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    if when == "made":
        monkeypatch.setattr(Qwen2MLP, "__init__", fails)
    elif when == "asked for its cache":
        monkeypatch.setattr(parts, "cache_shapes", fails)
    else:
        monkeypatch.setattr(Qwen2MLP, "forward", fails)
        side = in_torch.InTorch(base, TASKS["causal-lm"], False)
        with pytest.raises(CheckpointError, match=r"module model\.layers\.0\.mlp.*; try"):
            side.play(side.runs(True, 0)[0])
        return
    with pytest.raises(CheckpointError):
        lora_tools.export(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
