"""Export: the graph's weights are the checkpoint's bytes, its outputs those of torch and of PEFT,
and what does not hold is refused."""

from __future__ import annotations

import json
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

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import (
    CheckpointError,
    MismatchError,
    OutputError,
    QualityGateError,
    UsageError,
)
from lora_tools.formats import output

from . import export_models, forks, iotools, models
from .traced import Traced, session

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def base(traced: Callable[[str], Traced]) -> Path:
    return traced("Llama").base


@pytest.fixture(scope="module")
def exported(traced: Callable[[str], Traced]) -> tuple[Path, dict[str, Any]]:
    """A folder with a graph, and the report of making it."""
    made = traced("Llama")
    return made.graph, made.report


def runtime(folder: Path) -> Any:
    return session(folder / "model.onnx")


def decode(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of a prompt, the last two tokens of it in two steps of their own."""
    running = runtime(folder)
    names = [o.name for o in running.get_outputs()]
    past = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in running.get_inputs()
        if "past" in i.name
    }
    logits = []
    start = 0
    for stop in (ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]):
        outputs = running.run(
            None,
            {
                "input_ids": ids[:, start:stop],
                "attention_mask": np.ones_like(ids[:, :stop]),
                "position_ids": np.arange(start, stop)[None].repeat(len(ids), 0),
                **past,
            },
        )
        named = dict(zip(names, outputs, strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in named.items() if "pres" in k}
        logits.append(named["logits"])
        start = stop
    return np.concatenate(logits, 1)


def encode(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The last hidden state of an encoder."""
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return runtime(folder).run(None, given | {"token_type_ids": np.zeros_like(ids)})[0]


IDS = np.arange(2 * 9).reshape(2, 9) * 7 % 96


def in_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.numpy()


# ------------------------------------------------------------------------------------- the graph


def test_the_graph_points_into_the_checkpoint(base: Path, exported: Any) -> None:
    out, report = exported
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (base / weights).read_bytes()
    assert not list(out.glob("*.onnx_data"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    stored = models.tensors(base)
    data = (out / weights).read_bytes()
    seen = set()
    for initializer in model.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            where = {e.key: e.value for e in initializer.external_data}
            assert where["location"] == weights
            start, size = int(where["offset"]), int(where["length"])
            assert data[start : start + size] == stored[initializer.name].numpy().tobytes()
            seen.add(initializer.name)
    assert seen == set(stored)  # the tied head among them: stored once, named once
    assert report["totals"]["verified"]
    assert report["totals"]["tokens_same"] == report["totals"]["tokens_generated"] == 16


def test_nothing_of_this_machine_is_in_the_graph(exported: Any) -> None:
    data = (exported[0] / "model.onnx").read_bytes()
    for word in (b"site-packages", b".py", str(Path.home()).encode() + b"/", b"stack"):
        assert word not in data


def test_inputs_and_outputs_have_optimums_names(exported: Any) -> None:
    graph = onnx.load(exported[0] / "model.onnx", load_external_data=False).graph
    cache = [f"{i}.{what}" for i in range(5) for what in ("key", "value")]
    assert [i.name for i in graph.input] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{c}" for c in cache),
    ]
    assert [o.name for o in graph.output] == ["logits", *(f"present.{c}" for c in cache)]
    dims = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert dims["input_ids"] == ["batch", "sequence"]
    assert dims["past_key_values.4.key"] == ["batch", 2, "past", 8]
    assert dims["logits"] == ["batch", "sequence", 96]


def test_steps_with_the_cache_are_torch(base: Path, exported: Any) -> None:
    assert np.abs(decode(exported[0], IDS) - in_torch(models.load(base))).max() < 1e-5


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_repeated_layers_are_traced_layers(
    name: str, traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """The graph of every layer traced has the same nodes and gives the same numbers."""
    from lora_tools.onnx.layers import shorten
    from lora_tools.onnx.model import weightless
    from lora_tools.onnx.tasks import TASKS
    from lora_tools.onnx.trace import trace
    from lora_tools.onnx.weights import attach, places
    from lora_tools.sources.checkpoints import open_checkpoint

    base, exported = traced(name).base, traced(name).graph
    task = TASKS["causal-lm" if name == "Llama" else "features"]
    checkpoint = open_checkpoint(base)
    [stack] = shorten(weightless(base, task))
    assert (stack.kept, stack.total) == (3, 5)
    [graph] = trace(base, checkpoint.specs, task, opset=23, whole=True, fuse=True)
    attach(graph.model, places(checkpoint, checkpoint.specs))
    shutil.copytree(base, tmp_path / "whole")
    (tmp_path / "whole" / "model.onnx").write_bytes(graph.model.SerializeToString())
    one = onnx.load(exported / "model.onnx", load_external_data=False)
    assert sorted(n.op_type for n in one.graph.node) == sorted(
        n.op_type for n in graph.model.graph.node
    )
    run = decode if name == "Llama" else encode
    assert np.array_equal(run(tmp_path / "whole", IDS), run(exported, IDS))


def test_layers_that_differ_are_not_repeated() -> None:
    from lora_tools.onnx.layers import shorten

    config = transformers.LlamaConfig(**export_models._DECODER | {"num_hidden_layers": 9})
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[7].self_attn.scaling *= 2
    assert shorten(model) == []
    model.model.layers[7].self_attn.scaling /= 2
    [stack] = shorten(model)
    assert (stack.kept, stack.period) == (3, 1)
    [stack] = shorten(export_models._gemma3(layers=8))
    assert (stack.kept, stack.total, stack.period) == (5, 8, 2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "BERT" else pytest.mark.sweep(0))
        for name in export_models.REPEATING
    ],
)
def test_no_layer_is_traced_but_the_first(name: str, traced: Callable[[str], Traced]) -> None:
    """The last one's nodes are copies. Export compares with torch."""
    made = traced(name)
    assert made.report["totals"]["verified"]
    config = json.loads((made.base / "config.json").read_text())
    copied = f"layer_{config['num_hidden_layers'] - 1}_"
    model = onnx.load(made.graph / "model.onnx", load_external_data=False)
    assert any(node.name.startswith(copied) for node in model.graph.node)


# ----------------------------------------------------------------------------- weights and files


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "float16", "weights": "bundled"}, {"weights": "bundled"}],
    ids=lambda o: "-".join(o.values()),
)
def test_dtypes_and_bundles(options: Any, base: Path, exported: Any, tmp_path: Path) -> None:
    """The graph is used again; export itself compares with torch."""
    report = lora_tools.export(base, tmp_path / "out", graph=exported[0], rtol=1e-4, **options)
    assert report.totals["verified"]
    files = {p.name for p in (tmp_path / "out").iterdir()}
    bundled = "weights" in options
    assert ("model.onnx_data" in files) is bundled
    assert ("model.safetensors" in files) is not bundled
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    casts = [n for n in model.graph.node if n.name.startswith("cast:")]
    assert len(casts) == (len(models.tensors(base)) if "dtype" in options else 0)
    if bundled:
        offsets = [
            int(e.value)
            for i in model.graph.initializer
            for e in i.external_data
            if e.key == "offset"
        ]
        assert all(offset % 4096 == 0 for offset in offsets)


