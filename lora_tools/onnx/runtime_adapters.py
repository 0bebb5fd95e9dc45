"""Low-rank factors as optional inputs of a graph: a branch beside each layer that is adapted.

y = x·W becomes y = x·W + (x·A)·B, and the lookup of a row W[i] becomes W[i] + A[i]·B. A (in, r) and
B (r, out) are inputs of the graph and, by the same names, initializers of rank 0: a run that does
not give them adds zeros. The rank is free, and each module's is its own; A·B is never formed. A
vector that an adapter brings whole is an input of no elements by default: the first elements of it
and the base's, one after the other, are what the graph computes with. With a matrix that it brings
for a linear layer, of no outputs by default, it is the same for the outputs.

ONNX Runtime gives an active adapter's parameters to the inputs of their names (``LoraAdapter`` and
``RunOptions.add_active_adapter``, from version 1.20 on).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.onnxruntime import factor_names, saved_name
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
    """One use of a weight: the values that go in and come out, a Gemm's bias, and whether it is
    stored as (out, in)."""

    weight: str
    lookup: bool
    input: str
    output: str
    bias: str = ""
    out_first: bool = True


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
    matrices = [each for each in replacements if len(each.shape) > 1]
    weights = {branch.weight for branch in branches} | {each.tensor for each in matrices}
    stored: dict[str, bool] = {}  # matrices as (out, in)?
    reached: set[Branch] = set()
    for file, model in models.items():
        sites = list(_sites(model))
        _refuse_other_uses(model, sites, weights, file)
        found: dict[str, list[tuple[Branch | Replacement, _Site]]] = {}
        for branch in branches:
            for site in sites:
                if (site.weight, site.lookup) == (branch.weight, branch.lookup):
                    found.setdefault(site.output, []).append((branch, site))
                    reached.add(branch)
        for matrix in matrices:
            for site in sites:
                if site.weight == matrix.tensor:
                    if site.lookup:
                        raise _unreached(matrix.tensor, matrix.tensor)
                    found.setdefault(site.output, []).append((matrix, site))
                    stored[matrix.tensor] = site.out_first
        _insert(model.graph, found)
        vectors = [each for each in replacements if len(each.shape) == 1]
        _select(model.graph, [each for each in vectors if each.tensor in weights_of(model)])
    missing = {branch.module: branch.weight for branch in branches if branch not in reached}
    missing |= {
        each.tensor: each.tensor
        for each in replacements
        if each.tensor not in (stored if len(each.shape) > 1 else used)
    }
    for name, weight in missing.items():
        if formed or weight in used:
            raise _unreached(name, weight)
    for model in models.values():
        _declare_all(model.graph, branches, replacements, stored)
    return tuple(missing)


def _declare_all(
    graph: onnx.GraphProto,
    branches: Sequence[Branch],
    replacements: Sequence[Replacement],
    out_first: Mapping[str, bool],
) -> None:
    """The inputs of them all, in the order of their names.

    Args:
        out_first: of matrices that may be replaced, whether the graph has them as (out, in).
    """
    for branch in sorted(branches, key=lambda branch: branch.module):
        A, B = factor_names(branch.module, branch.lookup)
        rank = f"{branch.module}.r"  # of its own, since no two modules need have the same
        _declare(graph, A, (branch.sizes[0], rank))
        _declare(graph, B, (rank, branch.sizes[1]))
    for each in sorted(replacements, key=lambda each: each.tensor):
        name, shape = saved_name(each.tensor), list[int | str](each.shape)
        shape[0 if out_first.get(each.tensor, True) else 1] = f"{name}.outputs"
        _declare(graph, name, tuple(shape))


def remove_branches(model: onnx.ModelProto) -> None:
    """Make a graph what it was before ``add_branches``; one without branches stays as it is."""
    graph = model.graph
    optional = branch_inputs(graph)
    vectors: dict[str, str] = {}  # what an adapter may bring, or the base's → the base's
    for node in graph.node:
        if node.name.startswith(f"{_MARK}Concat:"):
            vectors[node.output[0]] = node.input[1]
        elif node.name.startswith(f"{_MARK}Slice:{_MARK}") and node.input[0] in vectors:
            vectors[node.output[0]] = vectors[node.input[0]]
    kept = [node for node in graph.node if not node.name.startswith(_MARK)]
    for node in kept:
        for at, value in enumerate(node.input):
            node.input[at] = vectors.get(value, value)
        for at, output in enumerate(node.output):
            node.output[at] = output.removeprefix(_MARK)
    initializers = [
        value
        for value in graph.initializer
        if value.name not in optional and not value.name.startswith(_MARK)
    ]
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


def _unreached(name: str, weight: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{name}: the graph does not use {weight} as it is stored, so a runtime adapter cannot "
        "change it; merge the adapter: leave --runtime-adapters out"
    )


def _sites(model: onnx.ModelProto) -> Iterator[_Site]:
    for layer in linears(model):
        yield _Site(layer.weight, False, layer.input, layer.output, layer.bias, layer.out_first)
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
                    f"{file}: {node.op_type} also uses {made[value]}, where a runtime adapter "
                    "cannot act; merge the adapter: leave --runtime-adapters out"
                )
            made[node.output[0]] = made[value]


def _insert(
    graph: onnx.GraphProto, found: Mapping[str, Sequence[tuple[Branch | Replacement, _Site]]]
) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for at, output in enumerate(node.output):
            if output not in found:
                continue
            node.output[at] = value = _MARK + output
            for number, (what, site) in enumerate(found[output], 1):
                last = number == len(found[output])
                result = output if last else f"{_MARK}{output}.{number}"
                if isinstance(what, Branch):
                    nodes += _branch(what, site, value, result)
                else:
                    nodes += _other_layer(graph, what, site, value, result)
                value = result
    _replace(graph.node, nodes)


def _branch(branch: Branch, site: _Site, base: str, result: str) -> list[onnx.NodeProto]:
    """base + the change."""
    A, B = factor_names(branch.module, branch.lookup)
    low, change = f"{_MARK}{site.output}.low", f"{_MARK}{site.output}.change"
    first = ("Gather", [A, site.input]) if site.lookup else ("MatMul", [site.input, A])
    return _nodes((*first, low), ("MatMul", [low, B], change), ("Add", [base, change], result))


def _other_layer(
    graph: onnx.GraphProto, matrix: Replacement, site: _Site, base: str, result: str
) -> list[onnx.NodeProto]:
    """The first outputs of the layer with the adapter's matrix and of the base's, in that order."""
    y = f"{_MARK}{site.output}"
    given, whole, both = saved_name(matrix.tensor), f"{y}.whole", f"{y}.both"
    outputs = matrix.shape[0 if site.out_first else 1]
    steps: list[tuple[Any, ...]] = []
    if site.out_first:
        steps.append(("Transpose", [given], f"{y}.turned", {"perm": [1, 0]}))
        given = f"{y}.turned"
    steps.append(("MatMul", [site.input, given], whole))
    if site.bias:  # of a Gemm, which has added it to the base's outputs
        count, bias = f"{y}.count", f"{y}.bias"
        steps += [
            ("Shape", [given], count, {"start": 1}),
            ("Slice", [site.bias, _number(graph, 0), count], bias),
            ("Add", [whole, bias], f"{y}.sum"),
        ]
        whole = f"{y}.sum"
    bounds = [_number(graph, n) for n in (0, outputs, -1)]
    return _nodes(
        *steps, ("Concat", [whole, base], both, {"axis": -1}), ("Slice", [both, *bounds], result)
    )


def _select(graph: onnx.GraphProto, vectors: Sequence[Replacement]) -> None:
    """The first elements of what an adapter brings and the base's vector, one after the other."""
    nodes: list[onnx.NodeProto] = []
    names = {each.tensor: f"{_MARK}{each.tensor}" for each in vectors}
    for node in graph.node:
        for at, value in enumerate(node.input):
            node.input[at] = names.get(value, value)
    for each in vectors:
        name, both = names[each.tensor], f"{_MARK}{each.tensor}.both"
        bounds = [_number(graph, n) for n in (0, each.shape[0])]
        nodes += _nodes(
            ("Concat", [saved_name(each.tensor), each.tensor], both, {"axis": 0}),
            ("Slice", [both, *bounds], name),
        )
    _replace(graph.node, [*nodes, *graph.node])


def _nodes(*steps: Any) -> list[onnx.NodeProto]:
    """(operator, inputs, output[, attributes]) → nodes, named after what they make."""
    return [
        onnx.helper.make_node(op, inputs, [output], name=f"{_MARK}{op}:{output}", **dict(*rest))
        for op, inputs, output, *rest in steps
    ]


def _number(graph: onnx.GraphProto, value: int) -> str:
    """A constant of one element, made where it is not there yet."""
    name = f"{_MARK}{value}"
    if all(initializer.name != name for initializer in graph.initializer):
        graph.initializer.append(onnx.helper.make_tensor(name, _INT64, [1], [value]))
    return name


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
