"""By which class PEFT's AutoPeftModel loads the base of an adapter: ``task_type`` of its config, or
``auto_mapping`` where PEFT has no task for the class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.base_name import named
from lora_tools.formats.names import TASK_CLASSES, class_name

# PEFT's tasks, and the auto class of transformers that it loads the base with (peft 0.21, auto.py).
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Heads that PEFT wants saved whole in models of these tasks: factors on them it leaves out, and one
# that is not there is a KeyError (peft 0.21).
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Base(Protocol):
    """A model at hand: a checkpoint, or its names."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


def identified(
    config: Mapping[str, Any],
    base: Base | None,
    wanted: str | None,
    modules: Collection[str],
    saved: Collection[str],
) -> dict[str, Any]:
    """An adapter's config that says which model it is for and how that is loaded: what it says
    already stays, but where another name is ``wanted``. The one place that does so.

    Args:
        base: where it is at hand.
        wanted: ``--base-name``.
        modules, saved: those that have factors, and those or the tensors that are saved whole.
    """
    found = named(config, (base.path, base.config) if base is not None else None, wanted)
    if base is None or found.get("task_type") or found.get("auto_mapping"):
        return found
    return {**found, **class_fields(base.config, modules, saved)}


def identify(given: Adapter, form: Format, base: Base | None, wanted: str | None) -> None:
    """Have the config of an adapter that is to be written in a format be ``identified``.

    Raises:
        UsageError: a name is wanted, and the format has no config to put it in.
    """
    refuse_base_name(form, wanted)
    if form.name == "peft":
        modules = given.changes or given.modules
        given.config = identified(given.config, base, wanted, modules, given.whole)


def refuse_base_name(form: Format, wanted: str | None) -> None:
    """Raises UsageError where a name is wanted, and the format has no config to put it in."""
    if form.name != "peft" and wanted is not None:
        raise UsageError(f"--base-name: {form.title} cannot store it")


def class_fields(
    config: Mapping[str, Any], modules: Collection[str], saved: Collection[str]
) -> dict[str, Any]:
    """``task_type`` or ``auto_mapping`` of an adapter's config; {} where the base's config.json
    names no class that transformers, or its own code, has.

    A task with a head of its own is named only where the head is saved whole, as PEFT's model for
    it wants; else the class is.

    Args:
        config: config.json of the base.
        modules, saved: as in ``identified``.
    """
    task = _task(config)
    heads = _HEADS.get(task or "", ())
    whole, factors = (
        any(head in name.split(".") for name in names for head in heads)
        for names in (saved, modules)
    )
    if task is not None and (not heads or (whole and not factors)):
        return {"task_type": task}
    name = class_name(config)
    return {"auto_mapping": _mapping(name)} if _is_in_transformers(config, name) else {}


def _task(config: Mapping[str, Any]) -> str | None:
    name, own = class_name(config), config.get("auto_map")
    if isinstance(own, Mapping) and own:  # code of its own: AutoModel… with trust_remote_code
        mine = {key for key, value in own.items() if str(value).rpartition(".")[2] == name}
        return next((task for task, auto in _AUTO.items() if auto in mine), None)
    ends = (*TASK_CLASSES.items(), ("CAUSAL_LM", "ForCausalLM"), ("CAUSAL_LM", "LMHeadModel"))
    by_name = next((task for task, end in ends if name.endswith(end)), None)
    if by_name is not None or not name:  # without the import of transformers
        return by_name
    return next((t for t in _AUTO if t not in TASK_CLASSES and _is_of(t, config, name)), None)


def _is_of(task: str, config: Mapping[str, Any], name: str) -> bool:
    """Whether transformers' auto class of the task makes this class of this config."""
    if find_spec("transformers") is None:
        return False
    from transformers.models.auto import modeling_auto

    tables = {
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
    }
    # PEFT's model for features passes token ids and embeddings on, which text models alone take.
    if task == "FEATURE_EXTRACTION" and not _reads_text(config):
        return False
    found = tables[task].get(config.get("model_type"))
    return name in (found if isinstance(found, list | tuple) else [found])


def _reads_text(config: Mapping[str, Any]) -> bool:
    return "vocab_size" in config and not config.get("is_encoder_decoder")


def _is_in_transformers(config: Mapping[str, Any], name: str) -> bool:
    if not name or config.get("auto_map") or find_spec("transformers") is None:
        return False
    import transformers

    return isinstance(getattr(transformers, name, None), type)


def _mapping(name: str) -> dict[str, str]:
    return {"base_model_class": name, "parent_library": "transformers"}
