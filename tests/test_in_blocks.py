"""Statistics of layers' inputs, collected block after block: those that a whole model gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_tools.calibration import blocks
from lora_tools.calibration.moments import Moments, Sum, width_of
from lora_tools.errors import CheckpointError, NonFiniteError
from lora_tools.options import Running
from lora_tools.quantizing import statistics

from . import export_models, models

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 24
IN_BLOCKS = (
    "BERT, classifier",
    "RoBERTa",
    "DistilBERT",
    "GPT-2",
    "Llama",
    "Mistral, sliding window",
    "Qwen3",
    "Gemma-2, softcap",
    "Gemma-3",
    "Phi-3",
    "Mixtral",
    "gpt-oss, sinks",
    "DeepSeek-V3",
    "GPT-NeoX",
    "Falcon, one key",
)


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(3, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def collected(folder: Path, out: Path, rows: torch.Tensor, kind: Any = "full") -> tuple[str, ...]:
    running = Running(jobs=1)
    return statistics.collect(folder, rows, kind, "cpu", running, out, {"tokens": "1"}).notes


def oracle(folder: Path, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the whole model, in float64, one sequence after the other."""
    model = models.load(folder).float()
    found: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def look(name: str, module: Any, x: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Embedding):
            x = torch.nn.functional.one_hot(x.flatten(), module.num_embeddings).double()
            each, start, count = x.sum(0), torch.ones(x.shape[1]).double(), x.shape[1]
        else:
            x = x.double().flatten(0, -2)
            each, start, count = x.T @ x, torch.zeros(()), 0
        found[name] = found.get(name, start) + each
        counts[name] = counts.get(name, count) + len(x)

    for name, module in model.named_modules():
        if width_of(module):
            module.register_forward_pre_hook(
                lambda module, given, name=name: look(name, module, given[0])
            )
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    return {name: total / counts[name] for name, total in found.items()}


def assert_right(folder: Path, out: Path, rows: torch.Tensor) -> tuple[str, ...]:
    """What is collected is what a whole model gives. Returns the notes."""
    notes = collected(folder, out, rows)
    found, wanted = load_file(out), oracle(folder, rows)
    assert found.keys() == wanted.keys()
    for key, moment in wanted.items():
        assert torch.dist(found[key].double(), moment) < 2e-6 * moment.norm(), key
        assert torch.equal(found[key], found[key].transpose(0, -1)), key
    return notes


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_it_is_what_the_whole_model_gives(name: str, tmp_path: Path) -> None:
    folder = export_models.make(name, tmp_path / "model")
    assert assert_right(folder, tmp_path / "stats", tokens(3)) == ()


@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("rows", [1, 4, LENGTH])
def test_as_many_sequences_as_there_are_heads_or_tokens(
    name: str, rows: int, tmp_path: Path
) -> None:
    folder = export_models.make(name, tmp_path / "model")
    assert assert_right(folder, tmp_path / "stats", tokens(rows)) == ()


def _albert() -> Any:
    config = transformers.AlbertConfig(
        **export_models._ENCODER, embedding_size=16, num_hidden_groups=1
    )
    return transformers.AlbertModel(config)


def _mpt() -> Any:
    config = transformers.MptConfig(
        vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64
    )
    return transformers.MptForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bloom", "a block gets a tensor of shape"),  # a row for each sequence and head
        ("DeBERTa-v2", "device"),  # an embedding's weight is read past its layer
        ("ALBERT", "through a block twice"),
    ],
)
def test_what_cannot_be_run_so_is_run_whole_and_says_why(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_models.ALL, "ALBERT", _albert)
    if name == "ALBERT":
        monkeypatch.setattr(blocks, "_blocks", lambda _: ["encoder.albert_layer_groups.0"])
    folder = export_models.make(name, tmp_path / "model")
    [note] = assert_right(folder, tmp_path / "stats", tokens(3))
    assert said in note
    assert "whole model" in note


def test_biases_by_heads_are_not_taken_for_rows_of_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPT's are (heads, 1, tokens); there are as many sequences."""
    monkeypatch.setitem(export_models.ALL, "MPT", _mpt)
    folder = export_models.make("MPT", tmp_path / "model")
    assert assert_right(folder, tmp_path / "stats", tokens(4)) == ()


