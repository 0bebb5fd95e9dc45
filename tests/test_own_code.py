"""Code that a checkpoint brings does not run, whatever is typed, unless the user allowed it."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_tools
from lora_tools.calibration import tokens_of
from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.pretrained import config_of
from lora_tools.sources.transformers_names import weightless

from . import iotools

PACKAGE = Path(lora_tools.__file__).parent
DOOR = PACKAGE / "pretrained.py"
# transformers' functions that may run code of a checkpoint's.
LOADERS = {
    "from_pretrained",
    "from_config",
    "_from_config",
    "get_class_from_dynamic_module",
    "get_cached_module_file",
    "dynamic_module_utils",
    "load_custom_generate",
    "transformers.pipeline",
    "get_kernel",
}
# What makes code of data.
RUNNERS = {"eval", "exec", "compile", "__import__", "spec_from_file_location", "run_path"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
UNPICKLERS = {
    "inert_pickle.py",  # finds no class at all
    "memo.py",  # finds records and enumerations of the package alone
    "dask.py",  # what the workers of a cluster, which run what they are sent, send back
    "remote.py",  # what such a worker is sent
}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` as it stands there; of other expressions their attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def reached(node: ast.AST) -> set[str]:
    """What a node of a syntax tree names: an attribute, a name, a string, or parts of an import."""
    if isinstance(node, ast.Attribute):
        return {node.attr, dotted(node)}
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")}
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return {*names, *(f"{node.module}.{name}" for name in names), *str(node.module).split(".")}
    return set()


def calls_of_loaders(source: str) -> list[int]:
    """Lines that reach for transformers' loaders."""
    return [getattr(n, "lineno", 0) for n in ast.walk(ast.parse(source)) if LOADERS & reached(n)]


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained(folder)",
        "load = kind.from_pretrained",
        "getattr(kind, 'from_pretrained')(folder)",
        "from transformers import pipeline",
        "transformers.pipeline('text')",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module as f",
        "import transformers.dynamic_module_utils",
    ],
)
def test_the_walker_sees_every_form_of_call(source: str) -> None:
    assert calls_of_loaders(source)


def test_transformers_loaders_are_called_in_one_place() -> None:
    found = {
        path.name: lines
        for path in PACKAGE.rglob("*.py")
        if path != DOOR and (lines := calls_of_loaders(path.read_text(encoding="utf-8")))
    }
    assert not found, "call them through lora_tools.pretrained"


def test_every_call_there_says_whether_code_may_run() -> None:
    tree = ast.parse(DOOR.read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOADERS
    ]
    assert len(calls) == 5
    for call in calls:
        said = ast.unparse(call)
        of_class = ".__from_config(" in said or "._from_config(" in said  # a class' own, of no file
        assert of_class or "trust_remote_code=" in said or "**_options(trusted)" in said, said


def test_nothing_else_makes_code_of_data() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                name = name or getattr(node.func, "id", "")
                is_regex = ast.unparse(node.func) in ("re.compile", "_compiler.compile")
                of_model = name == "eval" and not node.args
                assert name not in RUNNERS or is_regex or of_model, where
                if ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                    said = ast.unparse(node)
                    assert "weights_only=True" in said or "allow_pickle=False" in said, where
            if isinstance(node, ast.Import):
                found = {a.name.split(".")[0] for a in node.names} & PICKLES
                assert not found or path.name in UNPICKLERS, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in PICKLES, where


# A module that says, by a file, that it was run.
CODE = """
from pathlib import Path
Path({mark!r}).write_text("run")
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "own"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code of its own, and someone who says yes to all."""
    folder = iotools.checkpoint(tmp_path / "model", iotools.weights(layers=1))
    iotools.tokenizer(folder, 24)
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 24}" for i in range(400)))
    return folder


def set_in(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_collect_stats_runs_no_code_of_the_models(model: Path, tmp_path: Path) -> None:
    set_in(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(
        UnsafeInput, match=r"model:.*code that comes with it.*which is not run by default"
    ):
        lora_tools.collect_stats(model, tmp_path / "text.txt", tmp_path / "out", length=16)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def own_tokenizer(model: Path) -> None:
    set_in(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": [None, "own.Tokenizer"]},
    )


def test_collect_stats_runs_no_code_of_the_tokenizers(model: Path, tmp_path: Path) -> None:
    own_tokenizer(model)
    set_in(model / "config.json", model_type="own")
    with pytest.raises(CheckpointError):
        lora_tools.collect_stats(model, tmp_path / "text.txt", tmp_path / "out", length=16)
    assert not (tmp_path / "mark").exists()


def test_an_eval_text_runs_a_tokenizers_code_only_where_it_may(model: Path, tmp_path: Path) -> None:
    own_tokenizer(model)
    set_in(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(UnsafeInput, match="run it with --trust-remote-code"):
        tokens_of(model, "w1 w2", False)
    assert not (tmp_path / "mark").exists()
    assert tokens_of(model, "w1 w2", True) == [1, 2]
    assert (tmp_path / "mark").read_text() == "run"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_fetched(model: Path, key: str) -> None:
    set_in(model / "config.json", **{key: "someone/kernel"})
    with pytest.raises(UnsafeInput, match="someone/kernel"):
        config_of(model)
    config = json.loads((model / "config.json").read_text())
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 24, "num_hidden_layers": 1}
    built = weightless("LlamaForCausalLM", {**config, **sizes})
    assert "someone" not in str(built.config._attn_implementation)
