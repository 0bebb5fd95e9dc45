"""Statistics of layers' inputs, collected on a text: for ``collect-stats``, and for ``quantize
--calibrate``, which uses them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_tools.errors import UsageError
from lora_tools.formats.activations import MARK, VERSION
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.formats.safetensors_writer import SafetensorsWriter
from lora_tools.formats.tensors import as_bytes
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.options import NumberFormat, Running
from lora_tools.options.parse import read_text
from lora_tools.provenance import text_digest
from lora_tools.records import Action, Fate, Input, TensorSpec, counting
from lora_tools.sources.checkpoints import open_checkpoint

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


def collect(
    folder: Path,
    rows: torch.Tensor,
    kind: Literal["full", "diagonal"],
    device: str,
    running: Running,
) -> dict[str, torch.Tensor]:
    """The second moment of each layer's input in a model's folder on rows (n, length). Raises what
    ``calibration.moments`` does."""
    from lora_tools import calibration
    from lora_tools.engine import threads

    device = threads.pick_device(device)
    done = counting(running.progress, len(rows), "sequences")
    with threads.torch_threads(running.jobs):
        return calibration.moments(folder, rows, kind, device, running.allow_pickle, done)


def write(out: Path, found: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """As ``formats.activations`` reads them."""
    specs = [TensorSpec(name, "F32", tuple(found[name].shape)) for name in sorted(found)]
    with SafetensorsWriter(out, specs, {MARK: VERSION, **metadata}) as writer:
        for spec in specs:
            writer.write(spec.name, as_bytes(found[spec.name]))


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

    def collect(self, out: Path) -> None:
        """Run the model over the text and write the statistics. Raises what ``collect`` does."""
        rows = self._rows()
        found = collect(self.checkpoint.path, rows, "full", "cpu", self.running)
        write(
            out, found, {"kind": "full", "tokens": str(rows.numel()), "length": str(rows.shape[1])}
        )

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
                raise UsageError(f"--{field.replace('_', '-')} goes with --calibrate")
        return None
    if numbers.activations is not None:
        raise UsageError("--calibrate and --activations exclude each other: one set of statistics")
    from lora_tools.calibration import check_library, window

    checkpoint = open_checkpoint(given, running.allow_pickle)
    length = window(checkpoint.config)
    if numbers.calibration_tokens is not None and numbers.calibration_tokens < length:
        raise UsageError(f"--calibration-tokens: at least {length} are needed, one sequence")
    check_library("--calibrate")
    if not checkpoint.is_folder or not checkpoint.config or checkpoint.scheme is not None:
        raise UsageError(
            f"--calibrate: {checkpoint.path}: a folder with a config.json, a tokenizer and plain "
            "weights is needed; `loratools dequantize` makes quantized ones plain"
        )
    path = Path(numbers.calibrate)
    text, seed = read_text(path), numbers.calibration_seed or 0
    return Calibration(checkpoint, path, text, numbers.calibration_tokens, seed, running)
