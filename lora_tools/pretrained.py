"""The one door to transformers' loaders.

A checkpoint may bring Python files (``auto_map``), which transformers runs where it is told to, and
asks for on the terminal where it is told nothing. Here it is always told, and told no unless the
user allowed it; a test finds no call of these functions elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats.regular_files import MOST, is_there
from lora_tools.formats.stand_ins import refuse_loading

# What a config may set that transformers fetches from the hub, and runs, where it has a "/".
_KERNELS = ("attn_implementation", "experts_implementation")


# Of what transformers makes a part each, and how many it is asked for at most.
_PARTS = re.compile(r"(layer|block|stage|depth|head|codebook)s?$|experts?$")
_MOST_PARTS = 10_000
_MOST_EXPERTS = 200_000  # of all layers together
_MOST_LABELS = 1_000_000
# Files of a config, a tokenizer or a template.
_READ = re.compile(r"\.(json|jinja|model|tiktoken)$|^(vocab|merges)\.txt$")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What transformers prints is not ours to print."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def config_of(folder: Path, trusted: bool | None = None) -> Any:
    """transformers' config object of a folder.

    Args:
        trusted: whether code that comes with it may run; None where the verb has no option for it.

    Raises:
        UnsafeInput: it needs code that may not run.
        CheckpointError: it asks for more parts than any model has, or a small file that
            transformers would read is none.
        Exception: whatever transformers raises.
    """
    from transformers import AutoConfig

    _refuse_files(folder)
    with quietly(), _refusing_code(folder, trusted):
        config = AutoConfig.from_pretrained(folder, **_options(trusted))
    _refuse_kernels(folder, config, trusted)
    return config


def tokenizer_of(folder: Path, trusted: bool | None = None) -> Any:
    """The tokenizer of a folder. See ``config_of``."""
    from transformers import AutoTokenizer

    _refuse_files(folder)
    with quietly(), _refusing_code(folder, trusted):
        return AutoTokenizer.from_pretrained(folder, **_options(trusted))


def model_of(
    kind: Any, folder: Path, config: Any, trusted: bool | None = None, **options: Any
) -> Any:
    """The model of a folder with its weights, of a class of transformers. See ``config_of``, which
    makes the ``config``: as the file has it, it is not read again."""
    refuse_loading(folder)
    with quietly(), _refusing_code(folder, trusted):
        return kind.from_pretrained(folder, config=config, **_options(trusted), **options)


def weightless_of(kind: Any, config: Any, trusted: bool | None = None, **options: Any) -> Any:
    """A model as its config says, of a class of transformers, with weights of chance."""
    with quietly():
        if kind.__name__.startswith("Auto"):
            return kind.from_config(config, trust_remote_code=bool(trusted), **options)
        return kind._from_config(config, **options)


def too_many(config: Mapping[str, Any]) -> str:
    """What a config.json asks for more of than any model has, which would take all memory or time
    to be made; or ""."""
    found = list(_numbers("", config))
    layers = max((n for key, n in found if re.search("layers?$", key)), default=1)
    for key, number in found:
        most = _MOST_PARTS if _PARTS.search(key) else math.inf
        if re.search("experts?$", key):
            most = _MOST_EXPERTS // max(layers, 1)
        if key == "num_labels":
            most = _MOST_LABELS
        if number > most:
            return f"config.json has {key} {number:,}; at most {most:,} are made"
    return ""


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int]]:
    """Whole numbers in a config, with the key that each is under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(key, inner)
    elif type(value) is int:
        yield key, value


def _refuse_files(folder: Path) -> None:
    """Raises CheckpointError for a folder that transformers should not be given: it reads small
    files to their ends, whatever and however large they are, and makes what a config says."""
    for path in sorted(folder.iterdir()):
        if _READ.search(path.name) and is_there(path) and path.stat().st_size > MOST:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes; at most {MOST:,} are read of it"
            )
    path = folder / "config.json"
    said = too_many(json.loads(path.read_bytes())) if path.is_file() else ""
    if said:
        raise CheckpointError(f"{folder}: {said}")


def without_kernels(settings: dict[str, Any]) -> dict[str, Any]:
    """An object of a config.json without what names code of the hub; for ``json.loads``."""
    return {k: v for k, v in settings.items() if k.lstrip("_") not in _KERNELS}


def _options(trusted: bool | None) -> dict[str, bool]:
    """Code that is trusted may lie in another repository of the hub, and nothing else does."""
    return {"trust_remote_code": bool(trusted), "local_files_only": not trusted}


@contextlib.contextmanager
def _refusing_code(folder: Path, trusted: bool | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if trusted or "trust_remote_code" not in str(error):
            raise
        raise _unsafe(folder, "code that comes with it (auto_map)", trusted) from None


def _refuse_kernels(folder: Path, config: Any, trusted: bool | None) -> None:
    """Raises UnsafeInput for a config that names code of the hub."""
    named = [str(getattr(config, f"_{key}", "")) for key in _KERNELS]
    if not trusted and any("/" in name for name in named):
        raise _unsafe(folder, f"code of the hub ({', '.join(named)} in config.json)", trusted)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _refuse_kernels(folder, getattr(config, name), trusted)


def _unsafe(folder: Path, what: str, trusted: bool | None) -> UnsafeInput:
    how = "" if trusted is None else "; run it with --trust-remote-code"
    return UnsafeInput(f"{folder}: needs {what}, which is not run by default{how}")
