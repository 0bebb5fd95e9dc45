"""Graphs run by ONNX Runtime, as transformers runs a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_tools.errors import CheckpointError
from lora_tools.onnx.runs import Arrays, Played, Run, positions
from lora_tools.onnx.tasks import DECODER, ENCODER_DECODER, Task

# Of a session whose graph comes as bytes: where its external data lies.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


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
        kinds = {i.name: i.type for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        inputs = {name: _as(kinds[name], value) for name, value in given.items() if name in kinds}
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
                new = run.steps[call] if len(run.steps) else np.array([played.tokens[-1:]])
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


def _as(kind: str, value: Any) -> Any:
    """Numbers as an input of that type takes them."""
    return value.astype(np.float16) if kind == "tensor(float16)" else value


def _past(outputs: Mapping[str, Any]) -> Arrays:
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }
