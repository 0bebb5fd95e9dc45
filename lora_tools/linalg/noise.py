"""What rounding adds: how large its errors are, and a random matrix of entries of unequal
variances."""

from __future__ import annotations

import torch

from lora_tools.linalg.runs import row_runs

_POINTS, _ROUNDS, _HALVINGS = 33, 3, 50
_CODES = 1 << 18  # bytes of codes that are looked at in one go
_SUMMED = 1 << 16  # codes of a run whose costs are added up by themselves


def spacing(x: torch.Tensor) -> torch.Tensor:
    """The distance of each element to the next larger one its dtype holds (its ulp)."""
    info = torch.finfo(x.dtype)
    return magnitude_(x.clone(), info.tiny) * info.eps


def magnitude_(x: torch.Tensor, least: float) -> torch.Tensor:
    """The power of two at or below each |x|, in its place; ``least``, the smallest normal number,
    stands for what is smaller. An ulp is that times the dtype's eps."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    # The exponent's bits alone are that power.
    x.view(bits).bitwise_and_(torch.tensor(torch.inf, dtype=x.dtype).view(bits))
    return x.clamp_(min=least)


def rounding_errors(values: torch.Tensor) -> torch.Tensor:
    """The mean square of what rounding to each of these values costs, (n,) float64.

    A number that came to a value is taken to have lain anywhere between the midpoints to its
    neighbours alike; beyond an end, as far as towards the other side.

    Args:
        values: (n,) what codes stand for, ascending, n > 1.
    """
    gaps = values.double().diff() / 2
    below, above = torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])
    return (below**3 + above**3) / (3 * (below + above))


def errors_by_code(values: torch.Tensor) -> torch.Tensor:
    """``rounding_errors`` of what each code stands for, (n,) in any order and some of them alike;
    0 for those that are not finite."""
    finite = torch.isfinite(values)
    distinct = torch.unique(values[finite])
    errors = torch.zeros(len(values), dtype=torch.float64)
    errors[finite] = rounding_errors(distinct)[torch.searchsorted(distinct, values[finite])]
    return errors


def uniform_noise(scales: torch.Tensor, counts: torch.Tensor | float) -> float:
    """Σ count · scale² / 12: the square of the Frobenius norm that rounding to steps of ``scales``
    is expected to have cost, ``counts`` numbers for each of them (broadcast)."""
    return float((scales.double().square() * counts).sum()) / 12


def codes_noise(
    codes: torch.Tensor, errors: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> float:
    """E‖E‖²_F of numbers rounded to codes of unequal distances, times the scales of their blocks.

    Args:
        codes: (rows, cols) uint8.
        errors: (at most 256,) of each code (see ``errors_by_code``).
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉); the last blocks of a row and of a column may
            be ragged.
    """
    (rows, cols), (high, wide) = codes.shape, block
    table = torch.nn.functional.pad(errors, (0, 256 - len(errors)))
    codes = codes.contiguous()
    if codes.storage_offset() % 2:  # of which no view is wider
        codes = codes.clone()
    if not (cols % 2 or wide % 2):  # two codes at a time
        table = (table[:, None] + table).flatten()
        codes, wide = codes.view(torch.uint16), wide // 2
    table, total = table.float(), 0.0
    for start, stop in row_runs(rows, cols, _SUMMED):
        run = codes[start:stop]
        costs = table.index_select(0, run.flatten().int()).view(run.shape)
        costs = torch.nn.functional.pad(costs, (0, -run.shape[1] % wide))
        sums = costs.view(len(run), costs.shape[1] // wide, wide).sum(2).double()
        each = scales[torch.arange(start, stop) // high].double()
        total += float((sums * each.square()).sum())
    return total


def nibbles_noise(
    packed: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, blocksize: int
) -> float:
    """E‖E‖²_F of numbers rounded to a codebook of four bits times the scale of their block.

    The scale is the largest of their magnitudes, so one number of each block is held as it is.

    Args:
        packed: (⌈n / 2⌉,) uint8, two codes each.
        values: (16,) what the codes stand for, in any order.
        scales: (⌈n / blocksize⌉,).
        blocksize: even.
    """
    errors = errors_by_code(values)
    exact = errors[values.abs() == values.abs().max()].mean()
    of_byte = (errors[:, None] + errors).float().flatten()
    wide, sums = blocksize // 2, []
    step = max(_CODES // wide, 1) * wide
    for start in range(0, len(packed), step):
        costs = of_byte.index_select(0, packed[start : start + step].int())
        lacking = -len(costs) % wide  # the last block may be short
        sums.append(torch.nn.functional.pad(costs, (0, lacking)).view(-1, wide).sum(1).double())
    costs = torch.cat(sums) - exact if sums else torch.zeros(0, dtype=torch.float64)
    return float(costs.clamp(min=0) @ scales.double().square())


def edge(rows: torch.Tensor, cols: torch.Tensor) -> float:
    """‖E‖²_2 / ‖E‖²_F, in the limit, of a matrix E of independent entries of mean zero whose
    variances are proportional to rows_i · cols_j (float64 vectors, of any scale).

    It is the right edge of the spectrum of EEᵀ. With Σ a_i = Σ b_j = 1 the edge is the least z for
    which the equations of the two Stieltjes transforms (Couillet & Hachem 2014, arXiv 1310.8094,
    theorem 2 and section 3),

        y z = Σ a_i / (1 − a_i x),    x z = Σ b_j / (1 − b_j y),

    have a solution with x < 1 / max a and y < 1 / max b. For equal variances it is
    (√m + √n)² / (m n), Marchenko & Pastur's. Where all variances are 0 it is 1, the most it can be.
    """
    a, b = _normal(rows), _normal(cols)
    if not (len(a) and len(b)):
        return 1.0
    if len(b) > len(a):
        a, b = b, a  # the inner equation is solved on the shorter side
    low, high = 0.0, 1.0
    best = torch.inf
    for _ in range(_ROUNDS):
        t = torch.linspace(low, high, _POINTS + 2, dtype=torch.float64)[1:-1]
        z = _z(t / a.max(), a, b)
        at = int(z.argmin())
        best = min(best, float(z[at]))
        step = (high - low) / (_POINTS + 1)
        low, high = max(float(t[at]) - step, 0.0), min(float(t[at]) + step, 1.0)
    return best


def _normal(variances: torch.Tensor) -> torch.Tensor:
    positive = variances[variances > 0].double()
    return positive / positive.sum()


def _z(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """z(x) of the equations above: y by halving, as the left side of y Σ b/(1 − b y) = x F rises
    with y."""
    F = torch.stack([(a / (1 - a * each)).sum() for each in x])
    low = torch.zeros_like(x)
    high = torch.full_like(x, 1 / float(b.max()))
    for _ in range(_HALVINGS):
        y = (low + high) / 2
        left = y * (b / (1 - b * y[:, None])).sum(1)
        low, high = torch.where(left < x * F, y, low), torch.where(left < x * F, high, y)
    return F / ((low + high) / 2)
