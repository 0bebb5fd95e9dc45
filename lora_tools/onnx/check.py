"""A graph run in ONNX Runtime against the checkpoint run by transformers, on the same inputs.

Batches, lengths and pasts are not those of tracing. Padded positions are left out: what is computed
there depends on the kernel. transformers loads the checkpoint its own way, so that a weight taken
for another shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_tools.errors import CheckpointError
from lora_tools.onnx.in_runtime import InRuntime
from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.runs import Played, Run
from lora_tools.onnx.runtime_adapters import plain_graphs
from lora_tools.onnx.tasks import Task
from lora_tools.onnx.tolerance import Tolerance, tolerance
from lora_tools.totals import OutputsTotals


@dataclasses.dataclass
class Check:
    """What was found.

    Attributes:
        absolute, relative: the greatest difference, of the output named ``worst`` (of those that
            differ by more than allowed, where some do), and the greatest in units of the output's
            largest element.
        allowed: what the worst output may differ by, in units of its largest element.
        conditioning: how far torch is from itself in float64, in the same units; note: why that is
            not known.
        compared: how many outputs; beyond: whether one differs by more than allowed.
        tokens: how many tokens were generated greedily, and how many of them were the same.
        exact: of a graph with inputs for adapters, whether without one it gives the bits that it
            gives without those inputs; else None.
    """

    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""
    allowed: float = 0.0
    conditioning: float | None = None
    note: str = ""
    compared: int = 0
    beyond: bool = False
    failed: bool = False
    tokens: int = 0
    same_tokens: int = 0
    exact: bool | None = None

    def totals(self) -> OutputsTotals:
        """As a report has them."""
        tokens: OutputsTotals = {"tokens_generated": self.tokens, "tokens_same": self.same_tokens}
        return {
            "verified": not self.failed,
            "outputs_compared": self.compared,
            "max_difference": self.absolute,
            "max_relative_difference": self.relative,
            "worst_output": self.worst,
            "allowed_relative_difference": self.allowed,
            **({} if self.conditioning is None else {"conditioning": self.conditioning}),
            **(tokens if self.tokens else {}),
            **({} if self.exact is None else {"base_exact": self.exact}),
        }

    def add(self, name: str, found: Any, wanted: Any, atol: float, rtol: float) -> None:
        """Compare two arrays of equal shape."""
        if found.shape != wanted.shape:
            raise CheckpointError(f"{name}: {found.shape} in ONNX Runtime, {wanted.shape} in torch")
        self.compared += 1
        if not found.size:
            return
        difference = float(np.abs(found.astype(np.float64) - wanted).max())
        difference = difference if math.isfinite(difference) else math.inf
        largest = float(np.abs(wanted).max())
        beyond = difference == math.inf or difference > atol + rtol * largest
        if (beyond, difference) > (self.beyond, self.absolute) or not self.worst:
            self.beyond, self.absolute, self.worst = beyond, difference, name
            self.allowed = rtol + (atol / largest if largest else 0.0)
        self.failed |= beyond
        self.relative = max(self.relative, difference / largest if largest else difference)

    def hold(self, run: Run, found: Played, wanted: Played, allowed: Tolerance) -> None:
        """Compare all that a run gave, and the tokens it generated."""
        for step, (mine, theirs) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
            for name, value in theirs.items():
                label = f"{name} ({run.name}, step {step})"
                if name in mine:
                    pair = run.visible(step, mine[name], value)
                    self.add(label, *pair, allowed.atol, allowed.share(name))
        self.tokens += len(wanted.tokens)
        for step, (a, b) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
            self.same_tokens += a == b
            self.failed |= a != b and not _tie(wanted.outputs, step, a, b, allowed)


def compare(
    folder: Path,
    task: Task,
    cache: bool,
    *,
    atol: float,
    rtol: float | None,
    graphs: Sequence[Path] = (),
    generate: int = 16,
    trust_remote_code: bool = False,
    adapter: tuple[Path, Path] | None = None,
) -> Check:
    """Run every graph of an exported folder, and its checkpoint in torch.

    torch's model is gone before the graph's session is made, so that they are never in memory both.

    Args:
        folder: a checkpoint's folder, with its graphs in it unless ``graphs`` says where they are.
        cache: whether a decoder's graph has its past as inputs.
        atol, rtol: an output may differ by atol + rtol times its largest element; rtol None: by
            what ``tolerance`` measures.
        generate: tokens a decoder generates greedily, with the cache.
        adapter: the file of one to activate, and the folder of the checkpoint that it is merged
            into, for torch.

    Raises:
        CheckpointError: one of the two does not run.
    """
    side = InTorch(adapter[1] if adapter else folder, task, trust_remote_code)
    runs = side.runs(cache, generate)
    wanted = [side.play(run) for run in runs]
    allowed = tolerance(side, runs, wanted, atol, rtol)
    side.close()
    result = Check(conditioning=allowed.conditioning, note=allowed.note)
    graphs = graphs or [folder / file for file in task.files()]
    place = graphs[0].parent
    without = [] if adapter else plain_graphs(graphs)
    forced = [run.forced(each.tokens) for run, each in zip(runs, wanted, strict=True)]
    plain = _bits_of(forced, InRuntime(place, task, without)) if without else []
    runtime = InRuntime(place, task, graphs, adapter[0] if adapter else None)
    for number, (run, reference) in enumerate(zip(forced, wanted, strict=True)):
        found = runtime.play(run)
        if plain:
            result.exact = result.exact is not False and _bits(found) == plain[number]
        result.hold(run, found, reference, allowed)
    result.failed |= result.exact is False
    return result


def _tie(outputs: Sequence[Any], step: int, found: int, wanted: int, allowed: Tolerance) -> bool:
    """Whether two tokens are as likely as each other within what is allowed."""
    logits = outputs[step]["logits"][0, -1].astype(np.float64) if step < len(outputs) else None
    if logits is None:
        return False
    room = allowed.atol + allowed.share("logits") * float(np.abs(outputs[step]["logits"]).max())
    return float(logits[wanted] - logits[found]) <= 2 * room


def _bits_of(runs: Sequence[Run], runtime: InRuntime) -> list[str]:
    """What several runs give, by which it can be compared bit for bit."""
    return [_bits(runtime.play(run)) for run in runs]


def _bits(played: Played) -> str:
    digest = hashlib.sha256()
    for outputs in played.outputs:
        for name in sorted(outputs):
            digest.update(outputs[name].tobytes())
    return digest.hexdigest()
