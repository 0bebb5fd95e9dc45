"""A graph run in ONNX Runtime against the checkpoint run by transformers, on the same inputs.

Batches, lengths and pasts are not those of tracing. Padded positions are left out: what is computed
there depends on the kernel. transformers loads the checkpoint its own way, so that a weight taken
for another shows.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_tools.errors import CheckpointError
from lora_tools.onnx.model import loaded
from lora_tools.onnx.parts import decoder_inputs, image_size, is_speech, speech_shape, text_inputs
from lora_tools.onnx.runtime_adapters import plain_graphs
from lora_tools.onnx.tasks import DECODER, ENCODER_DECODER, IMAGE, Task
from lora_tools.totals import OutputsTotals

_LENGTHS = (7, 13)  # of a single sequence and of the longest in a batch of three
_STEPS = 3
# Of a session whose graph comes as bytes: where its external data lies.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Arrays = dict[str, Any]


@dataclasses.dataclass
class Check:
    """What was found.

    Attributes:
        absolute, relative: the greatest difference, and the greatest in units of the output's
            largest element; of the output named ``worst``.
        compared: how many outputs.
        tokens: how many tokens were generated greedily, and how many of them were the same.
        exact: of a graph with inputs for adapters, whether without one it gives the bits that it
            gives without those inputs; else None.
    """

    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""
    compared: int = 0
    failed: bool = False
    tokens: int = 0
    same_tokens: int = 0
    exact: bool | None = None

    def totals(self) -> OutputsTotals:
        """As a report has them."""
        tokens: OutputsTotals = {"tokens_generated": self.tokens, "tokens_same": self.same_tokens}
        return {
            "verified": not self.failed,
            "outputs_compared": self.compared,
            "max_difference": self.absolute,
            "max_relative_difference": self.relative,
            "worst_output": self.worst,
            **(tokens if self.tokens else {}),
            **({} if self.exact is None else {"base_exact": self.exact}),
        }

    def add(self, name: str, found: Any, wanted: Any, atol: float, rtol: float) -> None:
        """Compare two arrays of equal shape."""
        if found.shape != wanted.shape:
            raise CheckpointError(f"{name}: {found.shape} in ONNX Runtime, {wanted.shape} in torch")
        self.compared += 1
        if not found.size:
            return
        difference = float(np.abs(found.astype(np.float64) - wanted).max())
        largest = float(np.abs(wanted).max())
        if not math.isfinite(difference) or difference > atol + rtol * largest:
            self.failed = True
        if not self.worst or not difference <= self.absolute:
            self.absolute, self.worst = difference, name
        self.relative = max(self.relative, difference / largest if largest else difference)

    def hold(self, run: Run, found: Played, wanted: Played, atol: float, rtol: float) -> None:
        """Compare all that a run gave, and the tokens it generated."""
        for step, (mine, theirs) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
            for name, value in theirs.items():
                label = f"{name} ({run.name}, step {step})"
                if name in mine:
                    self.add(label, *run.visible(step, mine[name], value), atol, rtol)
        self.tokens += len(wanted.tokens)
        self.same_tokens += sum(a == b for a, b in zip(found.tokens, wanted.tokens, strict=True))
        self.failed |= self.same_tokens != self.tokens


def compare(
    folder: Path,
    task: Task,
    cache: bool,
    *,
    atol: float,
    rtol: float,
    graphs: Sequence[Path] = (),
    generate: int = 16,
    trust_remote_code: bool = False,
    adapter: tuple[Path, Path] | None = None,
) -> Check:
    """Run every graph of an exported folder, and its checkpoint in torch.

    torch's model is gone before the graph's session is made, so that they are never in memory both.

    Args:
        folder: a checkpoint's folder, with its graphs in it unless ``graphs`` says where they are.
        cache: whether a decoder's graph has its past as inputs.
        atol, rtol: an output may differ by atol + rtol times its largest element.
        generate: tokens a decoder generates greedily, with the cache.
        adapter: the file of one to activate, and the folder of the checkpoint that it is merged
            into, for torch.

    Raises:
        CheckpointError: one of the two does not run.
    """
    side = InTorch(adapter[1] if adapter else folder, task, trust_remote_code)
    runs = side.runs(cache, generate)
    wanted = [side.play(run) for run in runs]
    side.close()
    result = Check()
    graphs = graphs or [folder / file for file in task.files()]
    place = graphs[0].parent
    without = [] if adapter else plain_graphs(graphs)
    plain = _bits_of(runs, InRuntime(place, task, without)) if without else []
    runtime = InRuntime(place, task, graphs, adapter[0] if adapter else None)
    for number, (run, reference) in enumerate(zip(runs, wanted, strict=True)):
        found = runtime.play(run)
        if plain:
            result.exact = result.exact is not False and _bits(found) == plain[number]
        result.hold(run, found, reference, atol, rtol)
    result.failed |= result.exact is False
    return result


@dataclasses.dataclass
class Run:
    """One sequence of calls.

    Attributes:
        inputs: of the first call; further calls take ``steps`` more tokens each, or with
            ``generate`` the likeliest token of the call before.
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


