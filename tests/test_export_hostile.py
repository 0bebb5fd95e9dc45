"""Export cut short where it traces, or adds to the checkpoint's own folder; what it refuses."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError

from . import export_models, forks, iotools, killing, models

pytestmark = pytest.mark.filterwarnings("ignore")


def graph_of(folder: Path) -> list[str]:
    """Names of the graph's weights, once onnx's checker has read it and the files it points to."""
    path = folder / "model.onnx"
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    return sorted(i.name for i in model.graph.initializer)


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("weights", ["shared", "bundled"])
def test_killed_in_place_before_every_step(weights: str, tmp_path: Path) -> None:
    """The checkpoint is as it was, the graph absent or complete; the next run clears away."""
    tensors = iotools.weights()
    here = iotools.checkpoint(tmp_path / "here", tensors, shards=2)
    graph = iotools.graph(tmp_path / "graph", here, tensors)
    before = iotools.tree(shutil.copytree(here, tmp_path / "sound"))
    options = [str(graph) if word == "graph" else word for word in iotools.EXPORT]
    command = ["export", str(here), "-o", str(here), "-q", "--weights", weights, *options]
    kinds = killing.steps(command, here, tmp_path / "log")
    assert len(kinds) > 5
    seen = set()
    for i, step in enumerate(killing.telling(kinds)):
        shutil.rmtree(here)
        shutil.copytree(tmp_path / "sound", here)
        status = killing.stopped(command, here, step).returncode
        seen.add((here / "model.onnx").exists())
        after = iotools.tree(here)
        assert {name: after[name] for name in before} == before, step
        done = "model.onnx" in after
        if done:
            assert graph_of(here) == sorted(tensors), step
        assert status == -signal.SIGKILL, step
        if done or i % 3 == 0:
            assert forks.run(*command).returncode == int(done), step
            assert graph_of(here) == sorted(tensors), step
            assert not [p.name for p in here.iterdir() if p.name.startswith(".")], step
    assert seen == {False, True}


# Sends itself a signal that many calls of functions after torch.export begins, or has ended.
_WHILE_IT_TRACES = """
import os, sys
import torch
number, after, left = int(sys.argv.pop(1)), sys.argv.pop(1), 20_000
def count(frame, event, value):
    global left
    left -= event == "call"
    if left == 0:
        sys.setprofile(None)
        os.kill(os.getpid(), number)
def export(*args, **options):
    if after == "begin":
        sys.setprofile(count)
    program = real(*args, **options)
    sys.setprofile(count)
    return program
real, torch.export.export = torch.export.export, export
from lora_tools.cli import entry
entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, "begin"), (signal.SIGTERM, "end")])
def test_interrupted_while_it_traces(number: signal.Signals, after: str, tmp_path: Path) -> None:
    base = export_models.make("Qwen2", tmp_path / "base")
    before = iotools.tree(tmp_path)
    args = [int(number), after, "export", base, "-o", tmp_path / "out", "-q"]
    imports = ["transformers.models.qwen2.modeling_qwen2"]
    done = forks.run(*args, code=_WHILE_IT_TRACES, imports=imports)
    said = done.stderr.strip()
    assert done.returncode == 128 + number, said
    assert "Traceback" not in said
    assert said.count("\n") == 0, said
    assert iotools.tree(tmp_path) == before


def _no_onnx(x: torch.Tensor) -> torch.Tensor:
    return torch.special.airy_ai(x)


def _asks_for_data(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("odd", "says"), [(_no_onnx, "special_airy_ai"), (_asks_for_data, "known only when it runs")]
)
def test_what_does_not_export_is_named(
    odd: Any, says: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """The module, the operator; and torch's own pages of advice are not printed."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: forward(self, odd(x)))
    base = export_models.one_layer("Qwen2", tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"model\.onnx: module model\.layers\.0\.mlp"
    ) as caught:
        lora_tools.export(base, tmp_path / "out")
    assert says in str(caught.value)
    assert capfd.readouterr().err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_cannot_be_read_as_its_config_says(tmp_path: Path, capfd: Any) -> None:
    """The sentence names what was asked for, never the hidden folder it is worked on in."""
    base = models.save(models.make("bert"), tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "own", "architectures": ["OwnModel"]}')
    assert run(["export", str(base), "-o", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"Error: {tmp_path / 'out'}: transformers ")
    assert "loratools-" not in said
    assert said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
