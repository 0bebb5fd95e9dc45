"""Sequences of calls of a model, and what they gave: alike in torch and in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Arrays = dict[str, Any]


@dataclasses.dataclass
class Run:
    """One sequence of calls.

    Attributes:
        inputs: of the first call; further calls take ``steps`` more tokens each, or with
            ``generate`` and no steps the likeliest token of the call before.
    """

    name: str
    inputs: Arrays
    steps: Sequence[Any] = ()
    generate: int = 0

    def visible(self, step: int, mine: Any, theirs: Any) -> tuple[Any, Any]:
        """Both arrays without the positions of the first call that are padding."""
        mask = self.inputs.get("attention_mask")
        if mask is None or step or mine.ndim != 3 or mine.shape[:2] != mask.shape:
            return mine, theirs
        return mine[mask.astype(bool)], theirs[mask.astype(bool)]

    def at_once(self, tokens: Sequence[int]) -> Run:
        """One call with all the tokens of this run, those that were generated too."""
        generated = [np.array([tokens[:-1]], np.int64)] if tokens else []
        new = list(self.steps) or generated
        inputs = dict(self.inputs)
        key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        for each in new:
            inputs[key] = np.concatenate([inputs[key], each], 1)
            if key == "input_ids":
                mask = inputs["attention_mask"]
                inputs["attention_mask"] = np.concatenate([mask, np.ones_like(each)], 1)
        return Run(self.name, inputs)

    def forced(self, tokens: Sequence[int]) -> Run:
        """The same calls with these tokens, whichever the likeliest are."""
        steps = [np.array([[token]]) for token in tokens[:-1]]
        return dataclasses.replace(self, steps=steps) if self.generate else self


def relative_difference(found: Any, wanted: Any) -> float:
    """The greatest difference of two arrays of equal shape, in units of the largest element of
    ``wanted``, or of 1 where that is 0."""
    largest = float(np.abs(wanted).max(initial=0.0))
    return float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0)) / (largest or 1.0)


@dataclasses.dataclass
class Played:
    """What a run gave: outputs by name for each call, and the tokens generated."""

    outputs: list[Arrays] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def positions(mask: Any, length: int) -> Any:
    """Position ids of the last ``length`` places of an attention mask, left padding counted out."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -length:]
