"""The finder of linear layers: those of a graph are the ones that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lora_tools
from lora_tools.onnx.tasks import TASKS

from .linear_layers import check_linears
from .traced import Traced

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [("gpt2", "causal-lm", {"dtype": "bfloat16"}), ("Llama", "causal-lm", {"dtype": "float16"})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_linear_layers(
    name: str, task: str, options: dict[str, str], traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    made, how = traced(name), {"no_verify": True, **options}
    lora_tools.export(made.base, tmp_path / "out", graph=made.graph, **how)  # type: ignore[arg-type]
    found = check_linears(tmp_path / "out", TASKS[task])
    assert all((each.cast is not None) == bool(options) for each in found)
    tied = [each.weight for each in found if each.tied]
    heads = {"gpt2": ["transformer.wte.weight"], "Llama": ["model.embed_tokens.weight"]}
    assert tied == heads.get(name, [])
    if name == "gpt2":
        assert all(each.out_first == each.tied for each in found)
        assert sum(each.bias != "" for each in found) == 8
