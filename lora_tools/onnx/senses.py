"""Inputs that are not text, or not only: images, sound, images beside texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_tools.onnx.tasks import AUDIO, IMAGE, Task

IMAGES, SOUND = "pixel_values", "input_values"


@dataclasses.dataclass(frozen=True)
class Sensed:
    """One input.

    Attributes:
        shape: of one row of the batch.
        axes: names of its dynamic dimensions; 0 is the batch.
        tokens: how many tokens there are; 0 of numbers, 2 of a mask.
    """

    shape: tuple[int, ...]
    axes: dict[int, str]
    tokens: int = 0


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) that the model takes; 224 x 224 where it takes any."""
    size = getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sensed(config: Any, task: Task, takes_mask: bool, length: int) -> dict[str, Sensed]:
    """The inputs of a task's graph by name.

    Args:
        takes_mask: of a model of images and texts.
        length: how many tokens, or frames of sound, there are of what may be of any length.
    """
    if task.kind == AUDIO:
        return {SOUND: _sound(config, length)}
    seeing = config if task.kind == IMAGE else config.vision_config
    shape = (getattr(seeing, "num_channels", 3), *image_size(seeing))
    if task.kind == IMAGE:
        return {IMAGES: Sensed(shape, {0: "batch"})}
    along = {0: "texts", 1: "sequence"}
    found = {"input_ids": Sensed((length,), along, config.text_config.vocab_size)}
    if takes_mask:
        found["attention_mask"] = Sensed((length,), along, 2)
    return found | {IMAGES: Sensed(shape, {0: "images"})}


def _sound(config: Any, frames: int) -> Sensed:
    """Samples of a wave of any length, or a spectrogram of the length that the model has."""
    if hasattr(config, "conv_stride"):
        each = math.prod(config.conv_stride)
        field = 1  # samples that the first frame is made of
        for kernel, stride in zip(
            reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
        ):
            field = (field - 1) * stride + kernel
        return Sensed((field + (frames - 1) * each,), {0: "batch", 1: "samples"})
    return Sensed((config.max_length, config.num_mel_bins), {0: "batch"})
