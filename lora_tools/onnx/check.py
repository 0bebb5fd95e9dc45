"""A graph run in ONNX Runtime against the checkpoint run by transformers, on the same inputs.

Batches, lengths and pasts are not those of tracing. Padded positions are left out: what is computed
there depends on the kernel. transformers loads the checkpoint its own way, so that a weight taken
for another shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lora_tools.onnx.half import add_half, twins
from lora_tools.onnx.in_runtime import InRuntime
from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.initializers import load
from lora_tools.onnx.outputs import Check
from lora_tools.onnx.precision import FLOAT32, computed_in
from lora_tools.onnx.runs import Played, Run
from lora_tools.onnx.runtime_adapters import plain_graphs
from lora_tools.onnx.tasks import Task
from lora_tools.onnx.tolerance import tolerance


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
    dtype = computed_in(load(graphs[0]))
    models: Sequence[Path] | Sequence[bytes] = graphs
    if dtype != FLOAT32:
        models, room = twins(graphs, dtype)
        allowed = allowed.wider(room)
    runtime = InRuntime(place, task, models, adapter[0] if adapter else None)
    for number, (run, reference) in enumerate(zip(forced, wanted, strict=True)):
        found = runtime.play(run)
        if plain:
            result.exact = result.exact is not False and _bits(found) == plain[number]
        result.hold(run, found, reference, allowed)
    result.failed |= result.exact is False
    if dtype != FLOAT32:
        add_half(result, folder, task, forced, wanted, graphs, dtype, trust_remote_code)
    return result


def _bits_of(runs: Sequence[Run], runtime: InRuntime) -> list[str]:
    """What several runs give, by which it can be compared bit for bit."""
    return [_bits(runtime.play(run)) for run in runs]


def _bits(played: Played) -> str:
    digest = hashlib.sha256()
    for outputs in played.outputs:
        for name in sorted(outputs):
            digest.update(outputs[name].tobytes())
    return digest.hexdigest()
