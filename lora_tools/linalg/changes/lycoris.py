"""Changes of LyCORIS' own types, as lycoris-lora 4.1 makes them of the base's weight: each gives
W' − W, with W (out, in, *kernel) as (out, in · ∏kernel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_tools.linalg.changes.on import On, Tensors
from lora_tools.linalg.changes.rotations import cayley
from lora_tools.linalg.scaling import scaling

Numbers = Mapping[str, Any]


def lycoris_glora(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """GLoRA (arXiv 2306.07967): α/r · (W a1 a2 + b1 b2) with a1 (in, r), a2 (r, in), b1 (out, r),
    b2 (r, in, *kernel), the former product over the channels; a convolution's b2 may be (r, in)
    with a core bm (r, r, *kernel) between. Older files have 1 and 2 changed about: ComfyUI, too,
    reads both.

    Raises:
        ValueError: both readings fit, or the products are of another weight.
    """
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    inside = on.weight.shape[1]
    if a1.shape == (inside, inside):
        raise ValueError("a1 and a2 are square, so that nothing tells which comes first")
    if a1.shape[1] == inside:
        (a1, b1), (a2, b2) = (a2, b2), (a1, b1)
    if "bm.weight" in t:
        added = torch.einsum("or,rs...,si->oi...", b1, t["bm.weight"], b2).flatten(1)
    else:
        added = b1 @ b2
    moved = torch.einsum("oi...,ij->oj...", on.weight, a1 @ a2).flatten(1)
    if added.shape != moved.shape:
        raise ValueError("b1 and b2 are of another weight")
    return (moved + added) * scaling(n["alpha"] or a2.shape[0], a2.shape[0], False)


def _skew(blocks: torch.Tensor, most: float) -> torch.Tensor:
    """Q = blocks − blocksᵀ, all of it no longer than ``most`` where that is above 0."""
    Q = blocks - blocks.transpose(-1, -2)
    norm = Q.norm() + 1e-8
    return Q * (most / norm) if 0 < most < norm else Q


def _rescaled(turned: torch.Tensor, t: Tensors, on: On) -> torch.Tensor:
    """What an output is multiplied by in the end, where the file has that."""
    if "rescale" in t:
        turned = turned * t["rescale"].reshape(turned.shape[0], 1)
    return turned - on.matrix


def lycoris_oft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """Diag-OFT (arXiv 2306.07280): blocks of outputs, each turned by Cayley's matrix of its block
    (b, b). Alpha is no scale: the skew part is no longer than alpha · outputs (0: any length)."""
    blocks, (out, inside) = t["oft_blocks"], on.matrix.shape
    R = cayley(_skew(blocks, n["alpha"] * out))
    turned = R @ on.matrix.reshape(*blocks.shape[:2], inside)
    return _rescaled(turned.reshape(out, inside), t, on)


def lycoris_boft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """BOFT (arXiv 2311.06243): one such turn after the other, blocks (m, n, b, b), stage i among
    outputs that are 2ⁱ · b/2 apart."""
    blocks, (out, inside) = t["oft_blocks"], on.matrix.shape
    R = cayley(-_skew(blocks, n["alpha"] * out))
    factors, count, size, _ = blocks.shape
    turned = on.matrix
    for i in range(factors):
        apart = 2**i * size // 2
        near = turned.reshape(-1, 2, apart, inside).transpose(1, 2).reshape(count, size, inside)
        turned = (R[i] @ near).reshape(-1, apart, 2, inside).transpose(1, 2)
        turned = turned.reshape(out, inside)
    return _rescaled(turned, t, on)


def lycoris_ia3(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """IA³ (arXiv 2205.05638): w ∘ W, w one for each input or each output; the bias stays."""
    axis = 1 if t["on_input"].item() else 0
    shape = [1] * on.weight.dim()
    shape[axis] = on.weight.shape[axis]
    return on.weight * t["weight"].reshape(shape)
