"""Quantized exports: the graph runs the very bytes that were written, and says what they cost."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import (
    CheckpointError,
    MismatchError,
    OutputError,
    QualityGateError,
    UsageError,
)
from lora_tools.formats import output
from lora_tools.onnx.quantized_weights import stored_weights
from lora_tools.onnx.schemes import AFFINE, SCHEMES

from . import iotools, models
from .test_error_feedback import MARK, moments_of, output_error
from .traced import Traced
from .traced import session as one_thread

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")

# Whose graphs other tests use too; "Llama" is tied.
KINDS = ("llama", "Llama", "BERT", "gpt2")
OPERATORS = {"nf4": "MatMulBnb4", "int8": "MatMulNBits", "int4": "MatMulNBits"}
# Linear layers that are no output head: seven a layer of Llama, six of BERT, four of GPT-2.
LAYERS = {"llama": 14, "Llama": 35, "BERT": 30, "gpt2": 8}


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]
) -> dict[str, Path]:
    """Folders of models with plain graphs in them, which the tests use again."""
    root = tmp_path_factory.mktemp("plain")
    for kind in KINDS:
        base = shutil.copytree(traced(kind).base, root / kind)
        iotools.tokenizer(base, models.VOCAB)
        lora_tools.export(base, base, graph=traced(kind).graph, no_verify=True)
    return {kind: root / kind for kind in KINDS}


def export(plain: Path, out: Path, scheme: str = "", **options: Any) -> lora_tools.Report:
    """An export that uses the folder's own graph again."""
    flags = {scheme: True} if scheme else {}
    return lora_tools.export(plain, out, graph=plain, **flags, **options)


