"""loralib (0.1.2): a state dict of bare ``<module>.lora_A`` and ``<module>.lora_B``.

loralib keeps no numbers with it: lora_alpha (and for MergedLinear enable_lora) are in the user's
code. Written files carry both in the metadata of the safetensors file, which loralib's own loading
ignores. MergedLinear (lora_A (n_on·r, in), lora_B (n_on·m, r)) is read as the LoRA of rank n_on·r
that it is. Convolutions (lora_A (r·k, in·k), lora_B (out / groups · k, r·k), whose product has the
weight's elements in order) are read as two-stage ones; the base's weight tells kernel and groups.
``linalg.loralib`` has the algebra. Written of a kernel above 1, Conv1d and Conv3d are those of
``lora_tools.nn``: loralib's own do not work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.adapters.base_names import BaseNames, named_embedding
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import (
    Compute,
    Context,
    Outline,
    group_parts,
    pair,
    reshaped,
    stored_alphas,
)
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile

_PARTS = ("lora_A", "lora_B")
# Of a safetensors file: {module: {"enable_lora": [1, 0, 1], "rank": 4}}, both if they apply. rank:
# of the PEFT factors that ``linalg.loralib`` spread over these.
LAYERS_METADATA = "lora_layers"


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
    alphas, layers = stored_alphas(outline), _stored_layers(outline)
    for module, keys in group_parts(outline, _PARTS, split).items():
        a, b = pair(outline, module, keys, *_PARTS)
        alpha = alphas.get(module)
        if alpha is None:
            alpha = context.need_alpha(outline)
        if len(outline.shape(a)) != 2 or len(outline.shape(b)) != 2:
            raise outline.fail(f"{module}: lora_A and lora_B are not matrices")
        _add(outline, module, a, b, alpha, context, layers.get(module, {}))
    return outline


def _stored_layers(outline: Outline) -> dict[str, dict[str, Any]]:
    """What the metadata says of MergedLinears and convolutions, where this tool wrote the file."""
    text = outline.file.metadata.get(LAYERS_METADATA, "{}")
    try:
        said = strict_json(text)
        for layer in said.values():
            blocks, rank = layer.get("enable_lora", [1]), layer.get("rank", 0)
            if set(blocks) - {0, 1} or not sum(blocks) or type(rank) is not int or rank < 0:
                raise ValueError
    except (CheckpointError, ValueError, TypeError, AttributeError):
        raise outline.fail(f"its metadata {LAYERS_METADATA} describes no layers") from None
    return dict(said)


def _add(
    outline: Outline,
    module: str,
    a: str,
    b: str,
    alpha: float | None,
    context: Context,
    said: Mapping[str, Any],
) -> None:
    """One module, its layer kind told by the shapes."""
    (inner_a, cols), (rows, inner) = outline.shape(a), outline.shape(b)
    weights = context.base.weights if context.base is not None else {}
    if module not in weights and f"{module}.conv" in weights:
        module = f"{module}.conv"  # in loralib's model the convolution is a part of its layer
    weight, rank = weights.get(module), said.get("rank", 0)
    blocks = [int(on) for on in said.get("enable_lora", context.enable_lora)]
    if weight is not None and len(weight.shape) > 2:
        _add_conv(outline, module, a, b, alpha, weight.shape, rank)
    elif rank and not blocks and not context.guess:
        context.need_base(
            outline.path,
            f"{module} is a convolution, and the file does not have the size of its kernel",
        )
    elif "enable_lora" in said or (
        blocks and (inner_a != inner or (weight and sum(blocks) == 1 and rows not in weight.shape))
    ):
        _add_merged(outline, module, a, b, alpha, blocks, rank)
    elif inner_a != inner and context.guess and inner and inner_a % inner == 0:
        _add_merged(outline, module, a, b, alpha, [1] * (inner_a // inner), rank)
    elif inner_a != inner:
        raise outline.fail(
            f"{module}: lora_A {[inner_a, cols]} and lora_B {[rows, inner]} are those of a "
            "MergedLinear; give its enable_lora: loratools convert … --enable-lora 1,0,1"
        )
    else:
        embedding = (
            context.base.is_embedding(module, (cols, rows))
            if context.base
            else named_embedding(module)
        )
        outline.add_lora(module, outline.same(a), outline.same(b), alpha, embedding=embedding)


def _add_merged(
    outline: Outline, module: str, a: str, b: str, alpha: float | None, blocks: list[int], rank: int
) -> None:
    """The blocks' products as one."""
    (inner_a, cols), (rows, inner), on = outline.shape(a), outline.shape(b), sum(blocks)
    if not on or inner_a != on * inner or rows % on or rank not in (0, inner):
        raise outline.fail(
            f"{module}: lora_A {[inner_a, cols]} and lora_B {[rows, inner]} do not fit a "
            f"MergedLinear with {on} enabled blocks"
        )
    out = rows // on * len(blocks)
    outline.blocks[module] = tuple(map(bool, blocks))
    if rank:
        A = reshaped(outline.recipe(outline.same(a), "first_rows", (rank,)), (rank, cols))
        B = reshaped(outline.recipe(outline.same(b), "placed_rows", tuple(blocks)), (out, rank))
    else:
        A = outline.same(a)
        B = reshaped(outline.recipe(outline.same(b), "block_rows", tuple(blocks)), (out, inner_a))
    outline.add_lora(module, A, B, alpha, of_rank=inner)


