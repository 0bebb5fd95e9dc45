"""What each tensor is to its model, said once: by names and config, or by the model's class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import lora_tools
from lora_tools.formats.weights import ModelSays, Weights
from lora_tools.merging.targets import BaseOutline
from lora_tools.records import TensorSpec
from lora_tools.sources.as_loaded import loaded_view
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weights import kind_of
from tests.iotools import checkpoint

TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
SIZES = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def specs(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, "F32", shape) for name, shape in shapes}


LLAMA = specs(
    (EMBEDDING, (24, 16)),
    ("model.layers.0.q_proj.weight", (16, 16)),
    ("model.layers.0.q_proj.bias", (16,)),
    ("model.norm.weight", (16,)),
)


def test_by_names() -> None:
    weights = Weights(LLAMA, {})
    assert list(weights) == list(LLAMA)
    found = {name: weight.layout for name, weight in weights.items()}
    assert list(found.values()) == ["embedding", "linear", None, None]
    assert [name for name, weight in weights.items() if weight.is_embedding] == [EMBEDDING]
    assert not any(weight.is_head or weight.tied_to for weight in weights.values())
    assert (weights.head, weights.embedding, weights.tied_pair) == ("", EMBEDDING, ("", ""))
    bias = weights["model.layers.0.q_proj.bias"]
    assert (bias.module, bias.parameter) == ("model.layers.0.q_proj", "bias")


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_there_stored_or_not(stored: bool) -> None:
    own = specs((HEAD, (24, 16))) if stored else {}
    weights = Weights(LLAMA | own, TIED)
    head = weights[HEAD]
    assert (head.is_head, head.tied_to, head.stored) == (True, EMBEDDING, stored)
    assert (head.spec.shape, head.layout) == ((24, 16), "linear")
    assert weights.tied_pair == (HEAD, EMBEDDING)
    assert weights.ties == {HEAD: EMBEDDING}
    assert not weights[EMBEDDING].tied_to


def test_a_head_without_an_embedding_of_a_known_name() -> None:
    """It has a name all the same, by which a loader leaves it alone."""
    weights = Weights(specs(("x.q_proj.weight", (4, 4))), TIED)
    assert (weights.head, weights.tied_pair, weights.ties) == (HEAD, ("", ""), {})
    assert HEAD not in weights


def test_the_models_class_knows_better() -> None:
    layouts = {"model.layers.0.q_proj.weight": ("conv1d", 1)}
    says = ModelSays(layouts, ((EMBEDDING, "other.weight"),))
    weights = Weights(LLAMA, TIED, says)
    assert weights["model.layers.0.q_proj.weight"].layout == "conv1d"
    assert weights["other.weight"].tied_to == EMBEDDING
    assert HEAD not in weights  # the model would have said so


def test_under_another_dtype_and_another_name() -> None:
    weights = Weights(LLAMA, TIED)
    cast = TensorSpec(EMBEDDING, "BF16", (25, 16))
    assert weights.of(cast).spec == cast
    assert weights.of(cast).layout == "embedding"
    assert weights.of(TensorSpec("embed_out.weight", "F32", (24, 16))).is_head


@pytest.mark.parametrize(
    ("groups", "shape", "name"),
    [(1, (8, 8, 3), "conv"), (2, (8, 4, 3), "conv"), (8, (8, 1, 3), "")],
)
def test_kinds_of_convolutions(groups: int, shape: tuple[int, ...], name: str) -> None:
    """Of a depthwise one even rank 1 is larger than the weight."""
    [spec] = specs(("c.weight", shape)).values()
    says = ModelSays({spec.name: ("conv", groups)})
    kind = kind_of(Weights({spec.name: spec}, {}, says)[spec.name])
    assert (kind.name if kind else "") == name
    if kind is not None:
        assert len(kind.regions(shape)) == groups


def test_a_checkpoint_in_memory_has_what_its_model_has(tmp_path: Path) -> None:
    """BART ties four tensors, whose names only its class tells."""
    sizes = {f"{side}_{of}": n for side in ("encoder", "decoder") for of, n in SIZES.items()}
    config = transformers.BartConfig(vocab_size=24, d_model=16, max_position_embeddings=16, **sizes)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    view = loaded_view(open_checkpoint(tmp_path / "bart"))
    tied = {name: w.tied_to for name, w in view.weights.items() if w.tied_to}
    assert len(tied) == 3
    assert set(tied.values()) == {"model.shared.weight"}
    assert {"lm_head.weight", "model.encoder.embed_tokens.weight"} <= tied.keys()


def test_a_live_model(tmp_path: Path) -> None:
    """Of an outline, too, it is said once."""
    outline = BaseOutline(tmp_path, LLAMA, TIED)
    assert outline.weights is outline.weights
    assert outline.weights.tied_pair == (HEAD, EMBEDDING)


def test_a_quantized_checkpoint_has_the_plain_ones_weights(tmp_path: Path) -> None:
    """Its codes have no layer kind; what they stand for has."""
    tensors = {EMBEDDING: torch.ones(24, 16), "model.layers.0.q_proj.weight": torch.ones(16, 16)}
    base = checkpoint(tmp_path / "base", tensors)
    (base / "config.json").write_text(json.dumps(TIED))
    lora_tools.quantize(base, tmp_path / "four")
    plain, four = open_checkpoint(base).weights, open_checkpoint(tmp_path / "four").weights
    assert dict(four) == dict(plain)
    raw = open_checkpoint(tmp_path / "four", decoded=False).weights
    assert raw["model.layers.0.q_proj.weight"].layout is None
