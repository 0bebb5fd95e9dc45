"""Low-rank factors as optional inputs of a graph: a branch beside each layer that is adapted.

y = x·W becomes y = x·W + (x·A)·B, and the lookup of a row W[i] becomes W[i] + A[i]·B. A (in, r) and
B (r, out) are inputs of the graph and, by the same names, initializers of rank 0: a run that does
not give them adds zeros. The rank is free, and each module's is its own; A·B is never formed. A
tensor that an adapter brings whole is an input of no rows by default: the first rows of it and the
base's, one on the other, are what the graph computes with.

ONNX Runtime gives an active adapter's parameters to the inputs of their names (``LoraAdapter`` and
``RunOptions.add_active_adapter``, from version 1.20 on).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.onnxruntime import factor_names, saved_name
from lora_tools.onnx.linears import linears
from lora_tools.onnx.weights import weights_of

_MARK = "lora:"  # begins the names of a branch's nodes and values
_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


@dataclasses.dataclass(frozen=True)
class Branch:
    """A module that may get factors.

    Attributes:
        module: its name in the checkpoint, which its inputs are named after.
        weight: the initializer that it reads: another module's where the two are tied.
        sizes: (in, out) of its factors.
        lookup: whether rows of the weight are looked up (an embedding), else multiplied with.
    """

    module: str
    weight: str
    sizes: tuple[int, int]
    lookup: bool = False


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A tensor that an adapter may bring whole: its name in the checkpoint, and its shape."""

    tensor: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Site:
    """One use of a weight: the values that go in and come out."""

    weight: str
    lookup: bool
    input: str
    output: str


def add_branches(
    models: Mapping[str, onnx.ModelProto],
    branches: Sequence[Branch],
    replacements: Sequence[Replacement] = (),
    formed: bool = False,
) -> tuple[str, ...]:
    """Put branches, and tensors that may be replaced, into bare graphs by file name.

    Each graph gets the inputs of all of them, used or not: an adapter is one file for all graphs
    of a model, and ONNX Runtime refuses a parameter that no input is named after.

    Args:
        formed: some weights of the graphs are formed of several of the checkpoint's.

    Returns:
        Modules and tensors that are in no graph, since no output depends on them.

    Raises:
        UnsupportedAdapter: naming a module whose weight is used in another way, or in a weight that
            was formed of several.
    """
    used = {name for model in models.values() for name in weights_of(model)}
    weights = {branch.weight for branch in branches}
    reached: set[Branch] = set()
    for file, model in models.items():
        sites = list(_sites(model))
        _refuse_other_uses(model, sites, weights, file)
        found = {}
        for branch in branches:
            for site in sites:
                if (site.weight, site.lookup) == (branch.weight, branch.lookup):
                    found[site.output] = branch, site
                    reached.add(branch)
        _insert(model.graph, found)
        _select(model.graph, [each for each in replacements if each.tensor in weights_of(model)])
    missing = {branch.module: branch.weight for branch in branches if branch not in reached}
    missing |= {each.tensor: each.tensor for each in replacements if each.tensor not in used}
    for name, weight in missing.items():
        if formed or weight in used:
            raise UnsupportedAdapter(
                f"{name}: no layer of the graph reads {weight} as it is stored, so that no runtime "
                "adapter can act on it; merge the adapter: leave --runtime-adapters out"
            )
    for model in models.values():
        for branch in sorted(branches, key=lambda branch: branch.module):
            A, B = factor_names(branch.module, branch.lookup)
            rank = f"{branch.module}.r"  # of its own, since no two modules need have the same
            _declare(model.graph, A, (branch.sizes[0], rank))
            _declare(model.graph, B, (rank, branch.sizes[1]))
        for each in sorted(replacements, key=lambda each: each.tensor):
            name = saved_name(each.tensor)
            _declare(model.graph, name, (f"{name}.rows", *each.shape[1:]))
    return tuple(missing)


def remove_branches(model: onnx.ModelProto) -> None:
    """Make a graph what it was before ``add_branches``; one without branches stays as it is."""
    graph = model.graph
    optional = branch_inputs(graph)
    outputs, inputs = {}, {}
    for node in graph.node:
        if node.name.startswith(_MARK) and node.op_type == "Add":
            outputs[node.input[0]] = node.output[0]
        elif node.name.startswith(_MARK) and node.op_type == "Concat":
            inputs[node.name] = node.input[1]
    kept = [node for node in graph.node if not node.name.startswith(_MARK)]
    for node in kept:
        for at, value in enumerate(node.input):
            node.input[at] = inputs.get(value, value)
        for at, output in enumerate(node.output):
            node.output[at] = outputs.get(output, output)
    initializers = [
        value for value in graph.initializer
        if value.name not in optional and not value.name.startswith(_MARK)
    ]  # fmt: skip
    _replace(graph.input, [value for value in graph.input if value.name not in optional])
    _replace(graph.initializer, initializers)
    _replace(graph.node, kept)


