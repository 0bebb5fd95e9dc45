"""Second moments of what a model's layers are given, gathered while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    import torch

Kind = Literal["full", "diagonal"]
_COLUMNS = 256  # of a product at a time: what lies below the diagonal is what lies above


class NotInBlocksError(Exception):
    """Why a model cannot be run block after block."""


def width_of(module: Any) -> int:
    """Inputs of a layer that is looked at (an embedding: its rows); 0 for other modules."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings
    if isinstance(module, torch.nn.Linear):
        return module.in_features
    return int(module.weight.shape[0]) if isinstance(module, Conv1D) else 0


class Sum:
    """Σ xxᵀ over inputs, in float32, of which only what lies on and above the diagonal is computed;
    or Σ x², in float64.

    Attributes:
        members: the layers whose inputs these are.
        waiting: those of them that have not been given the last input yet.
        inputs: how many have been added.
    """

    def __init__(self, width: int, kind: Kind, device: Any, member: str) -> None:
        import torch

        full = kind == "full"
        dtype = torch.float32 if full else torch.float64
        self.total = torch.zeros((width,) * (1 + full), dtype=dtype, device=device)
        self.count = self.inputs = 0
        self.members, self.waiting = {member}, set[str]()
        self._last: tuple[list[torch.Tensor], int] = ([], 0)

    def add(self, name: str, rows: list[torch.Tensor]) -> None:
        """An input that a member is given, (n, width) at a time."""
        self.waiting = self.members - {name}
        self._last = (rows, rows[0]._version) if self.waiting else ([], 0)
        self.inputs += 1
        for each in rows:
            self._add(each, 1)

    def _add(self, x: torch.Tensor, sign: int) -> None:
        self.count += sign * len(x)
        if self.total.dim() == 1:
            self.total += sign * x.double().square().sum(0)
            return
        x = x.float()
        for start in range(0, x.shape[1], _COLUMNS):
            stop = min(start + _COLUMNS, x.shape[1])
            self.total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=sign)

    def given(self, name: str) -> None:
        """A member is given what another one was."""
        self.waiting.discard(name)
        if not self.waiting:
            self._last = [], 0

    def parted(self) -> Sum:
        """The sum of those that were not given the last input, for themselves from now on."""
        rows, version = self._last
        if rows[0]._version != version:
            raise CheckpointError("layers get the same input at first, and then another")
        other = Sum(0, "full", self.total.device, "")
        other.total, other.count, other.inputs = self.total.clone(), self.count, self.inputs - 1
        for each in rows:
            other._add(each, -1)
        other.members, self.members = self.waiting, self.members - self.waiting
        self.waiting, self._last = set(), ([], 0)
        return other

    def mean(self) -> torch.Tensor:
        """The moment, in float32. The sum is of no more use then."""
        if self.total.dim() == 2:
            for start in range(0, len(self.total), _COLUMNS):
                stop = start + _COLUMNS
                self.total[start:stop, :start] = self.total[:start, start:stop].T
                square = self.total[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
        return self.total.div_(self.count).float().cpu()


class Moments:
    """E[xxᵀ] (in, in), or its diagonal (in), of the input of each linear layer of a model.

    Layers that share an input (q, k and v; gate and up) are given the same tensor one after the
    other: they have one sum, as long as they are.

    An embedding's input is one token of its vocabulary: its moment is the diagonal of the tokens'
    frequencies, one added to each count (Laplace), so that no row is without weight.

    Attributes:
        batch: what is given has so many rows at this time, and so many of them count. One row is
            for each of them. None where it is one sequence.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._sums: dict[str, Sum] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, int, Sum] | None = None
        self.batch: tuple[int, int] | None = None

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Look at what the layers of a model are given."""
        handles = [
            module.register_forward_pre_hook(self._hook(name, module))
            for name, module in model.named_modules()
            if width_of(module)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: Any) -> Callable[[Any, Sequence[Any]], None]:
        import torch

        if isinstance(module, torch.nn.Embedding):
            size = module.num_embeddings
            return lambda _, given: self.see_tokens(name, size, given[0].detach())
        return lambda _, given: self.see(name, given[0])

    def see_tokens(self, name: str, size: int, tokens: torch.Tensor) -> None:
        """What an embedding of that many rows is given."""
        import torch

        one = torch.ones((), dtype=torch.float64, device=tokens.device)
        total = self._tokens.setdefault(name, one.repeat(size))
        for each in self._counted(tokens):
            total.index_add_(0, each.reshape(-1), one.expand(each.numel()))

    def see(self, name: str, x: torch.Tensor) -> None:
        """What a linear layer is given, (…, in)."""
        mine, last = self._sums.get(name), self._last
        if last is not None and last[0] is x and last[1] == x._version:
            shared = last[2]
            if mine is None and shared.inputs == 1:
                shared.members.add(name)
                self._sums[name] = shared
                return
            if mine is shared and name in shared.waiting:
                shared.given(name)
                return
        if mine is None:
            mine = self._sums[name] = Sum(x.shape[-1], self._kind, x.device, name)
        elif mine.waiting:
            other = mine.parted()
            self._sums |= dict.fromkeys(other.members, other)
            mine = self._sums[name]
        mine.add(name, [one.reshape(-1, one.shape[-1]) for one in self._counted(x.detach())])
        self._last = x, x._version, mine

    def _counted(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What counts of what a layer is given, by sequences. Raises NotInBlocksError where they
        cannot be told."""
        if self.batch is None:
            return [x]
        rows, counted = self.batch
        if x.shape[0] not in (1, rows):
            raise NotInBlocksError(
                "a layer outside the blocks does not get one sequence after the other"
            )
        return [x] * counted if x.shape[0] == 1 else [x[i : i + 1] for i in range(counted)]

    def done(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The moments of these layers, of those that were given anything; they are given nothing
        more, nor do others share with them. Raises NonFiniteError."""
        self._last = None
        sums = {name: self._sums.pop(name) for name in names if name in self._sums}
        for each in set(sums.values()):
            if each.waiting:
                other = each.parted()
                sums |= dict.fromkeys(other.members, other)
        means: dict[Sum, torch.Tensor] = {}
        for name in names:
            if name in self._tokens:
                tokens = self._tokens.pop(name)
                moment = (tokens / tokens.sum()).float().cpu()
            elif name in sums and sums[name].count:
                mine = sums[name]
                moment = means[mine] if mine in means else means.setdefault(mine, mine.mean())
            else:
                continue
            if not moment.isfinite().all():
                raise NonFiniteError(f"{name}: its input holds an inf or a NaN on this text")
            yield name, moment
