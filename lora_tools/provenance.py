"""What made an artifact: command, version and digests in its metadata."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from lora_tools.errors import MismatchError
from lora_tools.formats import digest as hashing


def text_digest(text: str) -> str:
    """Of a text that is an input, as reports have it."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


version_of = functools.cache(version)  # which reads a file, and parses it as an e-mail


def tool_version() -> str:
    """The installed version of loratools."""
    try:
        return version_of("loratools")
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


class Digested(Protocol):
    """What a digest can be formed of, such as a checkpoint."""

    def digest(self, known: Mapping[str, str]) -> str: ...


def digest_like(recorded: str, own: str, source: Digested) -> str:
    """The digest of ``source`` to compare a recorded one with.

    Args:
        own: its digest as formed in this call; where the recorded one is of another kind, all of
            it is read once more. Raises MismatchError for a kind that cannot be formed.
    """
    kind = hashing.kind_of(recorded)
    if kind == hashing.kind_of(own):
        return own
    with hashing.using(kind):
        return source.digest({})


def check_bases(
    adapters: Iterable[tuple[str, Mapping[str, str]]],
    base_digest: str,
    base: Digested,
    made_of: str = "",
) -> None:
    """Refuse an adapter whose metadata names another base than this one.

    Args:
        adapters: each one's path, and the metadata of its file.
        base_digest: the base's, as formed in this call.
        made_of: the digest of what the base is another form of, which will do as well.

    Raises:
        MismatchError: naming it.
    """
    allow = "pass --allow-other-base"
    given = {hashing.kind_of(base_digest): base_digest}
    for path, metadata in adapters:
        recorded = metadata.get("base_digest", base_digest)
        if recorded in (base_digest, made_of):
            continue
        try:
            kind = hashing.kind_of(recorded)
        except MismatchError as error:
            raise MismatchError(
                f"{path}: {error}; to merge it without this check, {allow}"
            ) from None
        if kind not in given:
            given[kind] = digest_like(recorded, base_digest, base)
        if recorded != given[kind]:
            raise MismatchError(
                f"{path}: was made for another base, with the digest {recorded}, but the given "
                f"base has {given[kind]}{_unlike(recorded, made_of)}; give the right base, or "
                f"{allow}"
            )


def _unlike(recorded: str, made_of: str) -> str:
    """Words on what the base was made of, where its digest cannot be compared with that one."""
    if not made_of or made_of.partition(":")[0] == recorded.partition(":")[0]:
        return ""
    return f", which was made from {made_of}, another kind of digest"
