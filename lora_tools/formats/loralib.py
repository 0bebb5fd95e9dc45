"""loralib (0.1.2): a state dict of bare ``<module>.lora_A`` and ``<module>.lora_B``.

loralib keeps no numbers with it: lora_alpha (and for MergedLinear enable_lora) are in the user's
code. Written files carry lora_alpha in the metadata of the safetensors file, which loralib's own
loading ignores. Read besides, with the base's shapes: MergedLinear (lora_A (n_on·r, in),
lora_B (n_on·m, r)) as the LoRA of rank n_on·r that it is, and convolutions (lora_A (r·k, in·k),
lora_B (out·k, r·k), whose product has the weight's elements in order) as two-stage ones of rank
r·k².
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lora_tools.formats.checkpoint import TensorFile
from lora_tools.formats.view import (
    Context,
    Outline,
    group_parts,
    named_embedding,
    pair,
    reshaped,
    stored_alphas,
)
from lora_tools.formats.writers import Factors, Keyed

_PARTS = ("lora_A", "lora_B")


def split(key: str) -> tuple[str, str] | None:
    """``a.b.lora_A`` → (``a.b``, ``lora_A``)."""
    module, _, part = key.rpartition(".")
    return (module, part) if module else None


def knows(key: str) -> bool:
    """Whether a key is one of these."""
    return key.rpartition(".")[2] in _PARTS


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "loralib")
    alphas = stored_alphas(outline)
    for module, keys in group_parts(outline, _PARTS, split).items():
        a, b = pair(outline, module, keys, *_PARTS)
        alpha = alphas.get(module)
        if alpha is None:
            alpha = context.need_alpha(path, "loralib")
        if len(outline.shape(a)) != 2 or len(outline.shape(b)) != 2:
            raise outline.fail(f"{module}: lora_A and lora_B are no matrices")
        _add(outline, module, a, b, float(alpha), context)
    return outline


def _add(outline: Outline, module: str, a: str, b: str, alpha: float, context: Context) -> None:
    """One module, its layer kind told by the shapes."""
    A, B = outline.same(a), outline.same(b)
    rank, inner = A.spec.shape[0], B.spec.shape[1]
    weight = context.base.weights.get(module) if context.base is not None else None
    if weight is not None and len(weight.shape) > 2:
        _add_conv(outline, module, a, b, alpha, weight.shape)
    elif context.enable_lora and (rank != inner or _is_partial(module, B.spec.shape[0], context)):
        on = sum(context.enable_lora)
        if not on or rank != on * inner or B.spec.shape[0] % on:
            raise outline.fail(
                f"{module}: lora_A {list(A.spec.shape)} and lora_B {list(B.spec.shape)} are not "
                f"those of a MergedLinear with {on} blocks on"
            )
        blocks = [int(x) for x in context.enable_lora]
        rows = B.spec.shape[0] // on * len(blocks)
        placed = outline.computed((rows, rank), (b,), "block_rows", blocks)
        outline.add_lora(module, A, placed, alpha, of_rank=inner)
    elif rank != inner:
        raise outline.fail(
            f"{module}: lora_A {list(A.spec.shape)} and lora_B {list(B.spec.shape)} are those of a "
            "MergedLinear; say which of its blocks are on: loratools convert … --enable-lora 1,0,1"
        )
    else:
        in_out = A.spec.shape[1], B.spec.shape[0]
        embedding = (
            context.base.is_embedding(module, in_out) if context.base else named_embedding(module)
        )
        outline.add_lora(module, A, B, alpha, embedding=embedding)


def _is_partial(module: str, rows: int, context: Context) -> bool:
    """Whether lora_B has fewer rows than the base's weight: a MergedLinear with one block on."""
    spec = context.base.weights.get(module) if context.base is not None else None
    return spec is not None and sum(context.enable_lora) == 1 and rows not in spec.shape


def _add_conv(
    outline: Outline, module: str, a: str, b: str, alpha: float, weight: tuple[int, ...]
) -> None:
    """lora_B @ lora_A is the weight's elements in order: ``runs`` rows of it are one filter."""
    kernel, runs = weight[-1], math.prod(weight[2:-1])
    inner = outline.shape(a)[0]
    if (
        inner != outline.shape(b)[1]
        or inner % kernel
        or (outline.shape(b)[0], outline.shape(a)[1]) != (weight[0] * runs, weight[1] * kernel)
    ):
        raise outline.fail(
            f"{module}: lora_A {list(outline.shape(a))} and lora_B {list(outline.shape(b))} do not "
            f"make a weight {list(weight)} without groups"
        )
    rank = inner * runs
    A = outline.computed((rank, *weight[1:]), (a,), "kernel_right", (runs,))
    left = outline.computed((weight[0], rank), (b,), "kernel_left", (runs,))
    B = reshaped(left, (weight[0], rank, *[1] * len(weight[2:])))
    outline.add_lora(module, A, B, alpha, of_rank=inner // kernel)


class LoralibWriter(Keyed):
    """Writes one safetensors file: ``model.load_state_dict(load_file(path), strict=False)``."""

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        self.named_alphas[factors.module] = factors.alpha
        return {
            f"{factors.module}.lora_A": factors.lora_A, f"{factors.module}.lora_B": factors.lora_B
        }  # fmt: skip
