"""``verify --against`` of four bits: every way in which quantize writes them; planted faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import QualityGateError, UsageError
from lora_tools.formats.quantized.bitsandbytes import STATE

from . import iotools, models
from .test_quantize_transformers import by_transformers

pytestmark = pytest.mark.filterwarnings("ignore")

Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base (tied), two adapters on it, and both of what quantize makes."""
    top = tmp_path_factory.mktemp("nf4")
    base = models.save(models.make("llama-tied", width=64).bfloat16(), top / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    models.train(base, top / "adapter", config)
    models.train(base, top / "saved", config | {"modules_to_save": ["norm"]}, seed=9)
    lora_tools.quantize(base, top / "plain")
    lora_tools.quantize(base, top / "merged", adapters=[top / "adapter"])
    return top


def refused(path: Path, *adapters: Any, against: Path, **options: Any) -> str:
    with pytest.raises(QualityGateError) as caught:
        lora_tools.verify(path, against=against, adapters=adapters, **options)
    assert caught.value.report is not None
    assert not caught.value.report.totals["same"]
    return str(caught.value)


WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "double": ({}, "nf4, blocks of 64, double quantization"),
    "not double": ({"double_quant": False, "blocksize": 32}, "blocks of 32, no double"),
    "searched": ({"scale_search": True}, "with --scale-search"),
    "searched, not double": ({"scale_search": True, "double_quant": False}, "--scale-search"),
    "fp4": ({"quant_type": "fp4", "blocksize": 128}, "fp4, blocks of 128"),
    "stored": ({"quant_storage": "bfloat16"}, "byte for byte"),
    "cast": ({"dtype": "float32"}, "byte for byte"),
    "some": ({"include": ["q_proj"]}, "byte for byte"),
    "compensated": ({"compensate": 4}, "byte for byte"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_quantize_writes_is_known_again(work: Path, tmp_path: Path, way: str) -> None:
    options, says = WAYS[way]
    made = lora_tools.quantize(work / "base", tmp_path / "q", **options)
    report = lora_tools.verify(tmp_path / "q", against=work / "base")
    assert says in report.totals["verdict"]
    assert "byte for byte as quantize writes it" in report.totals["verdict"]
    assert report.totals["bit_for_bit"] == made.totals["tensors_quantized"]
    assert report.totals["quantization_error"] == made.totals["quantization_error"]
    assert report.totals["expected_error"] == made.totals["quantization_error"]
    assert [i.digest for i in report.inputs][1] == made.inputs[0].digest
    assert not report.notes
    if way == "searched":
        plain = lora_tools.verify(work / "plain", against=work / "base").totals
        assert report.totals["quantization_error"] < 0.95 * plain["quantization_error"]


def test_adapters_merged_on_the_way(work: Path, tmp_path: Path) -> None:
    both = [work / "adapter", (work / "saved", 1)]
    lora_tools.quantize(work / "base", tmp_path / "q", adapters=both)
    report = lora_tools.verify(tmp_path / "q", against=work / "base", adapters=both)
    assert report.totals["verdict"].startswith("base + adapter in four bits")
    assert report.totals["bit_for_bit"] == report.totals["tensors_quantized"] == 14
    said = refused(tmp_path / "q", work / "adapter", against=work / "base")
    assert "model.norm.weight" in said or "different" in said


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "bert"])
def test_what_transformers_writes_is_known_again(tmp_path: Path, kind: str) -> None:
    base = models.save(models.make(kind, width=128), tmp_path / "base")
    by_transformers(base, tmp_path / "q")
    report = lora_tools.verify(tmp_path / "q", against=base)
    assert report.totals["bit_for_bit"] == report.totals["tensors_quantized"] >= 8


def test_scales(work: Path, tmp_path: Path) -> None:
    """An adapter that was applied at another scale, twice, or not at all, with the right base."""
    base, adapter = work / "base", work / "adapter"
    for weight, says in ((2, "twice"), (0.5, "at 0."), (-1, "with the wrong sign")):
        lora_tools.quantize(base, tmp_path / f"{weight}", adapters=[(adapter, weight)])
        said = refused(tmp_path / f"{weight}", adapter, against=base)
        assert f"the adapter is applied {says}" in said, said
        assert "4 different" in said
    assert "the adapter is not applied" in refused(work / "plain", adapter, against=base)


def test_another_checkpoint_and_another_adapter(work: Path, tmp_path: Path) -> None:
    other = models.save(models.make("llama-tied", 5, width=64).bfloat16(), tmp_path / "other")
    assert "another checkpoint" in refused(work / "plain", against=other)
    said = refused(work / "merged", work / "saved", against=work / "base")
    assert "differ by more" in said
    with pytest.raises(QualityGateError) as caught:
        lora_tools.verify(work / "merged", against=work / "base")
    assert any("1 adapters were merged" in note for note in caught.value.report.notes)


