"""Variants of weight files: diffusers and transformers put ``fp16`` or the like into their names.

Which one is wanted is said once for a call, by ``using``.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from lora_tools.within import holding

# ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors``, and as diffusers had it
# before 0.19 ``model-00001-of-00002.fp16.safetensors``; ``model.safetensors.index.fp16.json``.
_STEM = r"(?P<stem>diffusion_pytorch_model|diffusion_flax_model|pytorch_model|model)"
_SHARD = r"-\d+-of-\d+"
_FILE = re.compile(
    rf"{_STEM}(?:\.(?P<first>\w+))?(?P<shard>{_SHARD})?(?:\.(?P<last>\w+))?"
    r"(?P<suffix>\.safetensors|\.bin)(?P<index>\.index(?:\.(?P<of_index>\w+))?\.json)?"
)
# Files that stand for a whole model in parts, and accelerate's of a whole one.
_OF_PARTS = re.compile(r"\.metadata|model_world_size_.+\.pt|pytorch_model_fsdp.*\.bin")
_wanted: contextvars.ContextVar[str | None] = contextvars.ContextVar("variant", default=None)


def using(variant: str | None) -> AbstractContextManager[None]:
    """Weight files of that variant within, where there are any."""
    return holding(_wanted, variant)


def wanted() -> str | None:
    """The variant asked for."""
    return _wanted.get()


def variant_of(name: str) -> str:
    """The variant that a weight file or index is of, or "" for none."""
    match = _FILE.fullmatch(name)
    return (match["first"] or match["last"] or match["of_index"] or "") if match else ""


def plain(name: str) -> str:
    """The name without its variant."""
    match = _FILE.fullmatch(name)
    if match is None or not variant_of(name):
        return name
    index = ".index.json" if match["index"] else ""
    return f"{match['stem']}{match['shard'] or ''}{match['suffix']}{index}"


def chosen(names: Sequence[str]) -> list[str]:
    """Of the weight files and indexes of a folder those that are meant: of the variant asked for,
    where it is there, else those of none; [] where all are of others."""
    mine = [name for name in names if variant_of(name) == (wanted() or "")]
    return mine or [name for name in names if not variant_of(name)]


def there(names: Iterable[str]) -> list[str]:
    """The variants that files are of."""
    return sorted({variant for name in names if (variant := variant_of(name))})


def safetensors_name(path: Path) -> str:
    """The name transformers looks for once a weight file is safetensors: a pickle's
    ``pytorch_model….bin`` becomes ``model….safetensors``."""
    if path.suffix == ".safetensors":
        return plain(path.name)
    if _OF_PARTS.fullmatch(path.name):
        return "model.safetensors"
    return plain(path.with_suffix(".safetensors").name).removeprefix("pytorch_")
