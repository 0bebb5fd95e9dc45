"""What an adapter's config says of its base, by which PEFT's AutoPeftModel loads both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import lora_tools
from lora_tools.errors import UsageError
from lora_tools.formats.base_name import base_name, named
from lora_tools.sources.auto_class import class_fields

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BERT = BertConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
MODELS: dict[str, tuple[Any, Any]] = {
    "CAUSAL_LM": (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)),
    "BertForSequenceClassification": (BertForSequenceClassification, BERT),
    "FEATURE_EXTRACTION": (BertModel, BERT),
    "SEQ_2_SEQ_LM": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    ),
    "BertForMaskedLM": (BertForMaskedLM, BERT),
    "ViTModel": (
        ViTModel,
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        ),
    ),
}
AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
}


def pair(folder: Path, kind: str, changed: str) -> tuple[Path, Path]:
    """A model, and a copy of it in which one weight has a change of rank 1."""
    torch.manual_seed(0)
    make, config = MODELS[kind]
    model: PreTrainedModel = make(config)
    model.save_pretrained(folder / "base")
    state = dict(model.named_parameters())
    name = next(n for n in state if n.endswith(changed))
    with torch.no_grad():
        rows, cols = state[name].shape
        state[name] += torch.randn(rows, 1) @ torch.randn(1, cols)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def config_of(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return config


def assert_loads(adapter: Path, auto: Any, tuned: Path, changed: str) -> None:
    """AutoPeftModel finds base and class by the config alone, and merged it is the tuned one."""
    model = auto.from_pretrained(str(adapter)).merge_and_unload()
    mine = {n.removeprefix("base_model.model."): p for n, p in model.state_dict().items()}
    name = next(n for n in mine if n.endswith(changed))
    theirs = load_file(tuned / "model.safetensors")
    [wanted] = [t for n, t in theirs.items() if n.endswith(STORED.get(changed, changed))]
    torch.testing.assert_close(mine[name], wanted, atol=1e-4, rtol=1e-4)


CHANGED = {
    "CAUSAL_LM": "attn.c_attn.weight",
    "SEQ_2_SEQ_LM": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "ViTModel": "q_proj.weight",
}
STORED = {"q_proj.weight": "attention.query.weight"}


@pytest.mark.parametrize("kind", MODELS)
def test_auto_peft_model_loads_what_extract_writes(kind: str, tmp_path: Path) -> None:
    changed = CHANGED.get(kind, "attention.self.query.weight")
    base, tuned = pair(tmp_path, kind, changed)
    lora_tools.extract(base, tuned, tmp_path / "a", rank=2)
    config = config_of(tmp_path / "a")
    assert config["base_model_name_or_path"] == str(base)
    if kind in AUTO:
        assert config["task_type"] == kind
    else:
        assert config["task_type"] is None
        assert config["auto_mapping"] == {
            "base_model_class": kind,
            "parent_library": "transformers",
        }
    assert_loads(tmp_path / "a", AUTO.get(kind, peft.AutoPeftModel), tuned, changed)


def test_factors_on_a_head_are_not_left_out(tmp_path: Path) -> None:
    """PEFT's model for the task takes its head to be saved whole, and passes by factors on it."""
    base, tuned = pair(tmp_path, "BertForSequenceClassification", "classifier.weight")
    lora_tools.extract(base, tuned, tmp_path / "a", rank=2)
    assert config_of(tmp_path / "a")["task_type"] is None
    assert_loads(tmp_path / "a", peft.AutoPeftModel, tuned, "classifier.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned and the adapter a between them."""
    folder = tmp_path_factory.mktemp("made")
    base, tuned = pair(folder, "CAUSAL_LM", "attn.c_attn.weight")
    lora_tools.extract(base, tuned, folder / "a", rank=2)
    return folder


def test_the_other_verbs_keep_the_name_and_the_class(made: Path, tmp_path: Path) -> None:
    lora_tools.rescale(made / "a", tmp_path / "r", alpha=4)
    lora_tools.combine([made / "a", (made / "a", 0.5)], tmp_path / "c")
    lora_tools.convert(made / "a", tmp_path / "p", to="peft")
    for name in "rcp":
        config = config_of(tmp_path / name)
        assert config["base_model_name_or_path"] == str(made / "base")
        assert config["task_type"] == "CAUSAL_LM"
    assert_loads(tmp_path / "r", AUTO["CAUSAL_LM"], made / "tuned", "attn.c_attn.weight")


def test_what_had_no_name_gets_the_bases(made: Path, tmp_path: Path) -> None:
    lora_tools.convert(made / "a", tmp_path / "k.safetensors", to="kohya", base=made / "base")
    lora_tools.convert(tmp_path / "k.safetensors", tmp_path / "p", to="peft", base=made / "base")
    config = config_of(tmp_path / "p")
    assert config["base_model_name_or_path"] == str(made / "base")
    assert config["task_type"] == "CAUSAL_LM"
    assert_loads(tmp_path / "p", AUTO["CAUSAL_LM"], made / "tuned", "attn.c_attn.weight")


def test_one_input_spelled_otherwise_gives_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    for i, base in enumerate(["base", "./base", "base/", "../" + made.name + "/base"]):
        lora_tools.extract(base, "tuned", tmp_path / str(i), rank=2)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / str(i) / file).read_bytes() == (made / "a" / file).read_bytes()


