"""LyCORIS (lycoris-lora 4.1): LoCon, LoHa, LoKr and whole differences (``full``), read as the exact
LoRA each of them is; GLoRA, OFT, BOFT and IA³, which change the base's own weight; and what LyCORIS
and ComfyUI (``comfy/lora.py``) have beside: differences of norms and biases, and tensors that
replace the model's (``set_weight``).

Names are kohya's, or begin with ``lycoris_``. A LoHa of rank r is a LoRA of rank r² at most, a LoKr
one of the product of its two sides' ranks, a whole difference one of the weight's smaller side;
``linalg.recipes`` has the factors. The scaling is alpha / r with the r of the *file*; a LoKr of two
whole sides and a whole difference have scaling 1 and ignore alpha.
Files are written as LoCon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.changes import OF_LYCORIS, Change
from lora_tools.formats.adapters.format import READ, Format
from lora_tools.formats.adapters.kohya import (
    LORA_PARTS,
    KohyaWriter,
    add_locon,
    flat_name,
    magnitude,
    resolve_all,
    split,
)
from lora_tools.formats.adapters.outline import Compute, Context, Made, Outline, group_parts
from lora_tools.formats.names import split_tensor
from lora_tools.formats.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
# Parts that are whole tensors, and which one of the module they are for.
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
MODULATION = "diff_m"  # LightX2V's, of a tensor ``modulation`` of Wan
_SET = "set_weight"
OWN_PARTS = ("lora_mid.weight", *_HADA, *_KRON, *_DIFFERENCES, _SET)
# Of types that are made of the base's weight. (With dots a part ``weight`` is any module's, so that
# IA³ has no such names.)
_IA3 = ("weight", "on_input")
CHANGE_PARTS = tuple(
    sorted({part for _, must, may in OF_LYCORIS.values() for part in must | may} - {*_IA3, "alpha"})
)
PARTS = (*LORA_PARTS, *OWN_PARTS, *CHANGE_PARTS, *_IA3)
_TLORA = "T-LoRA, which adds to directions of the base's own weight"
# What LyCORIS has besides: parts of a key, and what they are refused as.
_OTHER = {
    "reshape_weight": "a weight of another shape than a model of this size has",
    **dict.fromkeys(("q_layer.weight", "p_layer.weight", "lambda_layer"), _TLORA),
    "scalar": "a trained scalar; save it with lycoris' own state_dict, which folds it in",
}


def knows(key: str) -> bool:
    """Whether a key is one of these: kohya's are all of them."""
    found = split(key)
    return found is not None and found[1] in (*PARTS, *_OTHER)


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "LyCORIS", context.base)
    for key in file.specs:
        found = split(key)
        if found is not None and found[1] in _OTHER:
            raise UnsupportedAdapter(
                f"{path}: {key}: holds {_OTHER[found[1]]}, which cannot be read"
            )
    modules = group_parts(outline, PARTS, split)
    names = resolve_all(outline, modules, context)
    for flat, keys in modules.items():
        add_module(outline, names[flat], keys, context)
    add_notes(outline)
    return outline


def _is_zero(outline: Outline, keys: Mapping[str, str]) -> bool:
    """Whether there is an alpha, and it is 0."""
    return "alpha" in keys and not outline.scalar(keys["alpha"])


def add_module(
    outline: Outline,
    module: str,
    keys: Mapping[str, str],
    context: Context,
    zero_is_rank: bool = True,
) -> None:
    """One module by its ``PARTS``.

    Raises:
        AdapterError, UnsupportedAdapter: they are none of a whole, or of several kinds.
    """
    base = context.base
    weight = base.weight(module) if base is not None else None
    shape = weight.shape if weight is not None else ()
    keys = _without_whole_tensors(outline, module, keys, base)
    if not keys.keys() - {"alpha"}:  # which no whole tensor is scaled by
        outline.used |= set(keys.values())
        return
    for (part, axes), row in OF_LYCORIS.items():
        if part in keys and axes in (0, len(outline.shape(keys[part]))):
            _add_change(outline, module, keys, *row)
            return
    if "diff" in keys:
        _add_full(outline, module, keys, shape)
    elif "hada_w1_a" in keys:
        _add_loha(outline, module, keys, shape)
    elif "lokr_w1" in keys or "lokr_w1_a" in keys:
        _add_lokr(outline, module, keys, shape)
    else:
        add_locon(outline, module, keys, zero_is_rank)
        if zero_is_rank and _is_zero(outline, keys):
            outline.zero.append(module)
        return
    if "diff" not in keys and _is_zero(outline, keys):
        outline.zero.append(module)
    if module in outline.ranks:
        outline.exact.append(outline.ranks[module])


