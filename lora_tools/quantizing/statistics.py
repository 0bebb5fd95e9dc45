"""Statistics of layers' inputs, collected on a text: for ``collect-stats``, and for ``quantize
--calibrate``, which uses them at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.errors import UsageError
from lora_tools.formats.activations import MARK, VERSION
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.formats.safetensors_growing import GrowingFile
from lora_tools.formats.tensors import as_bytes
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.options import NumberFormat, Running
from lora_tools.options.parse import read_text
from lora_tools.provenance import text_digest
from lora_tools.records import Action, Fate, Input, TensorSpec, counting
from lora_tools.sources.as_loaded import LoadedView
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.transformers_names import look

if TYPE_CHECKING:
    import torch

_LEAST, _TIMES = 8192, 5  # tokens, and how many there are for each input of the widest layer


def fates_of(checkpoint: Checkpoint, kind: str) -> tuple[Fate, ...]:
    """What will be known of each module's inputs, and its bytes."""
    fates = []
    for spec in checkpoint.specs.values():
        layout = checkpoint.weights[spec.name].layout
        if layout in ("linear", "conv1d", "embedding"):
            (_, width), _ = LAYOUTS[layout].shapes(spec.shape, 1)
            whole = kind == "full" and layout != "embedding"
            nbytes = 4 * width * (width if whole else 1)
            fates.append(Fate(split_tensor(spec.name)[0], Action.MEASURE, layout, nbytes))
    return tuple(fates)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What was written of a model's layers.

    Attributes:
        modules: their names.
        notes: how the model was run, where that says something.
    """

    modules: frozenset[str]
    notes: tuple[str, ...] = ()


def collect(
    folder: Path,
    rows: torch.Tensor,
    kind: Literal["full", "diagonal"],
    device: str,
    running: Running,
    out: Path,
    metadata: Mapping[str, str],
) -> Collected:
    """Write the second moment of each layer's input in a model's folder on rows (n, length), as
    ``formats.activations`` reads it.

    The model is run block after block, so that the memory is that of one, and of all rows between
    two blocks; a model whose blocks are not known is run as a whole.

    Raises:
        UnsafeInput: it is made by code that comes with it, which is not run.
        CheckpointError: transformers cannot load the model, or run it.
        NonFiniteError: an inf or a NaN among the activations.
    """
    from lora_tools.calibration import load, run
    from lora_tools.calibration.blocks import InBlocks
    from lora_tools.calibration.moments import Moments, NotInBlocksError, width_of
    from lora_tools.engine import threads

    device = threads.pick_device(device)
    with threads.torch_threads(running.jobs):
        try:
            checkpoint = open_checkpoint(folder, running.allow_pickle)
            blocks = InBlocks(folder, _InMemory(checkpoint), device)
            done = counting(running.progress, len(rows) * blocks.steps, "sequences in blocks")
            with _file(out, blocks.model, kind, metadata) as file:
                blocks.run(rows, Moments(kind), functools.partial(_keep, file), done)
            return Collected(frozenset(spec.name for spec in file.specs))
        except NotInBlocksError as error:
            out.unlink(missing_ok=True)
            note = (
                f"the whole model was in memory, because it cannot be run block by block: {error}"
            )
        model, moments = load(folder, running.allow_pickle).to(device), Moments(kind)
        done = counting(running.progress, len(rows), "sequences")
        with _file(out, model, kind, metadata) as file:
            with moments.watching(model):
                for i, row in enumerate(rows):
                    run(model, folder, row.to(device))
                    done(i + 1)
            layers = [name for name, each in model.named_modules() if width_of(each)]
            _keep(file, moments.done(layers))
        return Collected(frozenset(spec.name for spec in file.specs), (note,))


class _InMemory:
    """A checkpoint's tensors by the names that transformers gives them, tied ones by all theirs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from lora_tools.calibration.moments import NotInBlocksError

        how, why = look(checkpoint.config, checkpoint.specs)
        if how is None:
            raise NotInBlocksError(why)
        self._view, self._how = LoadedView(checkpoint, how), how

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self._how.tensors.get(self._how.tied.get(name, name))
        return found.spec.shape if found is not None else None

    def read(self, name: str) -> torch.Tensor:
        return self._view.tensor(self._how.tied.get(name, name))

    def release(self, name: str) -> None:
        self._view.release(self._how.tied.get(name, name))


