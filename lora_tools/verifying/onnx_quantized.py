"""The quantized weights of an ONNX graph (MatMulBnb4, MatMulNBits) against those of a checkpoint,
which are quantized again as ``export`` does it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.in_memory import merged_in
from lora_tools.merging.targets import Target
from lora_tools.records import Action, Fate
from lora_tools.verifying.findings import NEAR, applied

if TYPE_CHECKING:
    import torch

    from lora_tools.onnx.initializers import GraphWeights
    from lora_tools.onnx.quantized_weights import StoredWeight


@dataclasses.dataclass(frozen=True)
class Packed:
    """One quantized weight; ``error`` and ``energy`` are ‖Ŵ − W‖² and ‖W‖²."""

    target: Target
    fate: Fate
    source_hash: str
    error: float
    energy: float

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else math.sqrt(self.error)


def check_packed(
    weights: GraphWeights, known: Mapping[str, Target], source: Checkpoint
) -> tuple[list[Packed], set[str]]:
    """Compare each, and name the initializers that hold them.

    Args:
        known: the checkpoint's tensors by name; a weight that is none of them is left out.
    """
    from lora_tools.onnx.quantized_weights import stored_weights

    checked: list[Packed] = []
    parts: set[str] = set()
    for graph in weights.graphs:
        for stored in stored_weights(graph.model):
            if stored.name in known and stored.name not in parts:
                checked.append(_check(stored, graph.path.parent, known[stored.name], source))
                parts.update(stored.names)
    return checked, parts


def _check(stored: StoredWeight, folder: Path, target: Target, source: Checkpoint) -> Packed:
    from lora_tools.linalg.compare import further_off

    values = stored.values(folder)  # (out, in)
    wanted, source_hash = merged_in(target, source, target.spec.dtype)
    turned = source.weights.of(target.spec).layout == "conv1d"
    W = (wanted.T if turned else wanted).float()
    if values.shape != W.shape:
        why = f"is {list(values.shape)}, but should be {list(W.shape)}"
        return Packed(target, Fate(stored.name, Action.DIFFERENT, why), source_hash, 0.0, 0.0)
    step = values - W
    error, energy = (float(x.double().square().sum()) for x in (step, W))
    said = f"{stored.operator}, {stored.bits} bits"
    same, again = stored.again(W, folder)
    if same:
        fate = Fate(stored.name, Action.SAME, f"{said}, byte for byte as export writes it")
        return Packed(target, fate, source_hash, error, energy)
    off = further_off(step, again - W, W, stored.block, stored.bits, stored.is_flat)
    if not off:
        return Packed(target, Fate(stored.name, Action.ROUNDED, said), source_hash, error, energy)
    if target.parts:
        base = source.tensor(target.base_name)
        said = _scale(values, W, (base.T if turned else base).float(), error) + said
    said += f"; {off:,} of {W.numel():,} numbers differ by more than quantizing explains"
    return Packed(target, Fate(stored.name, Action.DIFFERENT, said), source_hash, error, energy)


def _scale(values: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor, error: float) -> str:
    """Whether another multiple of the adapter's change explains most of the distance."""
    change, moved = (wanted - base).double(), (values - base).double()
    size = float(change.square().sum())
    if not size:
        return ""
    coefficient = float((moved * change).sum()) / size
    left = float((moved - coefficient * change).square().sum())
    if abs(coefficient - 1) <= NEAR or left > error / 2:
        return ""
    return f"the adapter is {applied(coefficient)}; "
