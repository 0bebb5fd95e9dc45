"""The one table of layer kinds, and the kinds that are more than one product.

``layout`` says what a kind is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UnsupportedAdapter, UsageError
from lora_tools.linalg.layout import Block, Layout, Region, Shape, clip

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.layout import Product

__all__ = ["LAYOUTS", "Block", "Layout", "Region", "Shape", "clip", "named", "of_form"]


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
    """Conv1d, 2d and 3d as PEFT and LoCon store them: lora_A is a convolution with the layer's
    kernel (r, in, k…), lora_B one of kernel 1 (out, r / groups, 1…). On the weight (out,
    in / groups, k…) as (out, in / groups · k…) that is a product for each group.

    PEFT's lora_A reads all input channels whatever the groups are; only where each group's rows
    read their own channels alone (as ``factors`` writes them) is it a change of the weight.
    """

    groups: int = 1

    def suits(self, weight: Shape) -> bool:
        """By the number of dimensions; the groups must divide the outputs."""
        return 3 <= len(weight) <= 5 and weight[0] % self.groups == 0

    def regions(self, weight: Shape) -> tuple[Region, ...]:
        """One for each group: its output channels."""
        rows, cols = self.matrix(weight)
        size = rows // self.groups
        return tuple(Region(i * size, 0, size, cols) for i in range(self.groups))

    def fits(self, weight: Shape, a: Shape, b: Shape) -> Layout | None:
        """By the kernel and the channels, which tell the groups."""
        if not 3 <= len(weight) == len(a) == len(b) or a[1] % weight[1]:
            return None
        groups = a[1] // weight[1]
        kernels = a[2:] == weight[2:] and set(b[2:]) == {1}
        if not (kernels and groups and b[0] == weight[0] and a[0] == groups * b[1]):
            return None
        return dataclasses.replace(self, groups=groups) if b[0] % groups == 0 else None

    def of_factors(self, a: Shape, b: Shape) -> Layout:
        """The groups."""
        return self.having(groups=a[0] // b[1])

    def shapes(self, weight: Shape, r: int) -> tuple[Shape, Shape]:
        """lora_A (groups · r, in, k…), lora_B (out, r, 1…)."""
        kernel = weight[2:]
        a = (self.groups * r, self.groups * weight[1], *kernel)
        return a, (weight[0], r, *(1 for _ in kernel))

    def r(self, ranks: Sequence[int]) -> int:
        """Each group takes its share of it."""
        return max(ranks) * self.groups

    def split(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> list[Product]:
        """Each group's (out / groups, r) and (r, in · k…), over all input channels."""
        A, B = lora_A.flatten(1), lora_B.flatten(1)
        groups = A.shape[0] // B.shape[1]
        return list(zip(B.chunk(groups), A.chunk(groups), strict=True))

    def join(self, parts: Sequence[Product], a: Shape, b: Shape) -> Product:
        """Stacked by groups, the kernel back in place."""
        import torch

        A, B = torch.cat([A for _, A in parts]), torch.cat([B for B, _ in parts])
        return A.reshape(-1, *a[1:]), B.reshape(b[0], -1, *b[2:])

    def blocks(self, lora_A: torch.Tensor, lora_B: torch.Tensor, weight: Shape) -> list[Block]:
        """Each group's own channels. Raises UnsupportedAdapter where a group reads others."""
        blocks = []
        for i, (at, (B, A)) in enumerate(
            zip(self.regions(weight), self.split(lora_A, lora_B), strict=True)
        ):
            own = A[:, i * at.cols : (i + 1) * at.cols]
            if self.groups > 1 and own.count_nonzero() != A.count_nonzero():
                raise UnsupportedAdapter(
                    f"each of its {self.groups} groups has its own input channels, but the "
                    "adapter's lora_A reads all of them, so it is not a change of the weight "
                    "(PEFT does not merge it either)"
                )
            blocks.append(Block(at.row, 0, B, own))
        return blocks

    def factors(self, products: Sequence[Product], weight: Shape) -> Product:
        """As PEFT loads them: zeros on the channels of other groups."""
        from torch.nn.functional import pad

        wide = []
        for i, (left, right) in enumerate(products):
            cols = right.shape[1]
            wide.append((left, pad(right, (i * cols, (self.groups - 1 - i) * cols))))
        return super().factors(wide, weight)


@dataclasses.dataclass(frozen=True)
class ReshapedConv(Layout):
    """Convolutions as loralib 0.1.2 stores them: lora_B @ lora_A is the weight's elements in order.
    lora_A (r·k, in·k), lora_B (out / groups · k, r·k) for a Conv2d of kernel (k, k).

    loralib does the same for Conv1d and Conv3d, where the elements do not come out; here lora_A is
    the same always, with k the kernel's last size, and lora_B is (out / groups · the other sizes,
    r·k). For k = 1 and for Conv2d that is loralib's.
    """

    groups: int = 1

    def matrix(self, weight: Shape) -> tuple[int, int]:
        """(out / groups · the other sizes, in · k)."""
        rows = weight[0] // self.groups * math.prod(weight[2:-1])
        return rows, weight[1] * self.groups * weight[-1]

    def fits(self, weight: Shape, a: Shape, b: Shape) -> Layout | None:
        """By the channels, which tell the groups."""
        if len(weight) < 3 or not len(a) == len(b) == 2 or a[0] != b[1]:
            return None
        groups, rest = divmod(a[1], weight[1] * weight[-1])
        if rest or not groups or a[0] % weight[-1] or weight[0] % groups:
            return None
        bound = dataclasses.replace(self, groups=groups)
        return bound if bound.matrix(weight) == (b[0], a[1]) else None


