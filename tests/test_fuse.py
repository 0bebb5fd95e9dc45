"""Decoders as few operators: each family's graph against torch, and rules that know when not to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import lora_tools
from lora_tools.errors import MismatchError
from lora_tools.onnx.fuse.attention import Unfused, one_operator
from lora_tools.onnx.fuse.linears import fuse_linears
from lora_tools.onnx.fuse.norms import fuse_norms
from lora_tools.onnx.fuse.rotary import fuse_rotary

from . import export_models
from .test_export_table import SHARED
from .traced import Traced

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION, ROTARY, NORMS = "attention", "rotary_embeddings", "norms"


def operators(folder: Path) -> list[str]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return [node.op_type for node in model.graph.node]


# ------------------------------------------------------------------------------------ families

# By layer: two rotations, and the norms of a layer; one more norm at the end.
FUSED = {
    "Llama": {ATTENTION: 5, ROTARY: 10, NORMS: 11},
    "GPT-2": {ATTENTION: 5},
    "Gemma-3 of eight layers": {ATTENTION: 8, ROTARY: 16, NORMS: 49},
    "Qwen3": {ATTENTION: 2, ROTARY: 4, NORMS: 9},
    "Gemma-2, softcap": {ATTENTION: 2, ROTARY: 4, NORMS: 9},
    "Phi, partial rotary": {ATTENTION: 1, ROTARY: 2},
    "GPT-NeoX": {ATTENTION: 1, ROTARY: 2},
    "Falcon, one key": {ATTENTION: 1, ROTARY: 2},
    "gpt-oss, sinks": {ROTARY: 4, NORMS: 5},
    "DeepSeek-V3": {ATTENTION: 1, NORMS: 5},
    "Bloom": {},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("Llama", "Qwen3") else pytest.mark.sweep(0))
        for name in FUSED
    ],
)
def test_a_family_is_fused_and_is_torch(name: str, traced: Callable[[str], Traced]) -> None:
    """Export has compared it with torch: with padding on the left, with a past, past a window."""
    made = traced(name)
    totals = made.report["totals"]
    assert totals["verified"]
    assert totals["tokens_same"] == totals["tokens_generated"] == 16
    assert totals.get("fused", {}) == FUSED[name]
    said = [note for note in made.report["notes"] if "not fused" in note]
    assert bool(said) is (ATTENTION not in FUSED[name] or name == "DeepSeek-V3")
    if name == "gpt-oss, sinks":
        assert "s_aux" in said[0]


ENCODERS = {
    "BERT": {ATTENTION: 5},
    "RoBERTa": {ATTENTION: 5},
    "ViT": {ATTENTION: 5},
    "Whisper": {ATTENTION: 5},
    "T5": {NORMS: 19},
    "DeBERTa-v2": {},
    "ConvNeXt": {},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SHARED else pytest.mark.sweep(0)) for name in ENCODERS],
)
def test_encoders_are_fused_and_are_torch(name: str, traced: Callable[[str], Traced]) -> None:
    """Export has compared it with torch, with padding on the right."""
    made = traced(name)
    totals = made.report["totals"]
    assert totals["verified"]
    assert totals.get("fused", {}) == ENCODERS[name]
    said = any("not fused: attention" in note for note in made.report["notes"])
    assert said is (name in ("T5", "DeBERTa-v2"))
    for path in made.graph.glob("*.onnx"):  # what nothing is fused in needs no new runtime
        model = onnx.load(path, load_external_data=False)
        [opset] = [entry.version for entry in model.opset_import if not entry.domain]
        assert opset == (23 if ENCODERS[name] else 20)


def test_attention_has_its_cache_inside(traced: Callable[[str], Traced]) -> None:
    made = traced("Llama")
    model = onnx.load(made.graph / "model.onnx", load_external_data=False)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [23]
    layers = [node for node in model.graph.node if node.op_type == "Attention"]
    for number, node in enumerate(layers):
        assert node.input[4:] == [f"past_key_values.{number}.{what}" for what in ("key", "value")]
        assert node.output[1:] == [f"present.{number}.{what}" for what in ("key", "value")]
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Softmax", "Sqrt", "Neg", "Reciprocal"}


def test_linear_layers_take_weights_as_they_are_stored(traced: Callable[[str], Traced]) -> None:
    """A runtime need not transpose them when it loads the graph; of a layer only queries, keys,
    values and what attention makes are no rows."""
    folder = traced("Llama").graph
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    weights = {i.name for i in model.graph.initializer if i.external_data and len(i.dims) == 2}
    nodes = model.graph.node
    assert weights == {n.input[1] for n in nodes if n.op_type == "Gemm"} | {nodes_of_rows(model)}
    assert not any(n.op_type == "Transpose" and n.input[0] in weights for n in nodes)
    assert operators(folder).count("Gemm") == 5 * 7 + 1
    assert operators(folder).count("Reshape") == 5 * 4 + 8  # and before, between and after


def nodes_of_rows(model: onnx.ModelProto) -> str:
    """The weight whose rows are looked up."""
    [name] = [node.input[0] for node in model.graph.node if node.op_type == "Gather"]
    return str(name)


def test_biases_are_added_by_linear_layers(traced: Callable[[str], Traced]) -> None:
    model = onnx.load(traced("BERT").graph / "model.onnx", load_external_data=False)
    vectors = {i.name for i in model.graph.initializer if i.external_data and len(i.dims) == 1}
    products = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert len(products) == 5 * 6
    assert all(node.input[2] in vectors for node in products)
    assert not any(vectors & {*node.input} for node in model.graph.node if node.op_type == "Add")


def test_unfused_is_what_torch_traces(traced: Callable[[str], Traced], tmp_path: Path) -> None:
    base = export_models.one_layer("Llama", tmp_path / "base")
    report = lora_tools.export(base, tmp_path / "plain", no_fuse=True, no_verify=True)
    assert "fused" not in report.totals
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & {
        *operators(tmp_path / "plain")
    }
    made = traced("Llama")
    again = lora_tools.export(made.base, tmp_path / "again", graph=made.graph, no_verify=True)
    assert again.totals["fused"] == FUSED["Llama"]
    with pytest.raises(MismatchError, match="no_fuse"):
        lora_tools.export(made.base, tmp_path / "no", graph=made.graph, no_fuse=True)
    told = lora_tools.export(
        base, tmp_path / "old", opset=20, graph=tmp_path / "plain", no_verify=True
    )
    assert any("not fused" in note for note in told.notes)


def test_a_row_of_padding_stays_finite(traced: Callable[[str], Traced]) -> None:
    """A row of which nothing is seen: what comes of it is nobody's, and the others are right."""
    session = onnxruntime.InferenceSession(traced("Llama").graph / "model.onnx")
    ids = np.arange(12).reshape(2, 6) + 5
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.array([[1] * 6, [0] * 6]),
        "position_ids": np.tile(np.arange(6), (2, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            given[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    both = session.run(None, given)
    assert all(np.isfinite(each).all() for each in both)
    alone = session.run(None, {name: each[:1] for name, each in given.items()})
    assert np.abs(alone[0] - both[0][:1]).max() < 1e-5


def test_the_registry_is_as_it_was() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = export_models.ARCHITECTURES["Llama"]()
    with pytest.raises(Unfused, match="without a mask"), one_operator(model):  # noqa: PT012
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        head = torch.zeros(1, 4, 3, 8)
        ALL_ATTENTION_FUNCTIONS["sdpa"](model.model.layers[0].self_attn, head, head, head, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert model.config._attn_implementation == "sdpa"


# --------------------------------------------------------------------------------------- rules

NORM = """<ir_version: 10, opset_import: ["" : 23]>
g (float[2,3,8] x, float[{weight}] w) => (float[2,3,8] y)
<float two = {{{power}}}, int64[1] last = {{{axis}}}, float eps = {{0.001}}> {{
  square = Pow (x, two)
  mean = ReduceMean <keepdims = 1> (square, last)
  sum = Add (mean, eps)
  root = Sqrt (sum)
  over = Reciprocal (root)
  normal = Mul ({scaled}, over)
  y = Mul ({order})
}}"""
ROTATION = """<ir_version: 10, opset_import: ["" : 23]>
g (float[2,4,3,8] x, float[2,3,4] a) => (float[2,4,3,8] y)
<int64[1] heads = {{1}}, int64[1] zero = {{0}}, int64[1] half = {{{half}}},
 int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}, int64[1] one = {{1}}> {{
  both = Concat <axis = -1> (a, {other})
  c = Cos (both)
  s = Sin (both)
  cos = Unsqueeze (c, heads)
  sin = Unsqueeze (s, heads)
  first = Slice (x, zero, half, last, one)
  second = Slice (x, half, end, last, one)
  minus = Neg ({negative})
  turned = Concat <axis = -1> ({joined})
  straight = Mul (x, cos)
  across = Mul (turned, sin)
  y = Add (straight, across)
}}"""


def parsed(text: str) -> ir.Model:
    """A graph with the shapes of all values and the constants known."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert isinstance(model, ir.Model)
    return model


def run(model: ir.Model) -> Any:
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    dice = np.random.default_rng(0)
    given = {i.name: dice.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
    return session.run(None, given)[0]


def fused(text: str, rule: Callable[[ir.Graph], None], operator: str) -> bool:
    """Whether the rule puts its operator in, which must not change what the graph gives."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = parsed(text)
    before = run(model)
    rule(model.graph)
    RemoveUnusedNodesPass()(model)
    assert np.abs(run(model) - before).max() < 1e-5
    return operator in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        (True, {}),
        (True, {"order": "w, normal"}),
        (False, {"power": "4.0"}),
        (False, {"axis": "1"}),
        (False, {"weight": "1"}),
        (False, {"scaled": "square"}),
    ],
    ids=str,
)
def test_norms(wanted: bool, change: dict[str, str]) -> None:
    usual = {"weight": "8", "power": "2.0", "axis": "-1", "scaled": "x", "order": "normal, w"}
    assert fused(NORM.format(**usual | change), fuse_norms, "RMSNormalization") is wanted


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        (True, {}),
        (False, {"other": "minus_a"}),
        (False, {"negative": "first", "joined": "minus, second"}),
        (False, {"joined": "first, minus"}),
    ],
    ids=str,
)
def test_rotations(wanted: bool, change: dict[str, str]) -> None:
    usual = {"half": "4", "other": "a", "negative": "second", "joined": "minus, first"}
    text = ROTATION.format(**usual | change).replace("  both", "  minus_a = Neg (a)\n  both")
    assert fused(text, fuse_rotary, "RotaryEmbedding") is wanted