def test_without_accelerate_it_is_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_models.make("Llama", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    [note] = assert_right(folder, tmp_path / "stats", tokens(2))
    assert "accelerate" in note


def test_a_diagonal_is_that_of_the_full_one(tmp_path: Path) -> None:
    folder = export_models.make("Llama", tmp_path / "model")
    for kind in ("full", "diagonal"):
        collected(folder, tmp_path / kind, tokens(3), kind)
    full, diagonal = load_file(tmp_path / "full"), load_file(tmp_path / "diagonal")
    assert full.keys() == diagonal.keys()
    for name, moment in full.items():
        mine = moment.diagonal() if moment.dim() == 2 else moment
        assert torch.allclose(diagonal[name], mine, rtol=1e-5), name


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, held, most = export_models.make("Llama", tmp_path / "model"), set[str](), 0
    read, release = statistics._InMemory.read, statistics._InMemory.release

    def take(self: Any, name: str) -> torch.Tensor:
        nonlocal most
        held.add(name)
        most = max(most, len(held))
        assert len({name.split(".layers.")[1][0] for name in held if ".layers." in name}) <= 1
        return read(self, name)

    def give(self: Any, name: str) -> None:
        held.remove(name)
        release(self, name)

    monkeypatch.setattr(statistics._InMemory, "read", take)
    monkeypatch.setattr(statistics._InMemory, "release", give)
    assert collected(folder, tmp_path / "stats", tokens(2)) == ()
    assert not held
    assert most == 9 + 1  # a block, and the last norm


def test_an_infinite_input_is_an_error_by_name(tmp_path: Path) -> None:
    folder = export_models.make("Llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.q_proj"):
        collected(folder, tmp_path / "stats", tokens(2))


# ------------------------------------------------------------------------------------------- sums
def seen(moments: Moments, given: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    for name, x in given:
        moments.see(name, x)
    return dict(moments.done([*dict.fromkeys(name for name, _ in given)]))


def test_layers_that_share_an_input_share_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 5, 300), torch.randn(1, 4, 300)
    adds, add = [], Sum._add
    monkeypatch.setattr(Sum, "_add", lambda *given: (adds.append(1), add(*given)))
    found = seen(Moments("full"), [("q", x), ("k", x), ("q", y), ("k", y)])
    rows = torch.cat([x.view(-1, 300), y.view(-1, 300)]).double()
    assert len(adds) == 2
    assert found["q"] is found["k"]
    assert torch.allclose(found["q"].double(), rows.T @ rows / 14, atol=1e-5)


def test_what_is_changed_in_place_is_another_input() -> None:
    x = torch.ones(1, 2, 3)
    moments = Moments("full")
    moments.see("q", x)
    x.mul_(2)
    moments.see("k", x)
    found = dict(moments.done(["q", "k"]))
    assert found["q"].eq(1).all()
    assert found["k"].eq(4).all()


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("then", [[], ["q"], ["k"], ["q", "k"]])
def test_layers_that_do_not_share_any_more_have_sums_of_their_own(
    kind: Any, then: list[str]
) -> None:
    x, y, *others = (torch.randn(1, 6, 4) for _ in range(2 + len(then)))
    given = [("q", x), ("k", x), ("v", x), ("q", y), ("v", y), *zip(then, others, strict=True)]
    found = seen(Moments(kind), given)
    for name in ("q", "k", "v"):
        rows = torch.cat([each[0] for mine, each in given if mine == name]).double()
        wanted = rows.T @ rows / len(rows)
        wanted = wanted if kind == "full" else wanted.diagonal()
        assert torch.allclose(found[name].double(), wanted, atol=1e-5), name


def test_what_is_not_kept_as_it_was_is_refused_rather_than_guessed() -> None:
    moments, x, y = Moments("full"), torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    for name, each in (("q", x), ("k", x), ("q", y)):
        moments.see(name, each)
    y.zero_()
    with pytest.raises(CheckpointError, match="the same input at first"):
        moments.see("k", torch.randn(1, 6, 4))
