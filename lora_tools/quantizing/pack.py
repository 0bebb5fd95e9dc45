"""One tensor packed in four bits and written, and figures over all of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import NonFiniteError
from lora_tools.figures import Total
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.dtypes import FLOAT_NAMES, parse_float_dtype
from lora_tools.formats.quantized.bitsandbytes import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    STATE,
)
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.records import TensorResult
from lora_tools.totals import FourBitTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers


def torch_name(dtype: str) -> str:
    """``bf16`` → ``bfloat16``, as configs spell it. Raises UsageError."""
    wanted = parse_float_dtype(dtype)
    return next(name for name in FLOAT_NAMES if parse_float_dtype(name) == wanted)


def config_with(base: Checkpoint, changed: dict[str, bytes], settings: Any) -> None:
    """Put ``quantization_config`` into the changed small files."""
    if base.stored.config:
        config = json.loads(changed.get("config.json", b"null")) or dict(base.config)
        config["quantization_config"] = settings
        changed["config.json"] = (json.dumps(config, indent=2) + "\n").encode()


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None] = lambda start, stop: None,
    back: torch.Tensor | None = None,
) -> TensorResult:
    """Quantize a flat tensor and write all that is stored of it, unless ``writer`` is None; into
    ``back`` (n,), if given, goes what a reader makes of that."""
    import torch

    from lora_tools.formats.tensors import as_bytes
    from lora_tools.linalg import codebooks, nf4
    from lora_tools.linalg.nf4_search import quantize_searched

    assert item.packed is not None
    state, name = item.packed.state, item.name
    book = codebooks.CODEBOOKS[state.quant_type]
    n = x.numel()
    with (
        buffers.lend((nf4.SCRATCH_BYTES,), torch.uint8) as store,
        buffers.lend((nf4.packed_size(n),), torch.uint8) as room,
    ):
        scratch = nf4.Scratch(store)
        work = quantize_searched if item.searched else nf4.quantize_whole
        made = work(x, book, state.blocksize, state.nested, room, scratch)
        if not made.is_finite:
            raise NonFiniteError(
                f"{name}: holds an inf or a NaN, which has no four-bit form, or its scales are so "
                "large that double quantization, which takes their mean, overflows"
            )
        if writer is not None:
            writer.write(name, as_bytes(room))
        error, energy = nf4.measure(
            x, made.packed, made.scales, book, state.blocksize, scratch, done
        )
        if back is not None:
            nf4.dequantize(made.packed, made.scales, book, state.blocksize, back, scratch)
    stored = dict(zip((ABSMAX, NESTED_ABSMAX), made.tensors(), strict=False))
    stored[QUANT_MAP] = torch.from_numpy(book.table)
    if made.nested is not None:
        stored[NESTED_MAP] = torch.from_numpy(codebooks.dynamic_map())
        state = dataclasses.replace(state, nested_offset=float(made.nested.offset))
    text = state.to_json()
    if writer is not None:
        for end, tensor in stored.items():
            writer.write(name + end, as_bytes(tensor))
        writer.write_last(name + STATE + state.quant_type, text)
    nbytes = item.nbytes - item.packed.state.most_json + len(text)
    relative = math.sqrt(error / energy) if energy else 0.0
    return TensorResult(name, item.spec.shape, 8 * nbytes / n, relative, math.sqrt(energy))


def totals_of(plan: QuantizePlan, results: Sequence[TensorResult], nbytes: int) -> FourBitTotals:
    """Figures over all tensors, errors weighted by their energy."""
    error = Total.of_errors((r.norm, r.relative_error) for r in results)
    sizes = [math.prod(r.shape) for r in results]
    bits = math.fsum(r.bits_per_parameter * n for r, n in zip(results, sizes, strict=True))
    return {
        "tensors_quantized": len(results),
        "tensors_kept": len(plan.items) - len(results),
        "quantization_error": error.relative_error,
        "parameters": sum(item.spec.numel for item in plan.items),
        "parameters_quantized": sum(sizes),
        "bits_per_quantized_parameter": bits / sum(sizes),
        "bits_per_parameter": 8 * nbytes / sum(item.spec.numel for item in plan.items),
        "bytes": nbytes,
    }
