"""The values that codes of few bits stand for: the 4-bit codebooks of bitsandbytes, and the signed
8-bit dynamic map (arXiv 1511.04561) that it stores scales in."""

from __future__ import annotations

import base64
import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """16 values, ``values[code]``, in the order of their codes; ``name`` is bitsandbytes'."""

    name: str
    values: tuple[float, ...]

    @property
    def table(self) -> Array:
        """The values, (16,) float32, as ``quant_map`` holds them."""
        return np.array(self.values, np.float32)

    @functools.cached_property
    def order(self) -> Array:
        """Codes (16,) by ascending value; of equal values the lower code first."""
        return np.argsort(self.table, kind="stable").astype(np.uint8)

    @functools.cached_property
    def midpoints(self) -> Array:
        """(15,) float32 halfway between neighbours; what lies on one belongs to the lower."""
        ascending = self.table[self.order]
        return (ascending[:-1] + ascending[1:]) / np.float32(2)

    @functools.cached_property
    def pairs(self) -> Array:
        """(256,) of complex64, which stands for two float32: the values of each byte's halves."""
        byte = np.arange(256)
        both = np.stack((self.table[byte >> 4], self.table[byte & 15]), 1)
        return np.ascontiguousarray(both).view(np.complex64).reshape(-1)


CODEBOOKS: dict[str, Codebook] = {
    book.name: book
    for book in (
        Codebook(
            "nf4",
            (
                -1.0,
                -0.6961928009986877,
                -0.5250730514526367,
                -0.39491748809814453,
                -0.28444138169288635,
                -0.18477343022823334,
                -0.09105003625154495,
                0.0,
                0.07958029955625534,
                0.16093020141124725,
                0.24611230194568634,
                0.33791524171829224,
                0.44070982933044434,
                0.5626170039176941,
                0.7229568362236023,
                1.0,
            ),
        ),
        Codebook(
            "fp4",
            (
                0.0,
                0.0625 / 12,
                8 / 12,
                1.0,
                4 / 12,
                6 / 12,
                2 / 12,
                3 / 12,
                0.0,
                -0.0625 / 12,
                -8 / 12,
                -1.0,
                -4 / 12,
                -6 / 12,
                -2 / 12,
                -3 / 12,
            ),
        ),
    )
}

# The dynamic map's 127 values between 0 and 1, float32, little-endian: computing them anew gives
# other last bits on other processors.
_DYNAMIC = base64.b64decode(
    "t6MTNZQaWjb/BQI3BkKyNzSANziz74o4Sx+6OAvXIzkF54w5g+LHOQFvATrB7B46gGo8Oj7oWTr/ZXc6ne+nOvyp8Tot"
    "sh07XI9CO4psZzvdJIY7dJOYOw0CqzukcL07O9/PO9NN4jtqvPQ7gZUDPM3MDDwYBBY8ZDsfPEjhOjzD9Wg8H4WLPF2P"
    "ojyambk816PQPBWu5zxSuP48SOEKPWdmFj2F6yE9o3AtPcP1OD3hekQ9AABQPR+FWz09Cmc9XY9yPXsUfj3NzIQ9XY+K"
    "PetRkD17FJY9CtebPZqZoT0qXKc9uB6tPUjhsj3Xo7g9Z2a+PfcoxD2F68k9NDPbPQAA+D1mZgo+zcwYPjMzJz6amTU+"
    "AABEPmZmUj7NzGA+MzNvPpmZfT4AAIY+NDONPmZmlD6amZs+zMyiPgAAqj4zM7E+Zma4PpqZvz7MzMY+AADOPjMz1T5m"
    "Ztw+mpnjPszM6j4AAPI+MjP5PjMzAD/MzAM/ZmYHPwAACz+amQ4/NDMSP83MFT9mZhk/AAAdP5qZID80MyQ/zcwnP2Zm"
    "Kz8AAC8/mpkyPzQzNj/NzDk/ZmY9PwAAQT+amUQ/MzNIP83MSz9mZk8/AABTP5qZVj8zM1o/zcxdP2ZmYT8AAGU/mplo"
    "PzMzbD/NzG8/ZmZzPwAAdz+amXo/MzN+Pw=="
)


@functools.cache
def dynamic_map() -> Array:
    """(256,) float32, ascending: bitsandbytes' signed eight-bit dynamic data type."""
    inner = np.frombuffer(_DYNAMIC, "<f4").astype(np.float32)
    return np.concatenate((-inner[::-1], [np.float32(0)], inner, [np.float32(1)]))


@functools.cache
def dynamic_codes() -> Array:
    """(65536,) codes of the dynamic map for as many equal steps from -1 to 1: bitsandbytes' CPU
    encoder looks up the step a number falls on, which is not always its nearest value."""
    steps = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    codes = dynamic_map()
    midpoints = np.float32(0.5) * (codes[:-1] + codes[1:])
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)
