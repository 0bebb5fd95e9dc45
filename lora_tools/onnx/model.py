"""A model without its weights.

transformers builds it from ``config.json`` on the meta device; parameters then become memory that
is never touched, so that tracing costs no more of it than the graph.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_tools.errors import CheckpointError
from lora_tools.onnx.sentence_modules import attach
from lora_tools.onnx.tasks import Task

# Their attention adds a bias that transformers hands to the eager implementation only.
_EAGER = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


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

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        text = " ".join(str(error).split())
        hint = "; --trust-remote-code runs it" if "trust_remote_code" in text else ""
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} cannot read its config.json "
            f"({text:.300}){hint}"
        ) from None


def attention(config: Any) -> str | None:
    """The attention implementation to trace with; None is transformers' own choice."""
    return "eager" if config.model_type in _EAGER else None


def weightless(folder: Path, task: Task, trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint folder, in float32 and for inference, on the meta device.

    Buffers that are not stored (rotary frequencies) hold their values.

    Raises:
        CheckpointError: transformers does not know the architecture, or not for this task.
    """
    from accelerate import init_empty_weights

    config = read_config(folder, trust_remote_code)
    kind = class_of(task, config)
    options: dict[str, Any] = {"dtype": torch.float32}
    if attention(config):
        options["attn_implementation"] = attention(config)
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            if kind.__name__.startswith("Auto"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code, **options)
            else:
                model = kind._from_config(config, **options)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot make a {task.name} model of it ({text:.300})"
        ) from None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others loop over what they route
    model.eval()
    model.tie_weights()
    with init_empty_weights(include_buffers=False):
        attach(model, task, weights=False)
    return model  # type: ignore[no-any-return]


def loaded(folder: Path, task: Task, trust_remote_code: bool = False) -> Any:
    """The model with its weights in float32, as transformers itself loads it.

    Raises:
        CheckpointError: it does not load.
    """
    config = read_config(folder, trust_remote_code)
    options = {"attn_implementation": attention(config)} if attention(config) else {}
    with _quiet():
        try:
            model = class_of(task, config).from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: transformers does not load it ({text:.300})"
            ) from None
    attach(model, task, weights=True)
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing within: a library that is asked to be silent."""
    import transformers

    log: Any = transformers.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


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
