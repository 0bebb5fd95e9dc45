"""``quantize --scheme`` in every stored number format that is written: laws, loaders, and what is
refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    QualityGateError,
    UsageError,
)
from lora_tools.formats.quantized.forms import FORMS
from lora_tools.quantizing.pack import way_of
from lora_tools.sources.schemes import SCHEMES

from . import iotools, models
from .written import COST, NAME, NEW, Q, error, in_each_form, raw

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the base in each format."""
    return in_each_form(tmp_path_factory.mktemp("schemes"))


def test_every_row_that_can_be_written_is_a_form_or_comes_from_elsewhere() -> None:
    rows = {scheme.name for scheme in SCHEMES if way_of(scheme) is not None}
    assert {form.scheme for form in FORMS.values()} <= rows
    assert set(COST) == set(NEW)


@pytest.mark.parametrize("scheme", NEW)
def test_there_and_back_costs_the_rounding_and_nothing_more(
    work: Path, tmp_path: Path, scheme: str
) -> None:
    report = lora_tools.quantize(work / "base", tmp_path / "again", scheme=scheme, jobs=3)
    assert iotools.tree(tmp_path / "again") == iotools.tree(work / scheme)
    lora_tools.dequantize(work / scheme, tmp_path / "plain")
    base, plain = models.tensors(work / "base"), models.tensors(tmp_path / "plain")
    assert {k: (v.dtype, v.shape) for k, v in plain.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    assert {r.tensor for r in report.tensors} == {n for n in base if n.endswith("_proj.weight")}
    for result in report.tensors:
        found = error(plain[result.tensor], base[result.tensor])
        assert result.relative_error == pytest.approx(found, rel=1e-5)
        assert 0 < found < COST[scheme][0]
    for name in base.keys() - {r.tensor for r in report.tensors}:
        assert torch.equal(plain[name], base[name]), name
    assert report.totals["bits_per_quantized_parameter"] < COST[scheme][1]
    files = list((tmp_path / "again").glob("*.safetensors"))
    assert report.totals["bytes"] == sum(file.stat().st_size for file in files)
    configs = [json.loads((work / d / "config.json").read_text()) for d in ("base", scheme)]
    assert configs[1].pop("quantization_config")
    assert configs[0] == configs[1]
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == configs[0]


@pytest.mark.parametrize("scheme", NEW)
def test_transformers_loads_the_numbers_that_dequantize_gives(
    work: Path, tmp_path: Path, scheme: str
) -> None:
    lora_tools.dequantize(work / scheme, tmp_path / "plain")
    how: Any = hf.CompressedTensorsConfig(dequantize=True)
    if scheme == "fp8-block":
        how = hf.FineGrainedFP8Config(dequantize=True)
    load = hf.AutoModelForCausalLM.from_pretrained
    loaded, info = load(work / scheme, quantization_config=how, output_loading_info=True)
    assert not any(info.values())
    wanted = load(tmp_path / "plain")
    states = loaded.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, wanted.eval()(ids).logits)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4"])
def test_transformers_runs_what_keeps_its_activations(
    work: Path, tmp_path: Path, scheme: str
) -> None:
    """Loaded as it is, with layers of compressed-tensors' own."""
    lora_tools.dequantize(work / scheme, tmp_path / "plain")
    load = hf.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found = load(work / scheme).eval()(ids).logits
        assert torch.equal(found, load(tmp_path / "plain").eval()(ids).logits)


