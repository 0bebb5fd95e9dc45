"""Names: which layer kind a tensor is, and which modules a short name stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_tools.formats.expert_names import TRANSPOSED
from lora_tools.records import TensorSpec

# No model is built, so a 2-D weight is told to be an embedding by the last part of its module's
# name. These are the names transformers, timm and fairseq give to nn.Embedding.
EMBEDDING = re.compile(
    r"(embed_tokens|tok_embeddings|token_embedding|word_embeddings?|embed_in|wte|wpe|shared"
    r"|position_embeddings?|token_type_embeddings|embed_positions|rel_embeddings"
    r"|relative_attention_bias|tokens_embed|positions_embed|embeddings?)"
)
_INPUT_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "shared",
)
_HEAD = re.compile(r"(lm_head|embed_out|output_projection)")
# Architectures whose linear layers are transformers' Conv1D, stored (in, out), and those layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc|q_attn)")
# Fused experts: the parameters that hold them.
_FUSED = ("gate_up_proj", "down_proj", "up_proj")
# Architectures with an output head to tie. (BertModel's config ties as well, and it has none.)
_LANGUAGE_MODEL = re.compile(
    r".*(For\w*LM|LMHead\w*|DoubleHeadsModel|ForConditionalGeneration|ForPreTraining)"
)
# PEFT's task types of classes whose head is not that of a language model, and how those are called.
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def split_tensor(tensor: str) -> tuple[str, str]:
    """``a.b.weight`` → (``a.b``, ``weight``)."""
    module, _, parameter = tensor.rpartition(".")
    return module, parameter


def layout_name(spec: TensorSpec, config: Mapping[str, Any]) -> str | None:
    """The layer kind of a weight (a key of ``linalg.layouts.LAYOUTS``), or None where it has none.

    ``config`` is the checkpoint's config.json: GPT-2's family is known by ``model_type``. Grouped
    convolutions, and blocks of a weight, cannot be told from a name and a shape.
    """
    module, parameter = split_tensor(spec.name)
    last = module.rpartition(".")[2]
    if not (spec.is_float and module):
        return None
    if len(spec.shape) == 3 and last == "experts" and parameter in _FUSED:
        return "experts-transposed" if stores_transposed(spec, config) else "experts"
    if parameter != "weight":
        return None
    if 3 <= len(spec.shape) <= 5 and spec.shape[1] > 1:  # else depthwise, or of one channel
        return "conv"
    if len(spec.shape) != 2:
        return None
    if EMBEDDING.fullmatch(last):
        return "embedding"
    return "conv1d" if stores_transposed(spec, config) else "linear"


def as_held(parameters: Iterable[str]) -> list[str]:
    """Parameters of a module of experts in the order in which it holds them: down_proj last. (So do
    all of transformers 5's.)"""
    return sorted(parameters, key=lambda name: (name == "down_proj", name))


def stores_transposed(spec: TensorSpec, config: Mapping[str, Any]) -> bool:
    """Whether the architecture stores this weight as (in, out)."""
    if len(spec.shape) == 3:
        return config.get("model_type") in TRANSPOSED
    return may_be_conv1d(spec.name) and config.get("model_type") in _CONV1D_MODELS


def may_be_conv1d(tensor: str) -> bool:
    """Whether the name is one that transformers gives to a Conv1D, and others to other layers."""
    return bool(_CONV1D.fullmatch(split_tensor(tensor)[0].rpartition(".")[2]))


def is_output_head(tensor: str) -> bool:
    """Whether the name is that of a language model's output head."""
    return bool(_HEAD.fullmatch(split_tensor(tensor)[0].rpartition(".")[2]))


def is_input_embedding(tensor: str) -> bool:
    """Whether the name is that of a language model's token embedding."""
    return split_tensor(tensor)[0].rpartition(".")[2] in _INPUT_EMBEDDINGS


def is_language_model(kind: str) -> bool:
    """Whether the name of a class is that of a model with an output head over a vocabulary."""
    return bool(_LANGUAGE_MODEL.fullmatch(kind))


def tied_head(config: Mapping[str, Any], tensors: Collection[str]) -> str:
    """The output head of a model that ties it to the input embedding, going by the architecture
    and by the tensors that lie beside it; "" where the architecture has none."""
    architectures = config.get("architectures") or ["ForCausalLM"]
    if not is_language_model(str(architectures[0])):
        return ""
    for beside, head in (
        ("cls.predictions.", "cls.predictions.decoder.weight"),
        ("lm_head.dense.", "lm_head.decoder.weight"),
    ):
        if any(name.startswith(beside) for name in tensors):
            return head
    return next(filter(is_output_head, tensors), "lm_head.weight")


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a config.json names, or ""."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def modules_matched(name: str, modules: Iterable[str]) -> set[str]:
    """Modules that PEFT's ``target_modules: [name]`` selects: by whole name or by last parts."""
    return {m for m in modules if m == name or m.endswith("." + name)}


def compact(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """The shortest list of names by which PEFT selects exactly ``chosen`` out of ``everything``.

    The last part of a name stands for all modules that end in it, where all of them are chosen;
    the full name stands otherwise. Returns [] where not even full names select exactly.
    """
    wanted, result = set(chosen), []
    for last in sorted({name.rpartition(".")[2] for name in wanted}):
        mine = {n for n in wanted if n.rpartition(".")[2] == last}
        if modules_matched(last, everything) == mine:
            result.append(last)
        else:
            result += sorted(mine)
    exact = {m for name in result for m in modules_matched(name, everything)} == wanted
    return result if exact else []
