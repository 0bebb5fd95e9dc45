"""Surgery on model weights, file to file. The verbs of the command line are functions here.

>>> import lora_tools
>>> report = lora_tools.extract("base", "tuned", "adapter", rank=32)  # doctest: +SKIP
>>> report.totals["relative_error"]  # doctest: +SKIP
0.63

Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_tools.errors import (
        AdapterError,
        CheckpointError,
        LoraToolsError,
        MismatchError,
        NonFiniteError,
        OutputError,
        QualityGateError,
        TensorNotFound,
        UnsafeInput,
        UnsupportedAdapter,
        UsageError,
    )
    from lora_tools.records import (
        Fate,
        Input,
        ModuleResult,
        ModuleSpectrum,
        Progress,
        Report,
        TensorFacts,
        TensorResult,
        TensorSpec,
    )
    from lora_tools.verbs.collect_stats import collect_stats
    from lora_tools.verbs.combine import combine
    from lora_tools.verbs.convert import convert
    from lora_tools.verbs.dequantize import dequantize
    from lora_tools.verbs.diff import diff
    from lora_tools.verbs.export import export
    from lora_tools.verbs.extract import extract
    from lora_tools.verbs.inspect import inspect
    from lora_tools.verbs.merge import merge
    from lora_tools.verbs.quantize import quantize
    from lora_tools.verbs.rescale import rescale
    from lora_tools.verbs.unmerge import unmerge
    from lora_tools.verbs.verify import verify

_HOMES = {
    "errors": (
        "AdapterError",
        "CheckpointError",
        "LoraToolsError",
        "MismatchError",
        "NonFiniteError",
        "OutputError",
        "QualityGateError",
        "TensorNotFound",
        "UnsafeInput",
        "UnsupportedAdapter",
        "UsageError",
    ),
    "records": (
        "Fate",
        "Input",
        "ModuleResult",
        "ModuleSpectrum",
        "Progress",
        "Report",
        "TensorFacts",
        "TensorResult",
        "TensorSpec",
    ),
    "verbs.collect_stats": ("collect_stats",),
    "verbs.diff": ("diff",),
    "verbs.combine": ("combine",),
    "verbs.convert": ("convert",),
    "verbs.dequantize": ("dequantize",),
    "verbs.export": ("export",),
    "verbs.extract": ("extract",),
    "verbs.inspect": ("inspect",),
    "verbs.merge": ("merge",),
    "verbs.quantize": ("quantize",),
    "verbs.rescale": ("rescale",),
    "verbs.unmerge": ("unmerge",),
    "verbs.verify": ("verify",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Fate",
    "Input",
    "LoraToolsError",
    "MismatchError",
    "ModuleResult",
    "ModuleSpectrum",
    "NonFiniteError",
    "OutputError",
    "Progress",
    "QualityGateError",
    "Report",
    "TensorFacts",
    "TensorNotFound",
    "TensorResult",
    "TensorSpec",
    "UnsafeInput",
    "UnsupportedAdapter",
    "UsageError",
    "collect_stats",
    "combine",
    "convert",
    "dequantize",
    "diff",
    "export",
    "extract",
    "inspect",
    "merge",
    "quantize",
    "rescale",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
