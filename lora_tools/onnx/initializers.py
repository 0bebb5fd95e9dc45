"""The weights of ONNX graphs, read as those of a checkpoint: by name, lazily, wherever they lie.

A graph is input like any other: its external data may not lead out of its folder, and no tensor may
promise more than its file holds. What is not so is told by name, and not read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import onnx
from onnx import numpy_helper

from lora_tools.errors import CheckpointError, TensorNotFound
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.mapped import MappedFile
from lora_tools.formats.regular_files import MOST_OF_GRAPH, open_file, read_file
from lora_tools.formats.tensors import of_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "F64",
    onnx.TensorProto.INT8: "I8",
    onnx.TensorProto.INT16: "I16",
    onnx.TensorProto.INT32: "I32",
    onnx.TensorProto.INT64: "I64",
    onnx.TensorProto.UINT8: "U8",
    onnx.TensorProto.UINT16: "U16",
    onnx.TensorProto.UINT32: "U32",
    onnx.TensorProto.UINT64: "U64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    onnx.TensorProto.FLOAT8E5M2: "F8_E5M2",
    onnx.TensorProto.FLOAT8E4M3FNUZ: "F8_E4M3FNUZ",
    onnx.TensorProto.FLOAT8E5M2FNUZ: "F8_E5M2FNUZ",
}
_MOST_DIMS = 64


class GraphFile:
    """One graph with the face of a file of tensors.

    Attributes:
        path: of the graph.
        model: without external data.
        specs: its initializers, those of inner graphs too, that can be read.
        places: of each the file with its bytes, which is the graph itself where they are inline.
        problems: what keeps an initializer from being read, by its name.
    """

    def __init__(self, path: Path, files: dict[Path, MappedFile | None]) -> None:
        self.path, self.header = path, b""
        self.model = load(path)
        self.metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        self.specs: dict[str, TensorSpec] = {}
        self.places: dict[str, Path] = {}
        self.problems: dict[str, str] = {}
        self._files = files
        self._extent: dict[str, tuple[Path, int, int]] = {}
        self._inline: dict[str, bytearray] = {}
        for graph in graphs_in(self.model.graph):
            for tensor in graph.initializer:
                self._try(tensor)

    def _try(self, tensor: onnx.TensorProto) -> None:
        try:
            self._add(tensor)
        except CheckpointError as error:
            self.problems[tensor.name] = str(error)

    def _add(self, tensor: onnx.TensorProto) -> None:
        kind = (
            onnx.TensorProto.DataType.Name(tensor.data_type)
            if tensor.data_type in (onnx.TensorProto.DataType.values())
            else f"type {tensor.data_type}"
        )
        if tensor.data_type not in _DTYPES:
            raise CheckpointError(f"{kind}, which cannot be read")
        dims = tuple(tensor.dims)
        if len(dims) > _MOST_DIMS or any(n < 0 for n in dims):
            raise CheckpointError(f"its shape is {list(dims)[:8]}")
        if tensor.name in self.specs:
            raise CheckpointError("is there twice")
        spec = TensorSpec(tensor.name, _DTYPES[tensor.data_type], dims)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            self._extent[spec.name] = self._outside(tensor, spec)
            self.places[spec.name] = self._extent[spec.name][0]
        else:
            self._inline[spec.name] = _inside(tensor, spec)
            self.places[spec.name] = self.path
        self.specs[spec.name] = spec

    def _outside(self, tensor: onnx.TensorProto, spec: TensorSpec) -> tuple[Path, int, int]:
        said = {entry.key: entry.value for entry in tensor.external_data}
        where = PurePosixPath(said.get("location", ""))
        if not where.parts or where.is_absolute() or ".." in where.parts or "\\" in str(where):
            raise CheckpointError(f"its data is in {str(where)!r}, outside the folder")
        path = self.path.parent / where
        file = self._mapped(path)
        try:
            begin = int(said.get("offset", 0))
            length = int(said.get("length", file.size - begin))
        except ValueError:
            raise CheckpointError(f"its place in {where} is not a number") from None
        if length != spec.nbytes:
            raise CheckpointError(f"{length} bytes in {where} instead of {spec.nbytes}")
        if begin < 0 or begin + length > file.size:
            raise CheckpointError(
                f"bytes {begin} to {begin + length} of {where}, which has {file.size}"
            )
        return path, begin, begin + length

    def _mapped(self, path: Path) -> MappedFile:
        if path not in self._files:
            try:
                with open_file(path) as opened:
                    self._files[path] = MappedFile(opened, path)
            except (OSError, ValueError):  # a ValueError: it is empty
                self._files[path] = None
        file = self._files[path]
        if file is None:
            raise CheckpointError(f"its data is in {path.name}, which is missing or empty")
        return file

    def same_place(self, name: str, other: GraphFile) -> bool:
        """Whether an initializer's bytes are those of another graph's of that name."""
        mine, theirs = self._extent.get(name), other._extent.get(name)
        return mine is not None and mine == theirs and self.specs[name] == other.specs[name]

    def drop(self, name: str) -> None:
        """Leave an initializer out."""
        del self.specs[name]

    def rename(self, name: str, new: str) -> None:
        """Give an initializer another name here."""
        spec = self.specs.pop(name)
        self.specs[new] = TensorSpec(new, spec.dtype, spec.shape)
        self.places[new] = self.places[name]
        for where in (self._extent, self._inline):
            if name in where:
                where[new] = where.pop(name)  # type: ignore[assignment]

    def raw(self, name: str) -> memoryview:
        """The initializer's bytes."""
        if name in self._inline:
            return memoryview(self._inline[name])
        try:
            path, begin, end = self._extent[name]
        except KeyError:
            raise TensorNotFound(f"{self.path}: no initializer {name!r}") from None
        return self._mapped(path).view[begin:end]

    def tensor(self, name: str) -> torch.Tensor:
        """The initializer. Never write to it."""
        return of_bytes(self.raw(name), self.specs[name])

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of its bytes [start, stop) back to the system."""
        if name in self._extent:
            path, begin, end = self._extent[name]
            self._mapped(path).release(begin + start, end if stop is None else begin + stop)


class GraphWeights(Checkpoint):
    """The initializers of one or several graphs as one checkpoint; those that graphs share count
    once.

    Attributes:
        graphs: the files.
        renamed: initializers whose name another graph has for other bytes, and that name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        files: dict[Path, MappedFile | None] = {}
        self.graphs = [GraphFile(path, files) for path in paths]
        self.renamed: dict[str, str] = {}
        first: dict[str, GraphFile] = {}
        for graph in self.graphs:
            for name in list(graph.specs):
                if name not in first:
                    first[name] = graph
                elif graph.same_place(name, first[name]):
                    graph.drop(name)
                else:
                    new = f"{name} ({graph.path.name})"
                    self.renamed[new] = name
                    graph.rename(name, new)
        super().__init__(paths[0].parent, self.graphs, False, None)

    def place(self, name: str) -> Path:
        """The file with an initializer's bytes."""
        file = self._file(name)
        assert isinstance(file, GraphFile)
        return file.places[name]

    @property
    def problems(self) -> dict[str, str]:
        """What keeps initializers from being read, by name."""
        return {name: said for graph in self.graphs for name, said in graph.problems.items()}