def test_settings_of_bitsandbytes_are_refused_with_others(work: Path, tmp_path: Path) -> None:
    for option, value in (
        ("blocksize", 128),
        ("double_quant", False),
        ("compute_dtype", "float16"),
        ("quant_storage", "bfloat16"),
        ("scale_search", True),
        ("compensate", 4),
        ("compensate_iterations", 2),
    ):
        with pytest.raises(UsageError, match=rf"{option}(=\w+)? is for nf4 and fp4"):
            lora_tools.quantize(
                work / "base", tmp_path / "x", scheme="fp8-block", **{option: value}
            )
    with pytest.raises(UsageError, match="exclude each other"):
        lora_tools.quantize(work / "base", tmp_path / "x", scheme="int8", quant_type="fp4")
    lora_tools.quantize(work / "base", tmp_path / "a", scheme="fp4")
    lora_tools.quantize(work / "base", tmp_path / "b", quant_type="fp4")
    a, b = (models.tensors(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UsageError, match=r"scheme .int3.: one of nf4, fp4"):
        lora_tools.quantize(work / "base", tmp_path / "x", scheme="int3")


def test_what_cannot_be_written_is_refused(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_file({Q: torch.randn(256, 256)}, tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match=r"no config\.json"):
        lora_tools.quantize(tmp_path / "bare.safetensors", out, scheme="int4")
    with pytest.raises(UsageError, match="needs a quantized"):
        lora_tools.merge(work / "base", [work / "adapter"], out, requantize=True)
    with pytest.raises(QualityGateError, match="relative error above"):
        lora_tools.quantize(work / "base", out, scheme="int4", max_error=0.01)
    for value in (float("nan"), float("inf")):
        iotools.checkpoint(tmp_path / f"{value}", {Q: torch.full((256, 256), value)})
        for scheme in NEW:
            with pytest.raises(NonFiniteError, match=Q):
                lora_tools.quantize(tmp_path / f"{value}", out, scheme=scheme)
    iotools.checkpoint(tmp_path / "wide", {Q: torch.zeros(256, 256, dtype=torch.float64)})
    with pytest.raises(UsageError, match="float64"):
        lora_tools.quantize(tmp_path / "wide", out, scheme="int8")
    assert not out.exists()


@pytest.mark.parametrize("scheme", NEW)
def test_zeros_and_what_is_hardly_more(tmp_path: Path, scheme: str) -> None:
    for value in (0.0, 1e-30, 2.0):
        folder = tmp_path / f"{value}"
        iotools.checkpoint(folder, {Q: torch.full((256, 256), value).bfloat16()})
        lora_tools.quantize(folder, tmp_path / f"q{value}", scheme=scheme)
        lora_tools.dequantize(tmp_path / f"q{value}", tmp_path / f"p{value}")
        found = models.tensors(tmp_path / f"p{value}")[Q].float()
        assert float((found - value).abs().max()) <= max(0.07 * value, 1e-20)


def test_what_does_not_fit_stays_and_the_loader_is_told(tmp_path: Path) -> None:
    tensors = {
        Q: torch.randn(256, 256),
        f"{NAME[:-6]}k_proj.weight": torch.randn(192, 256),
        f"{NAME[:-6]}v_proj.weight": torch.randn(256, 200),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 256, 256),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 256),
        "lm_head.weight": torch.randn(256, 256),
    }
    iotools.checkpoint(tmp_path / "base", tensors)
    stay = {
        "fp8-block": {
            "k_proj": "cannot be divided into blocks of 128 x 128",
            "v_proj": "[256, 200]",
        },
        "fp8-channel": {},
        "int8": {},
        "int4": {"v_proj": "200 columns are not a multiple of 128"},
        "nvfp4": {"v_proj": "200 columns are not a multiple of 16"},
        "mxfp4": {"v_proj": "200 columns are not a multiple of 32"},
    }
    for scheme, reasons in stay.items():
        out = tmp_path / scheme
        report = lora_tools.quantize(tmp_path / "base", out, scheme=scheme)
        said = {fate.tensor: fate.reason for fate in report.plan}
        modules = {name.removesuffix(".weight") for name in tensors}
        quantized = {t.tensor.removesuffix(".weight") for t in report.tensors}
        assert len(quantized) == 3 - len(reasons)
        for part, reason in reasons.items():
            assert reason in said[f"{NAME[:-6]}{part}.weight"]
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        if scheme == "fp8-block":
            listed = config["modules_to_not_convert"]
            assert "model.layers.0.mlp.experts" in listed
            assert not any(name in quantized for name in listed)
        else:
            listed = config["ignore"]
            import re

            [pattern] = [name[3:] for name in listed if name.startswith("re:")]
            inside = [name for name in modules if re.match(pattern, name)]
            assert inside == ["model.layers.0.mlp.experts.gate_up_proj"]
        kept = {name for name in modules - quantized if ".experts." not in name}
        assert kept <= set(listed)
        lora_tools.dequantize(out, tmp_path / f"{scheme}-plain")


