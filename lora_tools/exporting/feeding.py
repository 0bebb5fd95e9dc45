"""Rounding errors fed forward in what ``export`` quantizes, by statistics of the layers' inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError
from lora_tools.formats.activations import Activations
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.quantizing.feeding import factor_of
from lora_tools.quantizing.plan import Feeding

if TYPE_CHECKING:
    from lora_tools.linalg.error_feedback import Factor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of the inputs of a checkpoint's layers."""

    known: Activations

    def has(self, weight: str, width: int) -> bool:
        """Whether all is known of the inputs of a layer, by its weight.

        Raises:
            MismatchError: it has another number of them.
        """
        module = split_tensor(weight)[0]
        if module not in self.known:
            return False
        self.known.check(module, width)
        return self.known.is_full(module)

    def factor(self, weight: str, width: int) -> Factor | None:
        """The factor of their second moment; None where it is not known, or they are all 0.

        Raises:
            CheckpointError: it is no second moment.
        """
        if not self.has(weight, width):
            return None
        return factor_of(Feeding(self.known, split_tensor(weight)[0]), width)


def statistics_for(source: Checkpoint, known: Activations | None) -> Statistics | None:
    """What is given, by the names of the checkpoint.

    Raises:
        MismatchError: it is of another model.
    """
    if known is None:
        return None
    weights = source.weights.values()
    linears = [w.spec.name for w in weights if w.layout in ("linear", "conv1d")]
    known.match([split_tensor(name)[0] for name in linears])
    return Statistics(known)


def refuse_unfed(scheme: str | None, stored: bool) -> None:
    """Raises UsageError where nothing is rounded that statistics would help."""
    if scheme is None:
        raise UsageError(
            "--activations needs --int4, --int8 or --nf4: without them nothing is rounded"
        )
    if stored:
        raise UsageError(
            "--activations: the checkpoint is in four bits already, and its bytes are kept; use "
            "--activations with `loratools quantize` instead"
        )
