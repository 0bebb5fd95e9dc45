"""Runtime adapters: one graph, factors as optional inputs; active, an adapter is what PEFT makes of
it, and without one the base's bits are those of the graph without inputs for adapters."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import (
    AdapterError,
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    QualityGateError,
    UnsupportedAdapter,
    UsageError,
)

from . import forks, iotools, killing, models
from .traced import Traced, session

pytestmark = pytest.mark.filterwarnings("ignore")
onnxruntime = pytest.importorskip("onnxruntime")

CONFIGS: dict[str, dict[str, Any]] = {
    "uneven": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    },
    "rslora": {
        "target_modules": ["v_proj", "up_proj"],
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
    },
    "saved": {
        "target_modules": ["q_proj"],
        "r": 2,
        "modules_to_save": ["norm", "layernorm", "0.mlp.up_proj"],
    },
    "ends": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 5, "lora_alpha": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA's magnitudes .*--drop dora"),
    "bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias .*--drop bias"),
    "saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "(lm_head|model.embed_tokens).weight: .*a whole vocabulary.*--drop saved",
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trained tokens .*--drop tokens",
    ),
}
IDS = np.arange(2 * 9).reshape(2, 9) * 7 % 96


class Made:
    """A base, its adapters by PEFT, its plain graph, and one with inputs for the adapters."""

    def __init__(self, top: Path, traced: Traced) -> None:
        self.top = top
        self.base, self.plain, self.out = traced.base, traced.graph, top / "out"
        self.peft: dict[str, Any] = {}
        for seed, (name, config) in enumerate(CONFIGS.items()):
            self.peft[name] = models.train(
                self.base, top / name, config, seed=seed, save_embedding_layers=False
            )
        self.report = lora_tools.export(
            self.base,
            self.out,
            adapters=[top / name for name in CONFIGS],
            runtime_adapters=True,
            graph=self.plain,
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Made:
    return Made(tmp_path_factory.mktemp("runtime"), traced("Llama"))


class Session:
    """A graph in ONNX Runtime; each call may have an adapter active."""

    def __init__(self, folder: Path) -> None:
        self.session = session(folder / "model.onnx")
        self.inputs = {
            i.name: np.zeros((len(IDS), i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if "past" in i.name
        } | {
            "input_ids": IDS,
            "attention_mask": np.ones_like(IDS),
            "position_ids": np.arange(9)[None].repeat(2, 0),
        }

    def logits(self, file: Path | None = None) -> np.ndarray:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        if file is not None:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
        return self.session.run(["logits"], self.inputs, options)[0]


def in_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.numpy()


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def optional(folder: Path) -> set[str]:
    graph = graph_of(folder)
    return {i.name for i in graph.input} & {i.name for i in graph.initializer}


# -------------------------------------------------------------------------------------- one graph


def test_adapters_swapped_in_one_session_are_peft(made: Made) -> None:
    session = Session(made.out)
    wanted = {name: in_torch(model) for name, model in made.peft.items()}
    base = session.logits()
    for _ in range(2):
        for name, logits in wanted.items():
            found = session.logits(made.out / f"{name}.onnx_adapter")
            assert np.abs(found - logits).max() < 2e-5
            assert np.abs(found - base).max() > 1e-2
        assert session.logits().tobytes() == base.tobytes()


def test_without_an_adapter_it_is_the_plain_graph_bit_for_bit(made: Made) -> None:
    assert Session(made.out).logits().tobytes() == Session(made.plain).logits().tobytes()
    assert made.report.totals["base_exact"] is True


def test_only_what_is_adapted_has_a_branch_and_no_dense_product_is_formed(made: Made) -> None:
    graph = graph_of(made.out)
    keys = {
        key.removeprefix("base_model.model.")
        for name in CONFIGS
        for key in models.tensors(made.top / name)
    }
    modules = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    saved = {key for key in keys if ".lora_" not in key}
    assert len(saved) == 12
    names = optional(made.out)
    assert {name.rpartition(".lora_")[0] for name in names if ".lora_" in name} == modules
    assert {name.replace(".modules_to_save.", ".") for name in names if "_save" in name} == saved
    assert len(names) == 2 * len(modules) + len(saved)
    for initializer in graph.initializer:
        if initializer.name in names:
            assert 0 in initializer.dims
    plain = graph_of(made.plain).node
    for node in graph.node:
        assert len(names & set(node.input)) <= 1  # the factors never meet
    new = [node.op_type for node in graph.node if node.name.startswith("lora:")]
    counts = {op: new.count(op) for op in new}
    assert counts == {
        "MatMul": 2 * len(modules),
        "Gather": 1,
        "Add": len(modules),
        "Transpose": 1,
        "Concat": len(saved),
        "Slice": len(saved),
    }
    assert len(graph.node) == len(plain) + len(new)


def test_other_exports_use_either_graph_again(made: Made, tmp_path: Path) -> None:
    """The branches come off: the plain graph is back, byte for byte."""

    def tree(folder: Path) -> dict[str, str]:
        """The figures in a card are those of a check, which is not made here."""
        return {name: known for name, known in iotools.tree(folder).items() if name != "README.md"}

    lora_tools.export(made.base, tmp_path / "plain", graph=made.out, no_verify=True)
    assert tree(tmp_path / "plain") == tree(made.plain)
    lora_tools.export(
        made.base,
        tmp_path / "out",
        adapters=[made.top / n for n in CONFIGS],
        runtime_adapters=True,
        graph=made.out,
        no_verify=True,
    )
    assert tree(tmp_path / "out") == tree(made.out)


def test_genai_is_told_of_no_optional_input(made: Made) -> None:
    config = json.loads((made.out / "genai_config.json").read_text())
    assert config == json.loads((made.plain / "genai_config.json").read_text())


def test_the_report(made: Made) -> None:
    report = made.report
    assert [i.path for i in report.inputs] == [
        str(p) for p in (made.base, *(made.top / name for name in CONFIGS))
    ]
    assert all(i.digest for i in report.inputs[1:])
    for name in CONFIGS:
        figures = report.totals["runtime_adapters"][f"{name}.onnx_adapter"]
        assert figures["verified"], name
        assert figures["tokens_same"] == figures["tokens_generated"] == 16
        assert figures["bytes"] == (made.out / f"{name}.onnx_adapter").stat().st_size
    fate = next(f for f in report.plan if f.tensor == "model.layers.1.mlp.down_proj")
    assert (fate.action, fate.reason) == ("branch", "uneven.onnx_adapter: rank 3, alpha 6")
    fates = {f.action: f.reason for f in report.plan if f.tensor == "model.norm.weight"}
    assert fates == {"copy": "", "replace": "saved.onnx_adapter"}


# -------------------------------------------------------------------------------- further adapters


def test_convert_writes_the_same_file_and_further_ones(made: Made, tmp_path: Path) -> None:
    for name in CONFIGS:
        lora_tools.convert(made.top / name, tmp_path / name, to="onnxruntime")
        assert (tmp_path / name).read_bytes() == (made.out / f"{name}.onnx_adapter").read_bytes()
    config = {"target_modules": ["q_proj", "v_proj"], "r": 7, "lora_alpha": 3}
    peft = models.train(made.base, tmp_path / "new", config, seed=9)
    lora_tools.convert(tmp_path / "new", tmp_path / "new.onnx_adapter", to="onnxruntime")
    found = Session(made.out).logits(tmp_path / "new.onnx_adapter")
    assert np.abs(found - in_torch(peft)).max() < 2e-5


def test_names_become_those_of_the_base(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.top / "uneven", tmp_path / "given")
    file = tmp_path / "given" / "adapter_model.safetensors"
    renamed = {
        k.replace("base_model.model.", "base_model.model.policy."): v
        for k, v in load_file(file).items()
    }
    save_file(renamed, file, {"format": "pt"})
    wanted = (made.out / "uneven.onnx_adapter").read_bytes()
    lora_tools.convert(tmp_path / "given", tmp_path / "a", to="onnxruntime", base=made.base)
    assert (tmp_path / "a").read_bytes() == wanted
    report = lora_tools.export(
        made.base,
        tmp_path / "out",
        adapters=[tmp_path / "given"],
        runtime_adapters=True,
        graph=made.plain,
        no_verify=True,
    )
    assert "'policy.' was left out" in " ".join(report.notes)
    assert (tmp_path / "out" / "given.onnx_adapter").read_bytes() == wanted
    lora_tools.convert(tmp_path / "given", tmp_path / "b", to="onnxruntime")
    with pytest.raises(Exception, match=r"Invalid input name: policy\.model"):
        Session(made.out).logits(tmp_path / "b")
    other = iotools.adapter(tmp_path / "other", {"model.layers.0.nothing": (4, 4)})
    with pytest.raises(AdapterError, match=r"layers\.0\.nothing\.weight matches no tensor of"):
        lora_tools.convert(other, tmp_path / "c", to="onnxruntime", base=made.base)


def test_float16_factors_are_written_as_the_graph_takes_them(made: Made, tmp_path: Path) -> None:
    lora_tools.convert(made.top / "rslora", tmp_path / "half", to="peft", dtype="float16")
    lora_tools.convert(tmp_path / "half", tmp_path / "a", to="onnxruntime")
    session = Session(made.out)
    wanted = session.logits(made.out / "rslora.onnx_adapter")
    assert np.abs(session.logits(tmp_path / "a") - wanted).max() < 1e-2
    lora_tools.convert(tmp_path / "half", tmp_path / "b", to="onnxruntime", dtype="float16")
    with pytest.raises(Exception, match="Unexpected input data type"):
        session.logits(tmp_path / "b")


def test_weights_other_formats_and_stored_dtypes(made: Made, tmp_path: Path) -> None:
    """Half of one adapter, and one that comes as GGUF, over a base in bfloat16."""
    lora_tools.convert(made.top / "rslora", tmp_path / "a.gguf", to="gguf", base=made.base)
    report = lora_tools.export(
        made.base,
        tmp_path / "out",
        adapters=[f"{made.top / 'uneven'}=0.5", tmp_path / "a.gguf"],
        runtime_adapters=True,
        graph=made.plain,
        dtype="bfloat16",
        weights="bundled",
        rtol=1e-4,
    )
    assert set(report.totals["runtime_adapters"]) == {"uneven.onnx_adapter", "a.onnx_adapter"}
    assert report.totals["verified"]
    assert report.totals["base_exact"]
    assert report.inputs[1].path.endswith("uneven=0.5")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    A = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "out" / "uneven.onnx_adapter"))
    B = onnxruntime.AdapterFormat.read_adapter(str(made.out / "uneven.onnx_adapter"))
    for name, value in A.get_parameters().items():
        scale = 0.5 if "lora_B" in name else 1.0
        assert np.array_equal(value.numpy(), scale * B.get_parameters()[name].numpy())


# ----------------------------------------------------------------------------- other kinds of model


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "BERT, classifier",
            {
                "target_modules": ["query", "dense", "word_embeddings"],
                "modules_to_save": ["LayerNorm", "classifier"],
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),
        pytest.param(
            "T5",
            {"target_modules": ["q", "v", "wo", "shared"], "modules_to_save": ["layer_norm"]},
            marks=[pytest.mark.slow, pytest.mark.sweep(0)],
        ),
    ],
)
def test_architectures(
    name: str, config: dict[str, Any], traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """The export compares with transformers; GPT-2 is traced with branches, and without its cache.
    T5 has three graphs."""
    if name == "gpt2":
        base = models.save(models.make(name), tmp_path / "base")
        how: dict[str, Any] = {"no_cache": True}
    else:
        base, how = traced(name).base, {"graph": traced(name).graph}
    models.train(base, tmp_path / "a", {"r": 3, **config}, save_embedding_layers=False)
    report = lora_tools.export(
        base, tmp_path / "out", adapters=[tmp_path / "a"], runtime_adapters=True, **how
    )
    assert report.totals["base_exact"]
    figures = report.totals["runtime_adapters"]["a.onnx_adapter"]
    assert figures["verified"]
    keys = models.tensors(tmp_path / "a")
    assert figures["modules"] == sum(".lora_" in key for key in keys) // 2
    replaced = [fate for fate in report.plan if fate.action == "replace"]
    assert len(replaced) == sum(".lora_" not in key for key in keys)
    assert bool(replaced) == ("modules_to_save" in config)


# ---------------------------------------------------------------------------------------- in place


def test_in_place_adapters_lie_beside_the_graph(made: Made, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(made.base, here)
    before = iotools.tree(here)
    call: Callable[..., Any] = lambda **more: lora_tools.export(  # noqa: E731
        here,
        here,
        adapters=[made.top / "uneven"],
        runtime_adapters=True,
        graph=made.plain,
        no_verify=True,
        **more,
    )
    (here / "uneven.onnx_adapter").write_bytes(b"someone's")
    with pytest.raises(OutputError, match=r"uneven\.onnx_adapter already exists"):
        call()
    assert (here / "uneven.onnx_adapter").read_bytes() == b"someone's"
    assert not any("not of this export" in note for note in call(force=True).notes)
    after = iotools.tree(here)
    assert {k: after[k] for k in before} == before
    assert set(after) - set(before) == {"model.onnx", "genai_config.json", "uneven.onnx_adapter"}
    wanted = Session(made.out).logits(made.out / "uneven.onnx_adapter")
    assert np.abs(Session(here).logits(here / "uneven.onnx_adapter") - wanted).max() < 1e-5
    (here / "older.onnx_adapter").write_bytes(b"of an earlier export")
    assert "older.onnx_adapter is from an earlier export" in " ".join(call(force=True).notes)
    assert (here / "older.onnx_adapter").read_bytes() == b"of an earlier export"


@pytest.mark.slow
def test_killed_in_place_with_adapters(made: Made, tmp_path: Path, full: bool) -> None:
    """An old graph never lies beside a new adapter, nor a new one beside an old; what the kill left
    is put back, or away, by the next run. In CI some steps of the
    commit, which is all that differs from other exports."""
    here, sound, first, again = (tmp_path / name for name in ("here", "sound", "first", "uneven"))
    shutil.copytree(made.base, sound)
    lora_tools.rescale(made.top / "uneven", again, scale=0.5)
    line = ["export", str(here), "-o", str(here), "--runtime-adapters", "--no-verify", "--force"]
    line += ["-q", "--graph", str(made.plain), "--adapter"]
    old = [*line, str(made.top / "uneven"), "--adapter", str(made.top / "rslora")]
    new = [*line, str(again)]
    shutil.copytree(sound, here)
    assert run(old) == 0
    shutil.copytree(here, first)
    before = _parts(first)
    kinds = killing.steps(new, here, tmp_path / "log")
    after = _parts(here)
    assert all(before[name] != after[name] for name in ("model.onnx", "uneven.onnx_adapter"))
    told = killing.telling(kinds)
    renames = [step for step in told if kinds[step - 1].startswith("os.rename")]
    seen = set()
    for i, step in enumerate(told if full else renames[-2:]):
        shutil.rmtree(here)
        shutil.copytree(first, here)
        assert killing.stopped(new, here, step).returncode == -signal.SIGKILL, step
        found = _parts(here)
        graph = found.get("model.onnx")
        seen.add("old" if graph == before["model.onnx"] else "new" if graph else "absent")
        wanted = {before["model.onnx"]: before, after["model.onnx"]: after}.get(graph or b"")
        assert wanted is None or found == wanted, step
        if full or i % 2 == 0:
            assert forks.run(*new).returncode == 0, step
            assert _parts(here) == after, step
            assert not [p.name for p in here.iterdir() if p.name.startswith(".")], step
    assert seen >= {"absent", "new"}


def _parts(folder: Path) -> dict[str, bytes]:
    """What an export in place puts there."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".onnx", ".onnx_adapter", ".onnx_data") or path.name[:5] == "genai"
    }


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_runtime_adapter_cannot_carry(name: str, made: Made, tmp_path: Path) -> None:
    config, says = REFUSED[name]
    models.train(made.base, tmp_path / "a", {"r": 2, **config}, save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapter, match=f"cannot hold {says}"):
        lora_tools.export(
            made.base, tmp_path / "out", adapters=[tmp_path / "a"], runtime_adapters=True
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bad_calls(made: Made, tmp_path: Path) -> None:
    def call(*adapters: Any, **options: Any) -> lora_tools.Report:
        return lora_tools.export(
            made.base,
            tmp_path / "out",
            adapters=adapters,
            runtime_adapters=True,
            graph=made.plain,
            **options,
        )

    with pytest.raises(UsageError, match="at least one adapters"):
        call()
    shutil.copytree(made.top / "uneven", tmp_path / "more" / "uneven")
    with pytest.raises(UsageError, match=r"would both be uneven\.onnx_adapter"):
        call(made.top / "uneven", tmp_path / "more" / "uneven")
    known = "model.layers.0.self_attn.q_proj"
    wide = iotools.adapter(tmp_path / "wide", {known: (33, 32)})
    with pytest.raises(MismatchError, match="q_proj"):
        call(wide)
    strange = iotools.adapter(tmp_path / "strange", {"lm_tail": (4, 4), known: (32, 32)})
    with pytest.raises(AdapterError, match="lm_tail"):
        call(strange)
    report = call(strange, allow_unmatched=True, no_verify=True)
    assert optional(tmp_path / "out") == {f"{known}.lora_{x}.weight" for x in "AB"}
    assert [f.tensor for f in report.plan if f.action == "unmatched"] == ["lm_tail.weight"]
    shutil.rmtree(tmp_path / "out")
    factors = load_file(wide / "adapter_model.safetensors")
    key = f"base_model.model.{known}.lora_B.weight"
    factors[key] = torch.full((32, 2), torch.nan)
    save_file(factors, wide / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match="q_proj"):
        call(wide)
    cut = tmp_path / "cut.onnx_adapter"
    cut.write_bytes((made.out / "uneven.onnx_adapter").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not an ONNX Runtime adapter"):
        call(cut)
    with pytest.raises(OutputError, match="is the input"):
        lora_tools.export(
            made.base, made.top / "uneven", adapters=[made.top / "uneven"], runtime_adapters=True
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.top / "rslora", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "base_digest": "xxh3-128/sha256:0"})
    call: dict[str, Any] = {
        "adapters": [tmp_path / "a"],
        "runtime_adapters": True,
        "graph": made.plain,
        "no_verify": True,
    }
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.export(made.base, tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()
    lora_tools.export(made.base, tmp_path / "out", **call, allow_other_base=True)


def test_a_head_that_is_to_follow_without_factors(made: Made, tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens"], "r": 2}
    models.train(made.base, tmp_path / "a", config, save_embedding_layers=False)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    with pytest.raises(UnsupportedAdapter, match="no factors for lm_head"):
        lora_tools.export(
            made.base, tmp_path / "out", adapters=[tmp_path / "a"], runtime_adapters=True
        )


def test_layers_that_factors_would_not_reach() -> None:
    from lora_tools.onnx.runtime_adapters import Branch, add_branches, remove_branches

    def graph(*nodes: Any) -> onnx.ModelProto:
        values = [onnx.helper.make_tensor_value_info(n, 1, ["n", 4]) for n in ("x", "y")]
        weight = onnx.TensorProto(name="w.weight", dims=(4, 4), data_type=1)
        made = [onnx.helper.make_node(*node) for node in nodes]
        body = onnx.helper.make_graph(made, "g", values[:1], values[1:], [weight])
        return onnx.helper.make_model(body)

    branch = Branch("w", "w.weight", (4, 4))
    twice = graph(("MatMul", ["x", "w.weight"], ["h"]), ("MatMul", ["h", "w.weight"], ["y"]))
    before = twice.SerializeToString()
    assert add_branches({"a": twice}, [branch]) == ()
    assert sum(node.op_type == "Add" for node in twice.graph.node) == 2
    remove_branches(twice)
    assert twice.SerializeToString() == before
    odd = graph(("MatMul", ["x", "w.weight"], ["h"]), ("Mul", ["h", "w.weight"], ["y"]))
    with pytest.raises(UnsupportedAdapter, match=r"Mul also uses w\.weight"):
        add_branches({"a": odd}, [branch])
    lookup = Branch("w", "w.weight", (4, 4), lookup=True)
    with pytest.raises(UnsupportedAdapter, match=r"w: the graph does not use w\.weight as"):
        add_branches({"a": graph(("MatMul", ["x", "w.weight"], ["y"]))}, [lookup])
    other = Branch("v", "v.weight", (4, 4))
    with pytest.raises(UnsupportedAdapter, match="v: the graph does not"):
        add_branches({"a": graph(("MatMul", ["x", "w.weight"], ["y"]))}, [other], formed=True)
    assert add_branches({"a": graph(("MatMul", ["x", "w.weight"], ["y"]))}, [other]) == ("v",)


# ---------------------------------------------------------------------------------------- the check


def test_an_adapter_that_does_something_else_is_found(
    made: Made, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    from lora_tools.exporting import runtime_adapters

    write = runtime_adapters.write_modules
    monkeypatch.setattr(
        runtime_adapters,
        "write_modules",
        lambda *given, **options: write(*given, **options | {"weight": 1.1}),
    )
    line = [
        "export",
        made.base,
        "--adapter",
        made.top / "uneven",
        "--runtime-adapters",
        "--graph",
        made.plain,
        "-o",
        tmp_path / "out",
        "--report",
        tmp_path / "report",
    ]
    assert run([str(word) for word in line]) == 3
    assert "Error: uneven.onnx_adapter: " in capfd.readouterr().err
    totals = json.loads((tmp_path / "report").read_text())["totals"]
    assert totals["base_exact"]
    assert not totals["verified"]
    assert not totals["runtime_adapters"]["uneven.onnx_adapter"]["verified"]
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_base_that_is_not_exact_is_found(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_tools.onnx import check

    plain = check.plain_graphs

    def other(paths: Sequence[Path]) -> list[bytes]:
        graphs = []
        for data in plain(paths):
            model = onnx.load_from_string(data)
            node = next(n for n in model.graph.node if n.output[0] == "logits")
            node.output[0] = "before"
            one = onnx.helper.make_tensor("near_one", 1, [], [1.0000001])
            model.graph.initializer.append(one)
            model.graph.node.append(
                onnx.helper.make_node("Mul", ["before", "near_one"], ["logits"])
            )
            graphs.append(model.SerializeToString())
        return graphs

    monkeypatch.setattr(check, "plain_graphs", other)
    with pytest.raises(QualityGateError, match="gives other bits"):
        lora_tools.export(
            made.base,
            tmp_path / "out",
            adapters=[made.top / "uneven"],
            runtime_adapters=True,
            graph=made.plain,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_from_the_command_line(made: Made, tmp_path: Path) -> None:
    done = forks.run(
        "export",
        made.base,
        "--adapter",
        made.top / "ends",
        "--runtime-adapters",
        "-o",
        tmp_path / "out",
        "--dry-run",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert [f["reason"] for f in plan if f["tensor"] == "lm_head"] == [
        "ends.onnx_adapter: rank 5, alpha 4"
    ]
    assert list(tmp_path.iterdir()) == []