def load(path: Path) -> onnx.ModelProto:
    """A graph without its external data. Raises CheckpointError, also where a name is no text."""
    try:
        model = onnx.load_model_from_string(read_file(path, most=MOST_OF_GRAPH))
        odd = _no_text(model)
    except CheckpointError:
        raise
    except Exception as error:  # protobuf's DecodeError is Exception's own child
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not an ONNX model ({text:.200})") from None
    if not (model.HasField("graph") and model.graph.output):
        raise CheckpointError(f"{path}: not an ONNX model (it has no graph with an output)")
    if odd is not None:
        raise CheckpointError(f"{path}: {odd[:60]!r} in it is not UTF-8 text")
    return model


def _no_text(message: Any) -> bytes | None:
    """A string of a list that is not UTF-8, which protobuf gives as bytes, or None where all are;
    of one that stands alone it raises UnicodeDecodeError."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_MESSAGE, field.TYPE_STRING):
            continue
        for each in value if field.is_repeated else (value,):
            odd = _no_text(each) if field.type == field.TYPE_MESSAGE else each
            if isinstance(odd, bytes):
                return odd
    return None


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes (If, Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for each in (*inner, *attribute.graphs):
                yield from graphs_in(each)


def rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Give values that nodes take or make other names."""
    for node in nodes:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = names.get(value, value)


def _inside(tensor: onnx.TensorProto, spec: TensorSpec) -> bytearray:
    if tensor.HasField("raw_data"):
        data = tensor.raw_data
    else:
        try:
            data = numpy_helper.to_array(tensor).tobytes()
        except Exception as error:  # whatever a proto that lies makes of numpy
            raise CheckpointError(f"cannot be read ({error!s:.100})") from None
    if len(data) != spec.nbytes:
        raise CheckpointError(f"{len(data)} bytes in the graph instead of {spec.nbytes}")
    return bytearray(data)


def described(graph: GraphFile) -> dict[str, Any]:
    """What a graph says of itself, in plain types."""
    model = graph.model
    nodes = [node for each in graphs_in(model.graph) for node in each.node]
    kinds = Counter(f"{n.domain}.{n.op_type}" if _custom(n.domain) else n.op_type for n in nodes)
    sizes: Counter[str] = Counter()
    for name, spec in graph.specs.items():
        sizes[graph.places[name].name] += spec.nbytes
    return {
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "ir_version": model.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "nodes": len(nodes),
        "operators": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        "custom_domains": sorted({n.domain for n in nodes if _custom(n.domain)}),
        "initializers": len(graph.specs) + len(graph.problems),
        "data": dict(sorted(sizes.items())),
    }


def unused(graph: GraphFile) -> list[str]:
    """Initializers that no node takes and no output is."""
    taken = {value.name for value in graph.model.graph.output}
    for each in graphs_in(graph.model.graph):
        taken.update(name for node in each.node for name in node.input)
        taken.update(value.name for value in each.output)
    return [name for name in graph.specs if name.removesuffix(f" ({graph.path.name})") not in taken]


def _custom(domain: str) -> bool:
    return domain not in ("", "ai.onnx")


def _value(value: onnx.ValueInfoProto) -> str:
    """``input_ids: INT64 [batch, sequence]``."""
    kind = value.type.tensor_type
    known = kind.elem_type in onnx.TensorProto.DataType.values() and kind.elem_type
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type) if known else "?"
    dims = (dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
    return f"{value.name}: {dtype} [{', '.join(dims)}]"


def large(spec: TensorSpec) -> bool:
    """Whether an initializer is a weight, going by its size and dtype, and not a constant of the
    graph's own."""
    return math.prod(spec.shape) >= 1024 and spec.dtype not in ("BOOL", "I32", "I64")
