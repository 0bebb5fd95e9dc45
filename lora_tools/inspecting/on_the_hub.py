"""What the Hub will make of a folder: by the head of its card, and where that is silent, by its
files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_tools.formats import model_card
from lora_tools.formats.base_name import base_of, named_base
from lora_tools.formats.regular_files import is_there
from lora_tools.totals import HubTotals

_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def on_the_hub(folder: Path) -> HubTotals:
    """How it will be filed there, and what is missing for it. Nothing is asked of the network.

    Raises:
        CheckpointError: a small file in it is no file, or not JSON.
    """
    head = model_card.said(folder)
    library = model_card.text_of(head, "library_name") or model_card.library_of(folder)
    of_adapter = is_there(folder / "adapter_config.json")
    task = model_card.text_of(head, "pipeline_tag")
    if task is None and not of_adapter:  # of adapters the Hub reads no task but the card's
        task = model_card.task_of(folder)
    bases = _names(head.get("base_model"))
    if not bases and of_adapter and (named := named_base(folder)):
        bases = [named]
    relation = model_card.text_of(head, "base_model_relation")
    if relation not in _RELATIONS:
        relation = "adapter" if of_adapter and bases else None
    found: HubTotals = {
        "library_name": library,
        "pipeline_tag": task,
        "base_model": bases,
        "base_model_relation": relation,
        "license": model_card.text_of(head, "license"),
        "missing": [],
    }
    found["missing"] = _missing(folder, found, of_adapter)
    return found


def _names(value: Any) -> list[str]:
    """A field that is one name or several."""
    given = value if isinstance(value, list) else [value]
    return [each for each in given if isinstance(each, str) and each.isprintable() and each]


def _missing(folder: Path, found: HubTotals, of_adapter: bool) -> list[str]:
    has_card = is_there(folder / model_card.NAME)
    lacks = [
        (not has_card, f"a model card ({model_card.NAME})"),
        (found["license"] is None, "license"),
        (found["library_name"] is None, "library_name"),
        (found["pipeline_tag"] is None, "pipeline_tag"),
        (of_adapter and not found["base_model"], "base_model"),
        (
            of_adapter and bool(base_of(folder)) and named_base(folder) is None,
            "the Hub id of the base in adapter_config.json, which has a path instead (--base-name)",
        ),
        (
            any(True for kind in _PICKLES for _ in folder.glob(kind))
            and not any(folder.glob("*.safetensors")),
            "weights in safetensors",
        ),
    ]
    return [what for lacking, what in lacks if lacking]
