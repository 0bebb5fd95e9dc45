"""A quantized checkpoint seen as the plain one it dequantizes to, tensor by tensor on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint, Decoder, View
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.packed import AGAIN, ASIDE, PackedWeight
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.jobs import Lying
from lora_tools.records import TensorSpec
from lora_tools.sources.schemes.row import P, Parts, Scheme, is_finite, matrix_of

if TYPE_CHECKING:
    import torch


class Dequantized(View, Generic[P]):
    """``stored`` with its quantized weights in their own names, dtype and orientation.

    ``tensor`` of a quantized weight is float32, not yet rounded to the dtype that ``specs`` names,
    so that what is added to it is rounded once; ``raw`` gives the rounded bytes.

    Attributes:
        quantized: the quantized weights by their plain names.
    """

    def __init__(self, stored: Checkpoint, scheme: Scheme[P], quantized: Mapping[str, P]) -> None:
        self._scheme, self.quantized = scheme, quantized
        super().__init__(stored, [_PlainFile(file, self) for file in stored.files])
        self.config = scheme.plain_config(stored.config)
        said = (f"{stored.path}: {note}" for note in scheme.notes(quantized))
        self.notes = (*self.notes, *said)

    @property
    def scheme(self) -> Scheme[P]:
        """How they are stored."""
        return self._scheme

    def lies(self, name: str) -> tuple[Lying, ...]:
        """Of a quantized weight, all that is stored of it."""
        if name not in self.quantized:
            return self.source.lies(name)
        stored = [spec.name for spec in self.quantized[name].specs.values()]
        return tuple(each for part in stored for each in self.stored.lies(part))

    def decoded_bytes(self, name: str) -> int:
        """Of a quantized weight, that of its numbers in float32."""
        return 4 * self.specs[name].numel if name in self.quantized else 0

    def quantization_noise(self, name: str) -> float:
        """As its scheme knows it."""
        if name not in self.quantized:
            return 0.0
        known = self.scheme.rounding
        return math.nan if known is None else known(self.quantized[name], self.parts(name))

    def noise_unknown(self) -> list[str]:
        """As its scheme says."""
        knows = self.scheme.rounding is not None
        return [n for n, w in self.quantized.items() if not (knows and self.scheme.tells(w))]

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Of a quantized weight only these rows are decoded, where they are rows of its own."""
        if name in self.quantized and matrix == matrix_of(self.specs[name]):
            return self.decode(name, start, stop)
        return super().rows(name, matrix, start, stop)

    def decoder(self, name: str, matrix: tuple[int, int]) -> Decoder | None:
        """Of a quantized weight, whose stored tensors are looked at once."""
        if name not in self.quantized or matrix != matrix_of(self.specs[name]):
            return super().decoder(name, matrix)
        parts = self.parts(name)
        return lambda start, stop: self.decode(name, start, stop, parts=parts)

    def decode(
        self,
        name: str,
        start: int,
        stop: int,
        dtype: torch.dtype | None = None,
        parts: Parts | None = None,
    ) -> torch.Tensor:
        """Rows [start, stop) of a quantized weight as a matrix, in float32 by default.

        Args:
            parts: what ``parts`` gives, where it is at hand.

        Raises:
            NonFiniteError: what is stored beside its codes, or what it decodes to, holds an inf or
                a NaN.
        """
        import torch

        out = torch.empty(
            stop - start, matrix_of(self.specs[name])[1], dtype=dtype or torch.float32
        )
        if out.numel():
            self.scheme.decode(self.quantized[name], parts or self.parts(name), out, start)
            if not is_finite(out):
                raise NonFiniteError(
                    f"{name}: decodes to an inf or a NaN in {out.dtype}, because of a code or of a "
                    f"scale that is too large; {AGAIN}"
                )
        return out

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of a quantized weight, as its scheme names the parts.

        Raises:
            NonFiniteError: a scale, or a table, holds an inf or a NaN.
        """
        return stored_parts(self.stored, self.quantized[name])

    def digest(self, known: Mapping[str, str]) -> str:
        """That of what is stored: a quantized weight's ``known`` hash is of other bytes."""
        mine = {name: value for name, value in known.items() if name not in self.quantized}
        return self.stored.digest(mine)

    def companions(self) -> tuple[list[Path], list[Path]]:
        """Those of what is stored that go with plain numbers, too."""
        travel, left = super().companions()
        return [path for path in travel if path.name not in self.scheme.files], left


def stored_parts(stored: Checkpoint, weight: PackedWeight) -> dict[str, torch.Tensor]:
    """``Dequantized.parts`` of a weight of the checkpoint as it is stored, without those put aside.

    The first part is codes, whatever dtype's elements hold them, and any of these may look like a
    NaN: only what they decode to tells.
    """
    names = {p: spec.name for p, spec in weight.specs.items() if not p.startswith(ASIDE)}
    parts = {part: stored.tensor(name) for part, name in names.items()}
    for name, tensor in list(zip(names.values(), parts.values(), strict=True))[1:]:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NonFiniteError(f"{name}: holds an inf or a NaN; {AGAIN}")
    return parts


class _PlainFile:
    """One weight file of the view: a quantized weight is in the file that holds its first part."""

    def __init__(self, file: TensorFile, view: Dequantized[P]) -> None:
        self.path: Path = file.path
        known = view.scheme.metadata
        self.header = b""
        self.metadata = {key: v for key, v in file.metadata.items() if key not in known}
        self._file, self._view = file, view
        parts = {spec.name for w in view.quantized.values() for spec in w.specs.values()}
        heads = {next(iter(w.specs.values())).name: w.plain for w in view.quantized.values()}
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in file.specs.items():
            if name in heads:
                self.specs[heads[name].name] = heads[name]
            elif name not in parts:
                self.specs[name] = spec

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; a quantized one in float32."""
        if name not in self._view.quantized:
            return self._file.tensor(name)
        return self._view.decode(name, 0, matrix_of(self.specs[name])[0]).view(
            self.specs[name].shape
        )

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        from lora_tools.formats.tensors import as_bytes

        if name not in self._view.quantized:
            return self._file.raw(name)
        spec = self.specs[name]
        return as_bytes(self._view.decode(name, 0, matrix_of(spec)[0], torch_dtype(spec.dtype)))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of a tensor's bytes [start, stop) back; of a quantized one all of them."""
        if name not in self._view.quantized:
            self._file.release(name, start, stop)
            return
        for spec in self._view.quantized[name].specs.values():
            self._view.stored.release(spec.name)