def test_a_conv1d_stays(tmp_path: Path) -> None:
    """GPT-2's layers are none of those that these loaders take."""
    base = models.save(models.make("gpt2", width=128), tmp_path / "base")
    for scheme in NEW:
        with pytest.raises(MismatchError, match="no linear layer"):
            lora_tools.quantize(base, tmp_path / "x", scheme=scheme)


def test_from_one_format_into_another(work: Path, tmp_path: Path) -> None:
    """Of what the first stands for; no entry of it is left."""
    report = lora_tools.quantize(work / "fp8-block", tmp_path / "q", scheme="nvfp4")
    assert any("errors are measured against its dequantized numbers" in n for n in report.notes)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any(name.endswith("_scale_inv") for name in models.tensors(tmp_path / "q"))
    report = lora_tools.verify(tmp_path / "q", against=work / "fp8-block")
    assert report.totals["bit_for_bit"] == 14
    lora_tools.quantize(work / "int8", tmp_path / "nf4")
    lora_tools.dequantize(tmp_path / "nf4", tmp_path / "plain")


@pytest.mark.parametrize(
    ("stored", "scheme"),
    [("int4", "int8"), ("nvfp4", "fp8-channel"), ("int8", "fp8-block"), ("fp4", "nf4")],
)
def test_into_another_form_of_the_same_library(
    work: Path, tmp_path: Path, stored: str, scheme: str
) -> None:
    """By way of the numbers that it stands for; the same form again is refused."""
    if stored == "fp4":
        lora_tools.quantize(work / "base", tmp_path / "fp4", scheme="fp4")
    base = (tmp_path if stored == "fp4" else work) / stored
    lora_tools.quantize(base, tmp_path / "q", scheme=scheme)
    lora_tools.dequantize(base, tmp_path / "plain")
    lora_tools.quantize(tmp_path / "plain", tmp_path / "wanted", scheme=scheme)
    found, wanted = (models.tensors(tmp_path / name) for name in ("q", "wanted"))
    assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in wanted.items()}
    configs = [(tmp_path / name / "config.json").read_text() for name in ("q", "wanted")]
    assert configs[0] == configs[1]
    assert lora_tools.verify(tmp_path / "q", against=base).totals["bit_for_bit"] == 14
    for again in (base, stored), (tmp_path / "q", scheme):
        with pytest.raises(CheckpointError, match="every weight is stored as"):
            lora_tools.quantize(again[0], tmp_path / "x", scheme=again[1])


def test_what_is_in_the_form_already_is_counted(work: Path, tmp_path: Path) -> None:
    lora_tools.quantize(work / "base", tmp_path / "some", scheme="int4", exclude=["q_proj"])
    report = lora_tools.quantize(tmp_path / "some", tmp_path / "all", scheme="int4")
    assert any("12 weights (" in n and "of 14 are stored as int4" in n for n in report.notes)
    with pytest.raises(CheckpointError, match="merge --requantize"):
        lora_tools.quantize(
            work / "int4", tmp_path / "x", scheme="int4", adapters=[work / "adapter"]
        )


