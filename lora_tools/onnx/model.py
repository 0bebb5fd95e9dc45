"""A model without its weights.

transformers builds it from ``config.json`` on the meta device; parameters then become memory that
is never touched, so that tracing costs no more of it than the graph.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_tools.errors import CheckpointError
from lora_tools.onnx.foreign import failing_as
from lora_tools.onnx.precision import FLOAT32
from lora_tools.onnx.senses import IMAGES, SOUND
from lora_tools.onnx.sentence_modules import attach
from lora_tools.onnx.tasks import AUDIO, IMAGE, Task
from lora_tools.pretrained import config_of, model_of, weightless_of

# Their attention adds a bias that transformers hands to the eager implementation only.
_EAGER = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
# By kind of task, the first argument of its classes.
_MAIN = {IMAGE: (IMAGES,), AUDIO: (SOUND,)}


def class_of(task: Task, config: Any) -> Any:
    """The class named in the config where it is one of the task's, else the task's auto class."""
    import transformers

    names = config.architectures or [""]
    if task.steps:  # sentence-transformers takes the bare model, or an encoder–decoder's encoder
        encoder = re.sub(r"(Model|ForConditionalGeneration)$", "EncoderModel", names[0])
        own = encoder if config.is_encoder_decoder else names[0]
        bare = own.endswith(task.endings) and not own.endswith("LMHeadModel")
        return getattr(transformers, own if bare else task.auto, getattr(transformers, task.auto))
    if names[0].endswith(task.endings) and task.endings and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    return getattr(transformers, task.auto)


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' config object. Raises CheckpointError."""
    import transformers

    reader = f"transformers {transformers.__version__}"
    with failing_as(f"{folder}: {reader} cannot read its config.json"):
        return config_of(folder, trust_remote_code)


def attention(config: Any) -> str | None:
    """The attention implementation to trace with; None is transformers' own choice."""
    return "eager" if config.model_type in _EAGER else None


def weightless(
    folder: Path, task: Task, trust_remote_code: bool = False, dtype: str = FLOAT32
) -> nn.Module:
    """The model of a checkpoint folder, in that dtype and for inference, on the meta device.

    Buffers that are not stored (rotary frequencies) hold their values.

    Raises:
        CheckpointError: transformers does not know the architecture, or not for this task.
    """
    from accelerate import init_empty_weights

    config = read_config(folder, trust_remote_code)
    kind = class_of(task, config)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention(config):
        options["attn_implementation"] = attention(config)
    with (
        failing_as(f"{folder}: transformers cannot make a {task.name} model of it"),
        init_empty_weights(include_buffers=False),
    ):
        model = weightless_of(kind, config, trust_remote_code, **options)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others loop over what they route
    _refuse_inputs(model, task)
    _keep_float32(model, getattr(torch, dtype))
    model.eval()
    model.tie_weights()
    with init_empty_weights(include_buffers=False):
        attach(model, task, weights=False)
    return model  # type: ignore[no-any-return]


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """The parameters that transformers loads in float32 where half precision is asked for."""
    if dtype == torch.float32 or not hasattr(model, "_get_dtype_plan"):
        return
    names = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]
    for name, parameter in model.named_parameters():
        if any(each.search(name) for each in names):
            parameter.data = parameter.data.float()


def _refuse_inputs(model: Any, task: Task) -> None:
    """Raises CheckpointError where the class takes something else than the task's graphs have."""
    main = getattr(model, "main_input_name", None)
    wanted = _MAIN.get(task.kind, ("input_ids", "input_features"))
    if isinstance(main, str) and main not in wanted:
        raise CheckpointError(
            f"{type(model).__name__}: takes {main}, but the graphs of the task {task.name} take "
            f"{wanted[0]}; choose another --task"
        )


def loaded(folder: Path, task: Task, trust_remote_code: bool = False, dtype: str = FLOAT32) -> Any:
    """The model with its weights in that dtype, as transformers itself loads it.

    Raises:
        CheckpointError: it does not load.
    """
    config = read_config(folder, trust_remote_code)
    options: dict[str, Any] = {}
    if attention(config):
        options["attn_implementation"] = attention(config)
    options["dtype"] = getattr(torch, dtype)
    with failing_as(f"{folder}: transformers does not load it"):
        model = model_of(class_of(task, config), folder, config, trust_remote_code, **options)
    attach(model, task, weights=True)
    return model.eval()


def with_memory(model: nn.Module) -> None:
    """Give every parameter memory that is not touched, so that it can be traced on the CPU."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