@pytest.mark.parametrize("wanted", ["float32", pytest.param("float16", marks=pytest.mark.sweep(0))])
def test_bundled_weights_are_cast_once(wanted: str, tmp_path: Path) -> None:
    """Into what the graph computes with: no runtime does it when it loads them."""
    base = export_models.one_layer("Llama", tmp_path / "base", dtype=torch.bfloat16)
    out = tmp_path / "out"
    lora_tools.export(base, out, weights="bundled", compute_dtype=wanted, no_verify=True)
    model = onnx.load(out / "model.onnx")
    assert not any(node.name.startswith("cast:") for node in model.graph.node)
    stored = models.tensors(base)
    weights = {i.name: i for i in model.graph.initializer if i.name in stored}
    assert weights.keys() == stored.keys()
    for name, found in weights.items():
        expected = stored[name].to(getattr(torch, wanted)).numpy()
        assert onnx.numpy_helper.to_array(found).tobytes() == expected.tobytes()
    shared = lora_tools.export(base, tmp_path / "shared", graph=out, compute_dtype=wanted)
    assert shared.totals["verified"]


def test_a_sharded_checkpoint(exported: Any, tmp_path: Path) -> None:
    model = models.load(exported[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    report = lora_tools.export(tmp_path / "shards", tmp_path / "out", graph=exported[0])
    assert report.totals["verified"]
    again = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    files = {
        e.value for i in again.graph.initializer for e in i.external_data if e.key == "location"
    }
    assert files == {p.name for p in (tmp_path / "out").glob("*.safetensors")}


def test_in_place_only_graphs_are_added(base: Path, exported: Any, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "here")
    before = iotools.tree(tmp_path / "here")
    lora_tools.export(tmp_path / "here", tmp_path / "here", graph=exported[0])
    after = iotools.tree(tmp_path / "here")
    assert {k: after[k] for k in before} == before
    assert set(after) - set(before) == {"model.onnx", "genai_config.json"}
    assert np.abs(decode(tmp_path / "here", IDS) - decode(exported[0], IDS)).max() == 0
    with pytest.raises(OutputError, match="already exists"):
        lora_tools.export(tmp_path / "here", tmp_path / "here", graph=exported[0])
    for name in ("genai_config.json", "model.onnx"):
        (tmp_path / "here" / name).write_text("another")
    lora_tools.export(
        tmp_path / "here", tmp_path / "here", graph=exported[0], force=True, no_verify=True
    )
    assert iotools.tree(tmp_path / "here") == after


def test_what_travels_and_what_is_added(base: Path, exported: Any) -> None:
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    genai = json.loads((exported[0] / "genai_config.json").read_text())["model"]
    assert genai["decoder"]["num_key_value_heads"] == 2
    assert genai["decoder"]["inputs"]["past_key_names"]


# --------------------------------------------------------------------------------------- adapters

ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
    "alpha pattern": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"q_proj": 16},
        "rank_pattern": {"layers.1.self_attn.k_proj": 2},
    },
}


