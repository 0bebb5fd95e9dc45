"""What a quantized model loses on a text, beside the errors of its weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from lora_tools.errors import QualityGateError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.prepare import Adapters, merge_for_now
from lora_tools.onnx.tasks import DECODER, task_of
from lora_tools.options import Evaluation, Running, Storage
from lora_tools.options.parse import read_text
from lora_tools.provenance import command_of, text_digest
from lora_tools.quantizing.compensate import FOLDER
from lora_tools.quantizing.prepare import prepare_dequantize
from lora_tools.records import Input, Report, counting
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.totals import QuantizeTotals, TextTotals


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A text, and the model that is quantized: ``base``, ``adapters`` merged.

    Attributes:
        given: the checkpoint as it was named; path: that of the text.
        most: the loss, in nats per token, that may be added.
    """

    given: str | Path
    base: Checkpoint
    adapters: Adapters
    path: Path
    text: str
    most: float | None
    running: Running

    @property
    def space(self) -> int:
        """Bytes of the plain copies that are run, at most three, in float32 at most."""
        numbers = sum(spec.numel for spec in self.base.specs.values())
        return 4 * numbers * (3 if self._forms else 2)

    @property
    def _forms(self) -> bool:
        """Whether the plain model lies nowhere as it is."""
        return bool(self.adapters) or self.base.scheme is not None

    def evaluate(self, report: Report[QuantizeTotals], out: Path) -> Report[QuantizeTotals]:
        """The report of what lies at ``out``, with what is lost on the text.

        Raises:
            QualityGateError: more than allowed.
            CheckpointError: transformers cannot load the model, or its tokenizer.
            NonFiniteError: an inf or a NaN among the logits.
        """
        found = self._measure(out)
        totals: QuantizeTotals = {**report.totals, **found}
        text = Input("text", str(self.path), text_digest(self.text))
        report = dataclasses.replace(report, totals=totals, inputs=(*report.inputs, text))
        added = found["loss_increase"]
        if self.most is not None and not added <= self.most:
            raise QualityGateError(
                f"the loss on {self.path} increases by {added:.4g} nats per token, more than "
                f"{self.most:g} (--max-loss-increase); nothing was written. --activations lowers "
                "it, and also --compensate or --scale-search together with it",
                report,
            )
        return report

    def _measure(self, out: Path) -> TextTotals:
        from lora_tools import calibration
        from lora_tools.engine import threads

        rows = calibration.windows(self.base.path, self.text, self.base.config)
        scratch, running = out.with_name("evaluation"), self.running
        scratch.mkdir()
        quiet = dataclasses.replace(running, progress=None)
        plain, quantized, adapter = self.base.path, scratch / "quantized", out / FOLDER
        if self.adapters:
            plain = scratch / "plain"
            merge_for_now(self.given, self.adapters, plain, None, quiet)
        elif self._forms:
            plain = _dequantized(self.given, scratch / "plain", quiet)
        _dequantized(out, quantized, quiet)
        if adapter.exists():
            merge_for_now(quantized, [adapter], scratch / "compensated", "float32", quiet)
            quantized = scratch / "compensated"

        done = counting(running.progress, len(rows), "sequences")
        with threads.torch_threads(running.jobs):
            found = calibration.text_loss(plain, quantized, rows, running.allow_pickle, done)
        shutil.rmtree(scratch)
        return found


def _dequantized(checkpoint: str | Path, out: Path, running: Running) -> Path:
    """The numbers that a loader has, in the dtype that it has them in, at ``out``."""
    prepare_dequantize(checkpoint, Storage(), running, command_of("dequantize")).write(out)
    return out


def plan_evaluation(
    given: str | Path, adapters: Adapters, wanted: Evaluation, running: Running
) -> Evaluator | None:
    """Check what is asked for, and read the text; None without one.

    Raises:
        UsageError: a gate without a text, a text that cannot be read, transformers is not there, or
            the model is no decoder in a folder.
    """
    if wanted.eval_text is None:
        if wanted.max_loss_increase is not None:
            raise UsageError("--max-loss-increase needs --eval-text")
        return None
    from lora_tools.calibration import check_library

    check_library("--eval-text")
    path, base = Path(wanted.eval_text), open_checkpoint(given, running.allow_pickle)
    if not base.is_folder or not base.config:
        raise UsageError(
            f"--eval-text: {base.path}: a folder with a config.json and a tokenizer is needed"
        )
    task = task_of(base.config, "auto")
    if task.kind != DECODER:
        raise UsageError(
            f"--eval-text: only a decoder (causal-lm) has a loss on text, and {base.path} is for "
            f"{task.name}"
        )
    text = read_text(path)
    return Evaluator(given, base, adapters, path, text, wanted.max_loss_increase, running)
