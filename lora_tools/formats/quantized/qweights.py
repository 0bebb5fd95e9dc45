"""Linear layers in groups of few bits, as ``qweight``, ``qzeros`` and ``scales``: what GPTQ and AWQ
have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.packed import FETCH, Packed
from lora_tools.records import TensorSpec

QWEIGHT, QZEROS, SCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
_MARKS = (QZEROS, G_IDX)  # names that nothing else has
FLOATS = ("F16", "BF16", "F32")


@dataclasses.dataclass(frozen=True)
class QWeight(Packed):
    """One such weight.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, where groups lie side by side.
        transposed: a plain checkpoint stores it as (in, out).
        offset: what is added to stored zero points.
        symmetric: its zero points are all 2^(bits − 1), or readers disagree.
    """

    bits: int
    group: int
    transposed: bool = False
    offset: int = 0
    symmetric: bool = False


def layers(
    specs: Mapping[str, TensorSpec], needed: Sequence[str], known: Sequence[str]
) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
    """Each module that has a ``qweight``, and its tensors of the names in ``known``.

    Raises:
        CheckpointError: one of ``needed`` is missing, or is left over, as scales of activations
            are; a part has a shape or dtype that none can have; the plain weight lies there as
            well.
    """
    modules = [name[: -len(QWEIGHT) - 1] for name in specs if name.endswith(f".{QWEIGHT}")]
    for name in specs:
        stem, _, last = name.rpartition(".")
        if last in _MARKS and f"{stem}.{QWEIGHT}" not in specs:
            raise CheckpointError(f"{name}: {stem}.{QWEIGHT} is missing beside it; {FETCH}")
        if last == SCALES and modules and f"{stem}.{QWEIGHT}" not in specs:
            raise CheckpointError(
                f"{name}: scales without {stem}.{QWEIGHT}; if they are for activations (AWQ's of "
                f"mlp.act), a plain model cannot have them and would compute other numbers; {FETCH}"
            )
    for module in modules:
        if f"{module}.weight" in specs:
            raise CheckpointError(
                f"{module}: has both a weight and a {QWEIGHT}; remove the wrong one"
            )
        parts = {p: specs[f"{module}.{p}"] for p in known if f"{module}.{p}" in specs}
        for part in needed:
            if part not in parts:
                raise CheckpointError(f"{module}.{part}: missing beside {QWEIGHT}; {FETCH}")
        for part in (QWEIGHT, QZEROS, SCALES):
            check(parts[part], FLOATS if part == SCALES else ("I32",), None)
        yield module, parts


def check(spec: TensorSpec, dtypes: Sequence[str], shape: tuple[int, ...] | None) -> None:
    """Raises CheckpointError for a tensor of another dtype or shape; None is any matrix."""
    fits = spec.shape == shape if shape is not None else len(spec.shape) == 2
    if spec.dtype not in dtypes or not fits or 0 in spec.shape:
        wanted = list(shape) if shape is not None else "a matrix"
        raise CheckpointError(
            f"{spec.name}: {' or '.join(dtypes)} {wanted} is expected, found {spec.dtype} "
            f"{list(spec.shape)}; {FETCH}"
        )
