"""Adapters with a classifier, reward, tagging or question-answering head on a base without one: the
merged folder is of the class that has the head, and gives what PEFT gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, LoraToolsError, MismatchError, UsageError

from . import models

AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
_SIZES: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _llama(kind: str, **options: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=1, pad_token_id=0, **options)
    return getattr(transformers, kind)(config)


def _bert(kind: str) -> transformers.PreTrainedModel:
    return getattr(transformers, kind)(transformers.BertConfig(**_SIZES))


def _gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=models.VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


BASES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: _llama("LlamaForCausalLM"),
    "llama-tied": lambda: _llama("LlamaForCausalLM", tie_word_embeddings=True),
    "llama-bare": lambda: _llama("LlamaModel"),
    "bert": lambda: _bert("BertModel"),
    "bert-lm": lambda: _bert("BertForMaskedLM"),
    "bert-two": lambda: _bert("BertForSequenceClassification"),
    "roberta-lm": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**_SIZES, max_position_embeddings=40)
    ),
    "gpt2": _gpt2,
}
TARGETS = ["q_proj", "query", "c_attn"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: models.noisy(make, root / name) for name, make in BASES.items()}


def with_head(base: Path, task: str, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(2)
    return models.quietly(lambda: AUTO[task].from_pretrained(base, **options))


def train(base: Path, task: str, out: Path, labels: int | None, **config: Any) -> torch.Tensor:
    """An adapter with a head for the task, saved to ``out``; what it gives."""
    options = {} if labels is None else {"num_labels": labels}
    model = with_head(base, task, ignore_mismatched_sizes=True, **options)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in TARGETS if name in names]
    given = {"r": 2, "target_modules": targets, "task_type": task, "init_lora_weights": False}
    tuned = models.quietly(lambda: peft.get_peft_model(model, peft.LoraConfig(**given | config)))
    models.quietly(lambda: tuned.save_pretrained(out))
    return outputs(tuned)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(2 * 7).reshape(2, 7) * 5 % 80 + 3
    with torch.no_grad():
        found = model.eval()(input_ids=tokens)
    parts = ("logits", "start_logits", "end_logits")
    return torch.cat([found[part].flatten() for part in parts if part in found])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def loaded(folder: Path, task: str) -> transformers.PreTrainedModel:
    """By the task's auto class, nothing missing and nothing left over."""
    model, info = models.quietly(
        lambda: AUTO[task].from_pretrained(folder, output_loading_info=True)
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == [type(model).__name__]
    return model


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        ("llama", "SEQ_CLS", 5),
        ("llama", "SEQ_CLS", 1),  # a reward model
        ("llama", "TOKEN_CLS", 3),
        ("llama-tied", "SEQ_CLS", 2),
        ("llama-bare", "TOKEN_CLS", 3),
        ("llama-bare", "QUESTION_ANS", None),
        ("bert", "SEQ_CLS", 3),
        ("bert", "TOKEN_CLS", 3),
        ("bert-lm", "TOKEN_CLS", 3),
        ("bert-lm", "QUESTION_ANS", None),
        ("bert-two", "SEQ_CLS", 3),
        ("bert-two", "TOKEN_CLS", 3),
        ("bert-two", "TOKEN_CLS", 2),  # names and shapes are those of the base
        ("bert-two", "QUESTION_ANS", None),
        ("roberta-lm", "SEQ_CLS", 4),
        ("gpt2", "SEQ_CLS", 3),
        ("gpt2", "TOKEN_CLS", 3),
    ],
)
def test_a_head_is_added(
    kind: str, task: str, labels: int | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    wanted = train(bases[kind], task, tmp_path / "a", labels)
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    model = loaded(tmp_path / "m", task)
    assert_close(outputs(model), wanted)
    number = labels or 2
    assert config_of(tmp_path / "m")["num_labels"] == model.config.num_labels == number
    assert len(model.config.id2label) == len(model.config.label2id) == number
    names = models.tensors(tmp_path / "m")
    assert not any("lm_head" in name or "cls." in name for name in names)


def test_the_report_says_what_became_of_it(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    report = lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    assert any("LlamaForSequenceClassification with 3 labels" in note for note in report.notes)
    fates = {fate.tensor: fate.action for fate in report.plan}
    assert fates["lm_head.weight"] == "drop"
    assert fates["score.weight"] == "merge"
    assert "pad_token_id" not in " ".join(report.notes)


def test_label_names_stay_where_there_are_as_many(bases: dict[str, Path], tmp_path: Path) -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = with_head(bases["bert"], "SEQ_CLS", problem_type="multi_label_classification", **names)
    models.save(model, tmp_path / "base")
    for labels in (2, 4):
        train(tmp_path / "base", "SEQ_CLS", tmp_path / f"a{labels}", labels)
        lora_tools.merge(tmp_path / "base", [tmp_path / f"a{labels}"], tmp_path / f"m{labels}")
        config = loaded(tmp_path / f"m{labels}", "SEQ_CLS").config
        assert len(config.id2label) == config.num_labels == labels
        assert config.problem_type == "multi_label_classification"
    assert config_of(tmp_path / "m2")["id2label"] == {"0": "no", "1": "yes"}
    with pytest.raises(UsageError, match="another shape"):
        lora_tools.merge(tmp_path / "base", [tmp_path / "a4"], tmp_path / "r", reversible=True)


def test_what_neither_side_holds_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """The masked language model has no pooler, and PEFT does not save the one made at random."""
    train(bases["bert-lm"], "SEQ_CLS", tmp_path / "a", 3)
    with pytest.raises(AdapterError, match=r"also has bert\.pooler\.dense\.weight, which neither"):
        lora_tools.merge(bases["bert-lm"], [tmp_path / "a"], tmp_path / "m")
    wanted = train(
        bases["bert-lm"], "SEQ_CLS", tmp_path / "b", 3, modules_to_save=["pooler", "classifier"]
    )
    lora_tools.merge(bases["bert-lm"], [tmp_path / "b"], tmp_path / "m")
    assert_close(outputs(loaded(tmp_path / "m", "SEQ_CLS")), wanted)
    report = lora_tools.merge(
        bases["bert-lm"], [tmp_path / "a"], tmp_path / "n", allow_unmatched=True
    )
    assert [fate.tensor for fate in report.plan if fate.action == "unmatched"]
    assert config_of(tmp_path / "n")["architectures"] == ["BertForMaskedLM"]


def renamed(adapter: Path, old: str, new: str, **config: Any) -> Path:
    file = adapter / "adapter_model.safetensors"
    tensors = {key.replace(old, new): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    changed = {**config_of(adapter, "adapter_config.json"), **config}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    return adapter


def test_a_value_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 1)
    renamed(tmp_path / "a", "score", "v_head.summary", task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"v_head\.summary\.weight.*value head, which no class"):
        lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m", allow_unmatched=True)


@pytest.mark.parametrize("base", ["bert", "bert-lm"])  # the second has no pooler
def test_a_head_of_two_classes_is_refused(
    base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases["bert"], "SEQ_CLS", tmp_path / "a", 3)
    renamed(tmp_path / "a", "", "", task_type=None)
    with pytest.raises(AdapterError, match=r"Bert\w+ and Bert\w+; set task_type"):
        lora_tools.merge(bases[base], [tmp_path / "a"], tmp_path / "m", allow_other_base=True)


def test_an_added_head_has_an_effect(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    report = lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    assert not any("did not change" in note for note in report.notes)


def test_it_is_merged_whole_or_not_at_all(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    with pytest.raises(MismatchError, match="cannot be merged in part"):
        lora_tools.merge(bases["llama"], [(tmp_path / "a", 0.5)], tmp_path / "m")


def test_a_head_without_transformers_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    monkeypatch.setattr("lora_tools.sources.class_fit.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"cannot be.*transformers is not installed"):
        lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")


def test_a_head_is_whole_or_not_at_all(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    with pytest.raises(MismatchError, match="give the adapter the weight 1"):
        lora_tools.merge(bases["llama"], [(tmp_path / "a", 0.5)], tmp_path / "m")


def test_a_missing_head_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora" in k}, file)
    report = lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    assert any("task_type is SEQ_CLS, but it holds no head" in note for note in report.notes)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("bert-lm", "SEQ_CLS"), ("bert", "SEQ_CLS")],
)
def test_extract_of_such_a_fine_tune_merges(
    kind: str, task: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = with_head(bases[kind], task, num_labels=3)
    models.perturb(tuned, 0.1, 3, only="q_proj" if kind == "llama" else "query")
    models.save(tuned, tmp_path / "tuned")
    lora_tools.extract(bases[kind], tmp_path / "tuned", tmp_path / "a", rank=16)
    assert config_of(tmp_path / "a", "adapter_config.json")["task_type"] == task
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    assert_close(outputs(loaded(tmp_path / "m", task)), outputs(tuned))
    fresh = with_head(bases[kind], task, num_labels=3)
    assert_close(outputs(models.attach_strictly(fresh, tmp_path / "a")), outputs(tuned))


def test_a_head_and_another_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = models.VOCAB + 8
    model = with_head(bases["llama"], "SEQ_CLS", num_labels=3)
    models.quietly(lambda: model.resize_token_embeddings(rows))
    given = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    config = peft.LoraConfig(**given, task_type="SEQ_CLS", init_lora_weights=False)
    tuned = models.quietly(lambda: peft.get_peft_model(model, config))
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a"))
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    merged = loaded(tmp_path / "m", "SEQ_CLS")
    assert merged.config.vocab_size == rows
    assert_close(outputs(merged), outputs(tuned))
    report = lora_tools.verify(tmp_path / "m", base=bases["llama"], adapters=[tmp_path / "a"])
    assert report.totals["same"]


def test_an_adapter_of_another_model_is_refused_as_before(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases["llama"], "SEQ_CLS", tmp_path / "a", 3)
    renamed(tmp_path / "a", "score", "other.part", task_type=None)
    with pytest.raises(LoraToolsError, match=r"other\.part\.weight matches no tensor of .*is this"):
        lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
