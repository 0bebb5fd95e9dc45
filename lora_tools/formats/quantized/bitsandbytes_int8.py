"""An eight-bit weight as bitsandbytes 0.50 stores it (``Linear8bitLt``, LLM.int8()):

====================  ==============================================================
``P.weight``          I8 (out, in)
``P.SCB``             F32 (out,), the largest magnitude of each row
``P.weight_format``   U8 (), 0: rows lie one after the other; older files may lack it
====================  ==============================================================

W = weight · SCB / 127. A Conv1D, which a plain checkpoint stores as (in, out), is (out, in) too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.names import layout_name
from lora_tools.formats.quantized.packed import AGAIN, Packed, plain_dtype
from lora_tools.records import TensorSpec

CODES, SCB, FORMAT = "weight", "SCB", "weight_format"


@dataclasses.dataclass(frozen=True)
class Int8Weight(Packed):
    """One such weight; ``transposed`` says that a plain checkpoint stores it as (in, out)."""

    transposed: bool = False


def find_int8(
    specs: Mapping[str, TensorSpec], read: Callable[[str], memoryview], config: Mapping[str, Any]
) -> dict[str, Int8Weight]:
    """Every such weight by its name.

    Args:
        read: a tensor's bytes; asked for ``weight_format`` only.
        config: config.json, which tells of a Conv1D and of the plain dtype.

    Raises:
        CheckpointError: a tensor is missing, or is not what it should be.
    """
    found: dict[str, Int8Weight] = {}
    for key, scales in specs.items():
        module, _, last = key.rpartition(".")
        if last != SCB:
            continue
        name = f"{module}.{CODES}"
        codes = specs.get(name)
        if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
            raise CheckpointError(
                f"{name}: I8 (out, in) is expected beside {key}, found "
                f"{codes or 'no such tensor'}; {AGAIN}"
            )
        expected = TensorSpec(key, "F32", codes.shape[:1])
        if scales != expected:
            raise CheckpointError(f"{key}: {expected} is expected, found {scales}; {AGAIN}")
        parts = {CODES: codes, SCB: scales}
        layout = specs.get(f"{module}.{FORMAT}")
        if layout is not None:
            if layout.dtype != "U8" or layout.numel != 1 or bytes(read(layout.name)) != b"\0":
                raise CheckpointError(
                    f"{layout.name}: U8 0 (row) is expected; load it with the bitsandbytes that "
                    "made it, and save it again"
                )
            parts[FORMAT] = layout
        plain = TensorSpec(name, plain_dtype(config), codes.shape)
        turned = layout_name(plain, config) == "conv1d"
        if turned:
            plain = TensorSpec(name, plain.dtype, codes.shape[::-1])
        found[name] = Int8Weight(plain, parts, "int8", turned)
    return found
