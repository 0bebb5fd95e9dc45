"""Changes that are made of the base's weight itself, as PEFT 0.21 and LyCORIS make them: each gives
W' − W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_tools.linalg.changes.on import On, Tensors, places
from lora_tools.linalg.scaling import scaling

Numbers = Mapping[str, Any]


def hira(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """HiRA (arXiv 2410.07524): W ∘ (B A); of an embedding W ∘ (B A)ᵀ, of a convolution with the
    kernel on A (r, in, *k)."""
    if "hira_embedding_A" in t:
        return on.weight * (t["hira_embedding_B"] @ t["hira_embedding_A"]).T
    A, B = t["hira_A"], t["hira_B"]
    return on.weight * (B.flatten(1) @ A.flatten(1)).reshape(on.weight.shape)


def _path(t: Tensors, name: str) -> torch.Tensor:
    """One of GLoRA's five: a product, a vector or a number; zero where it is left out."""
    if f"{name}.Xd" in t:
        return t[f"{name}.Xd"] @ t[f"{name}.Xu"]
    if f"{name}.X" in t:
        return t[f"{name}.X"]
    return torch.zeros(1)


def glora(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """GLoRA (arXiv 2306.07967): W ∘ A + B."""
    return (on.matrix * _path(t, "glora_A") + _path(t, "glora_B")).expand_as(on.matrix)


def glora_bias(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """GLoRA's change of the bias: b ∘ D + E + W C."""
    C = _path(t, "glora_C")
    moved = (on.matrix @ C.expand(on.matrix.shape[1], 1) if C.dim() == 1 else on.matrix @ C)[:, 0]
    return on.bias * _path(t, "glora_D").flatten() + _path(t, "glora_E").flatten() + moved


def input_dora(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """DoRA (arXiv 2402.09353) with a magnitude for each input, as LyCORIS 4.1 has it with
    ``wd_on_out=False``: W' = m ∘ V / ‖V‖, V = W + α/r · B A, each norm over all of V that one
    input is multiplied by. A (r, in, *k), B (out, r), m one for each input."""
    product = t["lora_B"].flatten(1) @ t["lora_A"].flatten(1)
    V = on.weight + scaling(n["alpha"], n["r"], False) * product.reshape(on.weight.shape)
    others = [dim for dim in range(V.dim()) if dim != 1]
    m = t["dora_scale"].reshape(1, -1, *[1] * (V.dim() - 2))
    norms = torch.linalg.vector_norm(V, dim=others, keepdim=True)
    moved: torch.Tensor = m * V / norms - on.weight
    return moved


def deft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """DEFT: Q (α/r · R − Sᵀ W), with Q = P and S = relu(P), or both of P's QR; ``para`` (arXiv
    2409.19739) has no R, and takes the subspace out."""
    P = t["deft_P"]
    if n["decomposition_method"] == "qr":
        Q: torch.Tensor = torch.linalg.qr(P).Q
        S = Q
    else:
        Q, S = P, P.relu()
    moved: torch.Tensor = -(S.T @ on.matrix)
    if not n["para"]:
        moved = moved + t["deft_R"] * (
            scaling(n["alpha"], P.shape[1], False) if n["alpha"] else 1.0
        )
    return Q.matmul(moved)


def frod(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """FRoD: W' = U (S + diag(l)) Vᵀ with a sparse S; U the columns of W V⁻ᵀ, normalised."""
    V, l, W = t["frod_V"], t["frod_lambda_l"], on.matrix  # noqa: E741
    # In float64, as PEFT does, and the columns of no length are zero.
    try:
        columns = torch.linalg.solve(V.double(), W.T.double()).T
    except RuntimeError:
        columns = W.double() @ torch.linalg.pinv(V.double(), rtol=1e-6).T
    norm = columns.norm(dim=0)
    U = torch.where(norm > 1e-12, columns / norm, 0.0).to(W.dtype)
    S = torch.diag(l)
    rows, cols = places(t["frod_s_indices"], t["frod_lambda_s_values"])
    S.index_put_((rows, cols), t["frod_lambda_s_values"], accumulate=True)
    return U @ S @ V.T - W


_NONLINEAR = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def peanut(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """PEANuT (arXiv 2410.01870): s · B f(A W), the nonlinearity f as often as there are encoders
    and decoders, these with what went into the encoders added again.

    Raises:
        ValueError: an activation that is not known here.
    """
    if n["act_fn"] not in _NONLINEAR:
        raise ValueError(f"act_fn {n['act_fn']!r} is not one of {', '.join(sorted(_NONLINEAR))}")
    f = _NONLINEAR[n["act_fn"]]
    x = f(on.matrix.T @ t["peanut_A.weight"].T)
    before = []
    for i in range(n["depth"]):
        before.append(x)
        x = f(x @ t[f"peanut_encoders.{i}.weight"].T)
    for i in range(n["depth"]):
        x = f(x @ t[f"peanut_decoders.{i}.weight"].T) + before[-1 - i]
    return (x @ t["peanut_B.weight"].T * float(n["scaling"])).T
