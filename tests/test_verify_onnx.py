"""``verify --against`` and ``inspect`` of ONNX models: what is right, and planted faults."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, MismatchError, QualityGateError, UsageError

from . import export_models, iotools, models
from .traced import Traced

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")

Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Path:
    """A tied base, an adapter, and exports: shared, bundled, and with the adapter."""
    top = tmp_path_factory.mktemp("onnx")
    base = shutil.copytree(traced("Llama").base, top / "base")
    shutil.copytree(traced("Llama").graph, top / "shared")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    models.train(base, top / "adapter", config)
    again: dict[str, Any] = {"graph": top / "shared", "no_verify": True}
    lora_tools.export(base, top / "bundled", weights="bundled", **again)
    lora_tools.export(base, top / "merged", adapters=[top / "adapter"], **again)
    return top


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as torch's older exporter, and so Optimum, writes it: weights of linear layers are
    transposed, and named onnx::MatMul_123."""
    top = tmp_path_factory.mktemp("legacy")
    model = models.load(export_models.make("BERT", top / "base"), attn_implementation="eager")
    names = ("input_ids", "attention_mask", "token_type_ids")

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, given, strict=True)))[0]

    ids = torch.ones(2, 5, dtype=torch.long)
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "last_hidden_state")}
    with torch.no_grad():
        torch.onnx.export(
            Wrapper(),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            top / "model.onnx",
            dynamo=False,
            input_names=list(names),
            output_names=["last_hidden_state"],
            dynamic_axes=axes,
            opset_version=17,
        )
    return top


def refused(path: Path, work: Path, *adapters: Any, **options: Any) -> str:
    with pytest.raises(QualityGateError) as caught:
        lora_tools.verify(path, against=work / "base", adapters=adapters, **options)
    assert caught.value.report is not None
    assert not caught.value.report.totals["same"]
    return str(caught.value)


def actions(report: lora_tools.Report) -> dict[str, str]:
    return {fate.tensor: fate.action for fate in report.plan}


@pytest.mark.parametrize("kind", ["shared", "bundled"])
def test_an_export_is_its_checkpoint(work: Path, kind: str) -> None:
    report = lora_tools.verify(work / kind, against=work / "base")
    stored = models.tensors(work / "base")
    assert "bit for bit; its outputs are torch's" in report.totals["verdict"]
    assert {n for n, action in actions(report).items() if action == "copied"} == set(stored)
    assert report.totals["weights_compared"] == len(stored)
    assert report.totals["verified"]
    assert report.totals["tokens_same"] == report.totals["tokens_generated"] == 16
    weights = lora_tools.verify(
        work / kind / "model.onnx", against=work / "base", weights_only=True
    )
    assert "verified" not in weights.totals
    assert "the model was not run" in weights.notes


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_another_dtype(work: Path, tmp_path: Path, dtype: str) -> None:
    lora_tools.export(
        work / "base", tmp_path / "e", dtype=dtype, graph=work / "shared", no_verify=True
    )
    report = lora_tools.verify(tmp_path / "e", against=work / "base")
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert f"F32 stored as {short}, bit for bit" in report.totals["verdict"]
    assert report.totals["dtypes"] == {short: report.totals["weights_compared"]}


def test_adapters(work: Path, tmp_path: Path) -> None:
    adapter = work / "adapter"
    report = lora_tools.verify(work / "merged", against=work / "base", adapters=[adapter])
    assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"] == 10
    assert report.totals["verdict"].startswith("its weights are those of base + adapter")
    again: dict[str, Any] = {"graph": work / "shared", "no_verify": True}
    for weight, says in ((2, "twice"), (0.5, "at 0.5")):
        lora_tools.export(
            work / "base", tmp_path / f"{weight}", adapters=[(adapter, weight)], **again
        )
        assert f"the adapter is applied {says}" in refused(tmp_path / f"{weight}", work, adapter)
    assert "the adapter is not applied" in refused(work / "shared", work, adapter)
    assert "10 changed" in refused(work / "merged", work)