def add_notes(outline: Outline) -> None:
    """Say which alphas were taken for the rank, and of what rank modules are that are no plain
    factors."""
    exact, zero = outline.exact, outline.zero
    if zero:
        outline.notes.append(
            f"{len(zero)} modules have an alpha of 0, such as {zero[0]}: the rank is used instead, "
            "as in LyCORIS (in ComfyUI they have no effect)"
        )
    if exact:
        ranks = f"{min(exact)} to {max(exact)}" if min(exact) < max(exact) else str(exact[0])
        outline.notes.append(
            f"{len(exact)} modules are LoHa, LoKr or whole differences. They become an exact LoRA "
            f"of rank {ranks}; --rank or --energy makes it smaller"
        )


def _without_whole_tensors(
    outline: Outline, module: str, keys: Mapping[str, str], base: BaseNames | None
) -> dict[str, str]:
    """The keys without those that are added to a tensor as they are, or put in its place. A whole
    difference of a matrix stays: it is a LoRA."""
    rest = {}
    for part, key in keys.items():
        is_weight = _DIFFERENCES.get(part, "weight") == "weight"
        alone = is_weight and base is not None and module in base.alone
        name = module if alone else f"{module}.{_DIFFERENCES.get(part, 'weight')}"
        if part == MODULATION:
            outline.add_difference(module, key)
        elif part == _SET:
            outline.add_saved(name, key)
        elif part in _DIFFERENCES and (part != "diff" or alone or len(outline.shape(key)) < 2):
            outline.add_difference(name, key)
        else:
            rest[part] = key
    is_whole = _SET in keys or f"{module}.weight" in outline.differences
    if is_whole and rest.keys() - {"alpha"}:
        raise outline.fail(
            f"{module}: has {', '.join(sorted(keys))}, and each of them defines the whole change; "
            "remove the wrong one"
        )
    return rest


def _add_full(
    outline: Outline, module: str, keys: Mapping[str, str], weight: tuple[int, ...]
) -> None:
    """A whole difference is a product with the identity, on its smaller side."""
    diff = keys["diff"]
    shape = outline.shape(diff)
    if set(keys) - {"diff", "alpha"}:
        raise UnsupportedAdapter(
            f"{outline.path}: {diff}: a whole difference beside {', '.join(sorted(keys))} cannot "
            "be read"
        )
    size = shape[0], math.prod(shape[1:])
    _add_exact(
        outline,
        module,
        {"diff": diff},
        weight or shape,
        size,
        min(size),
        0,
        lambda shape: outline.computed(shape, (diff,), "whole_left"),
        lambda shape: outline.computed(shape, (diff,), "whole_right"),
    )
    outline.used |= set(keys.values())


def _add_change(
    outline: Outline,
    module: str,
    keys: Mapping[str, str],
    kind: Change,
    must: Set[str],
    may: Set[str],
) -> None:
    """One of LyCORIS' types that are made of the base's weight. Without an alpha it is 0."""
    if not must <= keys.keys() <= must | may:
        raise outline.fail(f"{module}: has {sorted(keys)}, which is no whole {kind.title}")
    alpha = outline.scalar(keys["alpha"]) if "alpha" in keys else 0.0
    parts = {part: outline.same(key) for part, key in keys.items() if part != "alpha"}
    outline.add_change(module, kind, parts, {"alpha": alpha})


def _add_loha(
    outline: Outline, module: str, keys: Mapping[str, str], weight: tuple[int, ...]
) -> None:
    missing = [part for part in _HADA[:4] if part not in keys]
    if missing or ("hada_t1" in keys) != ("hada_t2" in keys):
        raise outline.fail(f"{module}: has {sorted(keys)}, which is not a complete LoHa")
    w1a, w1b, w2a, w2b = (keys[part] for part in _HADA[:4])
    tucker, lower = "", [w1b, w2b]
    out, cols = outline.shape(w1a)[0], outline.shape(w1b)[1]
    ranks = outline.shape(w1b)[0], outline.shape(w2b)[0]
    if "hada_t1" in keys:
        t1, t2 = keys["hada_t1"], keys["hada_t2"]
        tucker, lower = "_tucker", [t1, w1b, t2, w2b]
        out, cols = outline.shape(w1a)[1], cols * math.prod(outline.shape(t1)[2:])
        ranks = outline.shape(t1)[0], outline.shape(t2)[0]
    _add_exact(
        outline,
        module,
        keys,
        weight,
        (out, cols),
        math.prod(ranks),
        ranks[0],
        lambda shape: outline.computed(shape, (w1a, w2a), f"hadamard_left{tucker}"),
        lambda shape: outline.computed(shape, lower, f"hadamard_right{tucker}"),
    )