@dataclasses.dataclass(frozen=True)
class Merged(Layout):
    """loralib's MergedLinear: one weight whose outputs are blocks one after the other, such as
    query, key and value. lora_A (n · r, in) and lora_B (sum of the sizes, r) hold the n blocks that
    are enabled, in order; the others do not change.

    Attributes:
        enabled: which blocks are.
        sizes: outputs of each block, or () for equal ones. (loralib knows equal ones only.)
        heads: how often the outputs hold all blocks one after the other; the sizes are then those
            in one head. (GPT-NeoX and BLOOM: query, key and value of each head; Falcon's new
            decoder: the queries that share a key and value, these.)
    """

    enabled: tuple[bool, ...] = ()
    sizes: Shape = ()
    heads: int = 1

    @property
    def written(self) -> str:
        """PEFT knows one product only."""
        return "matrix"

    def _sizes(self, outputs: int) -> Shape:
        count = len(self.enabled)
        return self.sizes or (outputs // (count * self.heads),) * count

    def suits(self, weight: Shape) -> bool:
        """The blocks must make up the outputs."""
        outputs = weight[-1] if self.transposed else weight[0]
        return len(weight) == 2 and sum(self._sizes(outputs)) * self.heads == outputs

    def regions(self, weight: Shape) -> tuple[Region, ...]:
        """The enabled blocks: rows, or columns of a transposed weight."""
        rows, cols = self.matrix(weight)
        found, start = [], 0
        outputs = cols if self.transposed else rows
        sizes = self._sizes(outputs)
        for on, size in zip(self.enabled, sizes, strict=True):
            if on and self.transposed:
                found.append(Region(0, start, rows, size))
            elif on:
                found.append(Region(start, 0, size * self.heads, cols, size, sum(sizes)))
            start += size
        return tuple(found)

    def fits(self, weight: Shape, a: Shape, b: Shape) -> Layout | None:
        """By the sizes of the blocks, or where they are equal by their number."""
        n = sum(self.enabled)
        if not n or len(weight) != 2 or a[0] != n * b[1]:
            return None
        outputs, inside = weight[::-1] if self.transposed else weight
        sizes = self._sizes(outputs)
        fits = sum(sizes) == outputs and len(sizes) == len(self.enabled) and inside == a[1]
        chosen = sum(size for size, on in zip(sizes, self.enabled, strict=False) if on)
        return self if fits and chosen == b[0] else None

    def rest(self, weight: Shape) -> tuple[Region, ...]:
        """The blocks that are not enabled."""
        off = tuple(not on for on in self.enabled)
        return dataclasses.replace(self, enabled=off).regions(weight)

    def r(self, ranks: Sequence[int]) -> int:
        """PEFT knows one product: the blocks' are put into one, side by side."""
        return sum(ranks)

    def shapes(self, weight: Shape, r: int) -> tuple[Shape, Shape]:
        """Of that one product."""
        return super().shapes(weight, sum(self.enabled) * r)

    def factors(self, products: Sequence[Product], weight: Shape) -> Product:
        """One product, lora_B zero where a block's outputs are not its own."""
        import torch
        from torch.nn.functional import pad

        rows, cols = self.matrix(weight)
        lefts, rights = [], []
        for at, (left, right) in zip(self.regions(weight), products, strict=True):
            placed = left.new_zeros(rows, left.shape[1])
            for i, (start, stop) in enumerate(at.stripes):
                placed[start:stop] = left[i * (stop - start) : (i + 1) * (stop - start)]
            lefts.append(placed)
            rights.append(pad(right, (at.col, cols - at.col - at.cols)))
        left, right = torch.cat(lefts, 1), torch.cat(rights, 0)
        A, B = (left.T, right.T) if self.transposed else (right, left)
        return A.contiguous(), B.contiguous()

    def split(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> list[Product]:
        """One for each enabled block."""
        import torch

        n = sum(self.enabled)
        total = lora_B.shape[0]
        sizes = [s * self.heads for s, on in zip(self.sizes, self.enabled, strict=False) if on]
        sizes = sizes or [total // n] * n
        return list(zip(torch.split(lora_B, sizes), lora_A.chunk(n), strict=True))

    def join(self, parts: Sequence[Product], a: Shape, b: Shape) -> Product:
        """Stacked one on the other."""
        import torch

        return torch.cat([A for _, A in parts]), torch.cat([B for B, _ in parts])


@dataclasses.dataclass(frozen=True)
class Experts(Layout):
    """Fused experts, weight (E, out, in) or transposed (E, in, out), as PEFT's target_parameters
    stores them: lora_A (E · r, in) with the experts one after the other, lora_B (out, r · E) with
    the expert running fastest.

    PEFT 0.18 took (E, x, y) for (E, in, out) always; later versions do where the model says
    ``is_transposed``. The shapes tell which, but for square experts.

    Attributes:
        experts: how many, where no weight is at hand that tells.
    """

    experts: int = 0

    def matrix(self, weight: Shape) -> tuple[int, int]:
        """The experts' matrices one below the other; a plain matrix is one expert."""
        return math.prod(weight[:-1]), weight[-1]

    def suits(self, weight: Shape) -> bool:
        """One matrix for each expert."""
        return len(weight) == 3

    def regions(self, weight: Shape) -> tuple[Region, ...]:
        """One for each expert."""
        count, rows, cols = (1, *weight)[-3:]
        return tuple(Region(i * rows, 0, rows, cols) for i in range(count))

    def fits(self, weight: Shape, a: Shape, b: Shape) -> Layout | None:
        """By both sides of one expert's matrix."""
        if len(weight) not in ((3,) if self.transposed else (2, 3)) or a[0] != b[1]:
            return None
        count, *sides = (1, *weight)[-3:]
        out_in = [b[0], a[1]]
        fits = sides == (out_in[::-1] if self.transposed else out_in) and a[0] % count == 0
        return self if fits and self.experts in (0, count) else None

    def shapes(self, weight: Shape, r: int) -> tuple[Shape, Shape]:
        """lora_A (E · r, in), lora_B (out, r · E)."""
        count, *sides = (1, *weight)[-3:]
        out, inside = sides[::-1] if self.transposed else sides
        return (count * r, inside), (out, r * count)

    def blocks(self, lora_A: torch.Tensor, lora_B: torch.Tensor, weight: Shape) -> list[Block]:
        """One for each expert."""
        counted = dataclasses.replace(self, experts=(1, *weight)[-3])
        return super(Experts, counted).blocks(lora_A, lora_B, weight)

    def split(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> list[Product]:
        """One for each expert."""
        A = lora_A.reshape(self.experts, -1, lora_A.shape[1])
        B = lora_B.reshape(lora_B.shape[0], -1, self.experts)
        return [(B[:, :, i], A[i]) for i in range(self.experts)]

    def join(self, parts: Sequence[Product], a: Shape, b: Shape) -> Product:
        """lora_A stacked, lora_B woven."""
        import torch

        A, B = torch.cat([A for _, A in parts]), torch.stack([B for B, _ in parts], 2)
        return A, B.reshape(b[0], -1)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("linear"),
        # transformers' Conv1D of GPT-2; loralib's fan_in_fan_out
        Layout("conv1d", transposed=True, magnitude_dim=0),
        Layout("embedding", "embedding", transposed=True, magnitude_dim=0),
        Conv("conv", "conv"),
        ReshapedConv("reshaped-conv"),
        Merged("merged", "merged"),
        Merged("merged-conv1d", "merged", transposed=True, magnitude_dim=0),
        Experts("experts", "experts"),
        Experts("experts-transposed", "experts", transposed=True, magnitude_dim=0),
    )
}


def of_form(form: str, **parameters: Any) -> list[Layout]:
    """Every kind whose factors are held in this form, with those parameters set that it has."""
    return [
        layout.having(**{k: v for k, v in parameters.items() if hasattr(layout, k)})
        for layout in LAYOUTS.values()
        if layout.form == form
    ]


def named(text: str) -> Layout | None:
    """``linear``, ``conv:GROUPS``, ``merged:BLOCKS``, ``merged:SIZE,SIZE,…``, the last two with
    ``*HEADS`` where each head has all blocks, and with ``/101`` for the blocks that take part; None
    for ``none``. Raises UsageError."""
    name, _, given = text.partition(":")
    if text == "none":
        return None
    layout = None if name == "reshaped-conv" else LAYOUTS.get(name)  # PEFT has no such factors
    try:
        if isinstance(layout, Conv) and given:
            return dataclasses.replace(layout, groups=_positive(given))
        if isinstance(layout, Merged):
            sizes, _, mask = given.partition("/")
            sizes, star, heads = sizes.partition("*")
            numbers = tuple(_positive(size) for size in sizes.split(","))
            count = numbers[0] if len(numbers) == 1 else len(numbers)
            enabled = tuple("01".index(digit) == 1 for digit in mask or "1" * count)
            if len(enabled) != count or not any(enabled) or (star and layout.transposed):
                raise ValueError
            return dataclasses.replace(
                layout,
                enabled=enabled,
                sizes=numbers if len(numbers) > 1 else (),
                heads=_positive(heads) if star else 1,
            )
    except ValueError:
        layout = None
    if layout is None or given:
        kinds = ", ".join(sorted({*LAYOUTS, "none"} - {"reshaped-conv"}))
        raise UsageError(
            f"{text!r} is not a layer kind; use one of {kinds}, with parts as in conv:GROUPS, "
            "merged:BLOCKS[*HEADS][/101] and merged:SIZE,SIZE[*HEADS][/10]"
        )
    return layout


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
