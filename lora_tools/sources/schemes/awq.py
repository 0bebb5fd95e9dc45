"""AWQ: a row of the table of stored number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized import awq
from lora_tools.formats.quantized.qweights import QWEIGHT, QZEROS, SCALES, QWeight
from lora_tools.formats.quantized.settings import settings_of
from lora_tools.sources.schemes.row import Parts, Scheme

if TYPE_CHECKING:
    import torch


def _find(stored: Checkpoint) -> Mapping[str, QWeight]:
    settings = settings_of(stored, awq.METHODS, awq.FILES)
    return {} if settings is None else awq.find_awq(stored.specs, stored.config, settings)


def _decode(weight: QWeight, parts: Parts, out: torch.Tensor, first: int) -> None:
    """What ``dequantize_gemm`` of AutoAWQ and GPTQModel gives, which rounds to the scales' dtype
    the products that are rounded to the plain one here."""
    from lora_tools.linalg.bits import awq_stream
    from lora_tools.linalg.scaled import times_scales

    last = first + len(out)
    codes, zeros = (awq_stream(parts[part], first, last) for part in (QWEIGHT, QZEROS))
    if weight.symmetric and bool((zeros != 8).any()):
        raise CheckpointError(
            f"{weight.specs[QZEROS].name}: holds zero points other than 8, but config.json says "
            "zero_point false, and libraries read this in two ways; give the model that it was "
            "quantized from"
        )
    scales = parts[SCALES][:, first:last].T
    times_scales(codes, scales, (1, weight.group), out, 0, zeros)


def _rounding(weight: QWeight, parts: Parts) -> float:
    from lora_tools.linalg.noise import uniform_noise

    return uniform_noise(parts[SCALES], weight.group)


AWQ = Scheme("awq", "AWQ", _find, _decode, rounding=_rounding, files=awq.FILES)
