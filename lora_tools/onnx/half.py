"""The check of a graph that computes in half precision, in two parts.

With float32 in the place of the half dtype the graph must be torch's as closely as any other (and
one rounding of half precision, where it has a constant such as √d), which finds what is wrong. As
it is, it may differ by a multiple of what torch's own half precision does, which finds what
overflows, or was to be summed in float32 and is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lora_tools.errors import CheckpointError
from lora_tools.onnx.in_runtime import InRuntime
from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.initializers import load
from lora_tools.onnx.outputs import Check
from lora_tools.onnx.precision import in_float32
from lora_tools.onnx.runs import Played, Run, relative_difference
from lora_tools.onnx.tasks import Task
from lora_tools.onnx.tolerance import Tolerance

MULTIPLE = 3  # of what torch's own half precision is off
ROUNDINGS = 4  # a floor, in units of the dtype's last bit
LIMIT = 0.5
_LAST_BIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


def twins(paths: Sequence[Path], dtype: str) -> tuple[list[bytes], float]:
    """The graphs in float32 over the same weights, and what rounded constants may come to."""
    models = [load(path) for path in paths]
    rounded = [in_float32(model) for model in models]
    room = _LAST_BIT[dtype] if any(rounded) else 0.0
    return [bytes(model.SerializeToString()) for model in models], room


def add_half(
    check: Check,
    folder: Path,
    task: Task,
    runs: Sequence[Run],
    wanted: Sequence[Played],
    graphs: Sequence[Path],
    dtype: str,
    trust_remote_code: bool,
) -> None:
    """Run the graphs as they are, and torch in that dtype, and hold both against its float32.

    Args:
        check: gets what is found.
        folder: the checkpoint's.
        wanted: what torch's float32 gave.

    Raises:
        CheckpointError: torch's own half precision gives an inf or a NaN, or does not run.
    """
    place = graphs[0].parent
    try:
        runtime = InRuntime(place, task, graphs)
    except CheckpointError as error:
        check.note = (
            f"checked with float32 instead of {dtype}, because the graph itself could not be run: "
            f"{_last(error)}"
        )
        return
    own = _differences(folder, task, runs, wanted, dtype, trust_remote_code)
    floor = ROUNDINGS * _LAST_BIT[dtype]
    shares = {name: min(max(MULTIPLE * off, floor), LIMIT) for name, off in own.items()}
    half = Check(conditioning=max(own.values()))
    for run, reference in zip(runs, wanted, strict=True):
        half.hold(run, runtime.play(run), reference, Tolerance(0.0, None, shares))
    check.half = half
    check.failed |= half.failed


def _last(error: CheckpointError) -> str:
    """What ONNX Runtime said, without what came before."""
    return str(error).partition(": ")[2] or str(error)


def _differences(
    folder: Path,
    task: Task,
    runs: Sequence[Run],
    wanted: Sequence[Played],
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    """Of torch in that dtype from its float32, by the output's name."""
    side = InTorch(folder, task, trust_remote_code, dtype)
    found: dict[str, float] = {}
    for run, reference in zip(runs, wanted, strict=True):
        played = side.play(run)
        for step, outputs in enumerate(reference.outputs):
            for name, value in outputs.items():
                off = relative_difference(*run.visible(step, played.outputs[step][name], value))
                if not math.isfinite(off):
                    raise CheckpointError(
                        f"{name} ({run.name}): torch's own {dtype} gives an inf or a NaN; choose "
                        "another --compute-dtype (bfloat16 has the range of float32)"
                    )
                found[name] = max(found.get(name, 0.0), off)
    side.close()
    return found