LINEAR = """<ir_version: 10, opset_import: ["" : 23]>
g (float[B,S,4] x, float[B,S,6] other, float[1,S,6] row, float[B,S,1] narrow) => (float[{out}] y)
<float[6,4] w = {{{numbers}}}, float[6] b = {{1, 2, 3, 4, 5, 6}}, float two = {{2.0}},
 float[6] scale = {{1, 2, 1, 2, 1, 2}}, int64[3] form = {{0, -1, 2}}> {{
  turned = Transpose <perm = [1, 0]> (w)
  product = MatMul (x, turned)
  {body}
}}"""
BODIES = {
    "alone": ("y = Identity (product)", "B,S,6", 2),
    "the output itself": ("y = Add (product, b)", "B,S,6", 2),
    "a bias before": ("y = Add (b, product)", "B,S,6", 2),
    "a product in two sums": ("z = Add (product, b)\n y = Mul (product, z)", "B,S,6", 2),
    "by element": ("z = Sigmoid (product)\n y = Mul (z, product)", "B,S,6", 2),
    "with numbers": ("z = Mul (product, two)\n y = Pow (z, two)", "B,S,6", 2),
    "with another": ("y = Add (other, product)", "B,S,6", 3),
    "with a column": ("y = Mul (narrow, product)", "B,S,6", 3),
    "with what is broadcast": ("y = Add (row, product)", "B,S,6", 2),
    "a norm": ("y = LayerNormalization <axis = -1> (product, scale, b)", "B,S,6", 2),
    "a norm, axis 2": ("y = RMSNormalization <axis = 2> (product, scale)", "B,S,6", 2),
    "a norm over two axes": ("y = LayerNormalization <axis = 1> (product, scale)", "B,S,6", 2),
    "taken apart": ("z = Relu (product)\n y = Reshape (z, form)", "B,T,2", 3),
}


@pytest.mark.parametrize("body", BODIES)
def test_linear_layers(body: str) -> None:
    """The same, whatever is around a product, and no more shapes than it takes."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    code, out, shapes = BODIES[body]
    numbers = ", ".join(str(n % 5 - 2) for n in range(24))
    model = parsed(LINEAR.format(body=code, out=out, numbers=numbers))
    dice = np.random.default_rng(0)
    sizes = {"x": (2, 3, 4), "other": (2, 3, 6), "row": (1, 3, 6), "narrow": (2, 3, 1)}
    given = {name: dice.standard_normal(size).astype(np.float32) for name, size in sizes.items()}

    def found() -> Any:
        text = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(text).run(None, given)[0]

    before = found()
    fuse_linears(model.graph, ["w", "b", "scale"])
    RemoveUnusedNodesPass()(model)
    assert np.abs(found() - before).max() < 1e-5
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Gemm") == 1
    assert "MatMul" not in kinds
    assert kinds.count("Reshape") == shapes
