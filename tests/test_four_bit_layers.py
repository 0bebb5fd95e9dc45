"""quantize takes the layers that the loader of transformers replaces, by their class: what comes of
it is loaded, and runs forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers as hf

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.sources import transformers_names
from tests import (
    models,
    plain_bitsandbytes,  # noqa: F401 - on every machine the same
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = SMALL | {"image_size": 32, "patch_size": 16}
TEXT = SMALL | {"vocab_size": 96, "num_key_value_heads": 1, "head_dim": 16}
# What stays there though its name is that of a linear layer.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma3n": (
        lambda: hf.Gemma3nForCausalLM(
            hf.Gemma3nTextConfig(
                **TEXT,
                vocab_size_per_layer_input=96,
                hidden_size_per_layer_input=8,
                laurel_rank=4,
                num_kv_shared_layers=0,
                layer_types=["full_attention"],
                activation_sparsity_pattern=[0.0],
            )
        ),
        "model.embed_tokens_per_layer",
    ),
    "granitemoe": (
        lambda: hf.GraniteMoeForCausalLM(
            hf.GraniteMoeConfig(vocab_size=96, **SMALL, num_key_value_heads=2, num_local_experts=2)
        ),
        "model.layers.0.block_sparse_moe.router.layer",
    ),
    "siglip": (
        lambda: hf.SiglipModel(
            hf.SiglipConfig(
                text_config=SMALL | {"vocab_size": 96, "max_position_embeddings": 16},
                vision_config=VISION,
            )
        ),
        "vision_model.head.attention.out_proj",
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
        ),
        "backbone.layers.0.mixer.dt_proj",
    ),
    "rwkv": (
        lambda: hf.RwkvForCausalLM(
            hf.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=8)
        ),
        "rwkv.blocks.0.feed_forward.value",
    ),
}


def forward(model: Any) -> torch.Tensor:
    given: dict[str, Any] = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    if model.config.model_type == "siglip":
        given["pixel_values"] = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        found = model(**given)
    return found.logits if "logits" in found else found.logits_per_image  # type: ignore[no-any-return]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_loads_and_runs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, stays = KINDS[kind]
    model = models.quietly(lambda: make().eval())
    models.save(model, tmp_path / "base")
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "q")
    quantized = {f.tensor for f in report.plan if f.action == "quantize"}
    assert quantized
    assert f"{stays}.weight" not in quantized
    loaded, said = models.quietly(
        lambda: type(model).from_pretrained(tmp_path / "q", output_loading_info=True)
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    assert forward(loaded.eval()).isfinite().all()
    notes = lora_tools.inspect(tmp_path / "q").notes
    assert not [note for note in notes if note.startswith("config.json")]
    assert lora_tools.verify(tmp_path / "q", against=tmp_path / "base").totals["bit_for_bit"]


def test_linear_layers_of_a_class_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon's: whether its class can be asked or not."""
    config = hf.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    models.save(models.quietly(lambda: hf.FalconForCausalLM(config)), tmp_path / "base")
    with pytest.raises(MismatchError, match="that transformers' loader quantizes"):
        lora_tools.quantize(tmp_path / "base", tmp_path / "q")
    monkeypatch.setattr(transformers_names, "find_spec", lambda _: None)
    with pytest.raises(MismatchError, match="no linear layer to quantize"):
        lora_tools.quantize(tmp_path / "base", tmp_path / "q")


@pytest.mark.parametrize("kind", ["gemma3n", "siglip"])
def test_without_transformers_what_names_do_not_tell_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, stays = KINDS[kind]
    model = models.quietly(lambda: make().eval())
    models.save(model, tmp_path / "base")
    monkeypatch.setattr(transformers_names, "find_spec", lambda _: None)
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "q")
    assert f"{stays}.weight" not in {f.tensor for f in report.plan if f.action == "quantize"}
    loaded = models.quietly(lambda: type(model).from_pretrained(tmp_path / "q"))
    assert forward(loaded.eval()).isfinite().all()


def test_what_the_model_rescales_in_place_is_not_rounded_twice(tmp_path: Path) -> None:
    """RWKV does so before the first run, and rounds codes again, to others."""
    torch.manual_seed(0)
    model = models.quietly(KINDS["rwkv"][0])
    models.perturb(model, 0.1, 0)
    models.save(model, tmp_path / "base")
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "q")
    reasons = {fate.tensor: fate.reason for fate in report.plan}
    for part in ("attention.output", "feed_forward.value"):
        assert "rescaled by its model" in reasons[f"rwkv.blocks.1.{part}.weight"]
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain")
    loaded = models.quietly(lambda: hf.RwkvForCausalLM.from_pretrained(tmp_path / "q")).eval()
    for module in loaded.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    wanted = forward(models.load(tmp_path / "plain"))
    torch.testing.assert_close(forward(loaded), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [True, False], ids=["by its class", "by name"])
def test_experts_that_the_loader_looks_for_by_other_names(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4's; its dense layers alone are none of them."""
    config = hf.Llama4TextConfig(**TEXT, num_local_experts=2, moe_layers=[0])
    models.save(models.quietly(lambda: hf.Llama4ForCausalLM(config)), tmp_path / "base")
    if not known:
        monkeypatch.setattr(transformers_names, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"experts.*transformers does not find"):
        lora_tools.quantize(tmp_path / "base", tmp_path / "q")
    dense = hf.Llama4TextConfig(**TEXT, moe_layers=[])
    models.save(models.quietly(lambda: hf.Llama4ForCausalLM(dense)), tmp_path / "dense")
    assert lora_tools.quantize(tmp_path / "dense", tmp_path / "q")
