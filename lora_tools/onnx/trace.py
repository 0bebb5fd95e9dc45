"""From a model without weights to a graph whose weights are names: torch.export, then onnxscript.

What comes out is *bare*: initializers that are weights have a checkpoint's name, the type in which
they are computed with, a shape, and no data. Nothing of this machine stays in it, such as stack
traces or paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from lora_tools.errors import CheckpointError
from lora_tools.formats.alignment import align
from lora_tools.onnx.foreign import INNER, module_of, reason, run_by, silence, watched
from lora_tools.onnx.fuse.attention import Unfused, one_operator, translations
from lora_tools.onnx.fuse.found import OPSET
from lora_tools.onnx.fuse.passes import fuse as fuse_graph
from lora_tools.onnx.layers import NotRepeating, Stack, repeat, shorten
from lora_tools.onnx.model import weightless, with_memory
from lora_tools.onnx.parts import GraphPart, parts
from lora_tools.onnx.precision import FLOAT32
from lora_tools.onnx.tasks import Task
from lora_tools.records import TensorSpec

_TRACED = "cannot be exported by torch"
_HALF = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


@dataclasses.dataclass
class Graph:
    """A bare graph: weights are initializers named after the checkpoint's tensors, without data.

    Attributes:
        file: its name in the output.
        model: the graph.
        converted: weights that transformers forms from several tensors of the checkpoint (fused
            experts), under the model's own names.
        unfused: why attention is not one operator, where it was to be.
    """

    file: str
    model: onnx.ModelProto
    converted: tuple[str, ...]
    unfused: str = ""


def trace(
    folder: Path,
    stored: Mapping[str, TensorSpec],
    task: Task,
    *,
    cache: bool = True,
    opset: int = OPSET,
    trust_remote_code: bool = False,
    whole: bool = False,
    fuse: bool = False,
    dtype: str = FLOAT32,
) -> list[Graph]:
    """The bare graphs of a checkpoint for a task.

    Args:
        folder: the checkpoint's; only ``config.json`` (and code, where it is trusted) is read.
        stored: the checkpoint's tensors by name.
        whole: trace every layer, even where they repeat.
        fuse: attention, rotary embeddings and norms as one operator each (opset 23).
        dtype: what it computes in, and takes and gives.

    Raises:
        CheckpointError: transformers does not know the architecture, or an operator of it does not
            export; the sentence names it.
    """
    unfused = ""
    while True:
        model = weightless(folder, task, trust_remote_code, dtype)
        try:
            return list(_trace(model, stored, task, cache, opset, whole, fuse, unfused, dtype))
        except NotRepeating:
            whole = True
        except Unfused as error:
            unfused = str(error)


def _trace(
    model: torch.nn.Module,
    stored: Mapping[str, TensorSpec],
    task: Task,
    cache: bool,
    opset: int,
    whole: bool,
    fuse: bool,
    unfused: str,
    dtype: str,
) -> Iterator[Graph]:
    names = _Names(model, stored)
    stacks = [] if whole else shorten(model)
    with_memory(model)
    model.tie_weights()  # type: ignore[operator]
    kept = {stack.total: stack.kept for stack in stacks}
    with run_by(model, _TRACED):
        cut = list(parts(model, task, cache, kept))
    for each in cut:
        part = dataclasses.replace(each, args=_in(dtype, each.args))
        attention = one_operator(model) if fuse and not unfused else contextlib.nullcontext()
        with attention:
            made = _export(part, stacks, names, opset, fuse)
        yield dataclasses.replace(made, unfused=unfused)


def _in(dtype: str, args: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Example inputs, with the numbers among them in that dtype."""
    kind = getattr(torch, dtype)
    return {n: t.to(kind) if t.is_floating_point() else t for n, t in args.items()}


class _Names:
    """The model's names for its weights → the checkpoint's."""

    def __init__(self, model: torch.nn.Module, stored: Mapping[str, TensorSpec]) -> None:
        state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.key: dict[str, str] = {}
        self.shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.half = {name: _HALF[t.dtype] for name, t in state.items() if t.dtype in _HALF}
        mapping, _ = align(list(state), list(stored))
        first: dict[int, str] = {}  # tied weights are stored under one name, whichever that is
        for name, tensor in state.items():
            key = mapping[name]
            if key in stored and stored[key].shape == tuple(tensor.shape):
                self.key[name] = key
                first.setdefault(id(tensor), key)
        for name, tensor in state.items():
            if name not in self.key and id(tensor) in first:
                self.key[name] = first[id(tensor)]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.converted = {name for name in parameters if name not in self.key}

    def has(self, initializer: str) -> bool:
        """Whether an initializer of a traced graph is a weight."""
        name = initializer.removeprefix(INNER)
        return name in self.key or name in self.converted


