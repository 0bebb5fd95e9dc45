"""What a checkpoint can be exported for. Names only: nothing here imports torch or transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, UsageError

TEXT, DECODER, ENCODER_DECODER = "text", "decoder", "encoder-decoder"
IMAGE, AUDIO, IMAGE_AND_TEXT = "image", "audio", "image and text"
SENSED = (IMAGE, AUDIO, IMAGE_AND_TEXT)


@dataclasses.dataclass(frozen=True)
class Step:
    """A module of a sentence-transformers folder that is put into the graph.

    Attributes:
        folder: where its weights lie, if it has any; name: before the names of these.
        kind: the name of its class in sentence-transformers.
        config: its ``config.json``.
    """

    folder: Path
    name: str
    kind: str
    config: Mapping[str, Any] = dataclasses.field(hash=False)


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: what ``--task`` takes.
        auto: transformers' class that makes such a model of any architecture's config.
        endings: how the names of the classes end that ``config.json`` gives for it.
        kind: "text", "decoder", "encoder-decoder", "image", "audio" or "image and text": which
            inputs its graphs have.
        outputs: of an architecture without a cache.
        steps: modules of a sentence-transformers folder that run on what the model gives.
    """

    name: str
    auto: str
    endings: tuple[str, ...]
    kind: str
    outputs: tuple[str, ...] = ("logits",)
    steps: tuple[Step, ...] = ()

    def files(self) -> tuple[str, ...]:
        """The graphs it is exported to, by the names Optimum's runtimes look for."""
        if self.kind == ENCODER_DECODER:
            return "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
        return ("model.onnx",)


TASKS = {
    task.name: task
    for task in (
        Task("features", "AutoModel", ("Model",), TEXT, ("last_hidden_state",)),
        Task(
            "classification",
            "AutoModelForSequenceClassification",
            ("ForSequenceClassification",),
            TEXT,
        ),
        Task(
            "token-classification",
            "AutoModelForTokenClassification",
            ("ForTokenClassification",),
            TEXT,
        ),
        Task("masked-lm", "AutoModelForMaskedLM", ("ForMaskedLM",), TEXT),
        Task(
            "question-answering",
            "AutoModelForQuestionAnswering",
            ("ForQuestionAnswering",),
            TEXT,
            ("start_logits", "end_logits"),
        ),
        Task("causal-lm", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), DECODER),
        Task("seq2seq", "AutoModelForSeq2SeqLM", ("ForConditionalGeneration",), ENCODER_DECODER),
        Task("speech-seq2seq", "AutoModelForSpeechSeq2Seq", (), ENCODER_DECODER),
        Task(
            "image-classification",
            "AutoModelForImageClassification",
            ("ForImageClassification",),
            IMAGE,
        ),
        Task("image-features", "AutoModel", (), IMAGE, ("last_hidden_state",)),
        Task(
            "object-detection",
            "AutoModelForObjectDetection",
            ("ForObjectDetection",),
            IMAGE,
            ("logits", "pred_boxes"),
        ),
        Task(
            "semantic-segmentation",
            "AutoModelForSemanticSegmentation",
            ("ForSemanticSegmentation",),
            IMAGE,
        ),
        Task("ctc", "AutoModelForCTC", ("ForCTC",), AUDIO),
        Task(
            "audio-classification",
            "AutoModelForAudioClassification",
            ("ForAudioClassification",),
            AUDIO,
        ),
        Task("audio-features", "AutoModel", (), AUDIO, ("last_hidden_state",)),
        Task(
            "zero-shot-image-classification",
            "AutoModelForZeroShotImageClassification",
            (),
            IMAGE_AND_TEXT,
            ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
        ),
    )
}
_SPEECH = ("whisper", "speech_to_text", "moonshine")
# Classes whose names do not end as those of their task.
_OTHERWISE = {
    "MarianMTModel": "seq2seq",
    "BertGenerationDecoder": "causal-lm",
    "ReformerModelWithLMHead": "causal-lm",
    "FlaubertWithLMHeadModel": "masked-lm",
    "XLMWithLMHeadModel": "masked-lm",
    "CLIPModel": "zero-shot-image-classification",
    "SiglipModel": "zero-shot-image-classification",
}
# The names of classes of text, of images and of sound end alike.
_OF_IMAGES = {"features": "image-features"}
_OF_SOUND = {"features": "audio-features", "classification": "audio-classification"}
_ENCODERS = ("vision_config", "audio_config", "vision_tower_config", "speech_config")
_PAIRS = ("vision-encoder-decoder", "speech-encoder-decoder", "encoder-decoder")
# What configs call the size of a state that is neither keys nor values.
_STATES = (
    "state_size",
    "ssm_state_size",
    "mamba_d_state",
    "lru_width",
    "linear_conv_kernel_dim",
    "attention_hidden_size",
    "conv_L_cache",
)
# Kinds of layers with such a state, by which ``layer_types`` names them.
_STATEFUL = ("linear_attention", "conv", "mamba", "recurrent", "ssm")


