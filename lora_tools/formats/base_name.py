"""What an adapter's config calls the model it is for: ``base_model_name_or_path``, ``revision``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.formats.hub import in_cache, looks_like_hub_id, parse
from lora_tools.formats.json_file import read_object
from lora_tools.formats.regular_files import is_there
from lora_tools.watch.places import MEMORY, said_of

_FIELDS = ("base_model_name_or_path", "revision")


def base_name(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """A hub id and its revision, where it is certain; else the address that the path stands for, or
    the absolute path, links not followed. None of what lies in no file: nobody finds it by a name.

    Certain is a snapshot in the hub's cache, and a folder whose own name is that of the id in its
    config.json's ``_name_or_path``. Under another name the folder may be a fine-tuned copy: those
    keep the ``_name_or_path`` of what they were tuned from. So do model cards (``base_model``).

    Args:
        path: of the model, as opened; config: its config.json.
    """
    cached = in_cache(path)
    if cached is not None:
        return cached
    said = config.get("_name_or_path")
    if isinstance(said, str) and looks_like_hub_id(said) and "@" not in said:
        folder = Path(os.path.abspath(path)).name  # noqa: PTH100 - resolve would follow links
        if said.rpartition("/")[2].lower() == folder.lower():
            return said, None
    known = said_of(Path(os.path.abspath(path)))  # noqa: PTH100
    return (None if known.startswith(MEMORY) else known), None


def named(
    config: Mapping[str, Any], base: tuple[Path, Mapping[str, Any]] | None, wanted: str | None
) -> dict[str, Any]:
    """A config of PEFT that names its base: as ``wanted`` (``org/name[@revision]``), else as it
    does already, else by ``base_name``; as it is where no base is at hand.

    Args:
        base: the base's path and config.json.
    """
    if wanted is not None:
        found = parse(wanted)
        assert found is not None  # as the option's ``parse`` has seen to
        return {**config, **dict(zip(_FIELDS, (found.repository, found.revision), strict=True))}
    if config.get(_FIELDS[0]) or base is None:
        return dict(config)
    return {**config, **dict(zip(_FIELDS, base_name(*base), strict=True))}


def base_of(folder: Path) -> str | None:
    """What the adapter_config.json of a folder calls the base; None where it calls it nothing.
    Raises CheckpointError for one that is not JSON."""
    config = folder / "adapter_config.json"
    name = read_object(config).get(_FIELDS[0]) if is_there(config) else None
    return name if isinstance(name, str) and name else None


def named_base(folder: Path) -> str | None:
    """The same where it is a hub id, and not the path of something that is here."""
    name = base_of(folder)
    found = parse(name) if name and not os.path.exists(name) else None  # noqa: PTH110
    return found.repository if found and not found.subfolder else None
