"""Headings, what numbers may be, and the tables that choices come from.

A table is read when its choices are asked for: none is needed to list the verbs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_tools.errors import UsageError
from lora_tools.options.fields import one_of

RANK, TENSORS, ADAPTER, ADAPTERS = "Rank", "Which tensors", "Adapter", "Adapters"
DECOMPOSITION, OUTPUT, RUNNING, FORMAT = "Decomposition", "Output", "Running", "Format"
STRENGTH, METHOD, FOUR_BITS, GRAPH = "Strength", "Method", "Number format", "Graph"
QUANTIZED, CHECK, AGAINST, TEXT, PICTURE = "Quantized", "Check", "Against what", "Text", "Picture"

ABOVE_0 = (lambda x: 0 < x < math.inf, "a number above 0 is needed")
FROM_0 = (lambda x: x >= 0, "a number from 0 on is needed")
FROM_1 = (lambda x: x >= 1, "at least 1 is needed")
FINITE = (math.isfinite, "a finite number is needed")
SHARE = (lambda x: 0 < x <= 1, "a share above 0 and up to 1 is needed")
INSIDE = (lambda x: 0 < x < 1, "a number between 0 and 1 is needed")
OPSETS = (lambda x: 18 <= x <= 23, "18 to 23 is needed")


def consumers() -> Iterable[str]:
    """Programs that load adapters."""
    from lora_tools.formats.adapters.consumers import CONSUMERS

    return CONSUMERS


def conformed() -> Iterable[str]:
    """Those of them that a folder of PEFT's is written for."""
    from lora_tools.formats.adapters.consumers import CONFORMED

    return CONFORMED


def formats() -> Iterable[str]:
    """Adapter formats."""
    from lora_tools.formats.adapters.table import FORMATS

    return FORMATS


def features() -> Iterable[str]:
    """What an adapter can hold besides the factors of linear layers."""
    from lora_tools.formats.adapters.format import FEATURES

    return FEATURES


def methods() -> Iterable[str]:
    """Ways to combine adapters."""
    from lora_tools.linalg.combine import METHODS

    return METHODS


def schemes() -> Iterable[str]:
    """Stored number formats that are written."""
    from lora_tools.formats.quantized.forms import FORMS

    return FORMS


def quant_types() -> Iterable[str]:
    """Codebooks of four bits."""
    from lora_tools.formats.quantized.bitsandbytes import QUANT_TYPES

    return QUANT_TYPES


def storages() -> Iterable[str]:
    """Dtypes that hold packed bytes."""
    from lora_tools.formats.quantized.bitsandbytes import STORAGES

    return STORAGES


def blocksizes() -> Iterable[int]:
    """How many numbers may share a scale."""
    from lora_tools.formats.quantized.bitsandbytes import BLOCKSIZES

    return BLOCKSIZES


def tasks() -> Iterable[str]:
    """What a checkpoint is exported for."""
    from lora_tools.onnx.tasks import TASKS

    return ("auto", *TASKS)


def task_help() -> str:
    """The help of ``--task``."""
    _, *names = tasks()
    return f"{one_of(names)}; auto goes by config.json."


def dtype_help() -> str:
    """The help of ``--dtype``."""
    from lora_tools.formats.dtypes import FLOAT_NAMES

    return f"{one_of(FLOAT_NAMES)}."


def float_dtype(text: str) -> str:
    """What ``--dtype`` names. Raises UsageError."""
    from lora_tools.formats.dtypes import parse_float_dtype

    return parse_float_dtype(text)


def hub_id(text: str) -> str:
    """What ``--base-name`` says. Raises UsageError."""
    from lora_tools.formats.hub import parse

    found = parse(text)
    if found is None or found.subfolder:
        raise UsageError(f"{text[:80]!r} is not a hub id, such as org/name or org/name@revision")
    return text


def engine(text: str) -> None:
    """What ``--engine`` names. Raises UsageError."""
    name, mark, place = text.partition("://")
    if text != "threads" and (name != "dask" or bool(mark) != bool(place)):
        raise UsageError(f"--engine {text}: threads, dask or dask://HOST:PORT is needed")


def part(text: str) -> tuple[int, int]:
    """What ``--shard`` says: (i, n). Raises UsageError."""
    i, _, n = text.partition("/")
    digits = i.isascii() and n.isascii() and i.isdecimal() and n.isdecimal()
    if not digits or len(n) > 9 or not 1 <= int(i) <= int(n):
        raise UsageError(f"--shard {text}: I/N is needed, from 1/N to N/N")
    return int(i), int(n)


def size(text: str) -> int:
    """What ``--shard-size`` says, in bytes. Raises UsageError."""
    from lora_tools.formats.checkpoint_writer import parse_size

    return parse_size(text)