def _export(part: GraphPart, stacks: list[Stack], names: _Names, opset: int, fuse: bool) -> Graph:
    dynamic = {
        name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in part.axes.items()
    }
    program: torch.export.ExportedProgram | None = None
    with torch.no_grad(), silence(), watched(part.module) as running:
        try:
            program = torch.export.export(
                part.module,
                tuple(value.clone() for value in part.args.values()),
                dynamic_shapes=(tuple(dynamic[name] for name in part.args),),
                strict=False,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=list(part.args),
                output_names=list(part.outputs),
                custom_translation_table=translations() if fuse else None,
            )
        except Unfused:
            raise
        except Exception as error:  # whatever the model's own code, torch or onnxscript raises
            module = module_of(error, program) if program else running[-1] if running else ""
            raise CheckpointError(f"{part.file}: {reason(error, module, _TRACED)}") from error
    assert exported is not None
    model, buffers = _without_weights(exported.model, names, part.axes, fuse)
    for stack in stacks:
        scope = f"'{INNER}{stack.prefix}.0"
        if any(scope in e.value for node in model.graph.node for e in node.metadata_props):
            repeat(model, stack, buffers)
    _name_dimensions(model.graph, part)
    _strip(model)
    return Graph(part.file, model, _name_weights(model.graph, names))


def _without_weights(
    model: Any, names: _Names, axes: Mapping[str, Mapping[int, str]], fuse: bool
) -> tuple[onnx.ModelProto, dict[str, bytes]]:
    """The graph with weights by name only, and the contents of its other initializers."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    _measure_alike(model.graph, axes)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    if fuse:
        fuse_graph(model, [name for name in model.graph.initializers if names.has(name)])
    buffers: dict[str, bytes] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if names.has(name):
            value.const_value = ir.ExternalTensor(
                "bare", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=""
            )
        else:
            buffers[name] = tensor.tobytes()
    return ir.to_proto(model), buffers


def _measure_alike(graph: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Take a dimension that several inputs share from the first of them, so that layers do not
    differ in whose past they measure."""
    inputs = {value.name: value for value in graph.inputs}
    first: dict[str, tuple[Any, int]] = {}
    for name, named in axes.items():
        for at, axis in named.items():
            first.setdefault(axis, (inputs[name], at))
    for node in graph:
        start, end = node.attributes.get("start"), node.attributes.get("end")
        if node.op_type != "Shape" or start is None or end is None:
            continue
        measured = axes.get(node.inputs[0].name, {}).get(start.as_int())
        if measured is not None and end.as_int() == start.as_int() + 1:
            value, at = first[measured]
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", at)
            node.attributes["end"] = ir.AttrInt64("end", at + 1)


def _name_weights(graph: onnx.GraphProto, names: _Names) -> tuple[str, ...]:
    """Give weights the checkpoint's names, tied ones the same. Returns the converted ones.

    Weights of layers that were put in by copying have no initializer yet.
    """
    like = {i.name.removeprefix(INNER): i for i in graph.initializer}
    used: dict[str, str] = {}  # the model's name → the checkpoint's
    for node in graph.node:
        for i, value in enumerate(node.input):
            plain = value.removeprefix(INNER)
            if value.startswith(INNER) and (plain in names.key or plain in names.converted):
                used[plain] = names.key.get(plain, plain)
                node.input[i] = used[plain]
    others = [i for n, i in like.items() if n not in names.key and n not in names.converted]
    float32 = onnx.TensorProto.FLOAT
    made = {
        key: onnx.TensorProto(
            name=key, dims=names.shape[plain], data_type=names.half.get(plain, float32)
        )
        for plain, key in used.items()
    }
    del graph.initializer[:]
    graph.initializer.extend([*others, *(made[key] for key in sorted(made))])
    return tuple(sorted(plain for plain in used if plain in names.converted))


def _name_dimensions(graph: onnx.GraphProto, part: GraphPart) -> None:
    """torch's symbols (s53) → the names of the axes (sequence), in the outputs' sums as well."""
    symbols: dict[str, str] = {}
    for value in graph.input:
        for at, name in part.axes.get(_like_traced(value.name, part), {}).items():
            symbols[value.type.tensor_type.shape.dim[at].dim_param] = name
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), dim.dim_param)


def _like_traced(name: str, part: GraphPart) -> str:
    """An input that was traced; that of a repeated layer is like the first layer's."""
    return name if name in part.args else re.sub(r"\.\d+\.", ".0.", name, count=1)


def _strip(model: onnx.ModelProto) -> None:
    """Leave out what only this run knows: stack traces, paths, torch's symbols of inner values."""
    graph = model.graph
    del graph.value_info[:]
    del model.metadata_props[:]
    del graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    model.producer_name, model.producer_version = "loratools", ""
    graph.name = "main"
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
