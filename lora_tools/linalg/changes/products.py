"""Changes that are products of small factors, as PEFT 0.21 forms them from what it stores.

Each gives Δ (out, in, *kernel), or (out, in · ∏kernel), which the caller reshapes, or its factors.
Those of LoHa and LoKr, whose matrices come cheaper otherwise, are functions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_tools.linalg.changes.on import On, Product, Tensors, places
from lora_tools.linalg.recipes import compute
from lora_tools.linalg.scaling import scaling

Numbers = Mapping[str, Any]


def _core(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """t (r, s, *k), a (r, out), b (s, in) → (out, in, *k): a Tucker core with both its sides."""
    left = torch.tensordot(a.T, t, ([1], [0]))
    core: torch.Tensor = torch.tensordot(left, b, ([1], [0]))
    return core.movedim(-1, 1)


def loha(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """LoHa (FedPara, arXiv 2108.06098): α/r · (w1_a w1_b) ∘ (w2_a w2_b), w_a (out, r), w_b (r, in);
    of a convolution with cores t1, t2 (r, r, *k) and w_a (r, out)."""
    halves = []
    for i in "12":
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        halves.append(_core(t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b)
    return halves[0].mul_(halves[1]).mul_(scaling(n["alpha"], t["hada_w1_b"].shape[0], False))


def loha_product(t: Tensors, n: Numbers, on: On) -> Product | None:
    """Its factors, all products of two columns, and of two rows; None of a high rank."""
    halves = [(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in "12"]
    core, lower = "", [b for _, b in halves]
    if "hada_t1" in t:
        core, lower = "_tucker", [t["hada_t1"], lower[0], t["hada_t2"], lower[1]]
    if not on.is_small(lower[0].shape[0] * lower[-2 if core else -1].shape[0]):
        return None
    left = compute(f"hadamard_left{core}", [a for a, _ in halves])
    right = compute(f"hadamard_right{core}", lower)
    return Product(left, right, scaling(n["alpha"], t["hada_w1_b"].shape[0], False))


def lokr(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """LoKr (KronA, arXiv 2212.10650): α/r · w1 ⊗ w2, each whole or a product.

    PEFT takes the Kronecker product of a 3-D w2 (a Conv1d's) without a kernel axis for w1, and so
    mixes channels with the kernel; so does this.
    """
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        two = t["lokr_w2"]
    elif "lokr_t2" in t:
        two = _core(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        two = t["lokr_w2_a"] @ t["lokr_w2_b"]
    if two.dim() == 4:
        one = one[:, :, None, None]
    return torch.kron(one, two.contiguous()).mul_(scaling(n["alpha"], n["r"], False))


def lokr_product(t: Tensors, n: Numbers, on: On) -> Product | None:
    """Its factors, Kronecker products of both sides'; None of a high rank, and of a Conv1d."""
    one = [t[k] for k in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if k in t]
    two = [t[k] for k in ("lokr_w2", "lokr_t2", "lokr_w2_a", "lokr_w2_b") if k in t]
    ranks = (min(side[-1].shape[0], side[0].flatten(1).shape[1]) for side in (one, two))
    if two[0].dim() == 3 or not on.is_small(math.prod(ranks)):
        return None
    given, numbers = (*one, *two), (len(one), len(two))
    left, right = (compute(f"kronecker_{side}", given, numbers) for side in ("left", "right"))
    return Product(left, right, scaling(n["alpha"], n["r"], False))


def adalora(t: Tensors, n: Numbers, on: On) -> Product:
    """AdaLoRA (arXiv 2303.10512): s / (r₀ + 1e-5) · B diag(E) A with s = lora_alpha (the rank that
    is left where that is not above 0) and r₀ = init_r."""
    A, B, E = t["lora_A"], t["lora_B"], t["lora_E"]
    strength = n["lora_alpha"] if n["lora_alpha"] > 0 else float(A.shape[0])
    return Product(B, A * E, float(strength / (n["init_r"] + 1e-5)))


def vera(t: Tensors, n: Numbers, on: On) -> Product:
    """VeRA (arXiv 2310.11454): diag(b) B diag(d) A, where B and A are cut from those all share."""
    b, d = t["vera_lambda_b"], t["vera_lambda_d"]
    A, B = t["vera_A"][:, : on.shape[1]], t["vera_B"][: b.shape[0]]
    return Product(b[:, None] * B, d[:, None] * A)


def pvera(t: Tensors, n: Numbers, on: On) -> Product:
    """PVeRA: VeRA at the mean of what it samples, which the first halves of d and A give."""
    half = t["pvera_lambda_d"].shape[0] // 2
    parts = {name.removeprefix("p"): tensor for name, tensor in t.items()}
    parts["vera_lambda_d"], parts["vera_A"] = parts["vera_lambda_d"][:half], parts["vera_A"][:half]
    return vera(parts, n, on)


def randlora(t: Tensors, n: Numbers, on: On) -> Product:
    """RandLoRA (arXiv 2502.00987): α/r · Σ_b B_b diag(λ_b) A diag(γ_b) with the trained λ (r,
    bases) and γ (bases, smaller side), transposed where the output is the smaller side."""
    lam, gamma = t["randlora_lambda"], t["randlora_gamma"]
    out, inside = on.shape
    A = t["randlora_A"][:, :, : min(out, inside)]
    B = t["randlora_B"][: max(out, inside), : lam.shape[1]].flatten(1)
    small = (lam[:, :, None] * A * gamma[None]).flatten(0, 1)
    # PEFT flattens the bases of B as (bases, r) and those of A as (r, bases).
    product = Product(B, small, scaling(n["randlora_alpha"], lam.shape[0], False))
    return product if inside <= out else product.T


def vblora(t: Tensors, n: Numbers, on: On) -> Product:
    """VB-LoRA (arXiv 2405.15179): B A of vectors of one bank, mixed by the softmax of the top k
    logits; or by what ``save_only_topk_weights`` keeps of it, all weights but the last."""
    bank = t["vblora_vector_bank"]

    def mixed(name: str) -> torch.Tensor:
        if f"{name}_topk_indices" in t:
            indices, weights = places(t[f"{name}_topk_indices"]), t[f"{name}_topk_weights"]
            weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
        else:
            top, indices = t[name].topk(n["topk"], -1)
            weights = top.softmax(-1)
        return (weights[..., None] * bank[indices]).sum(-2)

    A, B = mixed("vblora_logits_A"), mixed("vblora_logits_B")
    return Product(B.transpose(1, 2).flatten(0, 1), A.flatten(1))


def unilora(t: Tensors, n: Numbers, on: On) -> Product:
    """Uni-LoRA (arXiv 2506.00799): B A whose entries are entries of one vector, scaled."""
    theta = t["unilora_theta_d"]
    A, B = (
        theta[places(t[f"unilora_indices_{side}"])] * t[f"unilora_scales_{side}"] for side in "AB"
    )
    return Product(B, A)


def gralora(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """GraLoRA (arXiv 2505.20355): a product of rank r/k in each of k × k blocks, and a LoRA of
    hybrid_r beside; scaling α / (r + hybrid_r). A (k, in/k, r), B (k, r, out/k)."""
    A, B = t["gralora_A"], t["gralora_B"]
    k, inside, r = A.shape
    # Block (j, i) of Δᵀ is A_i's share j of the rank times B_j's share i.
    left = A.reshape(k, inside, k, r // k).permute(2, 0, 1, 3)
    right = B.reshape(k, k, r // k, -1)
    delta = (left @ right).permute(1, 2, 0, 3).reshape(k * inside, -1).T
    if "gralora_A_general.weight" in t:
        delta = delta + t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
    return delta * scaling(n["alpha"], r + n["hybrid_r"], False)


def tinylora(t: Tensors, n: Numbers, on: On) -> Product:
    """TinyLoRA: B (Σ v_i P_i) A with B and A singular vectors of the base, which the file holds.

    Modules share vectors v in groups, by a module's number, which the file does not say: the seed
    of its P does.
    """
    P = t["tinylora_P"]
    vectors = [name for name in t if name.startswith("tinylora_v.")]
    group = 0
    if len(vectors) > 1:
        number = next(i for i in range(n["modules"]) if _is_rounded(P, _projection(n, i, P)))
        group = min(number // max(1, n["modules"] // len(vectors)), len(vectors) - 1)
    R = torch.einsum("i,ijk->jk", t[f"tinylora_v.{group}"], P)
    return Product(t["tinylora_B"] @ R, t["tinylora_A"])


def _projection(n: Numbers, number: int, like: torch.Tensor) -> torch.Tensor:
    """The random projection of a module."""
    seed = torch.Generator().manual_seed(n["projection_seed"] + number)
    std = 1.0 / like.shape[1] ** 0.5
    drawn: torch.Tensor = torch.normal(0.0, std, size=tuple(like.shape), generator=seed)
    return drawn


def _is_rounded(stored: torch.Tensor, drawn: torch.Tensor) -> bool:
    """Whether a projection is that one, in the dtype that it was stored in."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return any(drawn.to(dtype).equal(stored.to(dtype)) for dtype in dtypes if _holds(dtype, stored))


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether all of its numbers are numbers of that dtype."""
    return bool(tensor.to(dtype).to(tensor.dtype).equal(tensor))


def delora(t: Tensors, n: Numbers, on: On) -> Product:
    """DeLoRA (arXiv 2503.18225): λ/r · B diag(1 / ‖a_i‖‖b_i‖) A diag(w), w the norms of the base's
    columns, which the file holds."""
    A, B = t["delora_A"], t["delora_B"]
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    return Product(B * (t["delora_lambda"] / A.shape[0] / norms), A * t["delora_w_norm"])
