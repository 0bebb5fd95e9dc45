"""What made an artifact: command, version and digests in its metadata."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_tools.errors import MismatchError


def text_digest(text: str) -> str:
    """Of a text that is an input, as reports have it."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def tool_version() -> str:
    """The installed version of loratools."""
    try:
        return version("loratools")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"


def command_of(verb: str, *records: Any, order: str = "") -> str:
    """The call as artifacts record it: the verb, and the options that are not as by default, but no
    paths, so that the same input gives the same bytes wherever it lies.

    Args:
        records: of options, whose fields say whether they are recorded.
        order: names that come first; the others follow as the records have them.
    """
    given = {
        field.name: getattr(record, field.name)
        for record in records
        for field in dataclasses.fields(record)
        if (said := field.metadata.get("option")) is not None
        and said.recorded
        and getattr(record, field.name) != field.default
    }
    names = [name for name in dict.fromkeys((*order.split(), *given)) if name in given]
    parts = [f"{name}={given[name]!r}" for name in names]
    return " ".join([verb.replace("_", "-"), *parts])


def handed_on(metadata: Mapping[str, str], command: str, digest: str) -> dict[str, str]:
    """The metadata of an adapter made of another: it is for the same base, and the command comes
    after those that made the other.

    Args:
        metadata, digest: of the other.
    """
    before = metadata.get("command", "")
    return {
        **{key: metadata[key] for key in ("base_digest", "tuned_digest") if key in metadata},
        "loratools": tool_version(),
        "adapter_digests": digest,
        "command": " | ".join(each for each in (before, command) if each),
    }


def check_bases(
    adapters: Iterable[tuple[str, Mapping[str, str]]], base_digest: str, made_of: str = ""
) -> None:
    """Refuse an adapter whose metadata names another base than the one with this digest.

    Args:
        adapters: each one's path, and the metadata of its file.
        made_of: the digest of what the base is another form of, which will do as well.

    Raises:
        MismatchError: naming it.
    """
    for path, metadata in adapters:
        recorded = metadata.get("base_digest", base_digest)
        if recorded not in (base_digest, made_of):
            raise MismatchError(
                f"{path}: was made for another base: its digest is {recorded}, and that of the one "
                f"given is {base_digest}; give that base, or pass --allow-other-base"
            )
