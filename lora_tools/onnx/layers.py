"""Tracing a few layers of a stack of equal ones, and repeating them in the graph.

torch.export's time is linear in depth, and the layers of a model are the same code on other
weights. So a stack is cut to a few layers before tracing. In the graph the last of them must be the
ones before them, node for node, up to the names of weights, caches and what flows from layer to
layer; then the missing ones are copies. Where that does not hold, nothing is repeated and the whole
model is traced. A stack may repeat with a period: attention that slides in five layers of six.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_tools.onnx.initializers import rename

if TYPE_CHECKING:
    import onnx
    from torch import nn

_FREE = (1, 2)  # so many of the first layers may differ from the rest; what all share is in them
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.")


class NotRepeating(Exception):
    """The traced layers are not copies of each other: trace them all."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of layers cut short: ``prefix`` is its name in the model, ``kept`` of ``total`` are
    traced, and after the first ``free`` ones layer i is like layer i − ``period``."""

    prefix: str
    total: int
    free: int
    period: int

    @property
    def kept(self) -> int:
        return self.free + 2 * self.period


def shorten(model: nn.Module) -> list[Stack]:
    """Cut every stack of like layers to what shows how it goes on. Changes the model."""
    from torch import nn

    stacks: list[Stack] = []
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            prefix.startswith(f"{stack.prefix}.") for stack in stacks
        ):
            continue
        stack = _stack(prefix, module, getattr(model, "config", None))
        if stack is not None:
            stacks.append(stack)
    for stack in stacks:
        module = model.get_submodule(stack.prefix)
        assert isinstance(module, nn.ModuleList)
        del module[stack.kept :]
    return stacks


def _stack(prefix: str, layers: nn.ModuleList, config: Any) -> Stack | None:
    """How the layers repeat, with the fewest of them kept; None: they do not."""
    kinds = [_kind(layer) for layer in layers]
    lists = [
        value
        for value in getattr(config, "__dict__", {}).values()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    ]
    found = [
        Stack(prefix, len(layers), free, period)
        for free in _FREE
        if (period := _period(kinds, lists, free))
    ]
    return min(found, key=lambda stack: stack.kept, default=None)


def _period(kinds: list[dict[tuple[str, str], Any]], lists: list[Any], free: int) -> int:
    """The smallest p by which layers i and i − p are alike after so many of them; 0: none."""
    for period in range(1, (len(kinds) - free + 1) // 2):  # so that some are left out
        pairs = [(i, i - period) for i in range(free + period, len(kinds))]
        if all(_like(kinds, i, j) and all(v[i] == v[j] for v in lists) for i, j in pairs):
            return period
    return 0


def _kind(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, shapes and plain attributes of a layer and of the modules in it."""
    kind: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        kind[name, ""] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None):
                kind[name, key] = value
        for key, parameter in module.named_parameters(recurse=False):
            kind[name, key] = tuple(parameter.shape)
    return kind


def _like(kinds: list[dict[tuple[str, str], Any]], i: int, j: int) -> bool:
    """Whether two layers are alike but for attributes that are their own index."""
    one, other = kinds[i], kinds[j]
    return one.keys() == other.keys() and all(
        value == other[key] or (value == i and other[key] == j) for key, value in one.items()
    )


def repeat(model: onnx.ModelProto, stack: Stack, buffers: Mapping[str, bytes]) -> None:
    """Put the layers left out into a graph traced from the shortened model.

    Args:
        buffers: contents of the initializers that are not weights, to tell which are equal.

    Raises:
        NotRepeating: the traced layers are not alike; the graph is as it was.
    """
    _Repeater(model.graph, stack, buffers).run()


