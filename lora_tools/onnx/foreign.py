"""The code of a model, and of torch on it: what it prints, which module runs, why it failed."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lora_tools.errors import CheckpointError, LoraToolsError

# What torch.export says at length and of names that it made, by its beginning.
_PLAINLY = {
    "Constraints violated": "its code needs inputs of certain sizes, but a graph must accept any",
    "Could not guard on data-dependent": (
        "its code depends on sizes or numbers that are known only when it runs"
    ),
    "Could not extract specialized integer from data-dependent": (
        "its code uses numbers from a tensor as sizes, which are known only when it runs"
    ),
}
INNER = "inner."  # before the names of a model's modules, where it is an attribute


@contextlib.contextmanager
def run_by(model: torch.nn.Module, doing: str) -> Iterator[None]:
    """Have whatever a model's code raises told as an error of the checkpoint's.

    Args:
        doing: what is done with the model, after the name of the module.

    Raises:
        CheckpointError: naming the module that ran, and the cause.
    """
    with watched(model) as running:
        try:
            yield
        except (LoraToolsError, MemoryError):
            raise
        except Exception as error:  # whatever the model's own code and torch raise
            said = reason(error, running[-1] if running else "", doing)
            raise CheckpointError(said) from error


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """The same of code that runs before there is a model: an error that says ``what``, and in
    brackets the cause. Raises CheckpointError."""
    try:
        yield
    except (LoraToolsError, MemoryError):
        raise
    except Exception as error:  # whatever a model's own code raises
        text = " ".join(str(error).split())
        raise CheckpointError(f"{what} ({text:.300})") from None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """torch and transformers warn of their own code and of packages that are not needed, and print
    the whole graph where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def watched(module: torch.nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose forward runs, the innermost last; after an error, ran."""
    running: list[str] = []
    hooks: list[Any] = []

    def enters(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leaves(*_: Any) -> None:
        running.pop()

    for name, child in module.named_modules():
        hooks.append(child.register_forward_pre_hook(enters(name.removeprefix(INNER))))
        hooks.append(child.register_forward_hook(leaves))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def module_of(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """The module of the node which onnxscript's error says it could not translate."""
    cause: BaseException | None = error
    while cause is not None:
        if named := re.search(r"translating node %(\w+)", str(cause)):
            for node in program.graph.nodes:
                if node.name == named[1]:
                    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                    return stack[-1].removeprefix(INNER) if stack else ""
        cause = cause.__cause__ or cause.__context__
    return ""


def reason(error: BaseException, module: str, doing: str) -> str:
    """One line: the module, the function of the model, the innermost cause, and what to do."""
    import transformers

    while (error.__cause__ or error.__context__) is not None and error.__cause__ is not error:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    where = f"module {module}" if module else "it"
    for frame in traceback.extract_tb(error.__traceback__):
        if "/transformers/models/" in frame.filename:
            where += f" ({Path(frame.filename).stem}, {frame.name})"
            break
    text = " ".join((str(error) or type(error).__name__).split()).replace(";", ",")
    text = next((said for start, said in _PLAINLY.items() if text.startswith(start)), text)
    return (
        f"{where} {doing}: {text:.400}; try another --task, --no-cache for a decoder, or other "
        f"releases of torch and transformers than {torch.__version__} and "
        f"{transformers.__version__}"
    )