def test_a_dtype_that_config_does_not_name_is_written_down(tmp_path: Path) -> None:
    """It is what the numbers are read back as."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        iotools.checkpoint(folder, {Q: torch.randn(256, 256, dtype=dtype)})
        for scheme in NEW:
            out = tmp_path / f"{dtype} {scheme}"
            lora_tools.quantize(folder, out, scheme=scheme)
            lora_tools.dequantize(out, tmp_path / f"{out.name} plain")
            assert models.tensors(tmp_path / f"{out.name} plain")[Q].dtype == dtype
            assert lora_tools.verify(out, against=folder).totals["bit_for_bit"] == 1


def _moe(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    if kind == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, **sizes))
    config = hf.Qwen3MoeConfig(num_experts=3, moe_intermediate_size=128, head_dim=32, **sizes)
    return hf.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one(tmp_path: Path, kind: str) -> None:
    """As transformers, which fuses them, loads them: all of them, or none."""
    torch.manual_seed(0)
    base = models.save(_moe(kind).bfloat16(), tmp_path / "base")
    load = hf.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(8)[None]
    first = next(n for n in models.tensors(base) if ".experts.1." in n)
    for scheme, without in (
        ("fp8-block", False),
        ("fp8-channel", False),
        ("int4", False),
        ("mxfp4", False),
        ("int8", False),
        ("fp8-block", True),
        ("fp8-channel", True),
    ):
        out, plain = tmp_path / f"{scheme} {without}", tmp_path / f"{scheme} {without} plain"
        options = {"exclude": [first.removesuffix(".weight")]} if without else {}
        report = lora_tools.quantize(base, out, scheme=scheme, **options)
        assert report.totals["tensors_quantized"] == 4 + 9 * (not without)
        lora_tools.dequantize(out, plain)
        how: Any = hf.CompressedTensorsConfig(dequantize=True)
        if scheme == "fp8-block":
            how = hf.FineGrainedFP8Config(dequantize=True)
        loaded, info = load(out, quantization_config=how, output_loading_info=True)
        assert not any(info.values()), info
        assert not report.notes
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, load(plain).eval()(ids).logits)
        assert lora_tools.verify(out, against=base).totals["same"]
        listed = json.loads((out / "config.json").read_text())["quantization_config"]
        names = listed.get("ignore") or listed["modules_to_not_convert"]
        assert any(name.endswith(".gate") for name in names)  # vLLM's router is a linear layer
        assert any("experts" in name for name in names) == without
    for scheme in ("int8", "nvfp4", "mxfp4", "int4"):
        with pytest.raises(CheckpointError, match="left out by include or exclude"):
            lora_tools.quantize(base, tmp_path / "x", scheme=scheme, exclude=[r"experts\.1"])


def test_experts_in_nvfp4_are_for_vllm(tmp_path: Path) -> None:
    """transformers forgets their global scales, as a note says; the package itself does not."""
    torch.manual_seed(0)
    base = models.save(_moe("qwen3_moe").bfloat16(), tmp_path / "base")
    report = lora_tools.quantize(base, tmp_path / "q", scheme="nvfp4")
    assert any("vLLM reads experts in NVFP4; transformers" in note for note in report.notes)
    assert report.totals["tensors_quantized"] == 13
    stored = models.tensors(tmp_path / "q")
    entry = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain")
    plain = models.tensors(tmp_path / "plain")
    scales = {}
    for result in report.tensors:
        module = result.tensor.removesuffix("weight")
        state = {n.removeprefix(module): t for n, t in stored.items() if n.startswith(module)}
        scales[module] = float(state["weight_global_scale"])
        back = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(back.bfloat16(), plain[result.tensor]), module
    for module in (name for name in scales if name.endswith("experts.0.gate_proj.")):
        assert scales[module] == scales[module.replace("gate", "up")]  # as vLLM wants them


def test_layers_of_kin_classes_are_listed(tmp_path: Path) -> None:
    """compressed-tensors takes subclasses of nn.Linear, too, as that of torch's own attention."""
    config = hf.SiglipVisionConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    base = models.save(hf.SiglipVisionModel(config).bfloat16(), tmp_path / "base")
    lora_tools.quantize(base, tmp_path / "q", scheme="fp8-channel")
    listed = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    [name] = [name for name in listed["ignore"] if name.endswith("head.attention.out_proj")]
    lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    how = hf.CompressedTensorsConfig(dequantize=True)
    for options in ({}, {"quantization_config": how}):
        loaded, info = hf.SiglipVisionModel.from_pretrained(
            tmp_path / "q", output_loading_info=True, **options
        )
        assert not any(info.values()), info
        assert loaded.get_submodule(name).weight.dtype == torch.bfloat16
