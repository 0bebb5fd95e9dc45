"""Which modules of a sentence-transformers folder go into the graph, and their weights.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.pipelines import Module, Pipeline, weight_files
from lora_tools.formats.shards import Shards
from lora_tools.formats.wrapped_names import Renamed
from lora_tools.onnx.tasks import TASKS, Step, Task, task_of
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.pipelines import WholePipeline

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
_OURS = "sentence_transformers."
_KINDS = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
_TASK = "features"


def sentence_task(
    pipeline: Pipeline | None, config: Mapping[str, Any], asked: str
) -> tuple[Task, tuple[str, ...]]:
    """``task_of``; of a sentence-transformers folder with its modules, or a note on those that are
    not in the graph.

    Raises:
        UsageError: no such task.
        CheckpointError: a config cannot be read, or does not tell the task.
    """
    if pipeline is None or not pipeline.others:
        return task_of(config, asked), ()
    why = _unlike(pipeline.main)
    steps: tuple[Step, ...] = ()
    if not why:
        steps, why = _steps(pipeline)
    if asked in ("auto", _TASK) and not why:
        outputs = [TOKENS, *([SENTENCE] if SENTENCE in _made(steps) else [])]
        task = dataclasses.replace(TASKS[_TASK], outputs=tuple(outputs), steps=steps)
        return task, _notes(steps)
    task = task_of(config, asked)
    left = ", ".join(f"{each.path} ({each.kind})" for each in pipeline.others)
    return task, (f"not in the graph: {left}: {why or f'its task is {task.name}'}",)


def plain(task: Task) -> Task:
    """The task of the transformer alone."""
    return TASKS[task.name]


def module_weights(task: Task) -> Shards:
    """Tensors of the modules that are in the graph, by the names that they have there."""
    files = []
    for step in task.steps:
        if weight_files(step.folder):
            file = open_checkpoint(step.folder, allow_pickle=True)  # they were opened before
            files.append(Renamed(file, {name: f"{step.name}.{name}" for name in file.specs}))
    return Shards(Path(), files)


def with_modules(checkpoint: Checkpoint, task: Task) -> Checkpoint:
    """The checkpoint with those tensors."""
    modules = module_weights(task)
    return WholePipeline(checkpoint, modules) if modules.specs else checkpoint


def described(task: Task) -> str:
    """What the modules are, for a graph's metadata; "" where there are none."""
    said = [{"name": s.name, "kind": s.kind, **s.config} for s in task.steps]
    return json.dumps(said, sort_keys=True) if said else ""


def reads_and_writes(step: Step) -> tuple[str, str]:
    """What of the features a module takes, and where it puts what it makes of that."""
    if step.kind == "Pooling":
        return TOKENS, SENTENCE
    takes = step.config.get("module_input_name") or SENTENCE
    return takes, step.config.get("module_output_name") or takes


def _unlike(main: Module) -> str:
    """Why the first module is not just the model that transformers makes, or ""."""
    if main.kind != "Transformer" or not main.type.startswith(_OURS):
        return f"the first module is {main.type or 'of no known class'}"
    for path in sorted(main.folder.glob("sentence_*_config.json")):
        config = main.config(path.name)
        text = config.get("modality_config", {}).get("text", {})
        if config.get("transformer_task", "feature-extraction") != "feature-extraction" or (
            text.get("method", "forward"),
            text.get("method_output_name", "last_hidden_state"),
            config.get("module_output_name", TOKENS),
        ) != ("forward", "last_hidden_state", TOKENS):
            return f"{path.name} needs another output of the transformer"
    return ""


def _steps(pipeline: Pipeline) -> tuple[tuple[Step, ...], str]:
    """The modules after the first, or why they are not known."""
    steps, made = [], {TOKENS}
    for module in pipeline.others:
        known = module.kind in _KINDS and module.type.startswith(_OURS)
        if not known or "." in module.name:
            return (), f"{module.path} is {module.type or 'of no known class'}"
        step = Step(module.folder, module.name, module.kind, module.config())
        takes, gives = reads_and_writes(step)
        if takes not in made:
            return (), f"{module.path} reads {takes}, which no module before it makes"
        made.add(gives)
        steps.append(step)
    return tuple(steps), ""


def _made(steps: Sequence[Step]) -> set[str]:
    return {reads_and_writes(step)[1] for step in steps}


def _notes(steps: Sequence[Step]) -> tuple[str, ...]:
    """What sentence-transformers does around the graph and a user of it has to."""
    return tuple(
        f"{step.name} leaves out the tokens of a prompt (include_prompt is false), but the graph "
        "does not know which these are: it includes them"
        for step in steps
        if step.kind == "Pooling" and step.config.get("include_prompt") is False
    )
