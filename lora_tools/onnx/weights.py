"""Where a graph's weights lie: in the checkpoint's own files, or in one file made for them.

ONNX external data is a file beside the model, an offset and a length, which is just what a
safetensors header says of a tensor. A weight that is stored in another dtype than that in which the
graph computes with it gets a Cast node, named after it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.wrapped_names import Renamed
from lora_tools.onnx.initializers import rename
from lora_tools.records import TensorSpec

BUNDLE = "model.onnx_data"
_ALIGNMENT = 4096  # the external data of onnx: pages, so that a runtime can map it
_TYPES = {
    "F32": onnx.TensorProto.FLOAT,
    "F16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "F64": onnx.TensorProto.DOUBLE,
}
_BYTES = {"U8": onnx.TensorProto.UINT8}  # of quantized weights, which no Cast makes numbers of
_CAST = "cast:"
_CASTED = {
    onnx.TensorProto.FLOAT: ".float32",
    onnx.TensorProto.FLOAT16: ".float16",
    onnx.TensorProto.BFLOAT16: ".bfloat16",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor's bytes: a file beside the graph, where they begin there, and what they are."""

    file: str
    offset: int
    spec: TensorSpec


def weights_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the initializers whose data is not in the graph."""
    return {
        i.name: tuple(i.dims)
        for i in model.graph.initializer
        if not i.HasField("raw_data")
        and (i.external_data or i.data_type in _CASTED)
        and not (i.float_data or i.int32_data)
    }


def places(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Place]:
    """Where the checkpoint's own files hold these tensors.

    Raises:
        CheckpointError: they are pickles.
    """
    found: dict[str, Place] = {}
    wanted = set(names)
    for file in checkpoint.files:
        stored, own = (file.file, file.own) if isinstance(file, Renamed) else (file, {})
        if not isinstance(stored, SafetensorsFile):
            raise CheckpointError(
                f"{file.path}: a pickle, which a graph cannot refer to; use --weights bundled"
            )
        for name in wanted & file.specs.keys():
            start = stored.extent(own.get(name, name))[0]
            found[name] = Place(file.path.name, start, file.specs[name])
    return found


def bundle(
    path: Path, specs: Iterable[TensorSpec], read: Callable[[str], Iterable[memoryview]]
) -> dict[str, Place]:
    """Write tensors one after the other into a new file, each at a page's start; sync it.

    Args:
        read: yields a tensor's bytes in pieces.
    """
    made: dict[str, Place] = {}
    with path.open("xb") as file:
        for spec in specs:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            made[spec.name] = Place(path.name, file.tell(), spec)
            for piece in read(spec.name):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return made


def computed_types(models: Iterable[onnx.ModelProto]) -> dict[str, str]:
    """The dtype that bare graphs compute with each weight in."""
    names = {kind: name for name, kind in _TYPES.items()}
    return {
        i.name: names[i.data_type]
        for model in models
        for i in model.graph.initializer
        if i.data_type in names
    }


def cast(piece: memoryview, stored: str, wanted: str) -> memoryview:
    """The bytes of numbers in another dtype, rounded to the nearest, as a Cast node does it."""
    if stored == wanted:
        return piece
    with np.errstate(over="ignore"):  # an inf, which the check of the outputs sees
        made = np.frombuffer(piece, _numpy(stored)).astype(_numpy(wanted))
    return made.view(np.uint8).data


def _numpy(dtype: str) -> np.dtype[Any]:
    import onnx_ir as ir  # 0.2 s, which most exports need not

    return ir.DataType(_TYPES[dtype]).numpy()


def attach(model: onnx.ModelProto, where: Mapping[str, Place]) -> None:
    """Point every weight of a bare graph to its bytes, with a Cast where they are numbers in
    another dtype than it is computed with."""
    casts: dict[str, str] = {}
    nodes = []
    for initializer in model.graph.initializer:
        place = where.get(initializer.name)
        if place is None:
            continue
        computed, stored = initializer.data_type, (_TYPES | _BYTES)[place.spec.dtype]
        initializer.data_type = stored
        initializer.data_location = onnx.TensorProto.EXTERNAL
        del initializer.external_data[:]
        for key, value in (
            ("location", place.file),
            ("offset", place.offset),
            ("length", place.spec.nbytes),
        ):
            initializer.external_data.add(key=key, value=str(value))
        if stored != computed and place.spec.dtype not in _BYTES:
            name = initializer.name
            casts[name] = name + _CASTED[computed]
            nodes.append(
                onnx.helper.make_node("Cast", [name], [casts[name]], name=_CAST + name, to=computed)
            )
    rename(model.graph.node, casts)
    nodes.sort(key=lambda node: str(node.input[0]))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def detach(model: onnx.ModelProto) -> None:
    """Make a graph bare again: the reverse of ``attach``."""
    casts, computed = {}, {}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.name.startswith(_CAST):
            casts[node.output[0]] = node.input[0]
            computed[node.input[0]] = node.attribute[0].i
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    rename(model.graph.node, casts)
    for initializer in model.graph.initializer:
        if initializer.external_data:
            del initializer.external_data[:]
            initializer.ClearField("data_location")
            initializer.data_type = computed.get(initializer.name, initializer.data_type)


def check_shapes(
    model: onnx.ModelProto,
    stored: Mapping[str, TensorSpec],
    source: str,
    formed: Collection[str] = (),
) -> None:
    """That a graph's weights are the checkpoint's tensors, but for those formed of several.

    Raises:
        MismatchError: one is not, or is stored in a dtype that no graph computes with.
    """
    for name, shape in weights_of(model).items():
        if name in formed:
            continue
        spec = stored.get(name)
        if spec is None:
            raise MismatchError(f"{name}: a weight of {source} that the checkpoint does not have")
        if spec.shape != shape:
            raise MismatchError(
                f"{name}: {list(shape)} in {source}, the checkpoint's is {list(spec.shape)}"
            )
        if spec.dtype not in _TYPES:
            raise MismatchError(
                f"{name}: stored as {spec.dtype}, which a graph cannot compute with"
            )