@dataclasses.dataclass
class Played:
    """What a run gave: outputs by name for each call, and the tokens generated."""

    outputs: list[Arrays] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def positions(mask: Any, length: int) -> Any:
    """Position ids of the last ``length`` places of an attention mask, left padding counted out."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -length:]


class InTorch:
    """A checkpoint run by transformers."""

    def __init__(self, folder: Path, task: Task, trust_remote_code: bool) -> None:
        self.task = task
        self.model: Any = loaded(folder, task, trust_remote_code)
        self.config = self.model.config

    def close(self) -> None:
        """Give the memory back."""
        self.model = None
        gc.collect()  # models hold references to themselves

    def runs(self, cache: bool, generate: int) -> list[Run]:
        """The inputs, random but always the same."""
        dice = np.random.default_rng(0)
        config = self.config
        if self.task.kind == IMAGE:
            shape = (getattr(config, "num_channels", 3), *image_size(config))
            return [Run(f"{n} images", {"pixel_values": _noise(dice, n, *shape)}) for n in (1, 3)]
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

    def _lengths(self) -> tuple[int, int]:
        """Past the end of a sliding window, where one is short enough to get there."""
        window = getattr(self.config.get_text_config(decoder=True), "sliding_window", None) or 0
        longer = window if 0 < window <= 512 else 0
        return _LENGTHS[0] + longer, _LENGTHS[1] + longer

    def play(self, run: Run) -> Played:
        """Call the model as transformers' own generation does."""
        played = Played()
        given: dict[str, Any] = {
            name: torch.from_numpy(value) for name, value in run.inputs.items()
        }
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
                played.outputs.append(self._outputs(result))
                if run.generate:
                    played.tokens.append(int(result.logits[0, -1].argmax()))
                if call + 1 < calls:
                    given = self._next(run, given, result, call, played.tokens)
        return played

    def _outputs(self, result: Any) -> Arrays:
        names = ("logits",) if self.task.kind in (DECODER, ENCODER_DECODER) else self.task.outputs
        outputs = {name: result[name].numpy() for name in names}
        if self.task.kind == ENCODER_DECODER:
            outputs["last_hidden_state"] = result.encoder_last_hidden_state.numpy()
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


class InRuntime:
    """Graphs run by ONNX Runtime.

    Args:
        folder: where the weights lie of models that are given as bytes.
        models: the task's graphs, each as its path or as its bytes.
        adapter: the file of one that is active in every call.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        models: Sequence[Path] | Sequence[bytes],
        adapter: Path | None = None,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # which never gives back what it once took
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        self.task = task
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4
        try:
            # Folding the casts of weights would hold all of them in float32, for a while twice.
            self._sessions = [
                onnxruntime.InferenceSession(
                    model if isinstance(model, bytes) else str(model),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=["ConstantFolding"],
                )
                for model in models
            ]
            if adapter is not None:
                self._adapter = onnxruntime.LoraAdapter()  # kept: the options only point to it
                self._adapter.Load(str(adapter))
                self._options.add_active_adapter(self._adapter)
        except Exception as error:  # its own classes, all of them below Exception
            text = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: ONNX Runtime cannot load it ({text:.300})") from None

    def _call(self, number: int, given: Mapping[str, Any]) -> Arrays:
        session = self._sessions[number]
        wanted = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        inputs = {name: value for name, value in given.items() if name in wanted}
        try:
            return dict(zip(names, session.run(None, inputs, self._options), strict=True))
        except Exception as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.task.files()[number]}: ONNX Runtime cannot run it ({text:.300})"
            ) from None

    def play(self, run: Run) -> Played:
        """The same calls, with the graph's own cache handed on."""
        if self.task.kind == ENCODER_DECODER:
            return self._play_seq2seq(run)
        played = Played()
        given = dict(run.inputs)
        if self.task.kind == DECODER:
            ids = given["input_ids"]
            given["position_ids"] = positions(given["attention_mask"], ids.shape[1])
            given |= self._empty(len(ids))
        calls = run.generate or 1 + len(run.steps)
        for call in range(calls):
            outputs = self._call(0, given)
            played.outputs.append(outputs)
            if run.generate:
                played.tokens.append(int(outputs["logits"][0, -1].argmax()))
            if call + 1 < calls:
                new = run.steps[call] if run.steps else np.array([played.tokens[-1:]])
                mask = np.concatenate([given["attention_mask"], np.ones_like(new)], 1)
                given = {"input_ids": new, "attention_mask": mask, **_past(outputs)}
                given["position_ids"] = positions(mask, 1)
        return played

    def _empty(self, batch: int) -> Arrays:
        return {
            i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self._sessions[0].get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def _play_seq2seq(self, run: Run) -> Played:
        hidden = self._call(0, run.inputs)
        given = {
            "input_ids": run.inputs["decoder_input_ids"],
            "encoder_hidden_states": hidden["last_hidden_state"],
        }
        if "attention_mask" in run.inputs:
            given["encoder_attention_mask"] = run.inputs["attention_mask"]
        outputs = self._call(1, given)
        played = Played([{**outputs, **hidden}])
        past = _past(outputs)
        for new in run.steps:
            outputs = self._call(2, {**given, **past, "input_ids": new})
            played.outputs.append({**outputs, **hidden})
            past |= _past(outputs)
        return played


def _bits_of(runs: Sequence[Run], runtime: InRuntime) -> list[str]:
    """What several runs give, by which it can be compared bit for bit."""
    return [_bits(runtime.play(run)) for run in runs]


def _bits(played: Played) -> str:
    digest = hashlib.sha256()
    for outputs in played.outputs:
        for name in sorted(outputs):
            digest.update(outputs[name].tobytes())
    return digest.hexdigest()


def _past(outputs: Mapping[str, Any]) -> Arrays:
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def _noise(dice: np.random.Generator, *shape: int) -> Any:
    return dice.standard_normal(shape).astype(np.float32)
