"""Weights of several names that are one tensor: what the model's class says of them, and that a
merge which parts them writes every name that transformers looks for, with PEFT's own outputs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import lora_tools
from lora_tools.errors import UnsupportedAdapter
from lora_tools.merging import loadable
from lora_tools.nn import attach
from lora_tools.sources import class_says, transformers_names
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.class_says import DECODERS
from lora_tools.sources.untying import Loading, loading_of, untie
from tests import models
from tests.iotools import checkpoint

SIDES: dict[str, Any] = {"d_model": 16, "max_position_embeddings": 32} | {
    f"{side}_{of}": n
    for side in ("encoder", "decoder")
    for of, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
# Class, its config, a linear layer, the head, the embedding; and what else is that tensor.
KINDS: dict[str, tuple[str, str, dict[str, Any], tuple[str, str, str]]] = {
    "bart": ("BartForConditionalGeneration", "Bart", SIDES, ("q_proj", "lm_head", "shared")),
    "m2m": (
        "M2M100ForConditionalGeneration",
        "M2M100",
        SIDES,
        ("q_proj", "lm_head", "embed_tokens"),
    ),
    "marian": (
        "MarianMTModel",
        "Marian",
        SIDES | {"pad_token_id": 0},
        ("q_proj", "lm_head", "shared"),
    ),
    "t5": ("T5ForConditionalGeneration", "T5", T5, ("q", "lm_head", "shared")),
    "whisper": (
        "WhisperForConditionalGeneration",
        "Whisper",
        SIDES | {"num_mel_bins": 8, "max_source_positions": 8, "pad_token_id": 0},
        ("q_proj", "proj_out", "embed_tokens"),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBert",
        SMALL | {"eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 1},
        ("Wqkv", "decoder", "tok_embeddings"),
    ),
    "mamba": (
        "MambaForCausalLM",
        "Mamba",
        {"hidden_size": 16, "num_hidden_layers": 1},
        ("in_proj", "lm_head", "embeddings"),
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBert",
        {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
        ("q_lin", "vocab_projector", "word_embeddings"),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2",
        {"n_embd": 16, "n_layer": 1, "n_head": 2},
        ("c_attn", "lm_head", "wte"),
    ),
}
ACTS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "head": lambda lin, head, emb: {"target_modules": [lin, head]},
    "head-saved": lambda lin, head, emb: {"target_modules": [lin], "modules_to_save": [head]},
    "embedding": lambda lin, head, emb: {"target_modules": [lin, emb]},
    "embedding-saved": lambda lin, head, emb: {"target_modules": [lin], "modules_to_save": [emb]},
    "rows": lambda lin, head, emb: {
        "target_modules": [lin],
        "trainable_token_indices": {emb: [3, 5]},
    },
    "flag-for-nothing": lambda lin, head, emb: {
        "target_modules": [lin, emb],
        "ensure_weight_tying": emb != "embed_tokens",
    },
}


def outputs(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 4, 5, 6]])
    given: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    if model.config.model_type == "whisper":
        mel = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(3))
        given = {"input_features": mel, "decoder_input_ids": ids}
    with torch.no_grad():
        return model(**given).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by kind; T5's and GPT-2's config.json as transformers 4 wrote it."""
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in made:
            name, config, sizes, _ = KINDS[kind]
            torch.manual_seed(0)
            small = getattr(hf, config + "Config")(vocab_size=96, **sizes)
            model = getattr(hf, name)(small).eval()
            for parameter in model.parameters():
                if parameter.dim() == 2:  # PEFT 0.21 leaves a head's bias out of trained rows
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            made[kind] = models.save(model, tmp_path_factory.mktemp(kind) / "base")
            if kind in ("t5", "gpt2"):
                edit(made[kind], tie_word_embeddings=None, scale_decoder_outputs=None)
        return made[kind]

    return base