@pytest.mark.parametrize("verb", ["extract", "rescale", "combine", "convert"])
def test_a_name_that_is_asked_for(verb: str, made: Path, tmp_path: Path) -> None:
    called = {
        "extract": lambda **more: lora_tools.extract(
            made / "base", made / "tuned", tmp_path / "o", **more
        ),
        "rescale": lambda **more: lora_tools.rescale(made / "a", tmp_path / "o", **more),
        "combine": lambda **more: lora_tools.combine([made / "a"], tmp_path / "o", **more),
        "convert": lambda **more: lora_tools.convert(made / "a", tmp_path / "o", to="peft", **more),
    }[verb]
    called(base_name="org/base@v2")
    config = config_of(tmp_path / "o")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v2")
    for wrong in ("/org/base", "org/base/sub", "a b"):
        with pytest.raises(UsageError, match="is not a hub id"):
            called(base_name=wrong, force=True)


def test_a_name_without_a_place_is_refused(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "k.safetensors"
    with pytest.raises(UsageError, match=r"base_name: kohya \(sd-scripts\) cannot store it"):
        lora_tools.convert(made / "a", out, to="kohya", base=made / "base", base_name="org/base")


def test_names_that_are_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot's place in the cache, and a folder called as its _name_or_path is."""
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--org--name"
    for sha in ("1" * 40, "2" * 40):
        (repository / "snapshots" / sha / "unet").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    snapshots = repository / "snapshots"
    assert base_name(snapshots / ("1" * 40), {}) == ("org/name", None)
    assert base_name(snapshots / ("2" * 40), {}) == ("org/name", "2" * 40)
    inside = snapshots / ("1" * 40) / "unet"
    assert base_name(inside, {}) == (str(inside), None)
    assert base_name(Path("Llama"), {"_name_or_path": "org/llama"}) == ("org/llama", None)
    assert base_name(Path("x/.."), {"_name_or_path": 3}) == (str(tmp_path), None)
    # A fine-tuned copy keeps the name of what it was tuned from.
    tuned = {"_name_or_path": "org/llama"}
    assert base_name(Path("mine"), tuned) == (str(tmp_path / "mine"), None)
    assert named({"base_model_name_or_path": "kept"}, (Path("x"), {}), None) == {
        "base_model_name_or_path": "kept"
    }


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),
        ({"architectures": ["NoSuchModel"], "model_type": "none"}, {}),
        (
            {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "code.Own"}},
            {"task_type": "CAUSAL_LM"},
        ),
        ({"architectures": ["Own"], "auto_map": {"AutoModelForMaskedLM": "code.Own"}}, {}),
        ({"architectures": ["MistralForQuestionAnswering"]}, {"task_type": "QUESTION_ANS"}),
        ({"architectures": ["BertForTokenClassification"]}, {"task_type": "TOKEN_CLS"}),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
            {
                "auto_mapping": {
                    "base_model_class": "WhisperForConditionalGeneration",
                    "parent_library": "transformers",
                }
            },
        ),
    ],
)
def test_classes(config: dict[str, Any], fields: dict[str, Any]) -> None:
    heads = ["qa_outputs.weight", "classifier.weight"]
    assert class_fields(config, ["model.layers.0.q_proj"], heads) == fields


def test_a_task_whose_head_is_saved_whole(tmp_path: Path) -> None:
    """Then PEFT's model for it loads, and with the saved head."""
    base, tuned = pair(tmp_path, "BertForSequenceClassification", "self.query.weight")
    state = load_file(tuned / "model.safetensors")
    state["classifier.weight"] += torch.eye(2, 16)
    save_file(state, tuned / "model.safetensors", {"format": "pt"})
    lora_tools.extract(base, tuned, tmp_path / "a", rank=2, layout=["classifier=none"])
    assert config_of(tmp_path / "a")["task_type"] == "SEQ_CLS"
    auto = peft.AutoPeftModelForSequenceClassification
    assert_loads(tmp_path / "a", auto, tuned, "classifier.weight")


def test_an_adapter_without_a_base_stays_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    keys = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    tensors = {f"base_model.model.q.{key}": value for key, value in keys.items()}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    lora_tools.rescale(tmp_path / "a", tmp_path / "o", alpha=2)
    assert config_of(tmp_path / "o")["base_model_name_or_path"] is None
