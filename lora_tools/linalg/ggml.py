"""Numbers out of the blocks of ggml's types, by the ``gguf`` package."""

from __future__ import annotations

import math

import numpy as np
import torch

_AT_ONCE = 1 << 22  # numbers decoded in one go
_FEW = 1 << 17  # and where several copies of them are looked at, which a cache holds
# Types whose blocks hold numbers at equal distances: where in a block their codes lie, and how many
# distances lie between codes of zero bits and of one bits (of a signed byte, 0 and -1).
_EVEN = {
    "Q4_0": (2, 18, 15),
    "Q4_1": (4, 20, 15),
    "Q5_0": (2, 22, 31),
    "Q5_1": (4, 24, 31),
    "Q8_0": (2, 34, 1),
    "Q2_K": (16, 80, 3),
    "Q3_K": (0, 96, 7),
    "Q4_K": (16, 144, 15),
    "Q5_K": (16, 176, 31),
    "Q6_K": (0, 192, 63),
}
# Types with a codebook of sixteen numbers: where the codes lie, and which are the least and the
# largest number, twice in a byte.
_BOOKS = {
    "IQ4_NL": (2, 18, 0x00, 0xFF),
    "IQ4_XS": (8, 136, 0x00, 0xFF),
    "MXFP4": (1, 17, 0xFF, 0x77),
    "NVFP4": (4, 36, 0xFF, 0x77),
}


def dequantize(rows: torch.Tensor, name: str, out: torch.Tensor) -> None:
    """Fill ``out`` (n, cols) with the numbers of ``rows`` (n, bytes of a row) uint8, in float32 and
    rounded once, bit for bit as ``gguf.quants.dequantize``."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    step = max(1, _AT_ONCE // max(out.shape[1], 1))
    with np.errstate(all="ignore"):  # what is not finite is found by who asked
        for start in range(0, out.shape[0], step):
            piece = np.ascontiguousarray(rows[start : start + step].numpy())
            out[start : start + step] = torch.from_numpy(gguf.quants.dequantize(piece, kind))


def tells_rounding(name: str) -> bool:
    """Whether ``rounding`` knows a type. Not of codebooks of several numbers each (IQ1 to IQ3),
    whose choice went by weights that no file has, nor of three values (TQ), which numbers may have
    been trained to have."""
    return name in _EVEN or name in _BOOKS


def rounding(rows: torch.Tensor, name: str) -> float:
    """E‖E‖²_F, what rounding to the type is expected to have cost (see ``linalg.noise``), of
    ``rows`` (n, bytes of a row) uint8; NaN where that is not known.

    Distances are those of the package's own numbers for the least and the largest code of each
    place, so that no order of scales or bits is known here.
    """
    import gguf

    from lora_tools.linalg.noise import rounding_errors
    from lora_tools.linalg.truncation import sum_of_squares

    if not tells_rounding(name):
        return math.nan
    kind = gguf.GGMLQuantizationType[name]
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    held = getattr(gguf.quants, name.replace("_XS", "_NL")).kvalues if name in _BOOKS else ()
    book = torch.tensor(sorted(set(held)), dtype=torch.float32)
    if len(book):
        first, last, least, most = _BOOKS[name]
        steps = float(book[-1] - book[0])
    else:
        (first, last, steps), least, most = _EVEN[name], 0x00, 0xFF

    def decoded(piece: torch.Tensor, code: int | None = None) -> torch.Tensor:
        if code is not None:
            piece = piece.clone()
            piece[:, first:last] = code
        row = piece.reshape(1, -1).numpy()  # the package takes few rows in one go
        with np.errstate(all="ignore"):  # what is not finite is found by who decodes
            return torch.from_numpy(gguf.quants.dequantize(row, kind))

    errors, middles = rounding_errors(book).sqrt().float(), (book[1:] + book[:-1]) / 2
    total = 0.0
    for piece in torch.split(rows.reshape(-1, nbytes), max(1, _FEW // numbers)):
        unit = decoded(piece, most).sub_(decoded(piece, least)).div_(steps)
        if len(book):
            unit *= errors[torch.searchsorted(middles, decoded(piece).div_(unit))]
        total += sum_of_squares(unit)
    return total if len(book) else total / 12


def half_from_interleaved(first: int, stop: int, rows: int, heads: int) -> torch.Tensor:
    """Where rows [first, stop) of a weight, whose rotary heads are two halves each, stand among
    ``rows`` that alternate between the halves."""
    half = rows // heads // 2
    wanted = torch.arange(first, stop)
    head, place = wanted // (2 * half), wanted % (2 * half)
    return head * 2 * half + place % half * 2 + place // half
