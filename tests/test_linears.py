"""The finder of linear layers: those of a graph are the ones that torch runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_tools
from lora_tools.onnx.tasks import TASKS

from . import export_models
from .linear_layers import check_linears

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [("GPT-2", "causal-lm", {"dtype": "bfloat16"}), ("Llama", "causal-lm", {"dtype": "float16"})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_linear_layers(name: str, task: str, options: dict[str, str], tmp_path: Path) -> None:
    base = export_models.make(name, tmp_path / "base")
    lora_tools.export(base, tmp_path / "out", no_verify=True, **options)  # type: ignore[arg-type]
    found = check_linears(tmp_path / "out", TASKS[task])
    assert all((each.cast is not None) == bool(options) for each in found)
    tied = [each.weight for each in found if each.tied]
    heads = {"GPT-2": ["transformer.wte.weight"], "Llama": ["model.embed_tokens.weight"]}
    assert tied == heads.get(name, [])
    if name == "GPT-2":
        assert all(each.out_first == each.tied for each in found)
        assert sum(each.bias != "" for each in found) == 20
