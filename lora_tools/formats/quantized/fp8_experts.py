"""Experts in eight-bit floats: what shares a scale, of those in one tensor and of those one by one
whose scales are in one tensor.

transformers 5 fuses experts in memory, quantizes them so, and writes the codes one by one again by
the names of the original checkpoint (``…experts.3.gate_proj.weight``), but leaves the scales as
they are: ``…experts.gate_up_proj_scale_inv`` (E, ⌈2 · I/128⌉, ⌈H/128⌉) of all of them, those of
gate above those of up, and ``…experts.down_proj_scale_inv``. It reads that back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_tools.errors import CheckpointError
from lora_tools.formats.expert_names import ExpertName, expert_name
from lora_tools.formats.quantized.packed import ORIGINAL
from lora_tools.records import TensorSpec

Layout = tuple[tuple[int, int, int], tuple[int, int], str]  # grid, block, what to call it


def per_expert(
    codes: TensorSpec, given: tuple[int, ...], is_turned: bool, is_whole: bool
) -> Layout | None:
    """One scale for each of the matrices (E, rows, cols) of fused experts, or for each half of
    ``gate_up_proj``; or for each of their last dimension, as fbgemm has those of Llama 4.

    Args:
        given: the scale's shape.
        is_turned: scales (E, n, 1) are of the last dimension, too, as fbgemm's of ``down_proj``.
        is_whole: config.json says that there are no blocks.

    Raises:
        CheckpointError: scales (E, n) beside square matrices may be of their rows or columns; those
            of two projections, of two blocks of 128 rows.
    """
    if len(codes.shape) != 3:
        return None
    experts, rows, cols = codes.shape
    if given in ((experts,), (experts, 1), (experts, 1, 1)):
        return (experts, 1, 1), (rows, cols), "per expert"
    if given == (experts, 2, 1) and is_gate_up(codes) and rows % 2 == 0 and rows > 2:
        if not is_whole and _are_blocks(rows, cols):
            raise CheckpointError(
                f"{codes}: its scales {list(given)} may be for its two projections or for blocks "
                "of 128x128 numbers (weight_block_size in config.json, or null there, would show "
                f"it); {ORIGINAL}"
            )
        return (2 * experts, 1, 1), (rows // 2, cols), "per projection"
    if given == (experts, rows) and rows == cols:
        raise CheckpointError(
            f"{codes}: its scales {list(given)} may be for each expert's rows or columns "
            f"([{experts}, {rows}, 1] or [{experts}, 1, {cols}] would show it); {ORIGINAL}"
        )
    turned = (experts, cols, 1) if is_turned else (experts, 1, cols)
    if given in (turned, (experts, 1, cols)):
        return (experts, 1, cols), (rows, 1), "per channel"
    return None


def _are_blocks(rows: int, cols: int) -> bool:
    """Whether two scales would be of blocks of 128, other numbers than the two halves."""
    return 128 < rows < 256 and cols <= 128


def is_gate_up(codes: TensorSpec) -> bool:
    """Whether a tensor holds two projections of fused experts, one above the other."""
    return len(codes.shape) == 3 and codes.name.rpartition(".")[2] == "gate_up_proj"


def scale_of_all(
    codes: TensorSpec, specs: Mapping[str, TensorSpec], block: tuple[int, int] | None
) -> tuple[TensorSpec, Layout, tuple[int, int]] | None:
    """The scales of all experts that lie beside one expert's codes; what of them is its own: its
    layout, and (expert, first row of scales). None where there are none.

    Args:
        block: the size that config.json states; None where one scale is that of all of a matrix.

    Raises:
        CheckpointError: they are not of blocks of that size of such a matrix.
    """
    name = expert_name(codes.name)
    if name is None or name.number is None or len(codes.shape) != 2:
        return None
    fused, scale = next(_fused(name, specs), (name, None))
    if scale is None:
        return None
    rows, cols = codes.shape
    count, place = len(fused.projections), fused.projections.index(name.projections[0])
    high, wide = block or (count * rows, cols)
    down, across = -(count * rows // -high), -(cols // -wide)
    shape = (*scale.shape[:1], down, across)
    is_apart = down > 1 and count > 1  # then no block may lie in both projections
    if scale.shape != shape or name.number >= shape[0] or (is_apart and rows % high):
        raise CheckpointError(
            f"{scale}: the scales of all experts are expected to be of whole blocks of "
            f"{high}x{wide} numbers of {codes}, [experts, {down}, {across}]; is config.json of the "
            "same checkpoint?"
        )
    own = down // count if is_apart else down
    label = f"per block of {high}x{wide}" if block else "per expert"
    return scale, ((1, own, across), (high, wide), label), (name.number, place * own * is_apart)


def _fused(
    name: ExpertName, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[ExpertName, TensorSpec]]:
    for leaf in ("gate_up_proj", "up_proj", "down_proj"):
        fused = ExpertName(name.holder, None, leaf)
        scale = specs.get(f"{fused.tensor}_scale_inv")
        if scale is not None and name.projections[0] in fused.projections:
            yield fused, scale
