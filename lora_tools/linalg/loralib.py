"""loralib's factors (0.1.2) of convolutions and of MergedLinear, out of PEFT's and back. All exact.

**Convolutions.** loralib's lora_B @ lora_A has the elements of a weight (out, c, …, k) in order,
as (out / g · n, g · c · k): g the groups, n the product of the kernel's sizes but the last. Of a
filter that is c · n · k elements, and neither need be a multiple of the other; both are whole
numbers of pieces of length c · k · gcd(n, g): a filter has u = n / gcd of them, a row v = g / gcd.
Piece s of the weight is the (s mod u)-th of filter s div u, and the (s mod v)-th of row s div v.
A product of either matrix is one of the other with u · v times the rank, zero where a piece is none
of its own; the two stages of each group make one more.

**MergedLinear.** Each enabled block has factors of its own. A product of the whole weight is one of
each block, of the columns of lora_B that are not zero there.

Functions of (tensors, numbers) are recipes (``linalg.recipes``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError, UnsupportedAdapter
from lora_tools.linalg.layouts import LAYOUTS

if TYPE_CHECKING:
    import torch


def pieces(groups: int, runs: int) -> tuple[int, int]:
    """(u, v): how many pieces a filter has, and how many a row."""
    common = math.gcd(groups, runs)
    return runs // common, groups // common


def kernel_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """lora_B (out / g · n, q) → the second stage (out, u · v · q). ``numbers``: (g, n)."""
    import torch

    B, (groups, runs) = tensors[0], numbers
    u, v = pieces(groups, runs)
    out = B.shape[0] * groups // runs
    piece = torch.arange(out * u).reshape(out, u)
    result = B.new_zeros(out, u, v, B.shape[1])
    result[torch.arange(out)[:, None], torch.arange(u), piece % v] = B[piece // v]
    return result.reshape(out, -1)


def kernel_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """lora_A (q, g·c·k) → the first stage (g · u·v·q, g · c·n·k), as PEFT loads it: zero on the
    channels of other groups. ``numbers``: (g, n)."""
    import torch

    A, (groups, runs) = tensors[0], numbers
    u, v = pieces(groups, runs)
    rows = A.reshape(A.shape[0], v, -1).transpose(0, 1).reshape(v * A.shape[0], -1)
    return torch.kron(torch.eye(groups * u, dtype=A.dtype), rows.contiguous())


def spread_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The second stage (out, r) → lora_B (out / g · n, g·u·v·r). ``numbers``: (g, n)."""
    import torch

    B, (groups, runs) = tensors[0], numbers
    u, v = pieces(groups, runs)
    rows = B.shape[0] // groups * runs
    piece = torch.arange(rows * v).reshape(rows, v)
    filters = piece // u
    result = B.new_zeros(rows, groups, u, v, B.shape[1])
    at = torch.arange(rows)[:, None], filters * groups // B.shape[0], piece % u, torch.arange(v)
    result[at] = B[filters]
    return result.reshape(rows, -1)


def spread_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """Each group's first stage on its own channels (g, r, c·n·k) → lora_A (g·u·v·r, g·c·k).
    ``numbers``: (g, n)."""
    A, (groups, runs) = tensors[0], numbers
    u, v = pieces(groups, runs)
    own = A.reshape(groups, A.shape[1], u, -1).transpose(1, 2)
    result = A.new_zeros(groups, u, v, A.shape[1], v, own.shape[-1])
    for place in range(v):
        result[:, :, place, :, place] = own
    return result.reshape(-1, v * own.shape[-1])


def gathered_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The inverse of ``spread_left`` → (out, r). ``numbers``: (g, n, r). Raises MismatchError."""
    import torch

    B, (groups, runs, r) = tensors[0], numbers
    u, v = pieces(groups, runs)
    out, width = B.shape[0] * groups // runs, groups * u * v * r
    piece = torch.arange(out) * u
    parts = B[:, :width].reshape(-1, groups, u, v, r)
    found = parts[piece // v, torch.arange(out) * groups // out, 0, piece % v]
    _check_same(spread_left([found], numbers[:2]), B)
    return found


def gathered_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The inverse of ``spread_right`` → (g·r, g·c·n·k), zero on the channels of other groups.
    ``numbers``: (g, n, r). Raises MismatchError."""
    A, (groups, runs, r) = tensors[0], numbers
    u, v = pieces(groups, runs)
    parts = A[: groups * u * v * r].reshape(groups, u, v, r, v, -1)
    own = parts[:, :, 0, :, 0].transpose(1, 2).reshape(groups, r, -1)
    _check_same(spread_right([own], numbers[:2]), A)
    return _block_diagonal(own)


def _check_same(made: torch.Tensor, given: torch.Tensor) -> None:
    """That the file's factor is what was made, and zeros beyond it."""
    rows, cols = made.shape
    rest = given.clone()
    rest[:rows, :cols] -= made
    if rest.any():
        raise MismatchError(
            "the factors do not fit the file's metadata; were they changed later? Without the "
            "metadata, they are read as loralib's own"
        )


