"""A checkpoint run by transformers, on inputs that a graph can be given, too."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_tools.onnx.foreign import run_by
from lora_tools.onnx.model import loaded
from lora_tools.onnx.parts import decoder_inputs, is_speech, speech_shape, takes, text_inputs
from lora_tools.onnx.precise import in_float64
from lora_tools.onnx.precision import FLOAT32
from lora_tools.onnx.rounding import rounded_otherwise
from lora_tools.onnx.runs import Arrays, Played, Run, positions
from lora_tools.onnx.senses import sensed
from lora_tools.onnx.sentence_modules import run
from lora_tools.onnx.tasks import DECODER, ENCODER_DECODER, SENSED, Task

_LENGTHS = (7, 13)  # of a single sequence and of the longest in a batch of three
_STEPS = 3
_RUN = "does not run in torch"


class InTorch:
    """A checkpoint run by transformers."""

    def __init__(
        self, folder: Path, task: Task, trust_remote_code: bool, dtype: str = FLOAT32
    ) -> None:
        self.task = task
        self.model: Any = loaded(folder, task, trust_remote_code, dtype)
        self._dtype = getattr(torch, dtype)
        self.config = self.model.config
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the others know no float64

    def close(self) -> None:
        """Give the memory back."""
        self.model = None
        gc.collect()  # models hold references to themselves

    def runs(self, cache: bool, generate: int) -> list[Run]:
        """The inputs, random but always the same. Raises CheckpointError: see ``run_by``."""
        with run_by(self.model, _RUN):
            return self._runs(cache, generate)

    def _runs(self, cache: bool, generate: int) -> list[Run]:
        dice = np.random.default_rng(0)
        config = self.config
        if self.task.kind in SENSED:
            return self._sensed(dice)
        vocabulary = config.get_text_config(decoder=True).vocab_size

        def tokens(*shape: int) -> Any:
            return dice.integers(0, vocabulary, shape)

        if self.task.kind == ENCODER_DECODER and is_speech(self.model):
            return [
                Run(
                    f"batch {n}",
                    {
                        "input_features": _noise(dice, n, *speech_shape(config)),
                        "decoder_input_ids": tokens(n, 3),
                    },
                    [tokens(n, 1) for _ in range(_STEPS)],
                )
                for n in (1, 2)
            ]
        runs = []
        for batch, length in zip((1, 3), self._lengths(), strict=True):
            ids, mask = tokens(batch, length), np.ones((batch, length), np.int64)
            for row in range(1, batch):  # padded on the left for decoders, on the right for others
                pad = slice(0, 2 * row) if self.task.kind == DECODER else slice(-2 * row, None)
                mask[row, pad] = 0
            inputs = {"input_ids": ids, "attention_mask": mask}
            if self.task.kind not in (DECODER, ENCODER_DECODER):
                for name in text_inputs(self.model)[2:]:
                    inputs[name] = dice.integers(0, 2, ids.shape)
            if self.task.kind == ENCODER_DECODER:
                inputs["decoder_input_ids"] = tokens(batch, 3)
            stepping = (self.task.kind == DECODER and cache) or self.task.kind == ENCODER_DECODER
            steps = [tokens(batch, 1) for _ in range(_STEPS if stepping else 0)]
            runs.append(Run(f"batch {batch}", inputs, steps))
        if self.task.kind == DECODER and cache and generate:
            ids = tokens(1, self._lengths()[0])
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            runs.append(Run("generation", inputs, generate=generate))
        return runs

    def _sensed(self, dice: np.random.Generator) -> list[Run]:
        """Of images and texts there are not as many."""
        runs, masked = [], takes(self.model, "attention_mask")
        for rows, length in zip((1, 3), _LENGTHS, strict=True):
            inputs: Arrays = {}
            for name, given in sensed(self.config, self.task, masked, length).items():
                shape = (rows + (given.axes[0] == "texts"), *given.shape)
                tokens = dice.integers(0, given.tokens, shape) if given.tokens else None
                inputs[name] = _noise(dice, *shape) if tokens is None else tokens
            if "attention_mask" in inputs:
                inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
                inputs["attention_mask"][1:, -2:] = 0  # padded on the right
            runs.append(Run(f"batch {rows}", inputs))
        return runs

    def _lengths(self) -> tuple[int, int]:
        """Past the end of a sliding window, where one is short enough to get there."""
        window = getattr(self.config.get_text_config(decoder=True), "sliding_window", None) or 0
        longer = window if 0 < window <= 512 else 0
        return _LENGTHS[0] + longer, _LENGTHS[1] + longer

    def play(self, run: Run, exact: bool = False, seed: int | None = None) -> Played:
        """Call the model as transformers' own generation does.

        Args:
            exact: compute in float64.
            seed: round otherwise than float32 does, at random.

        Raises:
            CheckpointError: its code fails, naming the module.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_by(self.model, _RUN))
            if exact:
                stack.enter_context(in_float64())
            if seed is not None:
                stack.enter_context(rounded_otherwise(self.model, seed))
            return self._play(run)

    def _play(self, run: Run) -> Played:
        played = Played()
        given: dict[str, Any] = {name: self._numbers(value) for name, value in run.inputs.items()}
        recurrent = bool(run.steps) or run.generate > 0
        if self.task.kind == DECODER and "position_ids" in decoder_inputs(self.model):
            mask = run.inputs["attention_mask"]
            given["position_ids"] = torch.from_numpy(positions(mask, mask.shape[1]))
        if self.task.kind in (DECODER, ENCODER_DECODER):
            given["use_cache"] = recurrent
        calls = run.generate or 1 + len(run.steps)
        with torch.no_grad():
            for call in range(calls):
                result = self.model(**given, return_dict=True)
                played.outputs.append(self._outputs(result, given))
                if run.generate:
                    played.tokens.append(int(result.logits[0, -1].argmax()))
                if call + 1 < calls:
                    given = self._next(run, given, result, call, played.tokens)
        return played

    def _numbers(self, value: Any) -> torch.Tensor:
        tensor = torch.from_numpy(value)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _outputs(self, result: Any, given: Mapping[str, Any]) -> Arrays:
        if self.task.steps:
            hidden, mask = result["last_hidden_state"].float(), given["attention_mask"]
            made = run(self.model, self.task.steps, hidden, mask)
            return {name: _array(made[name]) for name in self.task.outputs}
        names = ("logits",) if self.task.kind in (DECODER, ENCODER_DECODER) else self.task.outputs
        outputs = {name: _array(result[name]) for name in names}
        if self.task.kind == ENCODER_DECODER:
            outputs["last_hidden_state"] = _array(result.encoder_last_hidden_state)
        return outputs

    def _next(
        self, run: Run, given: Mapping[str, Any], result: Any, call: int, tokens: list[int]
    ) -> dict[str, Any]:
        new = torch.from_numpy(run.steps[call]) if run.steps else torch.tensor([tokens[-1:]])
        after = {**given, "past_key_values": result.past_key_values}
        if self.task.kind == ENCODER_DECODER:
            from transformers.modeling_outputs import BaseModelOutput

            after.pop("input_ids", None)
            after.pop("input_features", None)
            hidden = result.encoder_last_hidden_state
            after["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)
            after["decoder_input_ids"] = new
            return after
        mask = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
        after |= {"input_ids": new, "attention_mask": mask}
        if "position_ids" in given:
            after["position_ids"] = torch.from_numpy(positions(mask.numpy(), 1))
        return after


def _array(tensor: torch.Tensor) -> Any:
    """numpy has no bfloat16."""
    return tensor.numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


def _noise(dice: np.random.Generator, *shape: int) -> Any:
    return dice.standard_normal(shape).astype(np.float32)
