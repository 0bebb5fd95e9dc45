"""One weight of a GGUF model: blocks of ggml, or plain numbers in another order."""

from __future__ import annotations

import dataclasses

from lora_tools.formats.quantized.packed import Packed


@dataclasses.dataclass(frozen=True)
class GgufWeight(Packed):
    """``label`` is ggml's type: rows of blocks as bytes (U8), or numbers of the dtype of that name.

    Attributes:
        heads: rotary heads whose rows are stored with their two halves interleaved; 0: none.
        offset: what was added to the numbers.
    """

    heads: int = 0
    offset: float = 0.0
