"""What every stored number format says of itself, and of one weight, whatever that is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lora_tools.records import TensorSpec


class PackedWeight(Protocol):
    """One weight that is stored as other numbers than its own, in one tensor or in several."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The stored tensors by what they are of it; the first lies where the weight would."""

    @property
    def plain(self) -> TensorSpec:
        """The weight as a plain checkpoint stores it: its name, dtype and shape."""

    @property
    def label(self) -> str:
        """How it is stored, in a word or two."""


class StoredFormat(Protocol):
    """A row of ``sources.schemes``, as far as it is known where its arithmetic is not."""

    @property
    def name(self) -> str:
        """A short one."""

    @property
    def title(self) -> str:
        """As people call it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Small files that say something of it, and do not go with plain numbers."""