def spoilt(work: Path, to: Path, change: Callable[[Tensors], object], name: str = "plain") -> Path:
    shutil.copytree(work / name, to)
    tensors = models.tensors(to)
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def flip(tensors: Tensors) -> None:
    """One code to one six codes away."""
    byte = int(tensors[Q][100, 0])
    high = byte >> 4
    tensors[Q][100, 0] = ((high + 6) % 16 if high < 10 else high - 6) << 4 | byte & 15


def swap(tensors: Tensors) -> None:
    """One layer's weight in another's place."""
    for end in [k.removeprefix(Q) for k in tensors if k.startswith(Q)]:
        there = Q.replace(".0.", ".1.") + end
        tensors[Q + end], tensors[there] = tensors[there], tensors[Q + end]


FAULTS: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "a code": (flip, Q, r"1 of 4,096 numbers differ by more .* \(differ: codes\)"),
    "a scale": (
        lambda t: t[f"{Q}.absmax"].__setitem__(3, 255 - t[f"{Q}.absmax"][3]),
        Q,
        r"differ: .absmax",
    ),
    "a codebook": (lambda t: t[f"{Q}.quant_map"].__setitem__(2, -0.6), Q, r"differ: .quant_map"),
    "a map of scales": (lambda t: t[f"{Q}.nested_quant_map"].mul_(1.1), Q, "nested_quant_map"),
    "scales of scales": (lambda t: t[f"{Q}.nested_absmax"].mul_(1.2), Q, "nested_absmax"),
    "places": (swap, "q_proj", r"2 different"),
    "a norm": (
        lambda t: t["model.norm.weight"].__setitem__(3, 9.0),
        "model.norm.weight",
        "differs from the base in 1 of its 64 numbers",
    ),
    "a lost tensor": (lambda t: t.pop("model.norm.weight"), "model.norm.weight", "1 missing"),
    "a stranger": (lambda t: t.update(stranger=torch.ones(2)), "stranger", "1 extra"),
    "a tied head": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.1}),
        "lm_head.weight",
        "tied",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(work: Path, tmp_path: Path, fault: str) -> None:
    change, tensor, says = FAULTS[fault]
    said = refused(spoilt(work, tmp_path / "q", change), against=work / "base")
    assert tensor in said
    import re

    assert re.search(says, said), said


def test_a_weight_left_plain_is_compared_as_it_is(work: Path, tmp_path: Path) -> None:
    """It is the base's; but a loader, by its list, would take it for four bits."""
    plain = models.tensors(work / "base")[Q]

    def change(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.startswith(Q)]:
            del tensors[key]
        tensors[Q] = plain

    path = spoilt(work, tmp_path / "q", change)
    said = refused(path, against=work / "base")
    assert f"does not list {Q.removesuffix('.weight')}" in said
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"].append(Q.removesuffix(".weight"))
    (path / "config.json").write_text(json.dumps(config))
    assert lora_tools.verify(path, against=work / "base").totals["bit_for_bit"] == 13
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (path / "config.json").write_text(json.dumps(config))
    assert "says fp4, but the weights are nf4" in refused(path, against=work / "base")


def test_rounding_is_no_fault(work: Path, tmp_path: Path) -> None:
    """Another order of summation gives another last bit of the scales' mean."""

    def change(tensors: Tensors) -> None:
        [key] = [k for k in tensors if k.startswith(Q + STATE)]
        fields = json.loads(bytes(tensors[key].tolist()))
        fields["nested_offset"] *= 1 + 1e-7
        tensors[key] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    report = lora_tools.verify(spoilt(work, tmp_path / "q", change), against=work / "base")
    assert "13 of 14 weights byte for byte" in report.totals["verdict"]
    assert {f.tensor for f in report.plan if f.action == "rounded"} == {Q}


def test_other_ways_of_quantizing_have_a_figure(work: Path, tmp_path: Path) -> None:
    made = lora_tools.quantize(work / "base", tmp_path / "q", compensate=4, compensate_iterations=3)
    said = refused(tmp_path / "q", against=work / "base")
    assert "quantized differently" in said
    errors = {t.tensor: t.relative_error for t in made.tensors}
    worst = max(errors.values())
    report = lora_tools.verify(tmp_path / "q", against=work / "base", max_error=worst * 1.001)
    assert {t.tensor: pytest.approx(t.relative_error, rel=1e-4) for t in report.tensors} == errors
    assert report.totals["expected_error"] < report.totals["quantization_error"]
    assert "different" in refused(tmp_path / "q", against=work / "base", max_error=worst * 0.999)