def branch_inputs(graph: onnx.GraphProto) -> set[str]:
    """Names of the inputs that a run may leave out."""
    return {value.name for value in graph.input} & {value.name for value in graph.initializer}


def plain_graphs(paths: Sequence[Path]) -> list[bytes]:
    """Graphs without their branches; none where they have none."""
    plain = []
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        if branch_inputs(model.graph):
            remove_branches(model)
            plain.append(model.SerializeToString())
    return plain


def _sites(model: onnx.ModelProto) -> Iterator[_Site]:
    for layer in linears(model):
        yield _Site(layer.weight, False, layer.input, layer.output)
    shapes = weights_of(model)
    for node in model.graph.node:
        shape = shapes.get(node.input[0], ()) if node.op_type == "Gather" else ()
        if len(shape) == 2 and not any(a.name == "axis" and a.i for a in node.attribute):
            yield _Site(node.input[0], True, node.input[1], node.output[0])


def _refuse_other_uses(
    model: onnx.ModelProto, sites: Sequence[_Site], weights: set[str], file: str
) -> None:
    """A layer that the factors would not reach must not go unseen."""
    outputs = {site.output for site in sites}
    made = {weight: weight for weight in weights}
    for node in model.graph.node:
        for value in node.input:
            if value not in made or node.output[0] in outputs:
                continue
            if node.op_type != "Transpose":
                raise UnsupportedAdapter(
                    f"{file}: {node.op_type} uses {made[value]} besides a linear layer or an "
                    "embedding, where a runtime adapter cannot act; merge the adapter: leave "
                    "--runtime-adapters out"
                )
            made[node.output[0]] = made[value]


def _insert(graph: onnx.GraphProto, found: Mapping[str, tuple[Branch, _Site]]) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for at, output in enumerate(node.output):
            if output in found:
                node.output[at] = _MARK + output
                nodes += _branch(*found[output])
    _replace(graph.node, nodes)


def _branch(branch: Branch, site: _Site) -> list[onnx.NodeProto]:
    A, B = factor_names(branch.module, branch.lookup)
    low, change, y = f"{_MARK}{site.output}.low", f"{_MARK}{site.output}.change", site.output
    first = ("Gather", [A, site.input]) if site.lookup else ("MatMul", [site.input, A])
    return [
        onnx.helper.make_node(op, inputs, [output], name=f"{_MARK}{y}.{number}")
        for number, (op, inputs, output) in enumerate((
            (*first, low), ("MatMul", [low, B], change), ("Add", [_MARK + y, change], y)
        ))
    ]  # fmt: skip


def _select(graph: onnx.GraphProto, replacements: Sequence[Replacement]) -> None:
    """The first rows of what an adapter brings and the base's tensor, one on the other."""
    nodes: list[onnx.NodeProto] = []
    names = {each.tensor: f"{_MARK}{each.tensor}" for each in replacements}
    for node in graph.node:
        for at, value in enumerate(node.input):
            node.input[at] = names.get(value, value)
    for each in replacements:
        name = names[each.tensor]
        for bound, row in ((f"{name}.start", 0), (f"{name}.stop", each.shape[0])):
            graph.initializer.append(onnx.helper.make_tensor(bound, _INT64, [1], [row]))
        both, given = f"{name}.both", [saved_name(each.tensor), each.tensor]
        nodes += [
            onnx.helper.make_node("Concat", given, [both], name=name, axis=0),
            onnx.helper.make_node(
                "Slice", [both, f"{name}.start", f"{name}.stop"], [name], name=f"{name}.rows"
            ),
        ]
    _replace(graph.node, [*nodes, *graph.node])


def _declare(graph: onnx.GraphProto, name: str, shape: tuple[int | str, ...]) -> None:
    """An input that has a free size, and an initializer with none of it."""
    graph.input.append(onnx.helper.make_tensor_value_info(name, _FLOAT, shape))
    none = [size if isinstance(size, int) else 0 for size in shape]
    graph.initializer.append(onnx.TensorProto(name=name, dims=none, data_type=_FLOAT, raw_data=b""))


def _replace(values, kept) -> None:  # type: ignore[no-untyped-def]
    """The messages of a repeated field, which are dropped with it."""
    copies = [type(value).FromString(value.SerializeToString()) for value in kept]
    del values[:]
    values.extend(copies)
