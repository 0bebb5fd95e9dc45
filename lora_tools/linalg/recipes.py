"""How lora_A and lora_B come out of what other formats store: one function each in one table.

A recipe gets the file's tensors and some numbers, and gives one factor; the caller reshapes it. The
recipes of LyCORIS make *exact* factors of deltas that are no plain product, without forming the
delta (Kolda & Bader 2009, Tensor Decompositions and Applications, section 2.6):

- LoHa (FedPara, arXiv 2108.06098): (A₁B₁) ∘ (A₂B₂) = (A₁ • A₂)(B₁ ⊙ B₂), with all products of two
  columns, and of two rows: rank r² at most.
- LoKr (KronA, arXiv 2212.10650): (L₁R₁) ⊗ (L₂R₂) = (L₁ ⊗ L₂)(R₁ ⊗ R₂); a factor that is stored
  whole is a product with the identity, on its smaller side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError
from lora_tools.linalg import experts, loralib

if TYPE_CHECKING:
    import torch

Recipe = Callable[[Sequence["torch.Tensor"], Sequence[int]], "torch.Tensor"]


def block_diagonal(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """Blocks one below the other (m, n) → (m, n · count) with them on the diagonal."""
    import torch

    [blocks] = tensors
    if blocks.shape[0] % numbers[0]:
        raise ValueError("the blocks differ in size")
    whole: torch.Tensor = torch.block_diag(*blocks.chunk(numbers[0]))  # type: ignore[no-untyped-call]
    return whole


def _wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In float32, or float64 where one of them is."""
    import torch

    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def same(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """As it is stored."""
    return tensors[0]


def transposed(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """(m, n) → (n, m)."""
    return tensors[0].T


def half_to_interleaved(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """Rows of rotary heads from transformers' order (first halves, then second halves) to pairs.

    ``numbers``: how many heads.
    """
    x = tensors[0]
    heads = numbers[0]
    return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).transpose(1, 2).reshape(x.shape)


def interleaved_to_half(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The inverse of ``half_to_interleaved``."""
    x = tensors[0]
    heads = numbers[0]
    return x.reshape(heads, x.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(x.shape)


def tucker_down(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """mid (r, s, *k), down (s, in) → (r, in, *k): LoCon's middle factor joined to the lower one."""
    import torch

    mid, down = _wide(tensors)
    joined: torch.Tensor = torch.tensordot(mid, down.reshape(down.shape[0], -1), ([1], [0]))
    return joined.movedim(-1, 1)


def _columns(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(m, r), (m, s) → (m, rs): all products of a column of each."""
    return (x[:, :, None] * y[:, None, :]).reshape(x.shape[0], -1)


def hadamard_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """w1_a (out, r), w2_a (out, s) → (out, rs)."""
    one, two = _wide(tensors)
    return _columns(one, two)


def hadamard_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """w1_b (r, n), w2_b (s, n) → (rs, n)."""
    one, two = _wide(tensors)
    return _columns(one.T, two.T).T


def hadamard_left_tucker(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """w1_a (r, out), w2_a (s, out) → (out, rs)."""
    one, two = _wide(tensors)
    return _columns(one.T, two.T)


def hadamard_right_tucker(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """t1 (r, p, *k), w1_b (p, in), t2 (s, q, *k), w2_b (q, in) → (rs, in·∏k)."""
    sides = []
    for mid, down in (tensors[:2], tensors[2:]):
        joined = tucker_down((mid, down), numbers)
        sides.append(joined.reshape(joined.shape[0], -1))
    return hadamard_right(sides, numbers)


def _halves(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a product with the identity on its smaller side."""
    import torch

    rows, cols = whole.shape
    unit = torch.eye(min(rows, cols), dtype=whole.dtype)
    return (unit, whole) if rows <= cols else (whole, unit)


def whole_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """A weight's whole difference (out, in, *k) → (out, r) with r its smaller side."""
    [whole] = _wide(tensors)
    return _halves(whole.flatten(1))[0]


def whole_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The other side of that → (r, in·∏k)."""
    [whole] = _wide(tensors)
    return _halves(whole.flatten(1))[1]


def _kronecker_sides(
    tensors: Sequence[torch.Tensor], numbers: Sequence[int]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """((L₁, R₁), (L₂, R₂)) of what LoKr stores.

    ``numbers``: how many tensors the first side has (1: whole, 2: a, b), how many the second (1, 2,
    or 3: t2, a, b).
    """
    wide = _wide(tensors)
    first, second = wide[: numbers[0]], wide[numbers[0] :]
    one = _halves(first[0]) if len(first) == 1 else (first[0], first[1])
    if len(second) == 1:
        two = _halves(second[0].reshape(second[0].shape[0], -1))
    elif len(second) == 2:
        two = (second[0], second[1])
    else:
        joined = tucker_down((second[0], second[2]), ())
        two = (second[1].T, joined.reshape(joined.shape[0], -1))
    return one, two


def _kronecker(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Of two matrices. (``torch.kron`` fails on a row that is a transposed column.)"""
    return (one[:, None, :, None] * two[:, None, :]).reshape(
        one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]
    )


def kronecker_left(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """L₁ (a, i) ⊗ L₂ (b, j) → (ab, ij)."""
    (one, _), (two, _) = _kronecker_sides(tensors, numbers)
    return _kronecker(one, two)


def kronecker_right(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """R₁ (i, c) ⊗ R₂ (j, d·∏k) → (ij, cd·∏k): the kernel stays innermost."""
    (_, one), (_, two) = _kronecker_sides(tensors, numbers)
    return _kronecker(one, two)


def rows(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """(n, …) → its rows [first, after last), one run below the other. ``numbers``: both, for each
    run."""
    import torch

    runs = zip(numbers[::2], numbers[1::2], strict=True)
    return torch.cat([tensors[0][start:stop] for start, stop in runs])


def stacked(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """(rᵢ, in) → (Σ rᵢ, in)."""
    import torch

    return torch.cat(list(tensors))


def stacked_diagonal(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """(outᵢ, rᵢ) → (Σ out, Σ rᵢ), a block below the other. ``numbers``: the rows of every block,
    then 1 or 0 for each: whether it is there, or zeros."""
    sizes, there = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    result = tensors[0].new_zeros(sum(sizes), sum(x.shape[1] for x in tensors))
    blocks, row, column = iter(tensors), 0, 0
    for size, on in zip(sizes, there, strict=True):
        if on:
            block = next(blocks)
            result[row : row + size, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += size
    return result


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        same,
        block_diagonal,
        transposed,
        half_to_interleaved,
        interleaved_to_half,
        tucker_down,
        hadamard_left,
        hadamard_right,
        hadamard_left_tucker,
        hadamard_right_tucker,
        kronecker_left,
        kronecker_right,
        whole_left,
        whole_right,
        rows,
        stacked,
        stacked_diagonal,
        loralib.block_rows,
        loralib.placed_rows,
        loralib.first_rows,
        loralib.kernel_left,
        loralib.kernel_right,
        loralib.gathered_left,
        loralib.gathered_right,
        experts.one_of_A,
        experts.one_of_B,
        experts.turned_A,
        experts.turned_B,
        experts.zeros,
        experts.all_As,
        experts.all_Bs,
    )
}


def compute(
    recipe: str, tensors: Sequence[torch.Tensor], numbers: Sequence[int] = ()
) -> torch.Tensor:
    """One tensor by a row of the table.

    Raises:
        MismatchError: the tensors' shapes do not go together.
    """
    try:
        return RECIPES[recipe](tensors, numbers)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        shapes = " and ".join(str(list(t.shape)) for t in tensors)
        raise MismatchError(
            f"the shapes {shapes} do not fit together ({recipe}{numbers})"
        ) from None
