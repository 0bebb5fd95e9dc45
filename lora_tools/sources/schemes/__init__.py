"""The table of stored number formats: how each is found in a checkpoint, and read as plain numbers.

A new one is a file in ``formats/quantized`` that says which tensors belong to a weight, its
arithmetic in ``linalg``, and a file here with its row: then every verb reads it. What no row claims
is refused by ``sources.checkpoints``, by the signs of ``formats.quantized.signs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.sources.schemes.bitsandbytes import BITSANDBYTES
from lora_tools.sources.schemes.compressed_tensors import COMPRESSED_TENSORS
from lora_tools.sources.schemes.fp8 import COMFY, FLOATS
from lora_tools.sources.schemes.modelopt import MODELOPT
from lora_tools.sources.schemes.mxfp4 import MXFP4
from lora_tools.sources.schemes.row import Scheme

# The first that finds weights of its own is taken: those that know most come first.
SCHEMES: tuple[Scheme[Any], ...] = (
    BITSANDBYTES,
    COMPRESSED_TENSORS,
    MODELOPT,
    MXFP4,
    COMFY,
    FLOATS,
)


def scheme_of(stored: Checkpoint) -> tuple[Scheme[Any], Mapping[str, PackedWeight]] | None:
    """The row that a checkpoint's weights are stored in, and those weights; None where none is."""
    for scheme in SCHEMES:
        weights = scheme.find(stored)
        if weights:
            return scheme, weights
    return None