def edit(folder: Path, **entries: Any) -> None:
    """Set entries of a config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def train(kind: str, base: Path, out: Path, config: dict[str, Any]) -> torch.Tensor:
    """An adapter of PEFT's with noise for what was learnt, and the outputs of the base with it,
    loaded anew."""
    load = getattr(hf, KINDS[kind][0]).from_pretrained
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, **config)
    model = models.quietly(lambda: peft.get_peft_model(load(base), lora))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    models.quietly(lambda: model.save_pretrained(out))
    return outputs(models.quietly(lambda: peft.PeftModel.from_pretrained(load(base), out)).eval())


@pytest.mark.sweep(4)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_has_pefts_outputs(
    kind: str, act: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, name = bases(kind), KINDS[kind][0]
    wanted = train(kind, base, tmp_path / "a", ACTS[act](*KINDS[kind][3]))
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    load = getattr(hf, name).from_pretrained
    merged, said = models.quietly(lambda: load(tmp_path / "m", output_loading_info=True))
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    torch.testing.assert_close(outputs(merged.eval()), wanted, rtol=1e-5, atol=2e-6)
    live = models.quietly(lambda: load(base).eval())
    torch.testing.assert_close(outputs(attach(live, tmp_path / "a")), wanted, rtol=1e-5, atol=2e-6)
    if (kind, act) in (("bart", "head"), ("t5", "embedding-saved")):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "r", reversible=True)
        report = lora_tools.verify(tmp_path / "r", base=base, adapters=[tmp_path / "a"])
        assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"]
        lora_tools.unmerge(tmp_path / "r", [tmp_path / "a"], tmp_path / "u")
        assert models.tensors(tmp_path / "u").keys() == models.tensors(base).keys()


@pytest.mark.parametrize("embeddings", ["lora", "save"])
@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_extract_speaks_for_every_name(
    kind: str, embeddings: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, load = bases(kind), getattr(hf, KINDS[kind][0]).from_pretrained
    model = models.quietly(lambda: load(base).eval())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "position" not in name and "wpe" not in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    models.save(model, tmp_path / "tuned")
    lora_tools.extract(base, tmp_path / "tuned", tmp_path / "a", rank=96, embeddings=embeddings)
    with_it = models.quietly(lambda: peft.PeftModel.from_pretrained(load(base), tmp_path / "a"))
    torch.testing.assert_close(outputs(with_it.eval()), outputs(model), rtol=1e-4, atol=1e-5)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    assert models.tensors(tmp_path / "m").keys() == models.tensors(base).keys()


def test_what_the_class_says(bases: Callable[[str], Path]) -> None:
    base = open_checkpoint(bases("bart"))
    weights = pickle.loads(pickle.dumps(base)).weights
    [group] = weights.groups
    assert group[0] == "model.shared.weight"
    assert set(group[1:]) == {
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    assert weights["lm_head.weight"].is_head
    assert weights["model.shared.weight"].is_embedding
    assert weights.tied_pair == ("lm_head.weight", "model.shared.weight")
    assert open_checkpoint(bases("mamba")).weights["backbone.embeddings.weight"].is_embedding
    assert open_checkpoint(bases("whisper")).weights["proj_out.weight"].is_head


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("said", [None, True, False])
def test_plain_decoders_are_what_their_class_says(
    kind: str, said: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf.AutoConfig.for_model(kind, **SMALL, vocab_size=96)
    with torch.device("meta"):
        model = models.quietly(lambda: hf.AutoModelForCausalLM.from_config(config))
    entries = {"model_type": kind, "architectures": [type(model).__name__], **SMALL}
    if said is not None:
        entries["tie_word_embeddings"] = said
    names = [n for n in model.state_dict() if n not in model.all_tied_weights_keys]
    specs = {n: lora_tools.TensorSpec(n, "F32", tuple(model.state_dict()[n].shape)) for n in names}
    quick = class_says.class_says(entries, specs)
    monkeypatch.setattr(transformers_names, "SAME_NAMES", ())
    assert quick == class_says.class_says(entries, specs)


def test_a_merge_of_linear_layers_does_not_import_transformers(tmp_path: Path) -> None:
    """Whatever the architecture, and whatever is tied in it."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(96, 16),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16),
    }
    base = checkpoint(tmp_path / "base", tensors)
    said = {"architectures": ["NewForCausalLM"], "model_type": "new", "vocab_size": 96}
    (base / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    adapter = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.randn(*shape)
        for side, shape in {"A": (2, 16), "B": (16, 2)}.items()
    }
    out = checkpoint(tmp_path / "a", adapter)
    (out / "model.safetensors").rename(out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    code = (
        "import sys, lora_tools; lora_tools.merge(*sys.argv[1:2], sys.argv[2:3], sys.argv[3]);"
        "assert 'transformers' not in sys.modules"
    )
    run = [sys.executable, "-c", code, str(base), str(out), str(tmp_path / "m")]
    subprocess.run(run, check=True)


@pytest.mark.parametrize("kind", ["bart", "mamba"])
def test_what_nobody_knows_is_not_parted(
    kind: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(kind, bases(kind), tmp_path / "a", ACTS["embedding"](*KINDS[kind][3]))
    monkeypatch.setattr(transformers_names, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedAdapter, match=r"not.*transformers is not installed"):
        lora_tools.merge(bases(kind), [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_t5_scales_as_before(bases: Callable[[str], Path]) -> None:
    """In a config.json of transformers 4 a tie that goes would end the scaling of outputs."""
    base = open_checkpoint(bases("t5"))
    after = untie(base.config, base.specs)
    assert after.config["scale_decoder_outputs"] is True
    assert after.config["tie_word_embeddings"] is False
    assert any("shared.weight" in group for group in after.groups)


def test_what_could_not_be_loaded_is_not_written(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("bart")
    train("bart", base, tmp_path / "a", ACTS["head"](*KINDS["bart"][3]))
    checkpoint_ = open_checkpoint(base)
    assert loading_of(checkpoint_.config, checkpoint_.specs) == Loading(frozenset(), frozenset())
    gone = dict(checkpoint_.specs)
    norm = gone.pop("model.encoder.layernorm_embedding.weight")
    gone["strange"] = norm
    found = loading_of(checkpoint_.config, gone)
    assert found == Loading(frozenset({norm.name}), frozenset({"strange"}))
    answers = iter([Loading(frozenset(), frozenset()), found])
    monkeypatch.setattr(loadable, "loading_of", lambda *_: next(answers))
    with pytest.raises(UnsupportedAdapter, match="would not find"):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