def test_another_base(work: Path, tmp_path: Path) -> None:
    base = export_models.make("Llama", tmp_path / "base", seed=5)
    assert "changed" in refused(work / "shared", tmp_path)
    lora_tools.extract(base, work / "base", tmp_path / "a", rank=2)
    again: dict[str, Any] = {"graph": work / "shared", "no_verify": True}
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.export(work / "base", tmp_path / "e", adapters=[tmp_path / "a"], **again)
    assert not (tmp_path / "e").exists()
    lora_tools.export(
        work / "base", tmp_path / "e", adapters=[tmp_path / "a"], allow_other_base=True, **again
    )


def test_a_checkpoint_in_four_bits(work: Path, tmp_path: Path) -> None:
    """The graph of a dequantized checkpoint is that of the four-bit one."""
    lora_tools.quantize(work / "base", tmp_path / "base")
    lora_tools.dequantize(tmp_path / "base", tmp_path / "plain")
    lora_tools.export(tmp_path / "plain", tmp_path / "e", graph=work / "shared", no_verify=True)
    report = lora_tools.verify(tmp_path / "e", against=tmp_path / "base")
    assert report.totals["verified"]
    assert "changed" in refused(tmp_path / "e", work)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8"])
def test_quantized_weights(work: Path, tmp_path: Path, scheme: str) -> None:
    """They are quantized again, and compared by bytes; the graph is run on what they stand for."""
    again: dict[str, Any] = {"graph": work / "shared", "no_verify": True, scheme: True}
    lora_tools.export(work / "base", tmp_path / "e", **again)
    report = lora_tools.verify(tmp_path / "e", against=work / "base")
    assert "35 of 35 quantized ones byte for byte as export writes them" in report.totals["verdict"]
    assert report.totals["verified"]
    least, most = {"nf4": (0.08, 0.1), "int4": (0.05, 0.1), "int8": (1e-3, 1e-2)}[scheme]
    assert least < report.totals["quantization_error"] < most
    shown = ["verify", str(tmp_path / "e"), "--against", str(work / "base"), "--weights-only"]
    assert run(shown) == 0
    adapter = work / "adapter"
    said = refused(tmp_path / "e", work, adapter, weights_only=True)
    assert "10 different" in said
    assert "the adapter is not applied" in said
    lora_tools.export(work / "base", tmp_path / "a", adapters=[(adapter, 2)], **again)
    said = refused(tmp_path / "a", work, adapter, weights_only=True)
    assert "the adapter is applied twice" in said
    assert "10 different" in refused(tmp_path / "a", work, weights_only=True)
    twice = lora_tools.verify(
        tmp_path / "a", against=work / "base", adapters=[(adapter, 2)], weights_only=True
    )
    assert {f.action for f in twice.plan} == {"same", "copied", "constant"}
    model = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    where = place(model, Q)
    with (tmp_path / "e" / where["location"].value).open("r+b") as file:
        file.seek(int(where["offset"].value) + 7)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x50]))
    said = refused(tmp_path / "e", work, weights_only=True)
    assert f"{Q}: MatMul" in said
    assert "1 of 1,024 numbers differ by more" in said


# ----------------------------------------------------------------------------------- faults

Model = onnx.ModelProto


def spoilt(work: Path, to: Path, change: Callable[[Model, Path], object]) -> Path:
    """The bundled export with its graph, or a file beside it, changed."""
    shutil.copytree(work / "bundled", to)
    model = onnx.load(to / "model.onnx", load_external_data=False)
    change(model, to)
    (to / "model.onnx").write_bytes(model.SerializeToString())
    return to


def weight(model: Model, name: str) -> onnx.TensorProto:
    return next(i for i in model.graph.initializer if i.name == name)


def place(model: Model, name: str) -> dict[str, onnx.StringStringEntryProto]:
    return {entry.key: entry for entry in weight(model, name).external_data}


def a_byte(model: Model, folder: Path) -> None:
    with (folder / "model.onnx_data").open("r+b") as file:
        file.seek(int(place(model, Q)["offset"].value) + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))


def taken_for_another(model: Model, folder: Path) -> None:
    other = place(model, Q.replace(".1.", ".2."))
    place(model, Q)["offset"].value = other["offset"].value


def said(model: Model, key: str, value: str) -> None:
    place(model, Q)[key].value = value


