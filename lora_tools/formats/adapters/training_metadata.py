"""What trainers of diffusion adapters say in a file's metadata: sd-scripts' ``ss_*``, Stability's
``modelspec.*``. It is kept in what is made of the file, and made true of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_tools.formats.digest import PROVENANCE

_SAID = ("ss_", "modelspec.")
_HASHES = ("sshs_", "modelspec.hash_")  # of the file's bytes


def is_carried(key: str) -> bool:
    """Whether an entry passes to what is made of the file: that, and what says how it was made."""
    return key in PROVENANCE or is_of_training(key)


def is_of_training(key: str) -> bool:
    """Whether it is a trainer's, and not of the file's bytes."""
    return key.startswith(_SAID) and not key.startswith(_HASHES)


def updated(
    metadata: Mapping[str, str], ranks: Collection[int], alphas: Collection[float]
) -> dict[str, str]:
    """The metadata with the network's dimension and alpha as they are written ("Dynamic" where
    modules differ, as sd-scripts' ``resize_lora.py`` has it), and without hashes of other bytes."""
    result = {key: text for key, text in metadata.items() if not key.startswith(_HASHES)}
    for key, values in (("ss_network_dim", set(ranks)), ("ss_network_alpha", set(alphas))):
        if key in result:
            result[key] = f"{values.pop():g}" if len(values) == 1 else "Dynamic"
    return result


def note_on_hashes(metadata: Mapping[str, str]) -> list[str]:
    """What to say of hashes that are left out."""
    hashes = sorted(key for key in metadata if key.startswith(_HASHES))
    if not hashes:
        return []
    return [
        f"not copied from the metadata, because it describes the input file: {', '.join(hashes)}"
    ]
