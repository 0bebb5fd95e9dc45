"""The model card of what a verb wrote.

It says what is known and nothing else: no dates and no paths, so that the same input gives the same
bytes wherever it lies.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.formats import hub, model_card
from lora_tools.formats.base_name import base_name, named_base
from lora_tools.formats.json_file import read_object
from lora_tools.formats.output import Prepared
from lora_tools.formats.regular_files import is_there
from lora_tools.records import Input, Report
from lora_tools.remote import urls
from lora_tools.sentences import sentences
from lora_tools.sources.weighted import split_weight
from lora_tools.verbs.row import Verb, called

# What a model in another form has of its source's card, and an adapter of the one it is made of.
_HANDED_ON = ("language", "license", "license_name", "license_link", "pipeline_tag")
_BASES = ("base", "checkpoint")
_ADAPTERS = ("peft", "mlx", "diffusers")  # libraries of adapters in folders


def card_of(
    row: Verb, asked: Mapping[str, Any], report: Report[Any], folder: Path, prepared: Prepared
) -> bytes:
    """The card of a folder that was just written.

    Args:
        asked: the call's records; report: of what was written, as ``prepared``.
    """
    is_adapter = model_card.library_of(folder) in _ADAPTERS
    bases, adapters = _hub_ids(report.inputs, *_BASES), _hub_ids(report.inputs, "adapter")
    if is_adapter:
        named = named_base(folder)
        bases = [named] if named else bases[:1]
    merged = not is_adapter and any(each.role == "adapter" for each in report.inputs)
    title, tags = _titled(folder, is_adapter, merged)
    models = bases if is_adapter else [*bases, *adapters]
    relation = "adapter" if is_adapter else "merge" if merged else "quantized"
    head = {
        **_handed_on(_sources(prepared)),
        "base_model": models,
        "library_name": model_card.library_of(folder),
        "tags": [model_card.TAG, *tags],
        "base_model_relation": relation if models else None,
    }
    head["pipeline_tag"] = head.get("pipeline_tag") or model_card.task_of(folder)
    lines = [
        f"# {title}{' for ' if is_adapter else ' made of '}{bases[0]}" if bases else f"# {title}",
        "",
        f"Written by loratools {report.version}:",
        "",
        f"    {_typed(row, asked, report.inputs)}",
        "",
        *(f"- {line}" for line in _inputs(report.inputs)),
        "",
        "The result:",
        "",
        *(f"- {line}" for line in sentences(_without_sidecar(report))),
    ]
    return model_card.written(head, "\n".join(lines) + "\n")


def _without_sidecar(report: Report[Any]) -> Report[Any]:
    """The figures of the model alone: with a sidecar beside it, it is the same one."""
    kept = {k: v for k, v in report.totals.items() if not k.startswith("sidecar_")}
    return dataclasses.replace(report, totals=kept)


def _titled(folder: Path, is_adapter: bool, merged: bool) -> tuple[str, list[str]]:
    """What a folder holds, in words and tags."""
    if is_adapter:
        return "LoRA adapter", ["lora"]
    tags = ["merge"] if merged else []
    if any(folder.rglob("*.onnx")):
        return "ONNX model", ["onnx", *tags]
    config = folder / "config.json"
    if is_there(config) and "quantization_config" in read_object(config):
        return "Quantized model", tags
    return ("Merged model" if merged else "Model"), tags


def _sources(prepared: Prepared) -> list[Path]:
    """Folders of what was read, first the one that the result is another form of."""
    first, *others = prepared.inputs
    if any(each.role == "tuned" for each in prepared.report.inputs):
        first, others = others[0], [first, *others[1:]]
    root = prepared.pipeline.root if prepared.pipeline is not None else first
    return [path for path in (root, *others) if path.is_dir()]


def _handed_on(sources: Sequence[Path]) -> dict[str, Any]:
    """Fields of the first source's card that no other's contradicts."""
    first, *others = [model_card.said(source) for source in sources] or [{}]
    found = {key: model_card.text_of(first, key) for key in _HANDED_ON}
    return {
        key: value
        for key, value in found.items()
        if value and all(other.get(key, value) == value for other in others)
    }


def _hub_ids(inputs: Sequence[Input], *roles: str) -> list[str]:
    """Ids of the inputs of those roles, where they are known, each once."""
    found = [_hub_id(each) for each in inputs if each.role in roles]
    return list(dict.fromkeys(each.partition("@")[0] for each in found if each))


def _hub_id(given: Input) -> str | None:
    """The id of an input on the hub, with the revision where it is not ``main``."""
    path = split_weight(given.path)[0] if given.role == "adapter" else given.path
    if not Path(path).exists():
        found = hub.parse(path)
        return str(found) if found and not found.subfolder else None
    config = Path(path) / "config.json"
    known = read_object(config) if Path(path).is_dir() and is_there(config) else {}
    name, revision = base_name(Path(path), known)
    if name is None or not hub.looks_like_hub_id(name):
        return None
    return f"{name}@{revision}" if revision else name


def _typed(row: Verb, asked: Mapping[str, Any], inputs: Sequence[Input]) -> str:
    """The call as it is typed, without what does not decide what is written."""
    parts = ["loratools", row.command]
    for argument in row.arguments:
        if argument.several:
            parts += [_adapter(each) for each in inputs if each.role == "adapter"]
        elif argument.name != "out":
            parts.append(argument.name.upper())
    parts += ["-o", "OUT"]
    for keyword in row.keywords:
        value = getattr(asked[called(keyword.record)], keyword.name)
        if keyword.option is None or value == keyword.default:
            continue
        if keyword.name == "adapters":
            adapters = [_adapter(each) for each in inputs if each.role == "adapter"]
            parts += [part for each in adapters for part in (keyword.flag, each)]
        elif keyword.option.recorded:
            parts += keyword.typed(value)
    return shlex.join(parts)


def _adapter(given: Input) -> str:
    """An adapter as the command names it, with its weight."""
    _, weight = split_weight(given.path)
    return "ADAPTER" if weight == 1 else f"ADAPTER={weight:g}"


def _inputs(inputs: Sequence[Input]) -> Iterator[str]:
    """What each input is, by hub id and digest."""
    for each in inputs:
        known = _hub_id(each) if each.role in (*_BASES, "tuned", "adapter") else None
        digest = f"digest `{each.digest}`" if each.digest else ""
        name = f"[{known}](https://huggingface.co/{known.partition('@')[0]})" if known else ""
        said = ", ".join(part for part in (name, digest) if part)
        where = "a file elsewhere" if urls.url(each.path) else "a local file"
        yield f"{each.role}: {said or where}"
