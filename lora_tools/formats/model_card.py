"""Model cards: a folder's README.md, whose YAML head tells the Hub how to file what lies beside it.

Ours carry the tag ``loratools``. They speak of one artifact, so they do not travel with its files
into what is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.formats.json_file import read_object
from lora_tools.formats.regular_files import is_there, read_file

NAME = "README.md"
TAG = "loratools"
_MOST = 1_000_000  # bytes of a card that is read
_LONGEST = 200  # letters of a field

# By the ending of the name of a model's class, as the Hub files models of transformers.
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
# By the ``task_type`` of an adapter of PEFT.
_ADAPTER_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def said(folder: Path) -> dict[str, Any]:
    """What the head of a folder's card says; nothing where there is none, or none that is
    understood. Raises CheckpointError for one that is no file."""
    path = folder / NAME
    if not is_there(path) or path.stat().st_size > _MOST:
        return {}
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path)
    except Exception:  # of yaml, of text, of nesting: the card is for people all the same
        return {}
    return found or {}


def is_ours(path: Path) -> bool:
    """Whether a file is a card that this tool wrote."""
    if path.name != NAME or path.stat().st_size > _MOST:
        return False
    if TAG.encode() not in read_file(path):
        return False
    tags = said(path.parent).get("tags")
    return isinstance(tags, list) and TAG in tags


def text_of(head: Mapping[str, Any], key: str) -> str | None:
    """A field that is a line of text; None where it is not."""
    value = head.get(key)
    fine = isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST
    return value if fine else None


def written(head: Mapping[str, Any], body: str) -> bytes:
    """A card. Fields of the head that are None or empty are left out."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**{key: value for key, value in head.items() if value})
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).encode()


def library_of(folder: Path) -> str | None:
    """The library that a folder's files are for, by the Hub's name; None where no file tells."""
    if is_there(folder / "adapter_config.json"):
        config = read_object(folder / "adapter_config.json")
        if "peft_type" in config:
            return "peft"
        return "mlx" if "fine_tune_type" in config else None
    if is_there(folder / "model_index.json") or _any(folder, "pytorch_lora_weights.*"):
        return "diffusers"
    if is_there(folder / "modules.json"):
        return "sentence-transformers"
    loads = is_there(folder / "config.json") and _any(folder, "*.safetensors", "*.bin")
    return "transformers" if loads and "model_type" in read_object(folder / "config.json") else None


def _any(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def task_of(folder: Path) -> str | None:
    """The task that the files of a folder name; None where they name none."""
    if is_there(folder / "adapter_config.json"):
        named = read_object(folder / "adapter_config.json").get("task_type")
        return _ADAPTER_TASKS.get(named) if isinstance(named, str) else None
    if is_there(folder / "modules.json"):
        return "sentence-similarity"
    if not is_there(folder / "config.json"):
        return None
    classes = read_object(folder / "config.json").get("architectures")
    return task_of_classes(classes if isinstance(classes, list) else ())


def task_of_classes(classes: Sequence[Any]) -> str | None:
    """The same by the names of a model's classes."""
    for name in classes[:1]:
        for ending, task in _TASKS.items():
            if isinstance(name, str) and name.endswith(ending):
                return task
    return None
