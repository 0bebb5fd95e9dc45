"""A model run over many sequences block after block: in memory are one block's weights, and what
all sequences are at that point."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_tools.calibration import kind_and_line
from lora_tools.calibration.moments import Moments, NotInBlocksError, width_of
from lora_tools.errors import LoraToolsError
from lora_tools.pretrained import config_of, weightless_of

if TYPE_CHECKING:
    import torch

Found = Iterable[tuple[str, "torch.Tensor"]]


class Stored(Protocol):
    """Weights by the names that they have in the model."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is none of that name."""

    def read(self, name: str) -> torch.Tensor:
        """Plain numbers, not to be written to."""

    def release(self, name: str) -> None:
        """It is not needed again soon."""


class InBlocks:
    """A model of transformers without its weights, which are read as they are needed, in float32.

    What is outside of blocks is run on all sequences at once, as one batch; a block on one after
    the other. That each tensor can be told to have a row for every sequence or to be for all of
    them, the batch has a size that nothing in the model has; the rows that fill it up count for
    nothing. Of the output head only the input is wanted: it gives a tensor without numbers.

    Args:
        device: where it is run.

    Raises:
        NotInBlocksError: it cannot be run so.
        LoraToolsError: its config is not to be loaded at all.
    """

    def __init__(self, folder: Path, stored: Stored, device: str) -> None:
        self._stored, self._device = stored, device
        self.model = _weightless(folder, device)
        self._modules = dict(self.model.named_modules())
        self._blocks = _blocks(self._modules)
        parts = [id(part) for name in self._blocks for part in self._modules[name].modules()]
        if not parts or len(parts) > len(set(parts)):
            what = "share layers" if parts else "are not known"
            raise NotInBlocksError(f"the blocks of a {type(self.model).__name__} {what}")
        within = set(parts)
        self._outside = [
            name
            for name, module in self._modules.items()
            if id(module) not in within and width_of(module)
        ]
        self._rest = [
            name
            for name, module in self._modules.items()
            if id(module) not in within and not width_of(module)
        ]
        self._head = _head(self.model)
        unread = {id(each) for each in self._head.parameters()} if self._head is not None else ()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in unread and stored.shape(name) != tuple(parameter.shape):
                raise NotInBlocksError(f"{name} is stored in another form than the model has")

    @property
    def steps(self) -> int:
        """How many times each sequence is run."""
        return len(self._blocks)

    def run(
        self,
        rows: torch.Tensor,
        moments: Moments,
        keep: Callable[[Found], None],
        done: Callable[[int], None],
    ) -> None:
        """Run it over rows (n, length) of tokens.

        Args:
            keep: is given each layer's moment as soon as it is known.
            done: hears how often a sequence was run through a block.

        Raises:
            NotInBlocksError: it cannot be run so, which shows only now.
            NonFiniteError: an inf or a NaN among the inputs.
        """
        import torch

        work = _Pass(self, rows, moments, keep, done)
        try:
            with torch.no_grad(), moments.watching(self.model), contextlib.ExitStack() as stack:
                for name in self._rest:
                    stack.enter_context(self.filled(name, alone=True))
                for name in self._blocks:
                    stack.enter_context(self._replaced(name, work.through_block))
                for name in self._outside:
                    stack.enter_context(self._replaced(name, work.at_once))
                self.model(input_ids=work.batch.to(self._device))
        except (LoraToolsError, NotInBlocksError, MemoryError, OSError):
            raise
        except Exception as error:  # transformers raises what it likes
            raise NotInBlocksError(kind_and_line(error)) from None
        keep(moments.done(self._outside))

    def layers(self, block: str) -> list[str]:
        """Names of a block's layers that are looked at."""
        inner = self._modules[block].named_modules(prefix=block)
        return [name for name, module in inner if width_of(module)]

    def is_head(self, name: str) -> bool:
        """Whether it is the output head."""
        return self._modules[name] is self._head

    def sizes(self) -> set[int]:
        """All dimensions of its weights."""
        return {size for parameter in self.model.parameters() for size in parameter.shape}

    @contextlib.contextmanager
    def _replaced(self, name: str, by: Callable[..., Any]) -> Iterator[None]:
        """A module's forward by ``by(name, forward, …)``."""
        module = self._modules[name]
        module.forward = functools.partial(by, name, module.forward)
        try:
            yield
        finally:
            del module.forward

    @contextlib.contextmanager
    def filled(self, name: str, alone: bool = False) -> Iterator[None]:
        """A module with its weights.

        Args:
            alone: without those of what is in it.
        """
        module = self._modules[name]
        parts = [(name, module)] if alone else module.named_modules(prefix=name)
        taken: list[tuple[dict[str, Any], str, Any, str]] = []
        try:
            for path, part in parts:
                for kind in (part._parameters, part._buffers):
                    for key, empty in kind.items():
                        stored = f"{path}.{key}" if path else key
                        if empty is None or self._stored.shape(stored) != tuple(empty.shape):
                            continue
                        taken.append((kind, key, empty, stored))
                        kind[key] = self._weight(stored, kind is part._parameters)
            yield
        finally:
            for kind, key, empty, stored in taken:
                kind[key] = empty
                self._stored.release(stored)

    def _weight(self, name: str, is_parameter: bool) -> torch.Tensor:
        import torch

        found = self._stored.read(name)
        dtype = torch.float32 if found.is_floating_point() else found.dtype
        found = found.to(self._device, dtype)
        return torch.nn.Parameter(found, requires_grad=False) if is_parameter else found


