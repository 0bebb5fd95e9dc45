"""What ``export`` does with linear layers that are quantized, and with a text to measure on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError
from lora_tools.exporting.feeding import Statistics, refuse_unfed, statistics_for
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.loaded_in_four_bits import reason_to_keep
from lora_tools.merging.prepare import OUTSIDE
from lora_tools.onnx.schemes import AFFINE, NF4, SCHEMES
from lora_tools.onnx.tasks import DECODER, Task
from lora_tools.options import Quantized
from lora_tools.options.parse import read_text
from lora_tools.provenance import text_digest
from lora_tools.quantizing.feeding import activations_of
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.schemes.bitsandbytes import BITSANDBYTES
from lora_tools.totals import ExportTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.error_feedback import Errors
    from lora_tools.onnx.graphs import Built
    from lora_tools.onnx.nbits import FactorOf


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is asked for.

    Attributes:
        scheme: a name of ``onnx.schemes``, or None.
        stored: the checkpoint's own weights are in four bits, which a graph reads as they are.
        decoded: they are in another scheme, and are written as the plain ones that they stand for.
        text: to measure perplexity on, or None.
        statistics: of the layers' inputs, by which rounding errors are fed forward, or None.
    """

    scheme: str | None
    stored: bool
    decoded: bool
    text: str | None
    statistics: Statistics | None = None

    @property
    def packs(self) -> bool:
        """Whether the checkpoint's weights are to be put into four bits."""
        return self.scheme == NF4 and not self.stored

    @property
    def affine(self) -> bool:
        """Whether ONNX Runtime's quantizer makes the weights, which only the graph reads."""
        return self.scheme in AFFINE

    @property
    def factor(self) -> FactorOf | None:
        """What errors are fed forward by, where ONNX Runtime's quantizer makes the weights."""
        if self.statistics is None or not self.affine:
            return None
        return self.statistics.factor

    def inputs(self, path: str | Path | None) -> tuple[Input, ...]:
        """The text, and statistics that no other verb has used, as inputs of the report."""
        given: tuple[Input, ...] = ()
        if self.statistics is not None and self.affine:
            given = (self.statistics.known.as_input(),)
        if self.text is None:
            return given
        return (*given, Input("text", str(path), text_digest(self.text)))

    def weights(self, asked: str | None, in_place: bool) -> str:
        """``--weights``, or what it is if not given."""
        return asked or ("bundled" if self.affine and not in_place else "shared")

    def rows(self, source: Checkpoint, trusted: bool) -> torch.Tensor | None:
        """The text in windows of tokens (n, length), or None without one.

        Args:
            trusted: whether code that comes with the tokenizer may run.

        Raises:
            UsageError: it has less than two tokens.
        """
        if self.text is None:
            return None
        from lora_tools.calibration import windows

        return windows(source.path, self.text, source.config, trusted)

    def planned(self, plan: Report[ExportTotals], source: Checkpoint) -> Report[ExportTotals]:
        """The plan with the fate of what ONNX Runtime's quantizer will make smaller."""
        if not self.affine:
            return plan
        fates = tuple(self._fate(fate, source) for fate in plan.plan)
        return dataclasses.replace(plan, plan=fates)

    def _fate(self, fate: Fate, source: Checkpoint) -> Fate:
        assert self.scheme is not None
        weight = source.weights.get(fate.tensor)
        if weight is None or not weight.stored:
            return fate
        spec, (reason, _) = weight.spec, reason_to_keep(weight, source.config, head=False)
        if reason:
            return dataclasses.replace(fate, reason="; ".join(filter(None, (reason, fate.reason))))
        scheme = AFFINE[self.scheme]
        turned = weight.layout == "conv1d"
        rows, cols = spec.shape[::-1] if turned else spec.shape
        nbytes = sum(each.nbytes for each in scheme.specs(spec.name, rows, cols))
        bits = 8 * nbytes / spec.numel
        said = f"{scheme.name} in blocks of {scheme.block}, {bits:.3f} bits per parameter"
        if self.statistics is not None:
            fed = self.statistics.has(spec.name, cols)
            said += ", error-fed" if fed else ", rounded by itself: no statistics of its inputs"
        reason = "; ".join(filter(None, (said, fate.reason)))
        return Fate(fate.tensor, Action.QUANTIZE, reason, nbytes)

    def measured(
        self, report: Report[ExportTotals], built: Built, bundled: bool
    ) -> Report[ExportTotals]:
        """The report, with what the graphs showed to be otherwise than planned."""
        if self.scheme is None:
            return report
        totals: ExportTotals = {"tensors_quantized": len(built.quantized), **report.totals}
        if built.fed:
            totals = {**totals, **_of_outputs(list(built.fed.values()))}
        if not self.affine:
            return dataclasses.replace(report, totals=totals)
        if bundled:
            totals["bytes"] = built.bundle
        fates = [self._settled(fate, built, bundled) for fate in report.plan]
        known = {fate.tensor for fate in fates}
        fates += [
            Fate(
                name,
                Action.QUANTIZE,
                f"{self.scheme}, made from several of the checkpoint's tensors",
            )
            for name in sorted(built.quantized - known)
        ]
        return dataclasses.replace(report, plan=tuple(fates), totals=totals)

    def _settled(self, fate: Fate, built: Built, bundled: bool) -> Fate:
        if fate.action == Action.GRAPH or fate.tensor in built.quantized:
            return fate
        if fate.reason == OUTSIDE:
            return fate
        if fate.tensor not in built.used and built.formed:
            return Fate(
                fate.tensor,
                Action.FORM,
                "goes into a weight that transformers makes from several tensors",
            )
        if fate.tensor not in built.used and bundled:
            return Fate(fate.tensor, Action.LEAVE_OUT, "no graph uses it")
        if fate.action == Action.QUANTIZE:
            return Fate(fate.tensor, Action.COPY, "the graph does not use it in linear layers only")
        return fate