def graph(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def located(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Of every initializer outside the graph: the file it lies in, and its bytes."""
    found = {}
    for each in graph(folder).initializer:
        if each.external_data:
            at = {e.key: e.value for e in each.external_data}
            data = (folder / at["location"]).read_bytes()
            start = int(at["offset"])
            found[each.name] = at["location"], data[start : start + int(at["length"])]
    return found


IDS = np.arange(2 * 9).reshape(2, 9) * 7 % models.VOCAB


def run(folder: Path) -> np.ndarray:
    session = one_thread(folder / "model.onnx")
    given = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.arange(9)[None].repeat(2, 0),
        "token_type_ids": np.zeros_like(IDS),
    }
    shapes = {i.name: i.shape for i in session.get_inputs()}
    given |= {
        name: np.zeros((2, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if "past" in name
    }
    return session.run(None, {name: given[name] for name in shapes})[0]


def in_torch(folder: Path) -> np.ndarray:
    with torch.no_grad():
        result = models.load(folder)(input_ids=torch.from_numpy(IDS))
    return result[0].numpy()


# ------------------------------------------------------------------------------------ the graphs


@pytest.mark.sweep(2)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer(kind: str, scheme: str, plain: dict[str, Path], tmp_path: Path) -> None:
    report = export(plain[kind], tmp_path / "out", scheme)
    t = report.totals
    assert t["verified"]
    assert t["max_relative_difference"] < 1e-5
    assert 0 < t["loss_max_relative_difference"] < (0.1 if scheme == "int8" else 1.5)
    nodes = [n for n in graph(tmp_path / "out").node if n.op_type == OPERATORS[scheme]]
    assert len(nodes) == LAYERS[kind]
    quantized = {f.tensor for f in report.plan if f.action == "quantize"}
    pooler = {"pooler.dense.weight"} if scheme == "nf4" else set()  # in the folder, in no graph
    assert {n.input[1] for n in nodes} == quantized - pooler
    kept = {f.tensor: f.reason for f in report.plan if f.action == "copy"}
    if kind == "llama":
        assert kept["lm_head.weight"].startswith("output head")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in names) == (scheme == "nf4")
    lost = np.abs(run(tmp_path / "out") - in_torch(plain[kind])).max()
    assert 0 < lost < 2
    assert "com.microsoft" in {
        o.domain
        for o in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).opset_import
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nf4_is_what_quantize_writes(kind: str, plain: dict[str, Path], tmp_path: Path) -> None:
    """The same file; the graph points into it, and gives what transformers makes of it."""
    export(plain[kind], tmp_path / "out", "nf4", no_verify=True)
    lora_tools.quantize(plain[kind], tmp_path / "folder")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    stored = models.tensors(tmp_path / "folder")
    found = located(tmp_path / "out")
    packed = [n for n in found if n + ".absmax" in found]
    assert len(packed) == LAYERS[kind]
    for weight in packed:
        assert found[weight] == (name, stored[weight].numpy().tobytes())
        assert found[weight + ".absmax"][0] == "model.onnx_data"
    lora_tools.dequantize(tmp_path / "out", tmp_path / "plain", dtype="float32")
    assert np.abs(run(tmp_path / "out") - in_torch(tmp_path / "plain")).max() < 2e-5


@pytest.mark.parametrize("scheme", ["nf4", *AFFINE])
def test_ours_is_the_kernels_reading(scheme: str, tmp_path: Path) -> None:
    """What ``dequantized`` makes of the bytes is what ONNX Runtime multiplies with: a product with
    the identity, of a size that fills no block."""
    from lora_tools.linalg import codebooks, nf4
    from lora_tools.onnx.quantized import quantizer_of
    from lora_tools.onnx.quantized_weights import dequantized, exact

    w = torch.randn(33, 65, generator=torch.Generator().manual_seed(0))
    attributes: dict[str, int] = {"N": 33, "K": 65}
    if scheme == "nf4":
        arrays = nf4.quantize(w.view(-1), codebooks.CODEBOOKS["nf4"], 64)
        attributes |= {"block_size": 64, "quant_type": 1}
    else:
        arrays = quantizer_of(AFFINE[scheme]).qbits_block_quant(w.T.contiguous().numpy())
        attributes |= {"block_size": 32, "bits": AFFINE[scheme].bits, "accuracy_level": 4}
    initializers = []
    for name, array in zip(("w", "w.1", "w.2"), arrays, strict=False):
        (tmp_path / name).write_bytes(np.ascontiguousarray(array).tobytes())
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=kind)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", 0), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    node = onnx.helper.make_node(
        OPERATORS[scheme],
        ["x", *(i.name for i in initializers)],
        ["y"],
        domain="com.microsoft",
        **attributes,
    )
    sides = [onnx.helper.make_tensor_value_info(n, 1, ["m", k]) for n, k in (("x", 65), ("y", 33))]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", sides[:1], sides[1:], initializers),
        opset_imports=[
            onnx.helper.make_opsetid("", 20),
            onnx.helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )
    exact(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    session = one_thread(tmp_path / "m.onnx")
    [theirs] = session.run(None, {"x": np.eye(65, dtype=np.float32)})
    [(name, ours)] = dequantized(tmp_path / "m.onnx")
    assert name == "w"
    assert np.abs(theirs.T - ours.numpy()).max() < 1e-6
    assert 0 < (ours - w).abs().max() < 0.6


def test_a_wrong_graph_is_found(plain: dict[str, Path], tmp_path: Path) -> None:
    """Two weights of one shape taken for each other differ by far more than rounding explains."""
    shutil.copytree(plain["llama"], tmp_path / "graph")
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    swap = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            if value in swap:
                node.input[i] = swap[1 - swap.index(value)]
    (tmp_path / "graph" / "model.onnx").write_bytes(model.SerializeToString())
    for scheme in ("nf4", "int4"):
        with pytest.raises(QualityGateError, match="differs from torch"):
            lora_tools.export(
                plain["llama"], tmp_path / "out", graph=tmp_path / "graph", **{scheme: True}
            )
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- four-bit folders


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": False},
        {"quant_type": "fp4", "blocksize": 128},
        {"quant_storage": "bfloat16"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_a_four_bit_folder(options: Any, plain: dict[str, Path], tmp_path: Path) -> None:
    """Its graph is added in place, or it is copied; either runs its own bytes."""
    lora_tools.quantize(plain["Llama"], tmp_path / "q", **options)
    before = iotools.tree(tmp_path / "q")
    report = lora_tools.export(tmp_path / "q", tmp_path / "q", graph=plain["Llama"], nf4=True)
    assert report.totals["verified"]
    assert "loss_max_difference" not in report.totals  # nothing says what it was
    after = iotools.tree(tmp_path / "q")
    assert {k: after[k] for k in before} == before
    made = {"model.onnx"}
    if options.get("double_quant", True):
        made.add("model.onnx_data")
    assert set(after) - set(before) == made
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain", dtype="float32")
    assert np.abs(run(tmp_path / "q") - in_torch(tmp_path / "plain")).max() < 2e-5
    if not options:
        export = lora_tools.export(
            tmp_path / "q", tmp_path / "b", graph=plain["Llama"], nf4=True, weights="bundled"
        )
        assert export.totals["verified"]
        assert not list((tmp_path / "b").glob("*.safetensors"))
        assert np.array_equal(run(tmp_path / "b"), run(tmp_path / "q"))


def test_an_adapter_merged_in_the_same_pass(plain: dict[str, Path], tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    models.adapt(plain["llama"], tmp_path / "a", config)
    options: Any = {"adapters": [tmp_path / "a"], "dtype": "bfloat16"}
    report = export(plain["llama"], tmp_path / "out", "nf4", rtol=1e-4, **options)
    assert report.totals["verified"]
    assert [i.role for i in report.inputs] == ["base", "adapter"]
    lora_tools.quantize(plain["llama"], tmp_path / "q", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "q" / "model.safetensors"
    ).read_bytes()
    report = export(plain["llama"], tmp_path / "eight", "int8", rtol=1e-4, **options)
    assert report.totals["tensors_merged"] == 4
    model = graph(tmp_path / "eight")
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.input, *model.output)}
    floats = [name for name in types if "past" in name or "present" in name or name == "logits"]
    assert {types[name] for name in floats} == {onnx.TensorProto.FLOAT}
    lora_tools.merge(plain["llama"], [tmp_path / "a"], tmp_path / "m")
    assert np.abs(run(tmp_path / "eight") - in_torch(tmp_path / "m")).max() < 0.1


# ------------------------------------------------------------------------------- weights and plans


def test_eight_bits_in_place(plain: dict[str, Path], tmp_path: Path) -> None:
    """Only what is quantized is written; the rest is pointed to where it lies."""
    shutil.copytree(plain["gpt2"], tmp_path / "here")
    before = iotools.tree(tmp_path / "here")
    export(tmp_path / "here", tmp_path / "here", "int8", force=True)
    after = iotools.tree(tmp_path / "here")
    assert {k for k in after if after.get(k) != before.get(k)} == {"model.onnx", "model.onnx_data"}
    where = {name: file for name, (file, _) in located(tmp_path / "here").items()}
    assert where["transformer.wte.weight"] == "model.safetensors"
    assert where["transformer.h.0.attn.c_attn.weight"] == "model.onnx_data"
    export(plain["gpt2"], tmp_path / "bundled", "int8")
    assert np.array_equal(run(tmp_path / "bundled"), run(tmp_path / "here"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plan_imports_nothing_heavy(
    scheme: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from lora_tools.cli import run; "
        f"run(['export', {str(plain['BERT'])!r}, '-o', 'out', '--dry-run', '--json', "
        f"'--{scheme}']); "
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    report, _, modules = done.stdout.partition("\n")
    assert not {"torch", "onnx", "transformers", "onnxruntime"} & set(modules.split())
    fates = {fate["tensor"]: fate for fate in json.loads(report)["plan"]}
    assert set(models.tensors(plain["BERT"])) == fates.keys() - {"model.onnx"}
    query = fates["encoder.layer.0.attention.self.query.weight"]
    assert query["action"] == "quantize"
    assert "bits per parameter" in query["reason"]
    table = fates["embeddings.word_embeddings.weight"]
    assert (table["action"], table["reason"].split(",")[0]) == ("copy", "embedding")
    done_report = export(plain["BERT"], tmp_path / "out", scheme, no_verify=True)
    after = {fate.tensor: fate for fate in done_report.plan}
    assert after["encoder.layer.0.attention.self.query.weight"].nbytes == query["nbytes"]
    if scheme != "nf4":
        assert after["pooler.dense.weight"].action == "leave out"


def test_the_quantizer_leaves_the_log_alone() -> None:
    """Importing it sets up Python's root logger."""
    code = (
        "import logging; from lora_tools.onnx.quantized import quantizer_of; "
        "from lora_tools.onnx.schemes import AFFINE; quantizer_of(AFFINE['int8']); "
        "root = logging.getLogger(); print(root.handlers, root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {logging.WARNING}"


# -------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(("kind", "how"), [("llama", "int4"), ("gpt2", "int8")])
def test_errors_are_fed_forward(
    kind: str, how: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    """Figures are those of the file, against what export makes without statistics; rows that end
    within a block, transposed layers, and one of which nothing is known, too."""
    base = models.tensors(plain[kind])
    moments = moments_of(base, kind == "gpt2")
    left = min(moments)
    save_file({k: v for k, v in moments.items() if k != left}, tmp_path / "stats", MARK)
    given: dict[str, Any] = {"activations": tmp_path / "stats", "no_verify": True}
    report = export(plain[kind], tmp_path / "onnx", how, **given)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    fed = unfed = energy = 0.0
    stored = {each.name: each for each in stored_weights(model)}
    for name, each in stored.items():
        W = base[name].T if kind == "gpt2" else base[name]
        found = each.values(tmp_path / "onnx")
        same, again = each.again(W, tmp_path / "onnx")
        module = name.removesuffix(".weight")
        assert same == (module == left)
        if not same:
            R = moments[module]
            fed += output_error(found - W, R)
            unfed += output_error(again - W, R)
            energy += output_error(W, R)
    totals = report.totals
    assert totals["tensors_fed"] == len(stored) - 1
    assert totals["output_error"] == pytest.approx(math.sqrt(fed / energy), rel=1e-3)
    assert totals["output_error_unfed"] == pytest.approx(math.sqrt(unfed / energy), rel=1e-3)
    assert fed < 0.8 * unfed
    assert [i.role for i in report.inputs] == ["base", "activations"]
    reasons = {fate.tensor.removesuffix(".weight"): fate.reason for fate in report.plan}
    assert reasons[left].endswith("rounded by itself: no statistics of its inputs")
    assert sum(reason.endswith("error-fed") for reason in reasons.values()) == len(stored) - 1


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = torch.randint(models.VOCAB, (150,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join(f"w{i}" for i in words))
    return path


def perplexity(folder: Path, text: Path, length: int) -> float:
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    rows = ids[: len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        loss = models.load(folder)(input_ids=rows, labels=rows).loss
    return math.exp(loss)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("kind", "scheme"), [("llama", ""), ("Llama", "nf4"), ("gpt2", "int8"), ("llama", "int4")]
)
def test_what_is_lost_on_a_text(
    kind: str, scheme: str, plain: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    report = export(plain[kind], tmp_path / "out", scheme, eval_text=text)
    t = report.totals
    assert [i.role for i in report.inputs] == ["base", "text"]
    assert str(text) not in report.command  # which is in the graph
    length = 32 if kind == "gpt2" else 64  # the positions that the models have
    assert t["eval_tokens"] == 150 // length * (length - 1)
    assert t["perplexity_unquantized"] == pytest.approx(
        perplexity(plain[kind], text, length), rel=1e-4
    )
    if not scheme:
        assert t["perplexity"] == pytest.approx(t["perplexity_unquantized"], rel=1e-5)
        assert abs(t["kl_divergence"]) < 1e-8
        assert "loss_max_difference" not in t
        return
    assert 1e-7 < t["kl_divergence"] < 0.3
    assert t["perplexity"] != t["perplexity_unquantized"]
    if scheme == "nf4":
        lora_tools.dequantize(tmp_path / "out", tmp_path / "plain", dtype="float32")
        assert t["perplexity"] == pytest.approx(
            perplexity(tmp_path / "plain", text, length), rel=1e-4
        )
        again = lora_tools.export(
            tmp_path / "out", tmp_path / "again", graph=plain[kind], nf4=True, eval_text=text
        )
        assert again.totals["perplexity"] == t["perplexity"]
        assert "kl_divergence" not in again.totals


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("kind", "options", "error", "says"),
    [
        ("llama", {"nf4": True, "int8": True}, UsageError, "--nf4 and --int8 exclude each other"),
        ("llama", {"int8": True, "int4": True, "dry_run": True}, UsageError, "exclude"),
        ("llama", {"int8": True, "runtime_adapters": True}, UsageError, "exclude each other"),
        ("llama", {"eval_text": "no-such-file"}, UsageError, "no-such-file"),
        ("llama", {"eval_text": "short.txt"}, UsageError, "1 tokens"),
        ("llama", {"eval_text": "bytes.txt"}, UsageError, "not UTF-8"),
        ("llama", {"eval_text": "short.txt", "no_verify": True}, UsageError, "no_verify"),
        ("BERT", {"eval_text": "short.txt"}, UsageError, "a decoder"),
        ("four", {}, UsageError, "pass --nf4"),
        ("four", {"int8": True}, UsageError, "dequantize"),
        ("four", {"nf4": True, "dtype": "float32"}, UsageError, "requantize"),
        ("wide", {"nf4": True}, MismatchError, "blocks of 512"),
        ("other", {}, CheckpointError, "gptq"),
        ("llama", {"nf4": True, "graph": "out-of-nf4"}, MismatchError, "without --nf4"),
    ],
)
def test_refused(
    kind: str, options: Any, error: Any, says: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w1")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    base = plain.get(kind, plain["llama"])
    if kind in ("four", "wide"):
        blocksize = 64 if kind == "four" else 512
        lora_tools.quantize(plain["llama"], tmp_path / kind, blocksize=blocksize)
        base = tmp_path / kind
    if kind == "other":
        base = tmp_path / "other"
        shutil.copytree(plain["llama"], base)
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq"}
        (base / "config.json").write_text(json.dumps(config))
    options = {"graph": plain["llama"], **options}
    if options["graph"] == "out-of-nf4":
        options["graph"] = tmp_path / "out-of-nf4"
        export(plain["llama"], tmp_path / "out-of-nf4", "nf4", no_verify=True)
    if "eval_text" in options:
        options["eval_text"] = tmp_path / options["eval_text"]
    if "runtime_adapters" in options:
        models.adapt(plain["llama"], tmp_path / "a", {"r": 2, "target_modules": ["q_proj"]})
        options["adapters"] = [tmp_path / "a"]
    with pytest.raises(error, match=says):
        lora_tools.export(base, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_a_disk_that_fails(
    scheme: str, plain: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        export(plain["BERT"], tmp_path / "out", scheme)
    assert list(tmp_path.iterdir()) == []


def test_refused_in_place(plain: dict[str, Path]) -> None:
    before = iotools.tree(plain["llama"])
    with pytest.raises(UsageError, match="choose another output"):
        export(plain["llama"], plain["llama"], "nf4", force=True)
    assert iotools.tree(plain["llama"]) == before


def test_a_graph_without_linear_layers_to_quantize(plain: dict[str, Path]) -> None:
    from lora_tools.onnx.quantized import NBits, quantize_linears

    model = onnx.load(plain["BERT"] / "model.onnx", load_external_data=False)
    how = NBits(AFFINE["int8"], {}, lambda name: torch.empty(0))
    how.takes = lambda linear: False  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match="no linear layer"):
        quantize_linears([model], how)


def test_convolutions_are_no_linear_layers(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    models.save(transformers.ResNetForImageClassification(config), tmp_path / "base")
    for scheme in SCHEMES:
        report = lora_tools.export(
            tmp_path / "base", tmp_path / "out", dry_run=True, **{scheme: True}
        )
        quantized = [fate.tensor for fate in report.plan if fate.action == "quantize"]
        assert quantized == ["classifier.1.weight"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param("DeBERTa-v2", "int4", marks=pytest.mark.sweep(0)),
        pytest.param("Mixtral", "nf4", marks=pytest.mark.sweep(0)),
        pytest.param("Phi-3", "int8", marks=pytest.mark.sweep(0)),
        pytest.param("T5", "nf4", marks=pytest.mark.sweep(0)),
        pytest.param("Whisper", "int4", marks=pytest.mark.sweep(0)),
        pytest.param("ViT", "int8", marks=pytest.mark.sweep(0)),
        ("ConvNeXt", "nf4"),
    ],
)
def test_architectures(
    name: str, scheme: str, traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    made = traced(name)
    # Their plain graphs hold weights that no file has (Mixtral's experts, ViT's names in memory).
    graph = None if name in ("Mixtral", "ViT") else made.graph
    report = lora_tools.export(made.base, tmp_path / "out", graph=graph, **{scheme: True})
    assert report.totals["verified"]
    assert report.totals["tensors_quantized"] >= 4


def test_from_the_command_line(
    plain: dict[str, Path], text: Path, tmp_path: Path, capfd: Any
) -> None:
    from lora_tools.cli import run as cli

    line = [
        "export",
        str(plain["llama"]),
        "--int8",
        "--graph",
        str(plain["llama"]),
        "--eval-text",
        str(text),
        "-o",
        str(tmp_path / "out"),
    ]
    assert cli(line) == 0
    said = capfd.readouterr().err
    assert "lost by quantizing: outputs differ by up to" in said
    assert "nats per token" in said
    assert cli([*line[:2], "--int8", "--nf4", "-o", str(tmp_path / "two")]) == 2
    assert "exclude each other" in capfd.readouterr().err
