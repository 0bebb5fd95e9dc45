"""Tiny random models and adapters, made by transformers and PEFT themselves."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 96
_SMALL = 4 << 20  # bytes of a model that is kept
transformers.logging.disable_progress_bar()


def _llama(width: int, tied: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def _bert_config(width: int) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        type_vocab_size=2,
    )


def _gpt2(width: int) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=width, n_layer=2, n_head=4, n_inner=2 * width
    )
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[int], transformers.PreTrainedModel]] = {
    "llama": lambda width: _llama(width, tied=False),
    "llama-tied": lambda width: _llama(width, tied=True),
    "bert": lambda width: transformers.BertModel(_bert_config(width)),
    "bert-classifier": lambda width: transformers.BertForSequenceClassification(
        _bert_config(width)
    ),
    "gpt2": _gpt2,  # Conv1D throughout, its attn.c_proj square; tied
}


def make(kind: str, seed: int = 0, width: int = 32) -> transformers.PreTrainedModel:
    """A model in float32 whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    model = MODELS[kind](width)
    perturb(model, 0.1, seed)
    return model.eval()


def perturb(model: torch.nn.Module, size: float, seed: int, only: str = "") -> None:
    """Add noise to every parameter whose name contains ``only``."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += size * torch.randn(parameter.shape, generator=noise)


def noisy(make: Callable[[], Any], folder: Path) -> Path:
    """A model with noise on every parameter, the same each time, saved to a folder."""
    torch.manual_seed(0)
    model = make()
    perturb(model, 0.1, 1)
    return save(model, folder)


def save(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    """``save_pretrained``, with the folder returned."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def pair(folder: Path) -> Path:
    """``base`` and ``tuned`` in a folder: a Llama, and all of its weights a little otherwise."""
    model = make("llama")
    save(model, folder / "base")
    perturb(model, 0.01, seed=1)
    save(model, folder / "tuned")
    return folder


def quietly(work: Callable[[], Any]) -> Any:
    """Call ``work``; what PEFT and transformers warn of is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def train(
    base: Path, out: Path, config: dict[str, Any], seed: int = 7, **saving: Any
) -> peft.PeftModel:
    """An adapter on the model in ``base``, every trained number random, saved to ``out``."""
    torch.manual_seed(seed)
    model = quietly(lambda: peft.get_peft_model(load(base), peft.LoraConfig(**config)))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                new = parameter + 0.2 * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(new.abs() if "magnitude" in name else new)
    model.eval()
    quietly(lambda: model.save_pretrained(out, **saving))
    return model


def adapt(base: Path, out: Path, config: dict[str, Any], **options: Any) -> peft.PeftModel:
    """The same as PEFT reads it back. That may differ from what was trained: PEFT sorts the keys of
    the config's dicts when it saves them, and takes the first pattern that matches."""
    train(base, out, config, **options)
    return attach(base, out)


def attach(base: Path, adapter: Path) -> peft.PeftModel:
    """The model in ``base`` with the adapter in ``adapter``, as PEFT loads them."""
    return quietly(lambda: peft.PeftModel.from_pretrained(load(base), adapter)).eval()


def attach_strictly(base: torch.nn.Module, adapter: Path) -> peft.PeftModel:
    """PEFT's model, having made sure that it reads every key of the file and misses none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    said = [str(w.message) for w in caught]
    assert not [text for text in said if "adapter keys" in text or "weight_tying" in text], said
    read = quietly(lambda: peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    written = tensors(adapter)
    # With bias="all" PEFT lists every bias of the model, and those of saved modules twice.
    assert sorted(k for k in read if not k.endswith(".bias")) == sorted(
        k for k in written if not k.endswith(".bias")
    )
    assert set(written) <= set(read)
    result = quietly(lambda: peft.set_peft_model_state_dict(model, dict(written)))
    assert not result.unexpected_keys
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor.to(read[name].dtype)), name
    return model


def load(folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """The model in ``folder`` by the class its config names, in the dtype it is stored in: a copy,
    as long as the files stay as they are, of what transformers loaded."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    if options or sum(stat.st_size for _, stat in files) > _SMALL:
        return _load(folder, **options)
    stamp = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in files)
    return copy.deepcopy(_loaded(folder, stamp))


@functools.lru_cache(32)
def _loaded(folder: Path, stamp: tuple[object, ...]) -> transformers.PreTrainedModel:
    return _load(folder)


def _load(folder: Path, **options: Any) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return quietly(lambda: kind.from_pretrained(folder, **options)).eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or hidden states where the model has no head, on fixed tokens."""
    tokens = torch.arange(2 * 11).reshape(2, 11) * 7 % VOCAB
    with torch.no_grad():
        return model(input_ids=tokens)[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint or adapter folder."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_same(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float
) -> None:
    """Equal names, and each tensor within ``rtol`` of the other's norm."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        distance = (found[name].double() - tensor.double()).norm()
        assert distance <= rtol * tensor.double().norm(), (name, float(distance))


def write_adapter(
    folder: Path, A: torch.Tensor, B: torch.Tensor, alpha: float, m: torch.Tensor | None = None
) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": A.shape[0], "lora_alpha": alpha, "use_dora": m is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.w.lora_A.weight": A, "base_model.model.w.lora_B.weight": B}
    if m is not None:
        tensors["base_model.model.w.lora_magnitude_vector"] = m
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder
