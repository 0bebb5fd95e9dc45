"""Graphs that compute in half precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError, QualityGateError, UsageError
from lora_tools.onnx.in_torch import InTorch

from . import export_models, models
from .traced import session

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("remembered_traces")]
pytest.importorskip("onnxruntime")
IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama stored in float16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    torch.manual_seed(0)
    model = export_models.ALL["Llama"]()
    models.perturb(model, 0.1, 0)
    return models.save(model.half().eval(), folder)


@pytest.fixture(scope="module")
def exported(base: Path, remembered_traces: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("half") / "graph"
    return out, lora_tools.export(base, out, compute_dtype="float16")


def graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def decode(folder: Path) -> Any:
    running = session(folder / "model.onnx")
    inputs: dict[str, Any] = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.arange(IDS.shape[1])[None],
    }
    for value in running.get_inputs():
        if value.name.startswith("past_key_values."):
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            inputs[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
    return running.run(["logits"], inputs)[0]


def test_weights_of_that_dtype_are_read_without_a_cast(base: Path, exported: Any) -> None:
    """Shared with the checkpoint's file, and norms and softmax in float32."""
    out, report = exported
    model = graph(out)
    half = onnx.TensorProto.FLOAT16
    weights = [i for i in model.graph.initializer if i.external_data]
    assert {i.data_type for i in weights} == {half}
    assert {e.value for i in weights for e in i.external_data if e.key == "location"} == {
        "model.safetensors"
    }
    assert not [n for n in model.graph.node if n.name.startswith("cast:")]
    kinds = Counter(n.op_type for n in model.graph.node)
    assert (kinds["Attention"], kinds["RMSNormalization"], kinds["RotaryEmbedding"]) == (5, 11, 10)
    for node in model.graph.node:
        said = {a.name: a.i for a in node.attribute}
        if node.op_type == "Attention":
            assert said["softmax_precision"] == onnx.TensorProto.FLOAT
        if node.op_type == "RMSNormalization":
            assert said.get("stash_type", 1) == onnx.TensorProto.FLOAT
    assert {v.type.tensor_type.elem_type for v in model.graph.output} == {onnx.TensorProto.FLOAT}
    totals = report.totals
    assert totals["max_relative_difference"] < totals["allowed_relative_difference"] < 5e-5
    assert 1e-4 < totals["half_relative_difference"] < totals["half_allowed_relative_difference"]
    assert totals["half_conditioning"] < 0.01
    assert totals["tokens_same"] == totals["tokens_generated"] == 16
    with torch.no_grad():
        wanted = models.load(base)(torch.from_numpy(IDS)).logits.float().numpy()
    assert np.abs(decode(out) - wanted).max() < 0.01 * np.abs(wanted).max()


def test_inputs_and_outputs_too(base: Path, exported: Any, tmp_path: Path) -> None:
    out = tmp_path / "io"
    report = lora_tools.export(base, out, compute_dtype="float16", half_io=True)
    values = (*graph(out).graph.input, *graph(out).graph.output)
    kinds = {v.type.tensor_type.elem_type for v in values}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert report.totals["half_relative_difference"] > 0
    made = decode(out)
    assert made.dtype == np.float16
    assert np.allclose(made.astype(np.float32), decode(exported[0]), rtol=0, atol=1e-3)
    assert lora_tools.verify(out, against=base).totals["half_conditioning"] > 0
    with pytest.raises(MismatchError, match="half_io"):
        lora_tools.export(base, tmp_path / "no", compute_dtype="float16", graph=out)


def test_used_again(base: Path, exported: Any, tmp_path: Path) -> None:
    """For weights in another dtype, which get a Cast; and for another precision not."""
    out = tmp_path / "again"
    options: Any = {"graph": exported[0], "dtype": "bfloat16"}
    report = lora_tools.export(base, out, compute_dtype="float16", **options)
    assert report.totals["verified"]
    casts = [n for n in graph(out).graph.node if n.name.startswith("cast:")]
    assert {n.attribute[0].i for n in casts} == {onnx.TensorProto.FLOAT16}
    back = tmp_path / "back"
    lora_tools.export(base, back, compute_dtype="float16", graph=out, no_verify=True)
    ours, first = graph(back), graph(exported[0])
    assert list(ours.graph.node) == list(first.graph.node)
    assert list(ours.graph.initializer) == list(first.graph.initializer)
    with pytest.raises(MismatchError, match=r"computes in float16,.*float32"):
        lora_tools.export(base, tmp_path / "no", graph=exported[0])