def _add_lokr(
    outline: Outline, module: str, keys: Mapping[str, str], weight: tuple[int, ...]
) -> None:
    sides: list[tuple[str, ...]] = []
    inner, sizes, file_rank = 1, [1, 1], 0
    used: tuple[str, ...]
    for side in ("lokr_w1", "lokr_w2"):
        whole, a, b = keys.get(side), keys.get(f"{side}_a"), keys.get(f"{side}_b")
        t = keys.get("lokr_t2") if side == "lokr_w2" else None
        if whole and not (a or b or t):
            used, (rows, *rest) = (whole,), outline.shape(whole)
            cols = math.prod(rest)
            inner *= min(rows, cols)
        elif a and b and not whole:
            used = (t, a, b) if t else (a, b)
            rank = outline.shape(b)[0]
            rows = outline.shape(a)[1 if t else 0]
            cols = outline.shape(b)[1] * (math.prod(outline.shape(t)[2:]) if t else 1)
            inner *= rank
            file_rank = file_rank or rank
        else:
            raise outline.fail(f"{module}: has {sorted(keys)}, which is not a complete LoKr")
        sides.append(used)
        sizes = [sizes[0] * rows, sizes[1] * cols]
    given = (*sides[0], *sides[1])
    numbers = (len(sides[0]), len(sides[1]))
    _add_exact(
        outline,
        module,
        keys,
        weight,
        (sizes[0], sizes[1]),
        inner,
        file_rank,
        lambda shape: outline.computed(shape, given, "kronecker_left", numbers),
        lambda shape: outline.computed(shape, given, "kronecker_right", numbers),
    )


def _add_exact(
    outline: Outline,
    module: str,
    keys: Mapping[str, str],
    weight: tuple[int, ...],
    size: tuple[int, int],
    rank: int,
    file_rank: int,
    left: Callable[[tuple[int, ...]], Made],
    right: Callable[[tuple[int, ...]], Made],
) -> None:
    """Exact factors (out, rank) and (rank, in·∏k) of a delta whose scaling is alpha / file_rank (1
    where that is 0)."""
    out, cols = size
    weight = weight or (out, cols)  # where it is read as stored
    if (weight[0], math.prod(weight[1:])) != (out, cols):
        raise outline.fail(
            f"{module}: its delta is {out} x {cols}, and the base's weight is {list(weight)}"
        )
    kernel = weight[2:]
    alpha = outline.scalar(keys["alpha"]) if "alpha" in keys else 0.0
    if not (file_rank and alpha):  # two whole sides; and LyCORIS takes an alpha of 0 for the rank
        alpha, file_rank = float(rank), rank
    outline.add_lora(
        module,
        right((rank, *weight[1:])),
        left((out, rank, *[1] * len(kernel))),
        alpha,
        magnitude=magnitude(outline, module, keys),
        of_rank=file_rank,
    )


class LycorisWriter(KohyaWriter):
    """LoCon, under the names that ``create_lycoris_from_weights`` looks for."""

    placing = False

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._norms: dict[str, set[str]] = {}  # the parameters written, by module

    def add_difference(self, name: str, tensor: torch.Tensor) -> None:
        """A norm's, of its weight or its bias. Raises UnsupportedAdapter."""
        module, parameter = split_tensor(name)
        part = {"weight": "w_norm", "bias": "b_norm"}.get(parameter)
        if part is None:
            raise UnsupportedAdapter(
                f"{name}: LyCORIS has no key for its change; --drop differences leaves it out"
            )
        self._norms.setdefault(module, set()).add(parameter)
        self.add_key(f"{flat_name(module, None)}.{part}", tensor)

    def finish(self) -> None:
        """Write the file. Raises UnsupportedAdapter."""
        for module, parameters in self._norms.items():
            if parameters == {"bias"}:
                raise UnsupportedAdapter(
                    f"{module}.bias: LyCORIS reads the change of a norm's bias only together with "
                    "that of its weight; --drop differences leaves it out"
                )
        super().finish()


FORMAT = Format(
    "lycoris",
    "LyCORIS",
    frozenset({"conv", "dora", "head", "differences"}),
    "module",
    "lycoris-lora 4.1",
    mixes_dora=True,
    base=READ,
    reads_besides="LoHa, LoKr, whole differences, those of norms and biases, CP-decomposed LoCon; "
    "GLoRA, OFT, BOFT, IA³ (merge, or to LoRA)",
    marks=("lora", "lycoris"),
    knows=knows,
    read=read,
    writer=LycorisWriter,
)
