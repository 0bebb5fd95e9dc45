"""What only some of the work takes is brought by an extra: without it everything else works, and
what needs it says so in one wording, with one exit code, before the work."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import onnx
import peft
import pytest
from packaging.requirements import Requirement

import lora_tools
from lora_tools.cli import run
from lora_tools.remote.stores import STORES

from . import models, refusals

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
# A command; its extra, its arguments with files of ``files`` as {name}, and what may be missing.
CASES = {
    "collect-stats": ("stats", "{base} {text} -o {out}", ("transformers",)),
    "quantize --calibrate": ("stats", "{text} {base} -o {out}", ("transformers",)),
    "quantize --eval-text": ("stats", "{text} {base} -o {out}", ("transformers",)),
    "export": (
        "onnx",
        "{base} -o {out}",
        ("onnx", "onnxscript", "onnxruntime", "transformers", "accelerate"),
    ),
    "verify": ("onnx", "{graph} --against {base}", ("onnx", "onnxruntime", "transformers")),
    "verify --weights-only": ("onnx", "{graph} --against {base} --weights-only", ("onnx",)),
    "inspect": ("onnx", "{graph}", ("onnx",)),
    "inspect --plot p.png": ("plot", "{adapter}", ("matplotlib",)),
    "diff --plot p.svg": ("plot", "{base} {base}", ("matplotlib",)),
    "diff --plot p.html": ("plot", "{base} {base}", ("plotly",)),
    "convert --to gguf": ("gguf", "{adapter} --base {base} -o {out}", ("gguf",)),
    "convert --to onnxruntime": (
        "onnxruntime",
        "{adapter} --base {base} -o {out}",
        ("onnxruntime",),
    ),
    "merge": ("gguf", "{base} {gguf} -o {out}", ("gguf",)),
    "merge --force": ("waveft", "{base} {waveft} -o {out}", ("peft",)),
    "inspect s3://bucket/base": ("remote", "", ("fsspec", "s3fs")),
    "inspect https://host/model.safetensors": ("remote", "", ("aiohttp",)),
    "inspect gs://bucket/base": ("remote", "", ("gcsfs",)),
    "inspect az://container/base": ("remote", "", ("adlfs",)),
    "merge az://container/base": ("remote", "{adapter} -o {out}", ("adlfs",)),
    "merge --force -o s3://bucket/new": ("remote", "{base} {adapter}", ("s3fs",)),
    "rescale --engine dask": ("dask", "{adapter} -o {out} --rank 1", ("distributed",)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("extras")
    base = models.save(models.make("llama"), top / "base")
    config = {"r": 2, "target_modules": ["q_proj"]}
    models.train(base, top / "adapter", config)
    made = peft.WaveFTConfig(n_frequency=30, target_modules=["q_proj"])
    model = models.quietly(lambda: peft.get_peft_model(models.load(base), made))
    models.quietly(lambda: model.save_pretrained(top / "waveft"))
    lora_tools.convert(top / "adapter", top / "a.gguf", to="gguf", base=base)
    graph = onnx.helper.make_graph([], "none", [], [])
    onnx.save(onnx.helper.make_model(graph), top / "model.onnx")
    return {
        "base": base,
        "adapter": top / "adapter",
        "waveft": top / "waveft",
        "gguf": top / "a.gguf",
        "graph": top / "model.onnx",
        "text": refusals.filled(top / "text", "some words of a text"),
    }


@functools.cache
def needs() -> dict[str, set[str]]:
    """Extras, and the modules that the package says it needs of each: read in its source, and of
    those that read addresses in their table."""
    found = {"remote": {"fsspec", *(store.module for store in STORES.values())}}
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "lora_tools").rglob("*.py"))
    for text in texts:
        for node in ast.walk(ast.parse(text)) if "need(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
                words = [
                    w.value
                    for arg in node.args[1:]
                    for w in ast.walk(arg)
                    if isinstance(w, ast.Constant)
                ]
                found.setdefault(words[0], set()).update(words[1:])
    return found


def test_an_extra_brings_what_is_needed_of_it() -> None:
    """A module has the name of its package here, but for Dask's workers, which are one too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    del extras["test"]
    assert extras.pop("pandas")
    for extra, modules in needs().items():
        assert modules <= {Requirement(each).name for each in extras.pop(extra)}
    assert not extras, "brought for nothing"


def test_each_is_tried() -> None:
    tried = {(extra, module) for extra, _, modules in CASES.values() for module in modules}
    assert {extra for extra, _ in tried} == needs().keys()
    assert tried >= {(extra, m) for extra, modules in needs().items() for m in modules}


@pytest.mark.parametrize(
    ("command", "module"), [(c, m) for c, row in CASES.items() for m in row[2]]
)
def test_without_it_the_extra_is_named(
    command: str,
    module: str,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra, arguments, _ = CASES[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    verb, *options = command.split()
    given = [each.format(out="out", **files) for each in arguments.split()]
    assert run([verb, *options, *given]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"Error: [^;\n]+ needs {module}; pip install 'loratools\[{extra}\]'\n", said
    )
    assert list(tmp_path.iterdir()) == []
