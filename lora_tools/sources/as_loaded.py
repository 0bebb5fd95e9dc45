"""A checkpoint seen as transformers holds it in memory: by those names, with experts fused and
blocks parted where it does so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint, View
from lora_tools.formats.names import layout_name
from lora_tools.records import Piece, rows_of
from lora_tools.sources.class_says import in_memory
from lora_tools.sources.transformers_names import Loaded, loaded, why_unknown

if TYPE_CHECKING:
    import torch

# In models whose experts transformers 5 fuses, PEFT 0.21 takes target_modules of these names for
# the experts', though they be other layers; as target_parameters they are what they are.
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class LoadedView(View):
    """``source`` by names in memory. What is not loaded, or changed in ways that are not followed,
    keeps its name.

    Attributes:
        how: what becomes of it.
        others: tensors of other names than those stored.
    """

    def __init__(self, source: Checkpoint, how: Loaded) -> None:
        self.how = how
        self.others = [t for t in how.tensors.values() if t.pieces[0].stored != t.spec.name]
        self._view = _LoadedFile(source, how)
        super().__init__(source, [self._view])
        says = in_memory(how)
        self.says = dataclasses.replace(says, layouts=_layouts(how, source.config))

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

    def digest(self, known: Mapping[str, str]) -> str:
        """That of what is loaded."""
        mine = {}
        for name, value in known.items():
            pieces = self._view.pieces(name)
            if len(pieces) == 1 and self.source.specs[pieces[0].stored].shape == (
                self.specs[name].shape
            ):
                mine[pieces[0].stored] = value
        return self.source.digest(mine)


def loaded_view(source: Checkpoint) -> Checkpoint:
    """The view; ``source`` itself where nothing is known of how it is loaded."""
    how = loaded(source.config, source.specs)
    return source if how is None else LoadedView(source, how)


def _layouts(how: Loaded, config: Mapping[str, Any]) -> dict[str, tuple[str | None, int]]:
    """The kinds of layer of a view's weights, and their groups, as the model has them."""
    tensors = how.tensors
    fuses = any(len(t.pieces) > 1 and len(t.spec.shape) == 3 for t in tensors.values())
    kinds: dict[str, tuple[str | None, int]] = {}
    for name, tensor in tensors.items():
        found = layout_name(tensor.spec, config) if tensor.layer == "" else tensor.layer
        if found == "linear" and fuses and name.split(".")[-2] in _OF_EXPERTS:
            found = "experts"
        kinds[name] = found, tensor.groups
    return kinds


def named_by(side: Checkpoint) -> str:
    """What gave a view's tensors other names than the files have, or ""."""
    return side.how.by if isinstance(side, LoadedView) and side.others else ""


def notes_on_names(side: Checkpoint) -> list[str]:
    """Sentences on what has other names, and on what PEFT will not find."""
    notes = []
    if not isinstance(side, LoadedView):
        reason = why_unknown(side.config, side.specs)
        if reason:
            notes.append(
                "modules have the names that the files give them, which need not be those in "
                f"memory that PEFT goes by: {reason}"
            )
    if isinstance(side, LoadedView) and side.others:
        first = side.others[0]
        notes.append(
            f"{len(side.others)} tensors have the names that {side.how.by} gives them on loading, "
            f"such as {first.spec.name} for {first.pieces[0].stored}; --names stored keeps those "
            "of the files"
        )
    other = side.how.other if isinstance(side, LoadedView) else ()
    other = tuple(name for name in other if name not in side.outside)
    if isinstance(side, LoadedView) and other:
        notes.append(
            f"{side.how.by} does not load {len(other)} tensors as they are, such as {other[0]}: "
            "what changed in them is not loaded by PEFT either"
        )
    return notes


class _LoadedFile:
    """All of the view's tensors."""

    header = b""

    def __init__(self, source: Checkpoint, how: Loaded) -> None:
        self.path: Path = source.path
        self.metadata: dict[str, str] = {}
        self._source, self._tensors = source, how.tensors
        self.specs = {name: t.spec for name, t in how.tensors.items()}
        self.specs |= {name: source.specs[name] for name in how.other}

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
        return taken[0] if len(taken) == 1 else torch.cat(taken)

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