def task_of(config: Mapping[str, Any], asked: str) -> Task:
    """The task asked for, or with ``auto`` the one that ``config.json`` names its class after.

    Raises:
        UsageError: no such task.
        CheckpointError: the config does not tell.
    """
    if asked != "auto":
        if asked not in TASKS:
            raise UsageError(f"--task {asked!r}: one of auto, {', '.join(TASKS)} is needed")
        return TASKS[asked]
    name = _class_of(config)
    if name in _OTHERWISE:
        return TASKS[_OTHERWISE[name]]
    for task in reversed(TASKS.values()):  # "Model" is the end of "LMHeadModel", too
        if name.endswith(task.endings) and task.endings:
            speech = task.kind == ENCODER_DECODER and config.get("model_type") in _SPEECH
            return TASKS["speech-seq2seq" if speech else _sensed(config).get(task.name, task.name)]
    raise CheckpointError(
        f"config.json does not show the task (its architecture is {name or 'missing'!r}); pass "
        f"--task ({', '.join(TASKS)})"
    )


def _sensed(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The tasks of a model of sound or of images in the place of those of text, by what only such
    a config has."""
    if "num_conv_pos_embeddings" in config or {"num_mel_bins", "patch_size"} <= config.keys():
        return _OF_SOUND
    return _OF_IMAGES if {"image_size", "num_channels"} & config.keys() else {}


def _class_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def refuse_kind(config: Mapping[str, Any], task: Task) -> None:
    """Before anything is read or traced, which can take minutes.

    Raises:
        CheckpointError: the model is of a kind of which no graph is written.
    """
    name = _class_of(config) or config.get("model_type")
    beside = [key for key in _ENCODERS if isinstance(config.get(key), Mapping)]
    if beside and task.kind != IMAGE_AND_TEXT:
        raise CheckpointError(
            f"{name}: a model of several parts ({', '.join(beside)} in config.json) that takes "
            "images or sound together with text, and only models with one kind of input can be "
            "exported; give a checkpoint of its language model or of its encoder"
        )
    if config.get("model_type") in _PAIRS:
        raise CheckpointError(
            f"{name}: consists of two models (model_type {config['model_type']}), which cannot be "
            "exported together; export the checkpoints that it was made from"
        )
    if task.name == "speech-seq2seq" and "num_mel_bins" not in config:
        raise CheckpointError(
            f"{name}: takes sound of any length; only speech models with a fixed number of mel "
            "frames, such as Whisper, can be exported"
        )
    told = {**config, **inner} if isinstance(inner := config.get("text_config"), dict) else config
    states = [key for key in _STATES if isinstance(told.get(key), int)]
    if any(kind in _STATEFUL for kind in told.get("layer_types") or ()):
        states.append("layer_types")
    if task.kind == DECODER and states:
        raise CheckpointError(
            f"{name}: keeps another state than keys and values ({', '.join(states)} in "
            "config.json), which torch does not export for any length; only models with keys and "
            "values can be exported as decoders"
        )
