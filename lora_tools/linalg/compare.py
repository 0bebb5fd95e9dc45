"""Is one tensor another one plus a change, to rounding? Sums over runs of rows."""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_tools.linalg import noise


@dataclasses.dataclass
class Match:
    """What is known of a stored tensor S against its base W and a change Δ, run by run.

    Attributes:
        once: elements that are W + Δ, rounded once: this tool's merge, and PEFT's
            ``merge_and_unload`` of a float32 adapter where that is into half precision.
        twice: elements that are W + round(Δ), rounded again: PEFT's with ``safe_merge``, or of an
            adapter in half precision.
        outside: elements further from W + Δ than two roundings can take them.
        moved, along, change: ‖S − W‖², ⟨S − W, Δ⟩ and ‖Δ‖².
    """

    numel: int = 0
    once: int = 0
    twice: int = 0
    outside: int = 0
    moved: float = 0.0
    along: float = 0.0
    change: float = 0.0

    def add(
        self, stored: torch.Tensor, base: torch.Tensor, merged: torch.Tensor, slack: torch.Tensor
    ) -> None:
        """One run of rows: S in its own dtype, W and W + Δ in the working dtype, and how far
        another order of summation can take W + Δ."""
        change = merged - base
        low = stored.dtype
        wide = stored.to(merged.dtype)
        self.numel += stored.numel()
        self.once += int((merged.to(low) == stored).sum())
        self.twice += int(((base + change.to(low).to(base.dtype)).to(low) == stored).sum())
        allowed = noise.spacing(stored).to(merged.dtype)
        allowed += noise.spacing(change.to(low)).to(merged.dtype)
        near = (wide - merged).abs() <= allowed * 0.505 + slack  # never where there is a NaN
        self.outside += int((~near).sum())
        step, change = (wide - base).double(), change.double()
        self.moved += float(step.square().sum())
        self.along += float((step * change).sum())
        self.change += float(change.square().sum())

    @property
    def coefficient(self) -> float:
        """The c for which S − W is nearest to c · Δ."""
        return self.along / self.change if self.change else math.nan

    @property
    def unexplained(self) -> float:
        """‖S − W − c·Δ‖ / ‖S − W‖ for that c."""
        if not self.moved:
            return 0.0
        explained = self.along**2 / self.change if self.change else 0.0
        return math.sqrt(max(1 - explained / self.moved, 0.0))

    def __add__(self, other: Match) -> Match:
        fields = dataclasses.fields(Match)
        return Match(*(getattr(self, f.name) + getattr(other, f.name) for f in fields))


@dataclasses.dataclass
class Coded:
    """What is known of numbers Ŵ read back from four bits against those they should stand for.

    W are the numbers to be quantized, P what plain quantization makes of them, run by run.

    Attributes:
        off: numbers further from W than P is, by more than a hundredth of their block's largest
            magnitude: another rounding of a scale does not take them there, another code does.
        error, own, energy, held: ‖Ŵ − W‖², ‖P − W‖², ‖W‖² and ‖Ŵ‖².
        moved, along, change: ‖Ŵ − W₀‖², ⟨Ŵ − W₀, Δ⟩ and ‖Δ‖² where W is W₀ + Δ.
    """

    numel: int = 0
    off: int = 0
    error: float = 0.0
    own: float = 0.0
    energy: float = 0.0
    held: float = 0.0
    moved: float = 0.0
    along: float = 0.0
    change: float = 0.0

    def add(
        self,
        wanted: torch.Tensor,
        stored: torch.Tensor,
        plain: torch.Tensor,
        blocksize: int,
        base: torch.Tensor | None,
    ) -> None:
        """One run (n,) of W, Ŵ, P and perhaps W₀, from the start of a block, all in float32."""
        off, own = (stored - wanted).abs_(), (plain - wanted).abs_()
        self.numel += wanted.numel()
        self.error += float(off.double().square_().sum())
        self.own += float(own.double().square_().sum())
        self.energy += float(wanted.double().square().sum())
        self.held += float(stored.double().square().sum())
        self.off += _beyond(off, own, wanted, blocksize)
        if base is not None:
            step, change = (stored - base).double(), (wanted - base).double()
            self.moved += float(step.square().sum())
            self.along += float((step * change).sum())
            self.change += float(change.square().sum())

    @property
    def coefficient(self) -> float:
        """The c for which Ŵ − W₀ is nearest to c · Δ."""
        return self.along / self.change if self.change else math.nan

    @property
    def unexplained(self) -> float:
        """‖Ŵ − W₀ − c·Δ‖² for that c."""
        explained = self.along**2 / self.change if self.change else 0.0
        return max(self.moved - explained, 0.0)

    @property
    def relative_error(self) -> float:
        """‖Ŵ − W‖ / ‖W‖."""
        return math.sqrt(self.error / self.energy) if self.energy else math.sqrt(self.error)

    @property
    def own_error(self) -> float:
        """‖P − W‖ / ‖W‖."""
        return math.sqrt(self.own / self.energy) if self.energy else 0.0

    def __add__(self, other: Coded) -> Coded:
        fields = dataclasses.fields(Coded)
        return Coded(*(getattr(self, f.name) + getattr(other, f.name) for f in fields))


def _beyond(off: torch.Tensor, own: torch.Tensor, wanted: torch.Tensor, blocksize: int) -> int:
    """How many of |Ŵ − W|, (n,), exceed |P − W| by over a hundredth of the block's largest |W|."""
    near = off <= own + 0.01 * _per_block(wanted, blocksize)  # never where there is a NaN
    return int((~near).sum())


def _per_block(x: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The largest magnitude of each number's block, (n,)."""
    full = x.numel() // blocksize * blocksize
    largest = [x[:full].view(-1, blocksize).abs().amax(1)] if full else []
    largest += [x[full:].abs().amax().reshape(1)] if full < x.numel() else []
    return torch.cat(largest).repeat_interleave(blocksize)[: x.numel()]


def further_off(
    step: torch.Tensor, own: torch.Tensor, wanted: torch.Tensor, block: int, bits: int, flat: bool
) -> int:
    """How many numbers lie further from those they stand for than quantizing puts them.

    Args:
        step, own, wanted: Ŵ − W, P − W and W, (out, in), P what quantizing makes of W.
        flat: blocks over the flattened weight, coded by a codebook: a hundredth of the largest
            magnitude is allowed beside. Else along rows, coded by whole numbers of ``bits`` bits
            over the range of the block and 0: a seventh of a step.
    """
    if flat:
        off, least = step.reshape(-1).abs(), own.reshape(-1).abs()
        return _beyond(off, least, wanted.reshape(-1), block)
    padded = torch.nn.functional.pad(wanted, (0, -wanted.shape[1] % block))
    blocks = padded.view(wanted.shape[0], -1, block)
    span = blocks.amax(2).clamp_min(0) - blocks.amin(2).clamp_max(0)
    steps = (span / (2**bits - 1)).repeat_interleave(block, 1)[:, : wanted.shape[1]]
    return int((~(step.abs() <= own.abs() + steps / 7)).sum())
