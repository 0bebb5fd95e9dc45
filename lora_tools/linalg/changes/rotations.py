"""Changes that multiply the weight by a matrix near the identity, as PEFT 0.21 forms it.

Each gives W' − W, with W (out, in, *kernel) as (out, in · ∏kernel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_tools.linalg.changes.on import On, Tensors

Numbers = Mapping[str, Any]


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I − S)(I + S)⁻¹ of skew-symmetric matrices (…, b, b): Cayley's orthogonal ones."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    solved: torch.Tensor = torch.linalg.solve(unit + skew, unit - skew, left=False)
    return solved


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """The same by so many terms of its series I + 2S + 2S² + … + Sᵏ, as PEFT cuts it: it takes the
    inverse's sign the other way round, and its last term once."""
    result = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    power = skew
    if terms > 1:
        result = result + 2 * power
    if terms > 2:
        power = power @ skew
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            result = result + 2 * power
        result = result + power @ skew
    return result


def _in_blocks(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """matrix (out, in) with the inputs of each block R (b, b) turned: W_i Rᵀ for W diag(R_i)ᵀ."""
    count, size = blocks.shape[:2]
    parts = matrix.reshape(matrix.shape[0], count, size).transpose(0, 1)
    return (parts @ blocks.transpose(1, 2)).transpose(0, 1).reshape(matrix.shape)


def _skew(vectors: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal (m, b(b − 1)/2) → skew-symmetric (m, b, b)."""
    size = int((1 + (1 + 8 * vectors.shape[1]) ** 0.5) / 2 + 0.5)
    above = torch.triu_indices(size, size, 1)
    matrix = vectors.new_zeros(vectors.shape[0], size, size)
    matrix[:, above[0], above[1]] = vectors
    return matrix - matrix.transpose(1, 2)


def oft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """OFT (arXiv 2306.07280; its Cayley–Neumann form 2506.19847): W diag(R)ᵀ, of an embedding
    W diag(R). ``coft`` keeps each skew matrix within eps / √blocks of zero."""
    embedding = "oft_embedding_R.weight" in t
    skew = _skew(t["oft_embedding_R.weight" if embedding else "oft_R.weight"])
    if n["coft"]:
        most = n["eps"] / skew.shape[0] ** 0.5
        norm = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norm <= most, skew, most * skew / norm)
    R = _neumann(skew, n["num_cayley_neumann_terms"]) if n["use_cayley_neumann"] else cayley(skew)
    matrix = on.matrix
    if R.shape[0] == 1:  # shared by all
        R = R.expand(matrix.shape[1] // R.shape[1], -1, -1)
    return _in_blocks(matrix, R.transpose(1, 2) if embedding else R) - matrix


def boft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """BOFT (arXiv 2311.06243): s ∘ (W Gᵀ), G a product of butterfly factors P diag(R) Pᵀ; R (m, n,
    b, b) with skew part (R − Rᵀ)/2, s a factor for each output."""
    blocks, matrix = t["boft_R"], on.matrix
    factors, count, size, _ = blocks.shape
    R = cayley((blocks - blocks.transpose(2, 3)) / 2)
    turned = matrix
    for i in range(factors):
        order = _butterfly(count * size, count >> i, size // 2, factors - 1)
        # W (P D Pᵀ)ᵀ = W P Dᵀ Pᵀ, with (W P)[:, order[k]] = W[:, k].
        moved = torch.empty_like(turned)
        moved[:, order] = turned
        turned = _in_blocks(moved, R[i])[:, order]
    return turned * t["boft_s"].reshape(-1, 1) - matrix


def _butterfly(n: int, blocks: int, half: int, factors: int) -> torch.Tensor:
    """The order in which a butterfly factor takes the inputs: in each of so many blocks, every
    other half-block first."""
    order = torch.arange(n)
    if factors == 0:
        return order
    size = n // blocks
    steps = torch.arange(size // half)
    first = torch.cat((steps[::2], steps[1::2]))
    within = (first[:, None] * half + torch.arange(half)[None, :]).reshape(-1)
    return order.reshape(blocks, size)[:, within].reshape(-1)


def hra(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """HRA (arXiv 2405.17484): W H₁ H₂ …, reflections H_i = I − 2 u_i u_iᵀ in the columns of u (in,
    r); with ``apply_GS`` in the columns made orthogonal first."""
    u, matrix = t["hra_u"], on.matrix
    directions: list[torch.Tensor] = []
    turned = matrix
    for column in u.T:
        if n["apply_GS"]:
            for before in directions:
                column = column - (before @ column) * before
        directions.append(column / column.norm())
        turned = turned - 2 * torch.outer(turned @ directions[-1], directions[-1])
    return turned - matrix


def bat(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """Bat, of MiSS' authors: W_ij B_i + B_i for each r × r block of the weight."""
    B, matrix = t["miss_block"], on.matrix
    r = B.shape[-1]
    out, inside = matrix.shape
    blocks = matrix.reshape(out // r, r, inside // r, r).permute(2, 0, 1, 3)
    return (blocks @ B + B).permute(1, 2, 0, 3).reshape(matrix.shape)


def road(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """RoAd (arXiv 2409.00119): the outputs, in pairs (i, i + half a group), are turned by θ and
    scaled by α: R W."""
    return _road(t, n, on.matrix)


def road_bias(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """The same of the bias (out,)."""
    return _road(t, n, on.bias[:, None])[:, 0]


def _road(t: Tensors, n: Numbers, matrix: torch.Tensor) -> torch.Tensor:
    """R x − x for each column."""
    theta, alpha, group = t["road_theta"], t["road_alpha"], n["group_size"]
    if n["variant"] == "road_4":
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        first = (alpha[:, 0] * theta[:, 0].cos()).flatten()
        second = (alpha[:, 1] * theta[:, 1].sin()).flatten()
    else:
        if n["variant"] == "road_1":
            theta, alpha = (
                x.reshape(-1, group // 2).repeat_interleave(2, 0).flatten() for x in (theta, alpha)
            )
        first, second = alpha * theta.cos(), alpha * theta.sin()
    halves = matrix.reshape(-1, 2, group // 2, matrix.shape[1])
    swapped = torch.stack((-halves[:, 1], halves[:, 0]), 1).reshape(matrix.shape)
    return matrix * first[:, None] + swapped * second[:, None] - matrix
