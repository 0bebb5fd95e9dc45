"""A quantized checkpoint seen as the plain one it dequantizes to, tensor by tensor on demand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.names import layout_name
from lora_tools.formats.quantized.bitsandbytes import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    QuantizedTensor,
    QuantState,
    find_quantized,
)
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


class PlainView(Checkpoint):
    """``stored`` with its quantized weights in their own dtype and, for Conv1D, orientation.

    ``tensor`` of a quantized weight is float32, not yet rounded to the dtype that ``specs`` names,
    so that what is added to it is rounded once; ``raw`` gives the rounded bytes.

    Attributes:
        stored: the checkpoint as it lies there.
        quantized: its quantized weights by name.
        transposed: those that a plain checkpoint stores as (in, out), and codes are of (out, in).
    """

    def __init__(self, stored: Checkpoint, quantized: dict[str, QuantizedTensor]) -> None:
        self.stored, self.quantized = stored, quantized
        files = [_PlainFile(file, stored, quantized) for file in stored.files]
        super().__init__(stored.path, files, stored.is_folder, stored.index_name)
        self.transposed = {name for file in files for name in file.transposed}
        self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}


def plain_view(stored: Checkpoint) -> PlainView | None:
    """The view of a checkpoint quantized by bitsandbytes in four bits; None of a plain one.

    Raises:
        CheckpointError: it is quantized in another way.
    """
    quantized = find_quantized(stored.specs, stored.raw)
    if quantized:
        return PlainView(stored, quantized)
    settings = stored.config.get("quantization_config")
    if settings:
        kind = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{stored.path}: its config.json says that it is quantized ({kind}), and it holds no "
            "four-bit weights of bitsandbytes; a plain checkpoint or one of those is wanted here"
        )
    return None


def nested_of(
    state: QuantState, part: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Of a weight's tensors by their endings, what its scales in eight bits are read with."""
    if state.nested_offset is None:
        return None
    return part[NESTED_ABSMAX], part[NESTED_MAP], state.nested_offset


def source_digest(source: Checkpoint, hashes: Mapping[str, str]) -> str:
    """A checkpoint's digest; of a quantized one that of what is stored, which is read for it.

    Args:
        hashes: of ``source``'s tensors.
    """
    if not isinstance(source, PlainView):
        return hashing.digest(source.specs.values(), hashes)
    stored, known = source.stored, {}
    for name in stored.specs:
        known[name] = hashing.tensor_hash(stored.raw(name))
        stored.release(name)
    return hashing.digest(stored.specs.values(), known)


def plain_files(view: PlainView, changed: dict[str, bytes]) -> dict[str, bytes]:
    """Changed small files: config.json has lost ``quantization_config`` in any case."""
    if view.config and "config.json" not in changed:
        changed["config.json"] = (json.dumps(view.config, indent=2) + "\n").encode()
    return changed


class _PlainFile:
    """One weight file of the view."""

    def __init__(
        self, file: TensorFile, stored: Checkpoint, quantized: Mapping[str, QuantizedTensor]
    ) -> None:
        self.path: Path = file.path
        self.header, self.metadata = b"", file.metadata
        self._file, self._stored = file, stored
        self._quantized = {name: q for name, q in quantized.items() if name in file.specs}
        parts = {spec.name for q in quantized.values() for spec in q.specs.values()}
        self.transposed: set[str] = set()
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in file.specs.items():
            if name in self._quantized:
                spec = self._plain_spec(self._quantized[name])
            elif name in parts:
                continue
            self.specs[name] = spec

    def _plain_spec(self, quantized: QuantizedTensor) -> TensorSpec:
        spec = quantized.dequantized
        if len(spec.shape) == 2 and layout_name(spec, self._stored.config) == "conv1d":
            self.transposed.add(spec.name)
            return TensorSpec(spec.name, spec.dtype, spec.shape[::-1])
        return spec

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; a quantized one in float32."""
        import torch

        return self._values(name, torch.float32)

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        from lora_tools.formats.tensors import as_bytes

        if name not in self._quantized:
            return self._file.raw(name)
        return as_bytes(self._values(name, torch_dtype(self.specs[name].dtype)))

    def _values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        import torch

        from lora_tools.linalg import nf4

        if name not in self._quantized:
            return self._file.tensor(name)
        state = self._quantized[name].state
        out = torch.empty(state.shape, dtype=dtype)
        if not out.numel():
            return out
        part = {end: self._stored.tensor(name + end) for end in self._quantized[name].specs}
        nested = nested_of(state, part)
        packed = part[""].reshape(-1).view(torch.uint8)
        nf4.dequantize_stored(
            packed, part[ABSMAX], part[QUANT_MAP], nested, state.blocksize, out.view(-1)
        )
        return out.T.contiguous() if name in self.transposed else out

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of a tensor's bytes [start, stop) back; of a quantized one all of them."""
        if name not in self._quantized:
            self._file.release(name, start, stop)
            return
        for spec in self._quantized[name].specs.values():
            self._stored.release(spec.name)
