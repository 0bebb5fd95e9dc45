"""Which linear layers transformers runs, told by watching torch, to hold a graph's against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from torch.overrides import TorchFunctionMode

from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.linears import Linear, linears
from lora_tools.onnx.tasks import Task
from lora_tools.sources.checkpoints import open_checkpoint


class _Watch(TorchFunctionMode):
    """Notes the weights of linear layers: bytes as stored, and whether stored as (out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bytes, bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {"linear": 1, "addmm": 2}.get(func.__name__)
        if place is not None and isinstance(args[place], torch.nn.Parameter):
            self.seen.add((as_stored(args[place]), func.__name__ == "linear"))
        return func(*args, **(kwargs or {}))


def as_stored(tensor: torch.Tensor) -> bytes:
    return tensor.detach().to(torch.float32).contiguous().numpy().tobytes()


def check_linears(folder: Path, task: Task) -> list[Linear]:
    """That the graphs of an exported folder have the linear layers that torch runs, no more and no
    fewer, of those sizes and that way round."""
    side = InTorch(folder, task, False)
    with _Watch() as watch:
        for run in side.runs(cache=True, generate=0):
            side.play(run)
    stored = open_checkpoint(folder)
    own = dict(side.model.state_dict())
    found: list[Linear] = []
    for file in task.files():
        model = onnx.load(folder / file, load_external_data=False)
        shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
        found_here = list(linears(model))
        for each in found_here:
            sizes = (each.out_features, each.in_features)
            assert shapes[each.weight] == (sizes if each.out_first else sizes[::-1])
            assert each.input in each.node.input
            assert each.output == each.node.output[0]
            table = each.cast.output[0] if each.cast else each.weight
            gathered = [n for n in model.graph.node if n.op_type == "Gather" and table in n.input]
            assert each.tied == bool(gathered)
        found += found_here
    values = {
        (
            as_stored(stored.tensor(f.weight) if f.weight in stored.specs else own[f.weight]),
            f.out_first,
        )
        for f in found
    }
    unused = (
        {  # what it makes is no output of the features
            (as_stored(own[name]), True) for name in ("pooler.dense.weight",) if name in own
        }
        if task.name == "features"
        else set()
    )
    assert values == watch.seen - unused
    return found