def _add_conv(
    outline: Outline,
    module: str,
    a: str,
    b: str,
    alpha: float | None,
    weight: tuple[int, ...],
    rank: int,
) -> None:
    """lora_B @ lora_A is the weight's elements in order; the channels tell the groups."""
    (inner, cols), (rows, inner_b) = outline.shape(a), outline.shape(b)
    kernel, runs = weight[-1], math.prod(weight[2:-1])
    groups, rest = divmod(cols, weight[1] * kernel)
    if (
        inner != inner_b
        or inner % kernel
        or rest
        or not groups
        or weight[0] % groups
        or rows != weight[0] // groups * runs
    ):
        raise outline.fail(
            f"{module}: lora_A {[inner, cols]} and lora_B {[rows, inner_b]} do not make a weight "
            f"{list(weight)}, of any number of groups"
        )
    common = math.gcd(groups, runs)
    width = rank or inner * (runs // common) * (groups // common)
    recipe, numbers = ("gathered", (groups, runs, rank)) if rank else ("kernel", (groups, runs))
    A = outline.recipe(outline.same(a), f"{recipe}_right", numbers)
    B = outline.recipe(outline.same(b), f"{recipe}_left", numbers)
    outline.add_lora(
        module,
        reshaped(A, (groups * width, groups * weight[1], *weight[2:])),
        reshaped(B, (weight[0], width, *[1] * len(weight[2:]))),
        alpha,
        of_rank=inner // kernel,
    )


class LoralibWriter(Keyed):
    """Writes one safetensors file: ``model.load_state_dict(load_file(path), strict=False)``."""

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._layers: dict[str, dict[str, Any]] = {}

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        self.named_alphas[factors.module] = factors.alpha
        layer: dict[str, Any] = {}
        if factors.blocks:
            layer["enable_lora"] = [int(on) for on in factors.blocks]
        if factors.spread:
            layer["rank"] = factors.spread
        if layer:
            self._layers[factors.module] = layer
        return {
            f"{factors.module}.lora_A": factors.lora_A,
            f"{factors.module}.lora_B": factors.lora_B,
        }

    def metadata(self) -> dict[str, str]:
        """With what loralib keeps in its user's code."""
        said = {LAYERS_METADATA: json.dumps(self._layers, sort_keys=True)} if self._layers else {}
        return {**super().metadata(), **said}


FORMAT = Format(
    "loralib",
    "loralib",
    frozenset({"embedding", "conv", "head"}),
    "module",
    "loralib 0.1.2",
    reads_besides="MergedLinear",
    own_forms=True,
    knows=knows,
    read=read,
    writer=LoralibWriter,
)
