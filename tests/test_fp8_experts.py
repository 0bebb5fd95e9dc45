"""Experts in eight-bit floats as transformers 5 writes them, in one tensor and one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import lora_tools
from lora_tools.errors import CheckpointError, UsageError
from tests import models
from tests.forms_fp8 import E4M3, Tensors, fp8_config, made, opened, seeded

Block = tuple[int, int] | None


def _model(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    }
    if kind == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, **sizes))
    if kind == "llama4":
        sizes |= {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
        config = hf.Llama4TextConfig(num_local_experts=3, intermediate_size_mlp=32, **sizes)
        return hf.Llama4ForCausalLM(config)
    sizes["moe_intermediate_size"] = 32
    if kind == "qwen3_moe":
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(num_experts=3, **sizes))
    sizes |= {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 0}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}
    sizes |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
    del sizes["head_dim"]
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes))


def _theirs(model: Any) -> Tensors:
    """The numbers of a model in eight bits, by transformers' own operation."""
    held = model.state_dict()
    numbers = {}
    for name, tensor in held.items():
        if not name.endswith("_scale_inv"):
            scale = held.get(f"{name}_scale_inv")
            scaled = scale is not None and tensor.dtype == E4M3
            back = Fp8Dequantize(None)._dequantize_one
            numbers[name] = back(tensor, scale, torch.bfloat16) if scaled else tensor
    return numbers


@pytest.mark.parametrize(
    ("kind", "block", "original"),
    [
        ("qwen3_moe", (16, 16), True),  # as it saves by default: codes one by one
        ("qwen3_moe", (16, 32), False),
        ("qwen3_moe", (64, 32), True),  # gate and up in one block
        ("mixtral", (16, 16), True),
        ("llama4", (16, 16), True),
        ("llama4", None, True),
        ("deepseek", (16, 32), True),
        ("deepseek", None, True),
    ],
)
def test_as_transformers_saves_them(
    kind: str, block: Block, original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model quantized as on a GPU, saved, and made plain here: the numbers that it computes with
    (its ``dequantize=True`` leaves the scales of fused experts out)."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)
    torch.manual_seed(0)
    base = models.save(_model(kind).bfloat16(), tmp_path / "base")
    how = hf.FineGrainedFP8Config(weight_block_size=block)
    load = hf.AutoModelForCausalLM.from_pretrained
    model = load(base, quantization_config=how, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "q", save_original_format=original)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    one_by_one = any(".experts.1." in name for name in stored)
    assert one_by_one == (original and kind != "llama4")
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain")
    mine = load(tmp_path / "plain").state_dict()
    theirs = _theirs(model)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    if one_by_one:
        facts = lora_tools.inspect(tmp_path / "q").totals["quantized"]
        scales = sum(t.nbytes for n, t in stored.items() if n.endswith("_scale_inv"))
        codes = sum(t.numel() for t in stored.values() if t.dtype == E4M3)
        assert facts["bits_per_parameter"] == 8 + 8 * scales / codes  # each scale counts once
        models.train(base, tmp_path / "a", {"r": 2, "target_modules": ["o_proj"]})
        with pytest.raises(UsageError, match="other weights"):
            lora_tools.merge(tmp_path / "q", [tmp_path / "a"], tmp_path / "m", requantize=True)


@pytest.mark.parametrize(
    ("strategy", "scale"), [("tensor", (1,)), ("channel", (3, 64, 1)), ("group", (3, 64, 3))]
)
def test_as_compressed_tensors_packs_them(
    strategy: str, scale: tuple[int, ...], tmp_path: Path
) -> None:
    """(E, out, in) in ``float-quantized``; of scales of blocks the package takes no three
    dimensions."""
    kind = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    kind |= {"group_size": 32} if strategy == "group" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**kind))
    package = BaseCompressor.get_value_from_registry("float-quantized")
    x = torch.randn(3, 64, 96, generator=seeded())
    scales = torch.rand(scale, generator=seeded()) * 0.02
    stored = package.compress({"weight": x, "weight_scale": scales}, scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized")
    entry = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    named = {f"model.layers.0.mlp.experts.{name}": t for name, t in stored.items()}
    view = opened(tmp_path / "q", named, {"quantization_config": entry, "dtype": "float32"})
    back = package.decompress(dict(stored), scheme)["weight"]
    assert torch.equal(view.tensor("model.layers.0.mlp.experts.weight"), back)


def _one_by_one(rows: int, scale: tuple[int, ...], block: list[int]) -> tuple[Tensors, Any]:
    held = "model.layers.0.mlp.experts"
    tensors = {
        f"{held}.{i}.{leaf}.weight": torch.randn(rows, 16, generator=seeded(i)).to(E4M3)
        for i in range(3)
        for leaf in ("gate_proj", "up_proj")
    }
    return tensors | {f"{held}.gate_up_proj_scale_inv": torch.ones(scale)}, fp8_config(block)


def test_scales_of_all_experts_that_do_not_fit(tmp_path: Path) -> None:
    for n, (rows, scale) in enumerate([(16, (2, 4, 2)), (16, (3, 3, 2)), (12, (3, 3, 2))]):
        folder = made(tmp_path / str(n), *_one_by_one(rows, scale, [8, 8]))
        with pytest.raises(CheckpointError, match="scales of all experts are expected"):
            lora_tools.dequantize(folder, tmp_path / "out")
    good = opened(tmp_path / "good", *_one_by_one(16, (3, 4, 2), [8, 8]))
    assert len(good.quantized) == 6


def test_scales_that_may_be_of_rows_or_of_columns(tmp_path: Path) -> None:
    """(E, n) beside square experts: with a 1 for the other dimension they are told."""
    name, codes = "model.layers.0.mlp.experts.down_proj", torch.ones(3, 8, 8).to(E4M3)
    scales = torch.rand(3, 8) + 0.5
    config = json.loads('{"quantization_config": {"quant_method": "fp8"}}')
    folder = made(tmp_path / "q", {name: codes, f"{name}_scale": scales}, config)
    with pytest.raises(CheckpointError, match="rows or columns"):
        lora_tools.dequantize(folder, tmp_path / "out")
    for told in (scales[:, :, None], scales[:, None, :]):
        view = opened(tmp_path / str(told.shape), {name: codes, f"{name}_scale": told}, config)
        assert torch.equal(view.tensor(name), told.expand(3, 8, 8))