@dataclasses.dataclass(frozen=True)
class Reformed:
    """Factors as loralib has them; ``r`` is what it divides lora_alpha by. ``rank``: of the PEFT
    factors, where they are to be found again in these; else 0."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    r: int
    rank: int = 0


def reshaped(lora_A: torch.Tensor, lora_B: torch.Tensor) -> Reformed:
    """A convolution's two stages, (g·R, g·c, …, k) and (out, R, 1…), as one product of loralib's.

    Factors that were read from loralib's become these again. The rank of a Conv2d of one group
    stays; of others it is what holds the product, a multiple of k.

    Raises:
        UnsupportedAdapter: a group reads the channels of others.
    """
    from lora_tools.linalg.factors import padded

    kernel = lora_A.shape[2:]
    rank, out = lora_B.shape[1], lora_B.shape[0]
    groups, runs = lora_A.shape[0] // rank, math.prod(kernel[:-1])
    weight = (out, lora_A.shape[1] // groups, *kernel)
    blocks = LAYOUTS["conv"].having(groups=groups).blocks(lora_A, lora_B, weight)
    B, rows = lora_B.flatten(1), [block.right for block in blocks]
    found = _as_read(rows[0], B, groups, runs)
    if found is not None:
        A, B = found
        if _equal(kernel_right([A], (groups, runs)), lora_A.flatten(1)) and _equal(
            kernel_left([B], (groups, runs)), lora_B.flatten(1)
        ):
            return Reformed(A, B, A.shape[0] // kernel[-1])
    import torch

    A = spread_right([torch.stack(rows)], (groups, runs))
    B = spread_left([lora_B.flatten(1)], (groups, runs))
    A, B = padded(A, B, -(-A.shape[0] // kernel[-1]) * kernel[-1])
    return Reformed(A.contiguous(), B.contiguous(), A.shape[0] // kernel[-1], rank)


def _as_read(
    A: torch.Tensor, B: torch.Tensor, groups: int, runs: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """loralib's factors that the first group's (R, c·n·k) and (out, R) would come from."""
    import torch

    u, v = pieces(groups, runs)
    q, rest = divmod(A.shape[0], u * v)
    rows = B.shape[0] * runs // groups
    if rest or B.shape[0] * runs % groups:
        return None
    piece = torch.arange(rows) * v
    left = B.reshape(-1, u, v, q)[piece // u, piece % u, 0]
    right = A.reshape(u, v, q, u, -1)[0, :, :, 0].transpose(0, 1).reshape(q, -1)
    return right.contiguous(), left.contiguous()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _block_diagonal(parts: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    import torch

    result: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return result


def block_rows(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """MergedLinear's lora_B (n_on·m, r) → block-diagonal (n·m, n_on·r), zero rows for the blocks
    that are off. ``numbers``: 1 or 0 for each block."""
    return placed_rows([_block_diagonal(tensors[0].chunk(sum(numbers)))], numbers)


def placed_rows(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """(n_on·m, r) → (n·m, r), zero rows for the blocks that are off. ``numbers`` as above."""
    import torch

    on = iter(tensors[0].chunk(sum(numbers)))
    zero = torch.zeros_like(tensors[0][: tensors[0].shape[0] // sum(numbers)])
    return torch.cat([next(on) if enabled else zero for enabled in numbers])


def first_rows(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """lora_A (n_on·r, in), the same for every block → (r, in). ``numbers``: (r,). Raises
    MismatchError."""
    first = tensors[0][: numbers[0]]
    _check_same(first.repeat(tensors[0].shape[0] // numbers[0], 1), tensors[0])
    return first


def merged(lora_A: torch.Tensor, lora_B: torch.Tensor, enabled: Sequence[bool]) -> Reformed:
    """One product (R, in), (out, R) as those of a MergedLinear's enabled blocks.

    Raises:
        UnsupportedAdapter: the outputs are no equal blocks, or change in a block that is off.
    """
    import torch

    numbers = [int(on) for on in enabled]
    if lora_B.shape[0] % len(numbers):
        raise UnsupportedAdapter(
            f"{lora_B.shape[0]} outputs cannot be divided into the {len(numbers)} equal blocks of "
            "loralib's MergedLinear"
        )
    parts = list(lora_B.chunk(len(numbers)))
    if any(part.any() for part, on in zip(parts, enabled, strict=True) if not on):
        raise UnsupportedAdapter("outputs of a disabled block change")
    parts = [part for part, on in zip(parts, enabled, strict=True) if on]
    rank, rest = divmod(lora_B.shape[1], len(parts))
    if not rest and len(parts) > 1:
        B = torch.cat([p[:, i * rank : (i + 1) * rank] for i, p in enumerate(parts)])
        if _equal(block_rows([B], numbers), lora_B):
            return Reformed(lora_A, B, rank)
    used = [part.any(0).nonzero().flatten() for part in parts]
    r = max(1, *(len(columns) for columns in used))
    if len(parts) == 1 or all(len(columns) == lora_B.shape[1] for columns in used):
        r = lora_B.shape[1]
        return Reformed(lora_A.repeat(len(parts), 1), torch.cat(parts), r, r)
    A = lora_A.new_zeros(len(parts), r, lora_A.shape[1])
    B = lora_B.new_zeros(len(parts), parts[0].shape[0], r)
    for i, (part, columns) in enumerate(zip(parts, used, strict=True)):
        A[i, : len(columns)], B[i, :, : len(columns)] = lora_A[columns], part[:, columns]
    return Reformed(A.flatten(0, 1), B.flatten(0, 1), r)
