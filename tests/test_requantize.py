"""``merge --requantize`` and ``verify`` in every stored number format that is written."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.engine.buffers import Buffers
from lora_tools.errors import CheckpointError, QualityGateError, UsageError
from lora_tools.linalg import nf4, runs
from lora_tools.merging import in_memory
from lora_tools.merging.in_memory import largest_in
from lora_tools.quantizing import encoded
from lora_tools.quantizing import tensor as quantized_item

from . import forms_compressed, forms_fp8, forms_groups, iotools, models
from .written import NAME, NEW, Q, error, in_each_form, raw, verified

pytestmark = pytest.mark.filterwarnings("ignore")

# Checkpoints as other tools store them.
STORED = {**forms_groups.FORMS, **forms_fp8.FORMS, **forms_compressed.FORMS}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the base in each format."""
    return in_each_form(tmp_path_factory.mktemp("schemes"))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("scheme", NEW)
def test_merged_and_written_again_is_what_quantizing_the_merged_gives(
    work: Path, tmp_path: Path, scheme: str
) -> None:
    base, adapters = work / scheme, [(work / "adapter", 0.05)]
    report = lora_tools.merge(base, adapters, tmp_path / "m", requantize=True)
    before, after = models.tensors(base), models.tensors(tmp_path / "m")
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.dtype, v.shape) for k, v in after.items()
    }
    acted = ("q_proj.", "up_proj.")
    for name in before:
        same = torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        assert same or any(part in name for part in acted), name
    kept = report.totals["delta_kept"]
    assert _kept(base, tmp_path / "m", adapters, tmp_path) == pytest.approx(kept, rel=1e-3)
    found = lora_tools.verify(tmp_path / "m", against=base, adapters=adapters)
    assert found.totals["bit_for_bit"] == 14
    config = "config.json"
    assert (base / config).read_bytes() == (tmp_path / "m" / config).read_bytes()
    fates = {fate.tensor: fate.action for fate in report.plan}
    assert fates[Q] == "requantize"
    assert {t.tensor for t in report.tensors} == {t for t, a in fates.items() if a == "requantize"}
    lora_tools.merge(base, adapters, tmp_path / "plain")
    # Global scales of NVFP4 are found anew, and those of whole numbers stay where numbers fit them.
    if scheme not in ("nvfp4", "int4", "int8"):
        lora_tools.quantize(tmp_path / "plain", tmp_path / "two", scheme=scheme)
        two = models.tensors(tmp_path / "two")
        for name in after:
            if any(part in name for part in acted):
                assert torch.equal(after[name].view(torch.uint8), two[name].view(torch.uint8))