def _of_outputs(errors: Sequence[Errors]) -> ExportTotals:
    """Over all layers that were fed, weighted by the energy of their outputs."""
    energy = math.fsum(each.energy for each in errors) or 1.0
    return {
        "output_error": math.sqrt(math.fsum(each.fed for each in errors) / energy),
        "output_error_unfed": math.sqrt(math.fsum(each.plain for each in errors) / energy),
        "tensors_fed": len(errors),
    }


def plan_quantization(
    source: Checkpoint,
    task: Task,
    wanted: Quantized,
    eval_text: str | Path | None,
    *,
    verify: bool,
    merging: bool,
    runtime: bool,
) -> Quantization:
    """Read the options.

    Args:
        wanted: schemes, of which one may be given, and statistics.
        merging: whether weights are merged or cast.
        runtime: whether adapters are inputs of the graph.

    Raises:
        UsageError: options that exclude each other, or a text for a task without perplexity.
    """
    chosen = [name for name in SCHEMES if getattr(wanted, name)]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other")
    scheme = chosen[0] if chosen else None
    stored = source.scheme == BITSANDBYTES
    if stored and scheme != NF4:
        raise UsageError(
            f"{source.path}: its weights are in four bits; pass --nf4, or make them plain with "
            "`loratools dequantize` first"
        )
    if stored and merging:
        raise UsageError(
            f"{source.path}: its weights are in four bits, and export cannot merge into them; use "
            "`loratools merge --requantize`, or `loratools dequantize`, first"
        )
    if runtime and scheme:
        raise UsageError(
            f"--runtime-adapters and --{scheme} exclude each other: runtime adapters need layers "
            "that are not quantized"
        )
    if wanted.activations is not None:
        refuse_unfed(scheme, stored)
    known = statistics_for(source, activations_of(wanted.activations))
    text = None
    if eval_text is not None:
        if task.kind != DECODER:
            raise UsageError(
                f"--eval-text: only a decoder (causal-lm) has a perplexity, not {task.name}"
            )
        if not verify:
            raise UsageError("--eval-text is part of the check; leave --no-verify out")
        if runtime:
            raise UsageError("--eval-text does not go with --runtime-adapters")
        text = read_text(Path(eval_text))
    decoded = source.scheme is not None and not stored
    return Quantization(scheme, stored, decoded, text, known)
