"""ModelOpt's NVFP4, and gpt-oss's experts in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, LoraToolsError, NonFiniteError
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.schemes.modelopt import MODELOPT
from lora_tools.sources.schemes.mxfp4 import MXFP4
from tests.compressed_checkpoints import STEM, UP, Q, decoded, form, made, opened
from tests.forms_compressed import Tensors, compress, decompress, scheme_of, unpacked_e2m1

# ---------------------------------------------------------------------------------------- ModelOpt


def test_two_kinds_of_one_checkpoint(tmp_path: Path) -> None:
    """ModelOpt's ``MIXED_PRECISION``, said in a file of its own."""
    stored, _, plain = form("modelopt")
    codes = torch.randn(16, 16).to(torch.float8_e4m3fn)
    for part in ("", "_scale", "_scale_2"):
        del stored[Q + part]
    stored |= {Q: codes, f"{Q}_scale": torch.tensor(0.25)}
    layers = {STEM[:-1]: {"quant_algo": "FP8"}, UP[:-7]: {"quant_algo": "NVFP4", "group_size": 16}}
    said = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    made(tmp_path / "q", stored, {"dtype": "bfloat16"})
    (tmp_path / "q/hf_quant_config.json").write_text(json.dumps(said))
    view = opened(tmp_path / "q")
    assert torch.equal(view.rounded(UP), plain[UP])
    assert torch.equal(view.tensor(Q), codes.float() * 0.25)
    assert STEM + "input_scale" not in view.specs
    for name in (Q, UP):
        weight, parts = view.quantized[name], view.parts(name)
        assert MODELOPT.encode
        assert MODELOPT.rounding
        encoded = MODELOPT.encode(weight, view.tensor(name))
        again = decoded(MODELOPT, weight, encoded)
        torch.testing.assert_close(again, view.tensor(name), rtol=0.2, atol=0.05)
        assert MODELOPT.rounding(weight, parts) > 0
    lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    assert not (tmp_path / "p/hf_quant_config.json").exists()


