"""What ``inspect`` says of an ONNX model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import need

if TYPE_CHECKING:
    from lora_tools.onnx.initializers import GraphFile

_DATA = (".onnx_data", ".onnx.data")  # how names of files of external data end


@dataclasses.dataclass(frozen=True)
class Model:
    """Graphs, facts on each by its file, where each initializer's bytes lie, and what is odd."""

    graphs: tuple[GraphFile, ...]
    facts: dict[str, Any]
    places: dict[str, str]
    notes: tuple[str, ...]


def open_model(paths: list[Path]) -> Model:
    """Read the graphs; of their weights, only where they lie.

    Raises:
        CheckpointError: one is no ONNX model.
        NotInstalled: onnx is not installed.
    """
    need("inspect of an ONNX model", "onnx", "onnx")
    from lora_tools.onnx.initializers import GraphWeights, described, unused

    weights = GraphWeights(paths)
    facts = {graph.path.name: described(graph) for graph in weights.graphs}
    notes = [f"{name}: {said}" for name, said in weights.problems.items()]
    notes += [
        f"{new}: {name} has other bytes in another graph" for new, name in weights.renamed.items()
    ]
    for graph in weights.graphs:
        notes += [f"{graph.path.name}: {name} is used by no node" for name in unused(graph)]
    used = {place for fact in facts.values() for place in fact["data"]} | facts.keys()
    beside = sorted(p.name for p in paths[0].parent.iterdir() if p.name.endswith(_DATA))
    notes += [f"{name}: no graph uses it" for name in beside if name not in used]
    places = {name: weights.place(name).name for name in weights.specs}
    return Model(tuple(weights.graphs), facts, places, tuple(notes))