@pytest.mark.parametrize("scheme", ["fp8-channel", "nvfp4"])
def test_runs_that_are_kept_give_what_runs_formed_twice_do(
    work: Path, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = work / scheme, [(work / "adapter", 0.05)]
    monkeypatch.setattr(runs, "RUN_ELEMENTS", 1 << 11)
    monkeypatch.setattr(encoded, "_BAND", 3 << 9)
    said = {}
    for few in (0, 2):
        monkeypatch.setattr(in_memory, "_FEW", few)
        out = tmp_path / str(few)
        said[few] = lora_tools.merge(base, adapters, out, requantize=True).totals
        assert iotools.tree(out) == iotools.tree(tmp_path / "0")
    assert said[0] == said[2]
    kept = pytest.approx(said[0]["delta_kept"], rel=1e-3)
    assert _kept(base, tmp_path / "0", adapters, tmp_path) == kept


@pytest.mark.parametrize("scheme", ["nf4", "nvfp4", "int4"])
def test_a_weight_is_not_held_in_float32(
    work: Path, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work space beside a merged weight: its codes, and a few runs."""
    lora_tools.quantize(work / "base", tmp_path / "q", scheme=scheme)
    monkeypatch.setattr(runs, "RUN_ELEMENTS", 1 << 11)
    monkeypatch.setattr(runs.rows_per_run, "__defaults__", (1 << 11,))
    monkeypatch.setattr(encoded, "_BAND", 3 << 9)
    lent, most, lend = [0], [0], Buffers.lend

    @contextlib.contextmanager
    def counted(self: Buffers, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Any]:
        nbytes = math.prod(shape) * dtype.itemsize
        nbytes *= nbytes != nf4.SCRATCH_BYTES  # however small the weight is
        lent[0] += nbytes
        most[0] = max(most[0], lent[0])
        with lend(self, shape, dtype) as buffer:
            yield buffer
        lent[0] -= nbytes

    monkeypatch.setattr(Buffers, "lend", counted)
    base, adapters = tmp_path / "q", [work / "adapter"]
    lora_tools.merge(base, adapters, tmp_path / "m", requantize=True, jobs=1)
    weights = [t for n, t in models.tensors(work / "base").items() if "_proj.weight" in n]
    largest = max(weights, key=torch.numel)
    assert largest.nbytes <= most[0] < largest.nbytes + largest.numel()


def _kept(base: Path, merged: Path, adapters: list[Any], tmp_path: Path) -> float:
    """The share of the adapters' change that is left, from the files alone."""
    lora_tools.dequantize(base, tmp_path / "wide", dtype="float32")
    lora_tools.merge(tmp_path / "wide", adapters, tmp_path / "exact")
    lora_tools.dequantize(merged, tmp_path / "found", dtype="float32")
    b, e, f = (models.tensors(tmp_path / name) for name in ("wide", "exact", "found"))
    moved = wanted = 0.0
    for name in b:
        delta = e[name].double() - b[name].double()
        wanted += float((delta * delta).sum())
        moved += float(((f[name].double() - b[name].double()) * delta).sum())
    return moved / wanted


def test_eight_bits_keep_most_of_a_small_change_and_four_bits_do_not(
    work: Path, tmp_path: Path
) -> None:
    kept = {}
    for scheme in NEW:
        out = tmp_path / scheme
        report = lora_tools.merge(work / scheme, [(work / "adapter", 0.02)], out, requantize=True)
        kept[scheme] = report.totals["delta_kept"]
    assert min(kept["int8"], kept["fp8-block"], kept["fp8-channel"]) > 0.7, kept
    assert max(kept["nvfp4"], kept["mxfp4"], kept["int4"]) < kept["fp8-block"], kept


@pytest.mark.sweep(2)
@pytest.mark.parametrize("form", STORED)
def test_written_again_as_others_store_it(tmp_path: Path, form: str) -> None:
    """What no adapter acts on, scales of activations, marks and config files stay as they were."""
    tensors = {k: v.bfloat16() for k, v in iotools.weights(width=16).items()}
    stored, config, plain = STORED[form](tensors)
    iotools.checkpoint(tmp_path / "base", stored)
    said = {"model_type": "llama", **config}
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    name = next(n for n in plain if n.endswith("q_proj.weight"))
    shape = tuple(plain[name].shape)
    iotools.adapter(tmp_path / "adapter", {name.removesuffix(".weight"): shape}, r=2)
    out, adapters = tmp_path / "out", [tmp_path / "adapter"]
    try:
        report = lora_tools.merge(tmp_path / "base", adapters, out, requantize=True)
    except (UsageError, CheckpointError) as refusal:
        said_instead = str(refusal)
    else:
        said_instead = ""
    if said_instead:
        assert "plain" in said_instead or "dequantize" in said_instead
        return
    before, after = models.tensors(tmp_path / "base"), models.tensors(out)
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.dtype, v.shape) for k, v in after.items()
    }
    changed = {k for k in before if raw(before[k]) != raw(after[k])}
    module = name.removesuffix(".weight")
    assert changed
    assert all(k.startswith(module) and "input" not in k for k in changed), changed
    trees = [iotools.tree(tmp_path / "base"), iotools.tree(out)]
    assert all(trees[0][k] == trees[1][k] for k in trees[0] if not k.endswith(".safetensors"))
    lora_tools.merge(tmp_path / "base", adapters, tmp_path / "plain")
    lora_tools.dequantize(out, tmp_path / "back")
    wanted, found = models.tensors(tmp_path / "plain"), models.tensors(tmp_path / "back")
    assert wanted.keys() == found.keys()
    [result] = report.tensors
    assert result.relative_error == pytest.approx(error(found[name], wanted[name]), rel=1e-4)
    looked = verified(out, tmp_path / "base", adapters)
    assert looked.totals["bit_for_bit"] == looked.totals["tensors_quantized"]
    # No config entry that a loader needs: the base has none, either.
    assert {f.tensor for f in looked.plan if f.action == "different"} <= {"config.json"}