def _file(out: Path, model: Any, kind: str, metadata: Mapping[str, str]) -> GrowingFile:
    """The file for the moments of a model's layers."""
    import torch

    from lora_tools.calibration.moments import width_of

    most = []
    for name, module in model.named_modules():
        if width := width_of(module):
            whole = kind == "full" and not isinstance(module, torch.nn.Embedding)
            most.append(TensorSpec(name, "F32", (width,) * (1 + whole)))
    return GrowingFile(out, most, {MARK: VERSION, **metadata})


def _keep(file: GrowingFile, found: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the next layers' moments."""
    for name, moment in found:
        file.write(TensorSpec(name, "F32", tuple(moment.shape)), as_bytes(moment))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text of --calibrate, and how much of it is used.

    Attributes:
        tokens: at most; None for five times as many as the widest layer has inputs.
    """

    checkpoint: Checkpoint
    path: Path
    text: str
    tokens: int | None
    seed: int
    running: Running

    @property
    def space(self) -> int:
        """Bytes of the statistics, which lie on the disk while the weights are quantized."""
        return sum(fate.nbytes for fate in fates_of(self.checkpoint, "full"))

    @property
    def input(self) -> Input:
        """The text, as reports name it."""
        return Input("text", str(self.path), text_digest(self.text))

    def collect(self, out: Path) -> Collected:
        """Run the model over the text and write the statistics. Raises what ``collect`` does."""
        rows = self._rows()
        said = {"kind": "full", "tokens": str(rows.numel()), "length": str(rows.shape[1])}
        return collect(self.checkpoint.path, rows, "full", "cpu", self.running, out, said)

    def _rows(self) -> torch.Tensor:
        """Sequences drawn from the text, in its order."""
        import torch

        from lora_tools import calibration

        length = calibration.window(self.checkpoint.config)
        rows = calibration.sequences(self.checkpoint.path, self.text, length)
        count = max((self.tokens or self._enough) // length, 1)
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return rows[drawn[:count].sort().values]

    @property
    def _enough(self) -> int:
        widths = [
            LAYOUTS[weight.layout].shapes(weight.spec.shape, 1)[0][1]
            for weight in self.checkpoint.weights.values()
            if weight.layout in ("linear", "conv1d")
        ]
        return max(_LEAST, _TIMES * max(widths, default=0))


def plan_calibration(
    given: str | Path, numbers: NumberFormat, running: Running
) -> Calibration | None:
    """Check what is asked for, and read the text; None without one.

    Raises:
        UsageError: options that go with --calibrate without it, statistics besides, a text that
            cannot be read, transformers is not there, or no plain model in a folder.
    """
    if numbers.calibrate is None:
        for field in ("calibration_tokens", "calibration_seed"):
            if getattr(numbers, field) is not None:
                raise UsageError(f"--{field.replace('_', '-')} needs --calibrate")
        return None
    if numbers.activations is not None:
        raise UsageError("--calibrate and --activations exclude each other: both are statistics")
    from lora_tools.calibration import check_library, window

    checkpoint = open_checkpoint(given, running.allow_pickle)
    length = window(checkpoint.config)
    if numbers.calibration_tokens is not None and numbers.calibration_tokens < length:
        raise UsageError(f"--calibration-tokens: at least {length} are needed, for one sequence")
    check_library("--calibrate")
    if not checkpoint.is_folder or not checkpoint.config or checkpoint.scheme is not None:
        raise UsageError(
            f"--calibrate: {checkpoint.path}: a folder with a config.json, a tokenizer and plain "
            "weights is needed; for quantized weights, run `loratools dequantize` first"
        )
    path = Path(numbers.calibrate)
    text, seed = read_text(path), numbers.calibration_seed or 0
    return Calibration(checkpoint, path, text, numbers.calibration_tokens, seed, running)