def test_bfloat16_is_not_silently_unverified(tmp_path: Path) -> None:
    """ONNX Runtime has no kernels of it for CPUs: it is checked in float32, and that is said."""
    base, out = export_models.one_layer("Llama", tmp_path / "base"), tmp_path / "out"
    report = lora_tools.export(base, out, compute_dtype="bfloat16", dtype="bfloat16")
    [note] = [n for n in report.notes if "bfloat16" in n]
    assert "could not be run" in note
    assert "NOT_IMPLEMENTED" in note
    assert "half_conditioning" not in report.totals
    assert report.totals["max_relative_difference"] < 5e-5
    assert not [n for n in graph(out).graph.node if n.name.startswith("cast:")]


def test_a_wrong_graph_is_found(base: Path, exported: Any, tmp_path: Path) -> None:
    """Below what half precision rounds, and above."""
    out = tmp_path / "out"
    out.mkdir()
    for path in exported[0].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    model = graph(out)
    last = [n for n in model.graph.node if n.op_type == "RMSNormalization"][-1]
    [epsilon] = [a for a in last.attribute if a.name == "epsilon"]
    epsilon.f = 1e-4
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(QualityGateError, match="differs from torch") as caught:
        lora_tools.verify(out, against=base)
    totals: Any = caught.value.report.totals  # type: ignore[union-attr]
    assert totals["max_relative_difference"] < 1e-3 < totals["half_allowed_relative_difference"]


def test_half_precision_that_is_worse_than_torch(
    base: Path, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_tools.onnx import half

    monkeypatch.setattr(half, "MULTIPLE", 0.1)
    monkeypatch.setattr(half, "ROUNDINGS", 0)
    with pytest.raises(QualityGateError, match="in half precision logits"):
        lora_tools.verify(exported[0], against=base)


def test_what_overflows_in_torch_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = InTorch._outputs

    def overflowing(self: InTorch, result: Any, given: Any) -> Any:
        outputs = own(self, result, given)
        if self._dtype == torch.float16:
            outputs["logits"][..., 0] = np.inf
        return outputs

    monkeypatch.setattr(InTorch, "_outputs", overflowing)
    with pytest.raises(CheckpointError, match="bfloat16 has the range"):
        lora_tools.export(base, tmp_path / "out", compute_dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"half_io": True}, "half_io"),
        ({"compute_dtype": "float16", "int4": True}, "int4"),
        ({"compute_dtype": "bfloat16", "nf4": True}, "nf4"),
        ({"compute_dtype": "float16", "runtime_adapters": True}, "runtime_adapters"),
        ({"compute_dtype": "float8"}, "compute_dtype"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(
    options: dict[str, Any], says: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        lora_tools.export(base, tmp_path / "out", dry_run=True, **options)


@pytest.mark.sweep(0)
@pytest.mark.parametrize("name", ["BERT", "Gemma-3", "T5", "Whisper", "ViT", "Mixtral"])
def test_other_kinds(name: str, tmp_path: Path) -> None:
    base = export_models.make(name, tmp_path / "base")
    totals = lora_tools.export(base, tmp_path / "out", compute_dtype="float16").totals
    assert totals["verified"]
    assert totals["half_relative_difference"] <= totals["half_allowed_relative_difference"] < 0.02


def test_constants_that_are_rounded() -> None:
    from lora_tools.onnx.precision import _is_rounded

    for kind in (np.float16, ml_dtypes.bfloat16):
        plain = np.array([0, 1, -0.5, 3, ml_dtypes.finfo(kind).min, -np.inf], kind)
        assert not _is_rounded(plain.astype(np.float32))
        assert _is_rounded(np.array([32**0.5], kind).astype(np.float32))
