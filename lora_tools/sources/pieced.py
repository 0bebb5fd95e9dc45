"""A checkpoint whose tensors are put together of others' rows: by other names, cut, or joined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint, View
from lora_tools.jobs import Lying
from lora_tools.records import Piece, TensorSpec, rows_of

if TYPE_CHECKING:
    import torch


class Joined(Protocol):
    """A tensor, and the stored rows that it is made of, one above the other."""

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def pieces(self) -> tuple[Piece, ...]: ...


class PiecedView(View):
    """``source`` with these tensors, by their names; those of ``others`` keep theirs."""

    def __init__(
        self, source: Checkpoint, tensors: Mapping[str, Joined], others: Collection[str]
    ) -> None:
        self._view = _PiecedFile(source, tensors, others)
        super().__init__(source, [self._view])

    def lies(self, name: str) -> tuple[Lying, ...]:
        """All that it is made of; of a part of a stored tensor its share."""
        found = []
        for piece in self._view.pieces(name):
            rows = max(rows_of(self.source.specs[piece.stored]), 1)
            for each in self.source.lies(piece.stored):
                share = each.nbytes * piece.rows // rows
                found.append(dataclasses.replace(each, nbytes=share))
        return tuple(found)

    def decoded_bytes(self, name: str) -> int:
        """That of all it is made of."""
        stored = {piece.stored for piece in self._view.pieces(name)}
        return sum(map(self.source.decoded_bytes, stored))

    def quantization_noise(self, name: str) -> float:
        """That of all it is made of, by their rows."""
        return math.fsum(
            self.source.quantization_noise(piece.stored)
            * piece.rows
            / max(rows_of(self.source.specs[piece.stored]), 1)
            for piece in self._view.pieces(name)
        )

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Only what these rows are made of is read."""
        return self._view.rows(name, matrix, start, stop)

    def hash(self, name: str) -> str:
        """Piece by piece, and those of several given back as they are read."""
        state, pieces = hashing.new_hash(), self._view.pieces(name)
        for piece, part in zip(pieces, self._view.parts(name), strict=True):
            state.update(part)
            if len(pieces) > 1:
                self.source.release(piece.stored)
        return state.hexdigest()

    def of_stored(self, known: Mapping[str, str]) -> Mapping[str, str]:
        """Those of tensors that are stored ones, whole."""
        mine = {}
        for name, value in known.items():
            pieces = self._view.pieces(name)
            if len(pieces) == 1 and self.source.specs[pieces[0].stored].shape == (
                self.specs[name].shape
            ):
                mine[pieces[0].stored] = value
        return mine

    def digest(self, known: Mapping[str, str]) -> str:
        """That of what is stored."""
        return self.source.digest(self.of_stored(known))


class _PiecedFile:
    """All of the view's tensors."""

    header = b""

    def __init__(
        self, source: Checkpoint, tensors: Mapping[str, Joined], others: Collection[str]
    ) -> None:
        self.path: Path = source.path
        self.metadata: dict[str, str] = {}
        self._source, self._tensors = source, tensors
        self.specs = {name: t.spec for name, t in tensors.items()}
        self.specs |= {name: source.specs[name] for name in others}

    def pieces(self, name: str) -> tuple[Piece, ...]:
        if name in self._tensors:
            return self._tensors[name].pieces
        return (Piece(name, 0, rows_of(self._source.specs[name])),)

    def _taken(self, name: str, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """Pieces, and which of their rows are among rows [start, stop) of the tensor."""
        row = 0
        for piece in self.pieces(name):
            first, last = max(start - row, 0), min(stop - row, piece.rows)
            if first < last:
                yield piece, piece.first + first, piece.first + last
            row += piece.rows

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; one that is a stored one is mapped, others are put together."""
        import torch

        pieces, shape = self.pieces(name), self.specs[name].shape
        if len(pieces) == 1 and pieces[0].rows == rows_of(self._source.specs[pieces[0].stored]):
            return self._source.tensor(pieces[0].stored).reshape(shape)
        return torch.cat([self._rows(p, p.first, p.first + p.rows) for p in pieces]).reshape(shape)

    def _rows(self, piece: Piece, first: int, last: int) -> torch.Tensor:
        spec = self._source.specs[piece.stored]
        if len(spec.shape) < 2:
            return self._source.tensor(piece.stored).reshape(-1)[first:last]
        return self._source.rows(piece.stored, (rows_of(spec), spec.shape[-1]), first, last)

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor as that matrix."""
        import torch

        each = rows_of(self.specs[name])
        if len(self.pieces(name)) == 1 or matrix[0] != each:
            return self.tensor(name).reshape(matrix)[start:stop]
        taken = [self._rows(*part) for part in self._taken(name, start, stop)]
        rows = taken[0] if len(taken) == 1 else torch.cat(taken)
        return rows.reshape(stop - start, matrix[1])  # of a vector one a row

    def parts(self, name: str) -> Iterable[memoryview]:
        """Its bytes in row-major order, piece by piece."""
        for piece in self.pieces(name):
            row = self._row_bytes(piece)
            start, stop = piece.first * row, (piece.first + piece.rows) * row
            yield self._source.raw(piece.stored)[start:stop]

    def raw(self, name: str) -> memoryview:
        """Its bytes; put together where they lie apart."""
        parts = list(self.parts(name))
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of its bytes [start, stop) back."""
        at = 0
        for piece in self.pieces(name):
            row = self._row_bytes(piece)
            first, last = max(start - at, 0), piece.rows * row
            last = last if stop is None else min(stop - at, last)
            if first < last:
                offset = piece.first * row
                self._source.release(piece.stored, offset + first, offset + last)
            at += piece.rows * row

    def _row_bytes(self, piece: Piece) -> int:
        spec = self._source.specs[piece.stored]
        return spec.nbytes // max(rows_of(spec), 1)