class _Repeater:
    def __init__(self, graph: onnx.GraphProto, stack: Stack, buffers: Mapping[str, bytes]) -> None:
        self.graph, self.stack, self._buffers = graph, stack, buffers
        self._scope = re.compile(rf"'inner\.{re.escape(stack.prefix)}\.(\d+)[.']")
        self.nodes: list[list[onnx.NodeProto]] = [[] for _ in range(stack.kept)]
        self.layer_of: dict[str, tuple[int, int, int]] = {}  # value → layer, node, output
        self._inputs = {value.name for value in graph.input}
        self.last = -1
        for at, node in enumerate(graph.node):
            layer = self._layer(node)
            if layer is None:
                continue
            if any(a.HasField("g") for a in node.attribute):
                raise NotRepeating("a layer with a subgraph")
            for slot, value in enumerate(node.output):
                self.layer_of[value] = (layer, len(self.nodes[layer]), slot)
            self.nodes[layer].append(node)
            self.last = at

    def _layer(self, node: onnx.NodeProto) -> int | None:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                match = self._scope.search(entry.value)
                return int(match[1]) if match else None
        return None

    def run(self) -> None:
        stack, first = self.stack, self.stack.free + self.stack.period
        for layer in range(first, stack.kept):
            self._compare(layer, layer - stack.period)
        handed = self._handed()
        self._refuse_other_uses(handed)
        new: list[onnx.NodeProto] = []
        current = self._value(stack.kept - 1, handed[stack.kept - 1])
        old = current
        for layer in range(stack.kept, stack.total):
            like = first + (layer - first) % stack.period
            before = self._value(like - 1, handed[like - 1])
            names = {before: current}
            new += self._copy(like, layer, names)
            current = names[self._value(like, handed[like])]
        after = list(self.graph.node[self.last + 1 :])
        del self.graph.node[self.last + 1 :]
        self.graph.node.extend(new)
        if any(value.name == old for value in self.graph.output):
            rename(self.graph.node, {old: f"inner_{old}", current: old})
        else:
            rename(after, {old: current})
        self.graph.node.extend(after)
        for values in (self.graph.input, self.graph.output):
            self._add_cache(values)

    def _value(self, layer: int, place: tuple[int, int]) -> str:
        return str(self.nodes[layer][place[0]].output[place[1]])

    def _compare(self, layer: int, other: int) -> None:
        """That two traced layers are copies of each other."""
        mine, theirs = self.nodes[layer], self.nodes[other]
        if not mine or len(mine) != len(theirs):
            raise NotRepeating(f"layer {layer} has {len(mine)} nodes, {other} has {len(theirs)}")
        for a, b in zip(mine, theirs, strict=True):
            same = (
                a.op_type == b.op_type
                and a.domain == b.domain
                and list(a.attribute) == list(b.attribute)
                and len(a.input) == len(b.input)
                and len(a.output) == len(b.output)
            )
            if not same or not all(
                self._alike(x, y, layer, other) for x, y in zip(a.input, b.input, strict=True)
            ):
                raise NotRepeating(
                    f"{a.op_type} of {list(a.input)} is not {b.op_type} of {list(b.input)}"
                )

    def _alike(self, mine: str, theirs: str, layer: int, other: int) -> bool:
        if mine == theirs:
            return self.layer_of.get(mine, (0,))[0] < self.stack.free  # what all layers share
        if mine in self.layer_of and theirs in self.layer_of:
            a, b = self.layer_of[mine], self.layer_of[theirs]
            if (a[0], b[0]) == (layer - 1, other - 1):  # what is handed on: see there
                return b[0] < self.stack.free or a[1:] == b[1:]
            return a[0] == layer and b[0] == other and a[1:] == b[1:]
        if mine in self._buffers and theirs in self._buffers:
            return self._buffers[mine] == self._buffers[theirs]
        return self._renamed(theirs, other, layer) == mine

    def _renamed(self, name: str, layer: int, to: int) -> str:
        """The name of another layer's weight or cache."""
        own = f"inner.{self.stack.prefix}.{layer}."
        if name.startswith(own):
            return f"inner.{self.stack.prefix}.{to}.{name.removeprefix(own)}"
        match = _CACHE.match(name)
        if match and int(match[2]) == layer:
            return f"{match[1]}.{to}.{name[match.end() :]}"
        return name

    def _handed(self) -> dict[int, tuple[int, int]]:
        """The one value that the next layer takes from each, but for what all layers share. The
        first layers may make it otherwise; there it is what stands where a copy takes its own."""
        stack, handed = self.stack, dict[int, tuple[int, int]]()
        for layer in range(stack.free + stack.period, stack.kept):
            other = layer - stack.period
            used = {
                (self.layer_of[mine][1:], self.layer_of[theirs][1:])
                for a, b in zip(self.nodes[layer], self.nodes[other], strict=True)
                for mine, theirs in zip(a.input, b.input, strict=True)
                if mine != theirs and self._before(mine, layer) and self._before(theirs, other)
            }
            if len(used) != 1:
                raise NotRepeating(f"layer {other - 1} hands {len(used)} values on")
            [(handed[layer - 1], place)] = used
            if handed.setdefault(other - 1, place) != place:
                raise NotRepeating(f"layer {other - 1} hands another value on than the others")
        handed[stack.kept - 1] = handed[stack.kept - 1 - stack.period]
        return handed

    def _before(self, value: str, layer: int) -> bool:
        return self.layer_of.get(value, (-2,))[0] == layer - 1

    def _refuse_other_uses(self, handed: Mapping[int, tuple[int, int]]) -> None:
        """Outside the layers only what the last one hands on is used, and it only after it."""
        last = self.stack.kept - 1
        for at, node in enumerate(self.graph.node):
            if self._layer(node) is not None:
                continue
            for value in node.input:
                place = self.layer_of.get(value)
                if place is None or place[0] < self.stack.free:
                    continue
                if place != (last, *handed[last]) or at < self.last:
                    raise NotRepeating(f"{node.name} uses {value} of layer {place[0]}")

    def _copy(self, like: int, layer: int, names: dict[str, str]) -> Iterator[onnx.NodeProto]:
        for node in self.nodes[like]:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.name = f"layer_{layer}_{node.name}"
            for i, value in enumerate(node.input):
                shared = value in self._buffers  # equal in all layers: the name is one layer's
                renamed = value if shared else self._renamed(value, like, layer)
                copy.input[i] = names.get(value, renamed)
            for i, value in enumerate(node.output):
                cached = self._renamed(value, like, layer)
                names[value] = cached if cached != value else f"layer_{layer}_{value}"
                copy.output[i] = names[value]
            for entry in copy.metadata_props:
                entry.value = self._scope.sub(
                    lambda m: m[0].replace(f".{m[1]}", f".{layer}"), entry.value
                )
            yield copy

    def _add_cache(self, values: Any) -> None:
        """Inputs or outputs of the caches of the layers put in."""
        like = [
            v for v in values if (m := _CACHE.match(v.name)) and int(m[2]) == self.stack.kept - 1
        ]
        for layer in range(self.stack.kept, self.stack.total):
            for value in like:
                copy = values.add()
                copy.CopyFrom(value)
                copy.name = self._renamed(value.name, self.stack.kept - 1, layer)
