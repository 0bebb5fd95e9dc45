"""What a graph over quantized weights gives: proved against torch, and what rounding cost.

The proof takes torch's model with the weights that the graph's own bytes stand for, so that only
the order of sums may differ. The cost is measured on the graph as it is shipped, against torch with
the weights as they were before: on the same random tokens, and on a text.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import torch

from lora_tools.calibration import TextLoss
from lora_tools.errors import NonFiniteError
from lora_tools.formats.alignment import align
from lora_tools.onnx.in_runtime import InRuntime
from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.outputs import Check
from lora_tools.onnx.quantized_weights import dequantized, exact
from lora_tools.onnx.runs import Run
from lora_tools.onnx.tasks import Task
from lora_tools.onnx.tolerance import Tolerance, tolerance
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.totals import LossTotals, TextTotals


def examine(
    folder: Path,
    task: Task,
    cache: bool,
    *,
    plain: Path,
    quantized: bool,
    original: bool,
    rows: torch.Tensor | None,
    atol: float,
    rtol: float | None,
    generate: int = 16,
    trust_remote_code: bool = False,
) -> tuple[Check, LossTotals]:
    """The proof, and the report's keys that say what was lost: every graph of an exported folder is
    run, and in torch the weights before and after rounding.

    Args:
        folder: the exported one.
        cache: whether a decoder's graph has its past as inputs.
        plain: the folder of the checkpoint with no weight quantized, which torch loads.
        quantized: whether the graphs' linear layers are.
        original: whether ``plain`` holds the weights from before they were quantized.
        rows: (n, length) of tokens of a text for a decoder.
        atol, rtol: an output may differ by atol + rtol times its largest element from torch's with
            the weights that the graph stands for; rtol None: by what ``tolerance`` measures.
        generate: tokens a decoder generates greedily, with the cache.

    Raises:
        CheckpointError: one of the two does not run.
        NonFiniteError: the graph gives an inf or a NaN where torch does not.
    """
    side = InTorch(plain, task, trust_remote_code)
    runs = side.runs(cache, generate)
    totals: LossTotals = {}
    files = [folder / file for file in task.files()]
    if rows is not None or (quantized and original):
        shipped = InRuntime(folder, task, files)
        if quantized and original:
            totals |= _difference(side, shipped, runs)
        if rows is not None:
            totals |= _on_text(side if original else None, shipped, rows)
        del shipped
    graphs: list[bytes] = []
    if quantized:
        put_in(side.model, folder, plain, task)
        graphs = [_exact(file) for file in files]
    wanted = [side.play(run) for run in runs]
    allowed = tolerance(side, runs, wanted, atol, rtol)
    side.close()
    runtime = InRuntime(folder, task, graphs or files)
    check = Check(conditioning=allowed.conditioning, note=allowed.note)
    for run, reference in zip(runs, wanted, strict=True):
        check.hold(run, runtime.play(run.forced(reference.tokens)), reference, allowed)
    return check, totals


def _exact(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    exact(model)
    return bytes(model.SerializeToString())


def put_in(model: torch.nn.Module, folder: Path, plain: Path, task: Task) -> None:
    """Give torch's model the weights that the quantized layers of the graphs stand for."""
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters())
    keys, _ = align(list(parameters), list(open_checkpoint(plain).specs))
    for file in task.files():
        for weight, values in dequantized(folder / file):
            names = [name for name in parameters if weight in (name, keys.get(name))]
            for name in names:
                module = model.get_submodule(name.rpartition(".")[0])
                turned = values.T.contiguous() if isinstance(module, Conv1D) else values
                assert turned.shape == parameters[name].shape
                parameters[name].data = turned
            assert names, f"{weight} is not a parameter of the model"


def _difference(side: InTorch, shipped: InRuntime, runs: list[Run]) -> LossTotals:
    """On the same tokens; of a greedy generation only whether its tokens are the same."""
    loss = Check()
    for run in runs:
        found, wanted = shipped.play(run), side.play(run)
        if run.generate:
            found.outputs, wanted.outputs = [], []
        loss.hold(run, found, wanted, Tolerance(math.inf, 0.0))
    if not math.isfinite(loss.absolute):
        raise NonFiniteError(f"{loss.worst}: the quantized graph gives an inf or a NaN")
    totals: LossTotals = {
        "loss_max_difference": loss.absolute,
        "loss_max_relative_difference": loss.relative,
    }
    if loss.tokens:
        totals["loss_tokens_same"] = loss.same_tokens
    return totals


def _on_text(side: InTorch | None, shipped: InRuntime, rows: torch.Tensor) -> TextTotals:
    loss = TextLoss()
    for row in rows:
        ids = row[None].numpy()
        run = Run("text", {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        mine = shipped.play(run).outputs[0]["logits"][0]
        theirs = side.play(run).outputs[0]["logits"][0] if side else None
        loss.add(row, torch.from_numpy(mine), None if theirs is None else torch.from_numpy(theirs))
    return loss.totals()
