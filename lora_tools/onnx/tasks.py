"""What a checkpoint can be exported for. Names only: nothing here imports torch or transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, UsageError

TEXT, DECODER, ENCODER_DECODER, IMAGE = "text", "decoder", "encoder-decoder", "image"


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
        kind: "text", "decoder", "encoder-decoder" or "image": which inputs its graphs have.
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
    )
}
_SPEECH = ("whisper", "speech_to_text", "moonshine")


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
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for task in reversed(TASKS.values()):  # "Model" is the end of "LMHeadModel", too
        if name.endswith(task.endings) and task.endings:
            speech = task.kind == ENCODER_DECODER and config.get("model_type") in _SPEECH
            return TASKS["speech-seq2seq"] if speech else task
    raise CheckpointError(
        f"config.json names the architecture {name or 'nowhere'!r}, from which the task cannot be "
        f"told; pass --task ({', '.join(TASKS)})"
    )