def test_layers_that_loaders_put_into_one_have_one_global_scale(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes the largest of q's, k's and v's for all three: any other would be read wrong. Each
    is looked at once for it."""
    looked_at = list[str]()

    def counted(target: Any, source: Any, spec: Any) -> float:
        looked_at.append(spec.name)
        return largest_in(target, source, spec)

    monkeypatch.setattr(quantized_item, "largest_in", counted)
    every = models.tensors(work / "nvfp4")
    places = {"self_attn.": ("q_proj", "k_proj", "v_proj"), "mlp.": ("gate_proj", "up_proj")}
    base = models.tensors(work / "base")
    for place, parts in places.items():
        modules = [f"model.layers.1.{place}{part}" for part in parts]
        scales = {float(every[f"{m}.weight_global_scale"]) for m in modules}
        inputs = base[f"{modules[0]}.weight"].shape[1]
        joined = [n for n in base if n.startswith(f"model.layers.1.{place}")]
        joined = [n for n in joined if base[n].dim() == 2 and base[n].shape[1] == inputs]
        largest = max(float(base[n].abs().max()) for n in joined)
        assert scales == {float(torch.tensor(448.0) * 6 / torch.tensor(largest))}

    def scales_of(folder: Path) -> dict[str, float]:
        found = models.tensors(folder)
        return {k: float(v) for k, v in found.items() if k.endswith("global_scale")}

    config = {"r": 2, "lora_alpha": 64, "target_modules": ["v_proj"]}
    models.train(work / "base", tmp_path / "one", config)
    lora_tools.merge(work / "nvfp4", [tmp_path / "one"], tmp_path / "m", requantize=True)
    assert scales_of(tmp_path / "m") == scales_of(work / "nvfp4")
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    models.train(work / "base", tmp_path / "all", config)
    lora_tools.merge(work / "nvfp4", [tmp_path / "all"], tmp_path / "n", requantize=True)
    before, after = scales_of(work / "nvfp4"), scales_of(tmp_path / "n")
    assert sorted(looked_at) == sorted(n for n in base if n.endswith("proj.weight") and "attn" in n)
    for layer in range(2):
        place = f"model.layers.{layer}.self_attn."
        mine = {after[k] for k in after if k.startswith(place)}
        assert len(mine) == 1
        assert mine != {before[f"{place}q_proj.weight_global_scale"]}
    report = lora_tools.verify(tmp_path / "n", against=work / "nvfp4", adapters=[tmp_path / "all"])
    assert report.totals["bit_for_bit"] == 14


def flip(tensors: dict[str, torch.Tensor], key: str) -> None:
    """One code to one that is far away, or a scale to another."""
    flat = tensors[key].reshape(-1).view(torch.uint8)
    flat[7] = flat[7] ^ 0x44


@pytest.mark.parametrize("scheme", NEW)
def test_planted_faults(work: Path, tmp_path: Path, scheme: str) -> None:
    stored = models.tensors(work / scheme)
    for key in [k for k in stored if k.startswith(f"{NAME}.weight") and "shape" not in k]:
        out = tmp_path / key
        shutil.copytree(work / scheme, out)
        tensors = {k: v.clone() for k, v in stored.items()}
        if "global" in key:
            tensors[key] *= 1.5
        elif "scale" in key and tensors[key].itemsize > 1:
            tensors[key].view(-1)[0] *= 1.5
        else:
            flip(tensors, key)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        with pytest.raises(QualityGateError) as caught:
            lora_tools.verify(out, against=work / "base")
        assert Q in str(caught.value), key


@pytest.mark.parametrize("scheme", NEW)
def test_what_is_merged_otherwise_is_told(
    work: Path, tmp_path: Path, scheme: str, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = work / "base", work / "adapter"
    lora_tools.quantize(base, tmp_path / "q", scheme=scheme, adapters=[(adapter, 2)])
    with pytest.raises(QualityGateError, match="the adapter is applied twice"):
        lora_tools.verify(tmp_path / "q", against=base, adapters=[adapter])
    with pytest.raises(QualityGateError, match="the adapter is not applied"):
        lora_tools.verify(work / scheme, against=base, adapters=[adapter])
    assert run(["verify", str(work / scheme), "--against", str(base)]) == 0
    assert "byte for byte as quantize writes it" in capfd.readouterr().out


def test_a_scale_of_another_rounding_is_no_fault(work: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}_scale_inv"] *= 1 + 1e-6

    shutil.copytree(work / "fp8-block", tmp_path / "q")
    tensors = models.tensors(work / "fp8-block")
    change(tensors)
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    report = lora_tools.verify(tmp_path / "q", against=work / "base")
    assert "to rounding: 13 of 14" in report.totals["verdict"]


def test_experts_of_gpt_oss_are_written_again(tmp_path: Path) -> None:
    config = hf.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    base = models.save(hf.GptOssForCausalLM(config).bfloat16(), tmp_path / "base")
    told = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    models.train(base, tmp_path / "adapter", {"r": 2, "lora_alpha": 4, **told})
    stored = {}
    for name, tensor in models.tensors(base).items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            experts, cols, rows = tensor.shape
            shape = (experts, rows, cols // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
        else:
            stored[name] = tensor
    said = json.loads((base / "config.json").read_text())
    (tmp_path / "q").mkdir()
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(said))
    save_file(stored, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    adapters = [tmp_path / "adapter"]
    report = lora_tools.merge(tmp_path / "q", adapters, tmp_path / "m", requantize=True)
    fates = {fate.tensor.rpartition(".")[2]: fate.action for fate in report.plan}
    assert fates["gate_up_proj"] == "requantize"
    assert fates["down_proj"] == "copy"
    assert lora_tools.verify(tmp_path / "m", against=tmp_path / "q", adapters=adapters)
    lora_tools.dequantize(tmp_path / "m", tmp_path / "p")
    load = hf.AutoModelForCausalLM.from_pretrained
    found = load(tmp_path / "m", quantization_config=hf.Mxfp4Config(dequantize=True)).state_dict()
    wanted = load(tmp_path / "p").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_in_shards(work: Path, tmp_path: Path) -> None:
    """What belongs to one weight shares a file, however large files are."""
    for scheme in ("fp8-block", "int4"):
        parts = tmp_path / scheme
        lora_tools.quantize(work / "base", parts, scheme=scheme, shard_size="200kB")
        assert len(list(parts.glob("*.safetensors"))) > 2
        whole, found = models.tensors(work / scheme), models.tensors(parts)
        assert whole.keys() == found.keys()
        assert all(raw(whole[name]) == raw(found[name]) for name in whole)
        homes = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
        mine = {home for name, home in homes.items() if name.startswith(f"{NAME}.weight")}
        assert len(mine) == 1
        adapters = [work / "adapter"]
        for size in (None, "100kB"):
            out = tmp_path / f"{scheme} {size}"
            lora_tools.merge(parts, adapters, out, requantize=True, shard_size=size)
            assert lora_tools.verify(out, against=work / scheme, adapters=adapters)


def test_a_bare_file_of_comfyui_keeps_what_its_metadata_says(tmp_path: Path) -> None:
    layer = "blocks.0.q_proj"
    said = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"}}}
    w = torch.randn(32, 32)
    scale = w.abs().max() / 448
    stored = {
        f"{layer}.weight": (w / scale).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale": scale,
        "norm.weight": torch.ones(32).bfloat16(),
    }
    metadata = {"_quantization_metadata": json.dumps(said)}
    save_file(stored, tmp_path / "base.safetensors", metadata)
    iotools.adapter(tmp_path / "adapter", {layer: (32, 32)}, r=2)
    out, adapters = tmp_path / "out.safetensors", [tmp_path / "adapter"]
    lora_tools.merge(tmp_path / "base.safetensors", adapters, out, requantize=True)
    with safe_open(out, "pt") as file:
        assert file.metadata()["_quantization_metadata"] == metadata["_quantization_metadata"]
    report = lora_tools.verify(out, against=tmp_path / "base.safetensors", adapters=adapters)
    assert report.totals["bit_for_bit"] == 1
    lora_tools.merge(tmp_path / "base.safetensors", adapters, tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        assert "_quantization_metadata" not in file.metadata()


@pytest.mark.parametrize("scheme", ["fp8-channel", "nf4"])
def test_a_head_that_is_untied_is_said_to_be(tmp_path: Path, scheme: str) -> None:
    """Else a loader takes the embedding for the head that was written."""
    config = hf.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    lora_tools.quantize(tmp_path / "base", tmp_path / "q", scheme=scheme)
    iotools.adapter(tmp_path / "adapter", {"lm_head": (48, 32)}, r=2)
    lora_tools.merge(tmp_path / "q", [tmp_path / "adapter"], tmp_path / "m", requantize=True)
    stored, made = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("q", "m")
    )
    assert "lm_head.weight" in models.tensors(tmp_path / "m")
    assert made == {**stored, "tie_word_embeddings": False}