@pytest.mark.parametrize("name", [n for n in ADAPTERS if n != "embedding"])
def test_an_adapter_merged_in_the_same_pass_is_peft(
    name: str, base: Path, exported: Any, tmp_path: Path
) -> None:
    peft = models.adapt(base, tmp_path / "adapter", ADAPTERS[name])
    report = lora_tools.export(
        base, tmp_path / "out", adapters=[tmp_path / "adapter"], graph=exported[0] / "model.onnx"
    )
    assert report.totals["tensors_merged"] > 0
    assert [i.role for i in report.inputs] == ["base", "adapter"]
    assert np.abs(decode(tmp_path / "out", IDS) - in_torch(peft)).max() < 2e-5


def test_an_adapter_that_unties_the_head(base: Path, exported: Any, tmp_path: Path) -> None:
    """The head is a tensor of its own then: the old graph is refused, a new one is right."""
    adapters = [tmp_path / "lora"]
    models.adapt(base, adapters[0], ADAPTERS["embedding"])
    with pytest.raises(MismatchError, match="tie_word_embeddings"):
        lora_tools.export(base, tmp_path / "a", adapters=adapters, graph=exported[0])
    base = export_models.one_layer("Llama", tmp_path / "base", tie_word_embeddings=True)
    adapters = [tmp_path / "other"]
    peft = models.adapt(base, adapters[0], ADAPTERS["embedding"])
    lora_tools.export(base, tmp_path / "out", adapters=adapters, no_cache=True, no_verify=True)
    given = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    given["position_ids"] = np.arange(IDS.shape[1])[None].repeat(2, 0)
    [found] = runtime(tmp_path / "out").run(None, given)
    assert np.abs(found - in_torch(peft)).max() < 2e-5


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("no_cache", [False, True], ids=["cache", "no cache"])
def test_a_sliding_window_past_its_length(
    no_cache: bool, traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """The window is 8: the prompt is twice as long, the steps go further."""
    name = "Mistral, sliding window"
    if no_cache:
        base = export_models.one_layer("Mistral", tmp_path / "base", sliding_window=8)
    else:
        base = traced(name).base
    ids = np.arange(2 * 21).reshape(2, 21) * 7 % 96
    model = models.load(base)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        model.config.sliding_window = None
        endless = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(endless - wanted).max() > 1e-3  # so that the window shows
    if no_cache:
        lora_tools.export(base, tmp_path / "out", no_cache=True, no_verify=True)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given["position_ids"] = np.arange(21)[None].repeat(2, 0)
        [found] = runtime(tmp_path / "out").run(None, given)
    else:
        found = decode(traced(name).graph, ids)
    assert np.abs(found - wanted).max() < 1e-5


# ------------------------------------------------------------------------------- what is refused


def tampered(exported: Path, folder: Path) -> Path:
    """The graph with two weights of one shape taken for each other."""
    shutil.copytree(exported, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    swap = ["model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            if value in swap:
                node.input[i] = swap[1 - swap.index(value)]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def test_a_wrong_graph_is_found(base: Path, exported: Any, tmp_path: Path, capfd: Any) -> None:
    graph = tampered(exported[0], tmp_path / "graph")
    out = tmp_path / "out"
    with pytest.raises(QualityGateError, match="differs from torch") as caught:
        lora_tools.export(base, out, graph=graph)
    assert caught.value.report is not None
    assert caught.value.report.totals["verified"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]
    line = ["export", str(base), "-o", str(out), "--graph", str(graph), "--keep-failed"]
    assert run(line) == 3
    assert "Error: logits" in capfd.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"graph", "out.failed"}
    assert (tmp_path / "out.failed" / "model.onnx").exists()
    report = lora_tools.export(base, out, graph=graph, no_verify=True)
    assert "verified" not in report.totals
    assert "not verified" in report.notes[0]


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("fields", "options", "error", "says"),
    [
        ({"architectures": ...}, {}, CheckpointError, "pass task"),
        ({"model_type": "nonsense"}, {}, CheckpointError, "transformers .* cannot read"),
        (
            {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "own"},
            {},
            CheckpointError,
            "trust_remote",
        ),
        ({"rms_norm_eps": 0.5}, {"graph": True}, MismatchError, "rms_norm_eps"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"graph": True},
            MismatchError,
            "rope_",
        ),
        ({}, {"task": "nonsense"}, UsageError, "one of auto"),
        ({}, {"task": "image-classification"}, CheckpointError, "cannot make"),
        ({}, {"opset": 7}, UsageError, "opset"),
        ({}, {"rtol": -1.0}, UsageError, "rtol"),
    ],
    ids=lambda v: next(iter(v), "") if isinstance(v, dict) else "",
)
def test_refused(
    fields: Any, options: Any, error: Any, says: str, base: Path, exported: Any, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    edit(tmp_path / "base", **fields)
    if "graph" in options:
        options = {"graph": exported[0]}
    with pytest.raises(error, match=says):
        lora_tools.export(tmp_path / "base", tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_refused_without_the_extra(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'loratools\[onnx\]'"):
        lora_tools.export(base, tmp_path / "out")


def test_a_graph_of_another_shape(exported: Any, tmp_path: Path) -> None:
    tensors = models.tensors(exported[0])
    tensors["model.norm.weight"] = torch.ones(31)
    shutil.copytree(exported[0], tmp_path / "base")
    models.save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"model\.norm\.weight"):
        lora_tools.export(tmp_path / "base", tmp_path / "out", graph=exported[0])
    for name, text in (("no ONNX", b"\xff\xff nonsense"), ("another tool", b"")):
        (tmp_path / "base" / "model.onnx").write_bytes(text)
        with pytest.raises((CheckpointError, MismatchError), match=r"model\.onnx"):
            lora_tools.export(exported[0], tmp_path / name, graph=tmp_path / "base")


def test_a_disk_that_fails(base: Path, exported: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        lora_tools.export(base, tmp_path / "out", graph=exported[0])
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- the command line


def test_what_needs_no_torch_does_not_import_it(base: Path, exported: Any, tmp_path: Path) -> None:
    """A dry run, nor onnx; a graph that is used again."""
    line = ["export", str(base), "--graph", str(exported[0]), "-o", "out", "-q", "--no-verify"]
    code = (
        "import sys; from lora_tools.cli import run\n"
        "def imported(*line):\n"
        "    assert run([*line]) == 0\n"
        "    print(*sorted({m.partition('.')[0] for m in sys.modules}))\n"
        f"imported(*{line}, '--dry-run'); imported(*{line})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    planned, made = (set(line.split()) for line in done.stdout.splitlines())
    assert not {"torch", "onnx", "transformers", "onnxruntime"} & planned
    assert "onnx" in made
    assert not {"torch", "transformers", "onnxruntime"} & made


@pytest.mark.parametrize(
    "name", ["BERT, classifier", pytest.param("Llama", marks=pytest.mark.sweep(0))]
)
def test_the_same_graph_from_the_command_line(
    name: str, traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """In another process, traced anew: the same bytes."""
    made = traced(name)
    line = ["export", made.base, "-o", tmp_path / "out", "--json", "--no-verify"]
    done = forks.run(*line)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verb"] == "export"
    out, graph = iotools.tree(tmp_path / "out"), iotools.tree(made.graph)
    assert out.pop("README.md") != graph.pop("README.md")  # which has the figures of its check
    assert out == graph