def without_a_layer(model: Model, folder: Path) -> None:
    for initializer in list(model.graph.initializer):
        if initializer.name.startswith("model.layers.3."):
            model.graph.initializer.remove(initializer)


def apart(model: Model, folder: Path) -> None:
    """An output head of its own, which the base ties to the embedding."""
    head = onnx.numpy_helper.from_array(torch.randn(96, 32).numpy(), "lm_head.weight")
    model.graph.initializer.append(head)


FAULTS: dict[str, tuple[Callable[[Model, Path], object], str]] = {
    "a byte": (
        a_byte,
        f"{Q}: no adapter acts on it, but it differs from the base in 1 of its 1,024",
    ),
    "another's place": (taken_for_another, f"worst is {Q}"),
    "cut short": (lambda m, f: os.truncate(f / "model.onnx_data", 90_000), "broken"),
    "no data": (lambda m, f: (f / "model.onnx_data").unlink(), "missing or empty"),
    "another length": (lambda m, f: said(m, "length", "4092"), f"{Q}: 4092 bytes"),
    "past the end": (lambda m, f: said(m, "offset", "99999999"), f"{Q}: bytes 99999999"),
    "outside the folder": (
        lambda m, f: said(m, "location", "../base/model.safetensors"),
        "outside the folder",
    ),
    "another shape": (lambda m, f: weight(m, Q).dims.__setitem__(0, 16), "instead of"),
    "turned": (
        lambda m, f: weight(m, "model.layers.1.mlp.up_proj.weight").dims.reverse(),
        "is [32, 48], but should be [48, 32]",
    ),
    "a layer less": (
        without_a_layer,
        "model.layers.3.input_layernorm.weight: the graph has others of this kind",
    ),
    "a head apart": (apart, "lm_head.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(work: Path, tmp_path: Path, fault: str) -> None:
    change, says = FAULTS[fault]
    path = spoilt(work, tmp_path / "e", change)
    assert says in refused(path, work, weights_only=True)


def test_wired_wrongly(work: Path, tmp_path: Path) -> None:
    """Every weight is right; only running it shows that two of them are taken for each other."""

    def cross(model: Model, folder: Path) -> None:
        other = Q.replace(".1.", ".2.")
        names = {Q: other, other: Q}
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = names.get(name, name)

    path = spoilt(work, tmp_path / "e", cross)
    lora_tools.verify(path, against=work / "base", weights_only=True)
    told = refused(path, work)
    assert "not the checkpoint: " in told
    assert "differs from torch by" in told


def test_names_that_say_nothing(work: Path, tmp_path: Path) -> None:
    """A weight under another name is known by its numbers; one in another form is not."""

    def rename(model: Model, folder: Path) -> None:
        weight(model, Q).name = "onnx::MatMul_1"
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = "onnx::MatMul_1" if name == Q else name

    report = lora_tools.verify(spoilt(work, tmp_path / "e", rename), against=work / "base")
    [fate] = [f for f in report.plan if f.tensor == "onnx::MatMul_1"]
    assert (fate.action, fate.reason) == ("same", Q)

    def both(model: Model, folder: Path) -> None:
        rename(model, folder)
        with (folder / "model.onnx_data").open("r+b") as file:
            file.seek(int(place(model, "onnx::MatMul_1")["offset"].value))
            file.write(bytes(4))

    path = spoilt(work, tmp_path / "f", both)
    with pytest.raises(MismatchError, match=r"1 weight, such as onnx::MatMul_1 .* must be run"):
        lora_tools.verify(path, against=work / "base", weights_only=True)
    assert "differs from torch by" in refused(path, work)


def test_other_exporters(legacy: Path) -> None:
    report = lora_tools.verify(legacy / "model.onnx", against=legacy / "base")
    transposed = [f for f in report.plan if f.reason.endswith(", transposed")]
    assert len(transposed) == 5 * 6
    assert all(f.tensor.startswith("onnx::MatMul") for f in transposed)
    assert report.totals["weights_unnamed"] == 0
    assert "not in the graph: pooler.dense.bias, pooler.dense.weight" in report.notes
    export_models.make("BERT", legacy / "other", seed=3)
    with pytest.raises(QualityGateError, match="changed"):
        lora_tools.verify(legacy / "model.onnx", against=legacy / "other")


def test_what_is_no_model(work: Path, tmp_path: Path) -> None:
    for name, data in (("empty.onnx", b""), ("text.onnx", b"not a model at all, but text")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="not an ONNX model"):
            lora_tools.verify(tmp_path / name, against=work / "base")
        with pytest.raises(CheckpointError, match="not an ONNX model"):
            lora_tools.inspect(tmp_path / name)
    shutil.copy(work / "bundled" / "model.onnx", tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="several models"):
        lora_tools.verify(tmp_path, against=work / "base")
    with pytest.raises(UsageError, match="max_error is for quantized weights"):
        lora_tools.verify(work / "shared", against=work / "base", max_error=0.1)
    with pytest.raises(UsageError, match=r"encoder_model.onnx"):
        lora_tools.verify(work / "shared", against=work / "base", task="seq2seq")
    bare = work / "base" / "model.safetensors"
    with pytest.raises(UsageError, match="use weights_only=True"):
        lora_tools.verify(work / "shared", against=bare)
    lora_tools.verify(work / "shared", against=bare, weights_only=True)


def test_exit_codes(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(work / "base")
    assert run(["verify", str(work / "shared"), "--against", base]) == 0
    assert "its weights are those of the checkpoint, bit for bit" in capfd.readouterr().out
    merged = [str(work / "merged"), "--against", base, "--weights-only", "--json", "-q"]
    assert run(["verify", *merged]) == 3
    printed, told = capfd.readouterr()
    assert json.loads(printed)["totals"]["same"] is False
    assert "Error: its weights are not those of the checkpoint" in told


# -------------------------------------------------------------------------------- inspect


def test_inspect_a_model(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = lora_tools.inspect(work / "merged")
    assert report.totals["kind"] == "ONNX model"
    facts = report.totals["graphs"]["model.onnx"]
    assert facts["opset"] == {"ai.onnx": 23}
    assert facts["inputs"][0] == "input_ids: INT64 [batch, sequence]"
    assert facts["outputs"][0] == "logits: FLOAT [batch, sequence, 96]"
    assert facts["operators"]["Gemm"] > 30
    assert sum(facts["operators"].values()) == facts["nodes"]
    assert facts["custom_domains"] == []
    stored = {t.tensor: t for t in report.stored}
    checkpoint = {
        t.tensor: t for t in lora_tools.inspect(work / "merged" / "model.safetensors").stored
    }
    assert {n: (t.hash, t.file) for n, t in stored.items() if n in checkpoint} == {
        n: (t.hash, "model.safetensors") for n, t in checkpoint.items()
    }
    made = report.totals["metadata"]["model.onnx"]
    assert made["command"] == "export"
    assert made["base_digest"] == lora_tools.inspect(work / "base").inputs[0].digest
    assert made["adapter_digests"].endswith("=1")
    assert not report.notes
    assert run(["inspect", str(work / "merged")]) == 0
    assert "opset ai.onnx 23; made by loratools" in capfd.readouterr().out


def test_inspect_finds_what_is_odd(work: Path, tmp_path: Path) -> None:
    def odd(model: Model, folder: Path) -> None:
        said(model, "offset", "99999999")
        extra = onnx.numpy_helper.from_array(torch.ones(3, 4).numpy(), "extra")
        model.graph.initializer.append(extra)
        model.graph.node.append(onnx.helper.make_node("Gelu", ["logits"], ["x"], domain="mine"))
        (folder / "old.onnx_data").write_bytes(b"x")

    report = lora_tools.inspect(spoilt(work, tmp_path / "e", odd))
    assert any(note.startswith(f"{Q}: bytes 99999999") for note in report.notes)
    assert "model.onnx: extra is used by no node" in report.notes
    assert "old.onnx_data: no graph uses it" in report.notes
    facts = report.totals["graphs"]["model.onnx"]
    assert facts["custom_domains"] == ["mine"]
    assert facts["operators"]["mine.Gelu"] == 1
    assert iotools.tree(work / "bundled")
