"""One weight quantized and written, in whatever scheme; and figures over all of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lora_tools.figures import Total
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.quantizing import encoded, four_bits
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.records import TensorResult, TensorSpec
from lora_tools.sources.schemes.bitsandbytes import BITSANDBYTES
from lora_tools.sources.schemes.row import Scheme
from lora_tools.totals import FourBitTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.sources.schemes.row import Parts


# Takes the next numbers of a flat tensor in float32, which are written over afterwards.
Reader = Callable[["torch.Tensor"], None]


def into(whole: torch.Tensor) -> Reader:
    """Fills a flat tensor."""
    at = 0

    def read(run: torch.Tensor) -> None:
        nonlocal at
        whole[at : at + len(run)] = run
        at += len(run)

    return read


class Pack(Protocol):
    """See ``Way.pack``."""

    def __call__(
        self,
        item: Item,
        x: torch.Tensor,
        writer: Sink | None,
        buffers: Buffers,
        done: Callable[[int, int], None],
        read: Reader | None,
        ready: Callable[[int], None],
    ) -> TensorResult: ...


@dataclasses.dataclass(frozen=True)
class Way:
    """How the weights of a scheme are written.

    Attributes:
        pack: quantizes a flat tensor and writes all that is stored of it, unless ``writer`` is
            None; ``read``, if given, takes what a reader makes of that, run after run. ``ready``
            hears how many numbers are to be there before they are looked at, and ``done`` of those
            that will not be again, and that ``read`` has. Raises NonFiniteError.
        anew: (weight, its plain spec): what is stored of it with other numbers.
        ways: (item, what is stored of it): the item in the ways that it may have been written, the
            likeliest first.
        block: how many numbers share a rounding of their scale that moves their codes.
        bytes_each: working memory beside the weight and its codes, for each number.
    """

    pack: Pack
    anew: Callable[[PackedWeight, TensorSpec], PackedWeight]
    ways: Callable[[Item, Parts], Sequence[Item]]
    block: Callable[[PackedWeight], int]
    bytes_each: int


_ENCODED = Way(encoded.pack, encoded.anew, encoded.ways, encoded.block, 8)
_OWN: Mapping[str, Way] = {
    BITSANDBYTES.name: Way(four_bits.pack, four_bits.anew, four_bits.ways, four_bits.block, 0)
}


def way_of(scheme: Scheme[Any]) -> Way | None:
    """How a scheme's weights are written; None where this tool does not write it."""
    return _OWN.get(scheme.name, _ENCODED if scheme.encode is not None else None)


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None] = lambda start, stop: None,
    read: Reader | None = None,
    ready: Callable[[int], None] = lambda stop: None,
) -> TensorResult:
    """``Way.pack`` of the item's scheme."""
    assert item.scheme is not None
    way = way_of(item.scheme)
    assert way is not None
    return way.pack(item, x, writer, buffers, done, read, ready)


def config_with(base: Checkpoint, changed: dict[str, bytes], entries: Mapping[str, Any]) -> None:
    """Put ``quantization_config`` and what else there is into the changed small files."""
    if base.stored.config:
        config = json.loads(changed.get("config.json", b"null")) or dict(base.config)
        config.update(entries)
        changed["config.json"] = (json.dumps(config, indent=2) + "\n").encode()


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