class _Pass:
    """One run of a model over sequences.

    Attributes:
        batch: the sequences, and rows that fill them up.
    """

    def __init__(
        self,
        model: InBlocks,
        rows: torch.Tensor,
        moments: Moments,
        keep: Callable[[Found], None],
        done: Callable[[int], None],
    ) -> None:
        import torch

        self._model, self._moments, self._keep, self._tell = model, moments, keep, done
        self._count, size = len(rows), _size(len(rows), model.sizes() | {rows.shape[1]})
        self.batch = torch.cat([rows, rows[-1:].expand(size - len(rows), -1)])
        self._whole = moments.batch = (size, len(rows))
        self._through: set[str] = set()

    def at_once(self, name: str, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """A layer outside of blocks, on all sequences."""
        import torch

        if self._model.is_head(name):
            outputs = self._model.model.get_submodule(name).out_features
            return torch.empty(*given[0].shape[:-1], outputs, device="meta")
        with self._model.filled(name):
            return forward(*given, **named)

    def through_block(
        self, name: str, forward: Callable[..., Any], *given: Any, **named: Any
    ) -> Any:
        """A block, on one sequence after the other."""
        if name in self._through:
            raise NotInBlocksError("it goes through a block twice")
        made: Any = None
        self._moments.batch = None
        with self._model.filled(name):
            for i in range(self._count):
                one = forward(*_row(given, i, self._whole[0]), **_row(named, i, self._whole[0]))
                made = _room(one, self._whole[0]) if i == 0 else made
                _put(made, one, i)
                self._tell(len(self._through) * self._count + i + 1)
        self._moments.batch = self._whole
        self._through.add(name)
        self._keep(self._moments.done(self._model.layers(name)))
        return made


def _weightless(folder: Path, device: str) -> Any:
    """The model of a folder, its parameters on the meta device; what is not stored (rotary
    frequencies) holds its numbers, on ``device``. Raises as ``InBlocks``."""
    import torch
    import transformers

    try:
        from accelerate import init_empty_weights

        config = config_of(folder)
        [architecture, *_] = config.architectures or ["AutoModel"]
        with init_empty_weights(include_buffers=False):
            kind = getattr(transformers, architecture)
            model = weightless_of(kind, config, dtype=torch.float32)
        for each in (model.config, model.config.get_text_config()):
            each.use_cache = False
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer.to(device) if buffer is not None else None
        return model.eval()
    except LoraToolsError:
        raise
    except Exception as error:  # transformers raises what it likes
        raise NotInBlocksError(kind_and_line(error)) from None


def _blocks(modules: Mapping[str, Any]) -> list[str]:
    """What transformers runs again for gradients instead of keeping what is in it: such a layer
    has one output that goes into the next."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[str] = []
    for name, module in modules.items():  # what is around others comes first
        inside = found and name.startswith(f"{found[-1]}.")
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append(name)
    return found


def _head(model: Any) -> Any:
    """The layer that gives a score to each word of the vocabulary, or None."""
    import torch

    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, torch.nn.Linear) else None


def _size(count: int, others: set[int]) -> int:
    """The first number from ``count`` on that divides none of the others: a number of heads
    divides that of their outputs."""
    size = count
    while size > 1 and any(other % size == 0 for other in others):
        size += 1
    return size


def _row(given: Any, i: int, size: int) -> Any:
    """What a block is given for the i-th of ``size`` sequences. Raises NotInBlocksError where it
    cannot be told."""
    import torch

    if isinstance(given, torch.Tensor):
        by_row = [at for at, each in enumerate(given.shape) if each and each % size == 0]
        if size == 1 or not by_row:
            return given
        if by_row != [0] or given.shape[0] != size:
            raise NotInBlocksError(f"a block gets a tensor of shape {tuple(given.shape)}")
        return given[i : i + 1]
    if isinstance(given, dict):
        return {key: _row(each, i, size) for key, each in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_row(each, i, size) for each in given)
    if given is None or isinstance(given, bool | int | float | str | torch.dtype):
        return given
    raise NotInBlocksError(f"a block gets a {type(given).__name__}")


def _room(made: Any, size: int) -> Any:
    """Room for what a block makes of ``size`` sequences, by what it makes of one."""
    import torch

    if isinstance(made, torch.Tensor) and made.dim() and len(made) == 1:
        return made.new_zeros(size, *made.shape[1:])
    if isinstance(made, tuple):
        return tuple(_room(each, size) for each in made)
    if made is None:
        return None
    raise NotInBlocksError("a block does not return one row for each sequence")


def _put(room: Any, made: Any, i: int) -> None:
    """Put what a block made of the i-th sequence to its place."""
    if isinstance(room, tuple):
        for each, its in zip(room, made, strict=True):
            _put(each, its, i)
    elif room is not None:
        room[i] = made[0]