def test_modelopt_scales_of_groups() -> None:
    """The largest of a group is the largest of E2M1 where its scale is exact, and zeros are 0."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[0, :16] = 0
    spec = TensorSpec("m.weight", "BF16", (8, 64))
    parts = {
        "weight": TensorSpec("m.weight", "U8", (8, 32)),
        "weight_scale": TensorSpec("m.weight_scale", "F8_E4M3", (8, 4)),
        "weight_scale_2": TensorSpec("m.weight_scale_2", "F32", ()),
    }
    weight: Any = SimpleNamespace(label="NVFP4", plain=spec, specs=parts)
    assert MODELOPT.encode
    stored = MODELOPT.encode(weight, x)
    assert stored["weight_scale_2"] == x.abs().max() / 2688
    each = stored["weight_scale"].float() * stored["weight_scale_2"]
    groups = (x.view(8, 4, 16) / each[..., None]).abs()
    assert groups.max() <= 6.5
    numbers = unpacked_e2m1(stored["weight"]).view(8, 4, 16)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (groups[..., None] - grid).abs().amin(-1)
    assert torch.allclose((groups - numbers.abs()).abs(), nearest, atol=1e-6)
    assert not numbers[0, 0].any()
    zeros = MODELOPT.encode(weight, torch.zeros(8, 64))
    assert not decoded(MODELOPT, weight, zeros).any()
    with pytest.raises(NonFiniteError):
        MODELOPT.encode(weight, torch.full((8, 64), torch.nan))


# -------------------------------------------------------------------------------- gpt-oss's MXFP4


def experts(folder: Path, shape: tuple[int, int, int] = (3, 4, 6)) -> tuple[Path, Tensors]:
    """Experts (E, groups of inputs, out) as gpt-oss stores them, beside others' plain weights."""
    noise = torch.Generator().manual_seed(0)
    held, groups, out = shape
    stored = {}
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        size = (held, out, groups, 16)
        stored[f"{name}_blocks"] = torch.randint(0, 256, size, generator=noise).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 131, size[:3], generator=noise).to(
            torch.uint8
        )
        stored[f"{name}_bias"] = torch.zeros(held, out, dtype=torch.bfloat16)
    stored["model.norm.weight"] = torch.ones(32 * groups, dtype=torch.bfloat16)
    config = {"model_type": "gpt_oss", "dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4"}  # type: ignore[assignment]
    return made(folder, stored, config), stored


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_experts_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """To the bit, by their plain names, whole and across experts; without a config, too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path, stored = experts(tmp_path / "q")
    blocks, scales = stored[f"{EXPERTS}_blocks"], stored[f"{EXPERTS}_scales"]
    wanted = convert_moe_packed_tensors(blocks, scales)
    for place in (path, path / "model.safetensors"):
        view = opened(place)
        assert view.scheme is MXFP4
        assert view.specs[EXPERTS] == TensorSpec(EXPERTS, "BF16", (3, 128, 6))
        assert torch.equal(view.rounded(EXPERTS), wanted)
    rows = wanted.float().flatten(0, 1)
    for start, stop in ((0, 1), (31, 33), (100, 300), (128, 256), (383, 384), (7, 7)):
        assert torch.equal(view.rows(EXPERTS, (384, 6), start, stop), rows[start:stop])


def test_experts_are_written_as_they_are_read(tmp_path: Path) -> None:
    from lora_tools.formats.quantized import mxfp4

    x = torch.randn(3, 64, 10, generator=torch.Generator().manual_seed(0))
    x[0, :32, 0] = 0
    spec = TensorSpec(EXPERTS, "BF16", (3, 64, 10))
    assert not mxfp4.why_not(spec)
    assert mxfp4.why_not(TensorSpec(EXPERTS, "BF16", (3, 48, 10)))
    assert mxfp4.why_not(TensorSpec(Q, "BF16", (64, 64)))
    weight = mxfp4.mxfp4_weight(spec)
    assert MXFP4.encode
    assert MXFP4.rounding
    stored = MXFP4.encode(weight, x)
    out = decoded(MXFP4, weight, stored).view(x.shape)
    scheme = scheme_of(
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
    )
    for expert, numbers in zip(x, out, strict=True):
        state = compress(expert.T.contiguous(), scheme, torch.float32)
        assert torch.equal(numbers.T.bfloat16(), decompress(state, scheme))
    lost = float((out - x).square().sum())
    assert MXFP4.rounding(weight, stored) == pytest.approx(lost, rel=0.5)
    assert torch.equal(decoded(MXFP4, weight, MXFP4.encode(weight, out)).view(x.shape), out)
    with pytest.raises(NonFiniteError):
        MXFP4.encode(weight, torch.full((3, 64, 10), torch.inf))


def test_transformers_and_extract_on_such_experts(tmp_path: Path) -> None:
    """A tuned copy in plain numbers against the base as it is stored, which merges back."""
    path, _ = experts(tmp_path / "q")
    lora_tools.dequantize(path, tmp_path / "p")
    plain = load_file(tmp_path / "p/model.safetensors")
    assert EXPERTS in plain
    assert not any(name.endswith(("_blocks", "_scales")) for name in plain)
    assert "quantization_config" not in (tmp_path / "p/config.json").read_text()
    tuned, noise = dict(plain), torch.Generator().manual_seed(3)
    change = torch.randn(3, 128, 1, generator=noise) @ torch.randn(3, 1, 6, generator=noise)
    tuned[EXPERTS] = (plain[EXPERTS].float() + change).bfloat16()
    made(tmp_path / "t", tuned, {"model_type": "gpt_oss", "dtype": "bfloat16"})
    for side in "qp":
        report = lora_tools.extract(tmp_path / side, tmp_path / "t", tmp_path / f"a{side}", rank=1)
        assert [m.module for m in report.modules] == [EXPERTS]
        assert report.modules[0].energy > 0.99
        lora_tools.merge(tmp_path / side, [tmp_path / f"a{side}"], tmp_path / f"m{side}")
    merged = [load_file(tmp_path / f"m{side}/model.safetensors")[EXPERTS] for side in "qp"]
    assert torch.equal(*merged)
    torch.testing.assert_close(merged[0], tuned[EXPERTS], atol=0.2, rtol=0.05)


def test_gpt_oss_is_quantized_as_its_own_checkpoints_are(tmp_path: Path) -> None:
    """Its experts and no other layer, all of them; transformers loads the very numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 64}
    kind = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["full_attention"], **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(kind).bfloat16().save_pretrained(tmp_path / "base")
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "q", scheme="mxfp4")
    assert [r.tensor.rpartition(".")[2] for r in report.tensors] == ["down_proj", "gate_up_proj"]
    assert report.totals["bits_per_quantized_parameter"] == 4.25
    lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    load = transformers.AutoModelForCausalLM.from_pretrained
    how = transformers.Mxfp4Config(dequantize=True)
    found, info = load(tmp_path / "q", quantization_config=how, output_loading_info=True)
    assert not any(info.values()), info
    wanted = load(tmp_path / "p").state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.state_dict().items())
    assert lora_tools.verify(tmp_path / "q", against=tmp_path / "base").totals["bit_for_bit"] == 2
    with pytest.raises(CheckpointError, match="is already quantized, in"):
        lora_tools.quantize(tmp_path / "q", tmp_path / "x", scheme="mxfp4")
    with pytest.raises(CheckpointError, match="left out by include or exclude"):
        lora_tools.quantize(tmp_path / "base", tmp_path / "x", scheme="mxfp4", exclude=["experts"])


MX_LIES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{EXPERTS}_scales"), f"{EXPERTS}_scales: is missing"),
    "no blocks": (lambda t: t.pop(f"{EXPERTS}_blocks"), f"{EXPERTS}_blocks: is missing"),
    "other scales": (
        lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"][:, :2]}),
        rf"{EXPERTS}_scales .*expected U8 \[3, 6, 4\]",
    ),
    "half blocks": (
        lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"][..., :8]}),
        rf"{EXPERTS}_blocks .*expected U8 \(experts",
    ),
    "flat blocks": (
        lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"].flatten(2)}),
        rf"{EXPERTS}_blocks .*expected U8 \(experts",
    ),
}


@pytest.mark.parametrize("lie", MX_LIES)
def test_experts_that_do_not_fit(lie: str, tmp_path: Path) -> None:
    path, stored = experts(tmp_path / "q")
    change, said = MX_LIES[lie]
    change(stored)
    save_file({n: t.contiguous() for n, t in stored.items()}, path / "model.safetensors")
    with pytest.raises(LoraToolsError, match=said):
        open_checkpoint(path)


def test_an_exponent_that_is_none(tmp_path: Path) -> None:
    path, stored = experts(tmp_path / "q")
    stored[f"{EXPERTS}_scales"][0, 0, 0] = 255
    save_file(stored, path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=EXPERTS):
        open_checkpoint(path).tensor(EXPERTS)
