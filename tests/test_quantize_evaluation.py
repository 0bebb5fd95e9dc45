"""``quantize --eval-text``: the loss that is added, against transformers' own, and its gate."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import UsageError

from . import forks, iotools, killing, models

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoders with a tokenizer, a BERT, an adapter, and a text of twelve words."""
    top = tmp_path_factory.mktemp("work")
    for kind in ("llama", "gpt2", "bert"):
        models.save(models.make(kind, width=64).bfloat16(), top / kind)
        iotools.tokenizer(top / kind, models.VOCAB)
    models.train(top / "llama", top / "lora", {"target_modules": ["q_proj"], "r": 2})
    (top / "text").write_text(" ".join(f"w{i}" for i in range(WORDS)))
    return top


def by_transformers(folder: Path) -> tuple[float, torch.Tensor]:
    """The mean loss on the text, and the log-probabilities."""
    ids = torch.arange(WORDS)[None]
    with torch.no_grad():
        made = models.load(folder).float()(input_ids=ids, labels=ids)
    return float(made.loss), made.logits[0, :-1].double().log_softmax(1)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("llama", {}),
    "another dtype": ("llama", {"dtype": "float32", "double_quant": False}),
    "transposed layers": ("gpt2", {}),
    "eight bits": ("llama", {"scheme": "fp8-channel"}),
    "an adapter for the error": ("llama", {"compensate": 4}),
    "an adapter merged": ("llama", {"adapters": ["lora"]}),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_transformers_own(case: str, work: Path, tmp_path: Path) -> None:
    kind, options = CASES[case]
    adapters = [work / str(name) for name in options.get("adapters", [])]  # type: ignore[attr-defined]
    given = {**options, "adapters": adapters, "jobs": 1}
    report = lora_tools.quantize(work / kind, tmp_path / "q", eval_text=work / "text", **given)
    before, after = work / kind, tmp_path / "back"
    if adapters:
        before = tmp_path / "merged"
        lora_tools.merge(work / kind, adapters, before)
    lora_tools.dequantize(tmp_path / "q", after)
    if "compensate" in options:
        after = tmp_path / "with"
        adapter = tmp_path / "q" / "loftq_init"
        lora_tools.merge(tmp_path / "back", [adapter], after, dtype="float32")
    (old, p), (new, q) = by_transformers(before), by_transformers(after)
    t = report.totals
    assert t["eval_tokens"] == WORDS - 1
    assert t["loss_increase"] == pytest.approx(new - old, abs=1e-5)
    assert t["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert t["kl_divergence"] > 0
    assert report.inputs[-1].role == "text"
    assert not (tmp_path / "q" / "evaluation").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"q", "back", "merged", "with"}


def test_the_gate(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than allowed: exit 3, the report is written, what lay there stays."""
    model, ids = models.load(work / "llama"), [1]
    while len(ids) < WORDS:  # what it likes best, which it can only like less
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (tmp_path / "own").write_text(" ".join(f"w{i}" for i in ids))
    given = {"eval_text": tmp_path / "own"}
    report = lora_tools.quantize(work / "llama", tmp_path / "q", max_loss_increase=9.0, **given)
    added = report.totals["loss_increase"]
    assert 0 < added < 9
    before = iotools.tree(tmp_path / "q")
    args = ["quantize", str(work / "llama"), "-o", str(tmp_path / "q"), "--force"]
    args += ["--eval-text", str(tmp_path / "own"), "--max-loss-increase", f"{added / 2}"]
    assert run([*args, "--report", str(tmp_path / "r.json")]) == 3
    assert "(--max-loss-increase); nothing was written" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["totals"]["loss_increase"] == added
    assert iotools.tree(tmp_path / "q") == before


def test_what_is_refused(work: Path, tmp_path: Path) -> None:
    """Before anything is written: a model without a next token, no text, a gate without one."""
    (tmp_path / "short").write_text("w1")
    refused = {
        "is for": (work / "bert", {"eval_text": work / "text"}),
        "needs": (work / "llama", {"max_loss_increase": 0.1}),
        "No such file": (work / "llama", {"eval_text": tmp_path / "none"}),
        "1 tokens": (work / "llama", {"eval_text": tmp_path / "short"}),
        "a folder with": (work / "llama" / "model.safetensors", {"eval_text": work / "text"}),
    }
    for said, (base, given) in refused.items():
        with pytest.raises(UsageError, match=said):
            lora_tools.quantize(base, tmp_path / "q", **given)
    assert {path.name for path in tmp_path.iterdir()} == {"short"}


def test_a_quantized_base(work: Path, tmp_path: Path) -> None:
    """Before is what it dequantizes to: codes of one form are rounded into another."""
    lora_tools.quantize(work / "llama", tmp_path / "base", scheme="fp8-channel")
    report = lora_tools.quantize(tmp_path / "base", tmp_path / "q", eval_text=work / "text")
    lora_tools.dequantize(tmp_path / "base", tmp_path / "before")
    lora_tools.dequantize(tmp_path / "q", tmp_path / "after")
    old, new = (by_transformers(tmp_path / name)[0] for name in ("before", "after"))
    assert report.totals["loss_increase"] == pytest.approx(new - old, abs=1e-5)


def test_killed_in_between(work: Path, tmp_path: Path, full: bool) -> None:
    """While statistics or plain copies lie about: nothing is there, and the next run clears up."""
    top = tmp_path / "here"
    top.mkdir()
    (tmp_path / "text").write_text(" ".join(f"w{i % models.VOCAB}" for i in range(150)))
    line = ["quantize", str(work / "llama"), "-o", str(top / "q"), "-q"]
    line += ["--calibrate", str(tmp_path / "text"), "--eval-text", str(work / "text")]
    forks.preload("transformers.models.llama.modeling_llama")
    kinds = killing.steps(line, top, tmp_path / "log")
    shutil.rmtree(top / "q")
    for aside in ("statistics", "evaluation"):
        at = [i for i, kind in enumerate(kinds, 1) if aside in kind]
        for step in (at[0], at[len(at) // 2], at[-1]) if full else [at[len(at) // 2]]:
            done = killing.stopped(line, top, step)
            assert done.returncode == -signal.SIGKILL
            assert not (top / "q").exists()
    assert run(line) == 0
    assert [path.name for path in top.iterdir()] == ["q"]
    assert {path.name for path in (top / "q").iterdir()} >= {"config.json", "model.safetensors"}
    assert not [path for path in (top / "q").iterdir() if path.is_dir()]