def test_into_a_four_bit_base(work: Path, tmp_path: Path) -> None:
    """A plain merge, and one in four bits again, whose other codes stay as they were."""
    base, adapter = work / "plain", work / "adapter"
    lora_tools.merge(base, [adapter], tmp_path / "m")
    report = lora_tools.verify(tmp_path / "m", base=base, adapters=[adapter])
    assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"] == 4
    with pytest.raises(QualityGateError, match=r"the adapter is applied at 0\.5"):
        lora_tools.verify(tmp_path / "m", base=base, adapters=[(adapter, 2)])
    with pytest.raises(QualityGateError):  # of the base that was not quantized it is not the merge
        lora_tools.verify(tmp_path / "m", base=work / "base", adapters=[adapter])
    lora_tools.merge(base, [adapter], tmp_path / "r", requantize=True)
    report = lora_tools.verify(tmp_path / "r", against=base, adapters=[adapter])
    fates = [f.action for f in report.plan]
    assert report.totals["bit_for_bit"] == 14
    assert fates.count("same") == 4
    assert "the adapter is not applied" in refused(base, adapter, against=base)
    assert lora_tools.verify(base, against=base).totals["bit_for_bit"] == 14


def test_square_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's c_proj: its shape does not tell that its codes are those of the transpose."""
    base = models.save(models.make("gpt2", width=64), tmp_path / "base")
    models.train(base, tmp_path / "a", {"r": 2, "target_modules": ["c_proj"]})
    lora_tools.quantize(base, tmp_path / "q")
    lora_tools.merge(tmp_path / "q", [tmp_path / "a"], tmp_path / "r", requantize=True)
    lora_tools.merge(tmp_path / "q", [tmp_path / "a"], tmp_path / "m")
    lora_tools.quantize(tmp_path / "m", tmp_path / "mq")
    name = "transformer.h.0.attn.c_proj.weight"
    found, wanted = models.tensors(tmp_path / "r"), models.tensors(tmp_path / "mq")
    assert torch.equal(found[name], wanted[name])
    report = lora_tools.verify(tmp_path / "r", against=tmp_path / "q", adapters=[tmp_path / "a"])
    assert report.totals["bit_for_bit"] == 8
    lora_tools.verify(tmp_path / "q", against=base)


def test_the_same_with_any_jobs_and_shards(work: Path, tmp_path: Path) -> None:
    lora_tools.quantize(work / "base", tmp_path / "q", shard_size="20kB")
    reports = [
        lora_tools.verify(tmp_path / "q", against=work / "base", jobs=n).to_dict() for n in (1, 3)
    ]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]


def test_calls_that_make_no_sense(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = work / "base"
    for options in (
        {},
        {"base": base},
        {"base": base, "against": base},
        {"against": base, "tuned": base},
    ):
        with pytest.raises(UsageError):
            lora_tools.verify(work / "plain", **options)
    with pytest.raises(UsageError, match="neither quantized nor an ONNX model"):
        lora_tools.verify(base, against=base)
    with pytest.raises(UsageError, match="give against"):
        lora_tools.verify(work / "plain", base=base, adapters=[work / "adapter"])
    assert run(["verify", str(work / "plain"), "--against", str(base)]) == 0
    assert "byte for byte as quantize writes it" in capfd.readouterr().out
    assert run(["verify", str(work / "merged"), "--against", str(base), "-q", "--json"]) == 3
    printed, said = capfd.readouterr()
    assert "Error: not the checkpoint in four bits (4 different)" in said
    assert json.loads(printed)["totals"]["same"] is False


def test_inspect_says_what_is_in_four_bits(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = lora_tools.inspect(work / "plain")
    found = report.totals["quantized"]
    assert report.totals["kind"] == "checkpoint in four bits (bitsandbytes)"
    assert found["weights"] == 14
    assert found["schemes"] == {"nf4, blocks of 64, double quantization": 14}
    assert found["dtypes"] == {"BF16": 14}
    made = lora_tools.verify(work / "plain", against=work / "base").totals
    assert found["numbers"] == made["parameters_quantized"]
    assert found["bits_per_parameter"] == pytest.approx(made["bits_per_quantized_parameter"])
    assert run(["inspect", str(work / "plain")]) == 0
    assert "14 in nf4, blocks of 64" in capfd.readouterr().out


def test_inspect_finds_what_keeps_it_from_loading(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "plain", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    notes = lora_tools.inspect(tmp_path / "q").notes
    assert any("has no quantization_config" in note for note in notes)
    config["quantization_config"] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["q_proj"],
    }
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    notes = lora_tools.inspect(tmp_path / "q").notes
    assert any(
        "says that model.layers.0.self_attn.q_proj is not in four bits" in note for note in notes
    )
    assert iotools.tree(work / "plain")  # and nothing is written
