"""The weights that an export writes: those of the checkpoint, or merged, cast, quantized."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_tools.exporting.quantized import Quantization
from lora_tools.formats.output import Prepared
from lora_tools.merging.prepare import Adapters, plan_merging, prepare_merge
from lora_tools.options import Matching, NumberFormat, Running, Storage, Tensors
from lora_tools.provenance import command_of
from lora_tools.quantizing.prepare import prepare_dequantize, prepare_quantize


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is asked of the weights of ``checkpoint``; ``adapters`` are to be merged."""

    checkpoint: str | Path
    adapters: Adapters
    quantization: Quantization
    storage: Storage
    matching: Matching
    running: Running

    @property
    def change(self) -> bool:
        """Whether they are others than the checkpoint's."""
        return self._merge or self.quantization.packs or self.quantization.decoded

    @property
    def _merge(self) -> bool:
        return bool(self.adapters or self.storage.dtype)

    def written(self) -> Prepared | None:
        """Those of the output; None where they are the checkpoint's."""
        known = self.quantization.statistics
        if not self.quantization.packs:
            return self._merged()
        return prepare_quantize(
            self.checkpoint,
            self.adapters,
            NumberFormat(activations=known.known.path if known is not None else None),
            Tensors(),
            self.storage,
            self.matching,
            self.running,
            command_of("quantize", self.storage, self.matching),
        )

    def plain(self) -> Prepared | None:
        """The same with none quantized; None where they lie somewhere as they are."""
        if self.quantization.stored:
            return self._decoded()
        return self._merged() if self.quantization.packs else None

    def _merged(self) -> Prepared | None:
        if not self._merge:
            return self._decoded() if self.quantization.decoded else None
        planned = plan_merging(
            self.checkpoint,
            self.adapters,
            self.matching,
            self.running,
            needs_adapters=not self.storage.dtype,
        )
        command = command_of("merge", self.storage, self.matching)
        return prepare_merge(planned, self.storage, self.running, command)

    def _decoded(self) -> Prepared:
        command = command_of("dequantize")
        return prepare_dequantize(self.checkpoint, Storage(), self.running, command)
