"""Adapters that were trained on another vocabulary than the base's, in every form that PEFT saves:
merged, they give what PEFT gives on the resized base."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import nn
from lora_tools.errors import LoraToolsError, MismatchError, UsageError
from lora_tools.merging.fit import fit_base
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import open_weighted

from . import models

SMALLER, LARGER = models.VOCAB - 8, models.VOCAB + 8
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Of each form of adapter, what its config has. The second and third train one side only.
FORMS: dict[str, dict[str, Any]] = {
    "both low-rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding low-rank": {"target_modules": ["q_proj", "embed_tokens"]},
    "head low-rank": {"target_modules": ["q_proj", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved as one": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "tokens": {"trainable_token_indices": [3, -1]},  # counted from the end of the vocabulary
    "none trained": {},
}
# What the adapter does not say of a larger vocabulary: PEFT has rows of its own making there.
UNKNOWN = {("embedding low-rank", "llama", LARGER), ("head low-rank", "llama", LARGER)}


def _phi() -> transformers.PreTrainedModel:
    """Its output head has a bias."""
    config = transformers.PhiConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.PhiForCausalLM(config)


def _bert() -> transformers.PreTrainedModel:
    """Its output head is the embedding, and its bias goes by two names."""
    return transformers.BertForMaskedLM(models._bert_config(16))


def _bart() -> transformers.PreTrainedModel:
    """Its bias has a column for each token."""
    sizes = {
        f"{side}_{of}": n
        for side in ("encoder", "decoder")
        for of, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = transformers.BartConfig(vocab_size=models.VOCAB, d_model=16, **sizes)
    model = transformers.BartForConditionalGeneration(config)
    torch.nn.init.normal_(model.final_logits_bias)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    kinds = {k: models.save(models.make(k), root / k) for k in ("llama", "llama-tied", "gpt2")}
    made: dict[str, Callable[[], transformers.PreTrainedModel]] = {
        "phi": _phi,
        "bert": _bert,
        "bart": _bart,
    }
    return kinds | {name: models.noisy(make, root / name) for name, make in made.items()}


def resized(base: Path, rows: int) -> transformers.PreTrainedModel:
    model = models.load(base)
    models.quietly(lambda: model.resize_token_embeddings(rows))
    return model


def train(base: Path, rows: int, out: Path, **config: Any) -> peft.PeftModel:
    """An adapter on the resized base, saved to ``out``; the model as it was trained."""
    torch.manual_seed(5)
    given = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    if "trainable_token_indices" in given:
        given["trainable_token_indices"] = [i % rows for i in given["trainable_token_indices"]]
    model = models.quietly(
        lambda: peft.get_peft_model(resized(base, rows), peft.LoraConfig(**given))
    )
    for name in ("modules_to_save", "trainable_tokens"):
        models.perturb(model, 0.2, 3, only=name)
    models.quietly(lambda: model.save_pretrained(out))
    return model.eval()


def logits(model: torch.nn.Module, rows: int) -> torch.Tensor:
    """With the first and the last rows of the vocabulary looked up."""
    tokens = torch.cat([torch.arange(8), torch.arange(rows - 8, rows)])[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def loaded(folder: Path, rows: int) -> transformers.PreTrainedModel:
    """The merged model, by its class, nothing missing and nothing left over."""
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == rows
    kind = getattr(transformers, config["architectures"][0])
    model, info = models.quietly(lambda: kind.from_pretrained(folder, output_loading_info=True))
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("rows", [SMALLER, LARGER])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_it(
    form: str, kind: str, rows: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(bases[kind], rows, tmp_path / "a", **FORMS[form])
    if (form, kind, rows) in UNKNOWN:
        with pytest.raises(
            MismatchError, match=r"but does not hold the new rows.*save_embedding_layers=True"
        ):
            lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
        return
    report = lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    assert any(
        f"the vocabulary has {rows} rows ({models.VOCAB} in the base)" in n for n in report.notes
    )
    fresh = models.quietly(
        lambda: peft.PeftModel.from_pretrained(resized(bases[kind], rows), tmp_path / "a")
    )
    wanted = logits(fresh.eval(), rows)
    assert_close(wanted, logits(trained, rows))
    assert_close(logits(loaded(tmp_path / "m", rows), rows), wanted)


@pytest.mark.parametrize("rows", [SMALLER, LARGER])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("phi", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("phi", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("phi", {}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        ("bert", {"target_modules": ["query"]}),
        ("bart", {}),
    ],
)
def test_biases_and_names_of_other_architectures(
    kind: str, config: dict[str, Any], rows: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(bases[kind], rows, tmp_path / "a", **config)
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    assert_close(logits(loaded(tmp_path / "m", rows), rows), logits(trained, rows))


@pytest.mark.parametrize(("kind", "saved"), [("phi", "embed_tokens"), ("bart", "shared")])
def test_without_transformers_the_names_tell(
    kind: str, saved: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(bases[kind], SMALLER, tmp_path / "a", modules_to_save=[saved])
    monkeypatch.setattr("lora_tools.sources.class_fit.find_spec", lambda name: None)
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    assert_close(logits(loaded(tmp_path / "m", SMALLER), SMALLER), logits(trained, SMALLER))


def only(folder: Path, kept: Callable[[str], bool]) -> Path:
    """The adapter with some of its tensors."""
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if kept(k)}, file, {"format": "pt"})
    return folder


def test_an_older_peft_saves_the_embedding_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """Without the frozen copy: the head, which was the same tensor, has other new rows."""
    train(bases["llama-tied"], LARGER, tmp_path / "a", modules_to_save=["embed_tokens"])
    only(tmp_path / "a", lambda key: "lora" in key or key.endswith("embed_tokens.weight"))
    with pytest.raises(MismatchError, match=r"lm_head.weight: base has 96 rows.*ensure_weight_ty"):
        lora_tools.merge(bases["llama-tied"], [tmp_path / "a"], tmp_path / "m")
    trained = train(bases["llama-tied"], SMALLER, tmp_path / "b", modules_to_save=["embed_tokens"])
    only(tmp_path / "b", lambda key: "lora" in key or key.endswith("embed_tokens.weight"))
    lora_tools.merge(bases["llama-tied"], [tmp_path / "b"], tmp_path / "m")
    assert_close(logits(loaded(tmp_path / "m", SMALLER), SMALLER), logits(trained, SMALLER))


def test_a_weight_scales_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], LARGER, tmp_path / "a", **FORMS["both saved"])
    lora_tools.merge(bases["llama"], [(tmp_path / "a", 0.5)], tmp_path / "m")
    saved, merged = models.tensors(tmp_path / "a"), models.tensors(tmp_path / "m")
    at = f"base_model.model.{EMBED.removesuffix('.weight')}"
    before, after = saved[f"{at}.original_module.weight"], saved[f"{at}.weight"]
    torch.testing.assert_close(merged[EMBED], (before + after) / 2, rtol=1e-5, atol=1e-6)
    only(tmp_path / "a", lambda key: "original" not in key)
    with pytest.raises(MismatchError, match="give the adapter the weight 1"):
        lora_tools.merge(bases["llama"], [(tmp_path / "a", 0.5)], tmp_path / "n")


def test_two_vocabularies_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], LARGER, tmp_path / "a")
    train(bases["llama"], SMALLER, tmp_path / "b")
    only(tmp_path / "a", lambda key: HEAD not in key)
    only(tmp_path / "b", lambda key: EMBED not in key)
    with pytest.raises(MismatchError, match=r"its vocabulary of 96 cannot.*104.*88"):
        lora_tools.merge(bases["llama"], [tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_the_tokenizer_beside_the_adapter_goes_with_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases["llama"], LARGER, tmp_path / "a")
    (tmp_path / "a" / "added_tokens.json").write_text('{"<new>": 96}')
    report = lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    assert (tmp_path / "m" / "added_tokens.json").read_text() == '{"<new>": 96}'
    assert any("is copied (added_tokens.json)" in note for note in report.notes)


def test_it_cannot_be_taken_away_again(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], LARGER, tmp_path / "a", **FORMS["tokens"])
    with pytest.raises(UsageError, match="another shape"):
        lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m", reversible=True)
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    with pytest.raises(LoraToolsError, match="cannot be undone without a sidecar"):
        lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")


def test_a_live_model_is_resized_first(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["llama"], LARGER, tmp_path / "a", **FORMS["embedding saved"])
    with pytest.raises(MismatchError, match="resize the model's vocabulary first"):
        nn.merge_(models.load(bases["llama"]), tmp_path / "a")
    for put_on in (nn.merge_, nn.attach):
        model = put_on(resized(bases["llama"], LARGER), tmp_path / "a")
        assert_close(logits(model, LARGER), logits(trained, LARGER))


@pytest.mark.parametrize("form", ["embedding saved", "tokens", "both low-rank"])
def test_verbs_that_write_adapters_keep_it(
    form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama-tied"]
    trained = train(base, LARGER, tmp_path / "a", **FORMS[form])
    lora_tools.convert(tmp_path / "a", tmp_path / "0", to="peft")
    lora_tools.rescale(tmp_path / "a", tmp_path / "1", rslora=True)
    lora_tools.combine([tmp_path / "a"], tmp_path / "2")
    for name in "012":
        lora_tools.merge(base, [tmp_path / name], tmp_path / f"m{name}")
        assert_close(logits(loaded(tmp_path / f"m{name}", LARGER), LARGER), logits(trained, LARGER))


def test_the_merged_model_is_verified_and_quantized(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["llama"], tmp_path / "a"
    train(base, LARGER, adapter, **FORMS["tokens"])
    lora_tools.merge(base, [adapter], tmp_path / "m")
    assert lora_tools.verify(tmp_path / "m", base=base, adapters=[adapter]).totals["same"]
    lora_tools.quantize(base, tmp_path / "q", adapters=[adapter])
    lora_tools.quantize(tmp_path / "m", tmp_path / "mq")
    models.assert_same(models.tensors(tmp_path / "q"), models.tensors(tmp_path / "mq"), 0.0)
    assert lora_tools.verify(adapter, base=base, tuned=tmp_path / "m").totals[
        "relative_error"
    ] == pytest.approx(0, abs=1e-6)


def test_a_base_in_four_bits(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["llama"], LARGER, tmp_path / "a", **FORMS["both saved"])
    lora_tools.quantize(bases["llama"], tmp_path / "q")
    with pytest.raises(UsageError, match="another vocabulary or head; run `loratools dequantize"):
        lora_tools.merge(tmp_path / "q", [tmp_path / "a"], tmp_path / "r", requantize=True)
    lora_tools.merge(tmp_path / "q", [tmp_path / "a"], tmp_path / "m")
    found = loaded(tmp_path / "m", LARGER).get_output_embeddings().weight
    assert torch.equal(found, trained.base_model.model.lm_head.modules_to_save["default"].weight)


def test_it_is_opened_elsewhere_as_it_is_here(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], LARGER, tmp_path / "a", **FORMS["both saved"])
    base = open_checkpoint(bases["llama"])
    fitted = fit_base(base, open_weighted([tmp_path / "a"], False, base))
    sent = pickle.loads(pickle.dumps(fitted))
    assert sent.config["vocab_size"] == LARGER
    for name, spec in fitted.specs.items():
        assert sent.specs[name] == spec
        assert bytes(sent.raw(name)) == bytes(fitted.raw(name))
    assert fitted.digest({}) == base.digest({})


@pytest.mark.parametrize("rows", [SMALLER, LARGER])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "phi"])
def test_extract_of_it_merges_again(
    kind: str, rows: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = resized(bases[kind], rows)
    models.perturb(tuned, 0.1, 3, only="q_proj")
    models.save(tuned, tmp_path / "tuned")
    lora_tools.extract(bases[kind], tmp_path / "tuned", tmp_path / "a", rank=64, embeddings="save")
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    assert_close(logits(loaded(tmp_path / "m", rows), rows), logits(tuned, rows))
