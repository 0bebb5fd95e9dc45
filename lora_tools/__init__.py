"""Surgery on model weights, file to file. The verbs of the command line are functions here.

>>> import lora_tools
>>> report = lora_tools.extract("base", "tuned", "adapter", rank=32)  # doctest: +SKIP
>>> report.totals["relative_error"]  # doctest: +SKIP
0.63

Options are keywords, or fields of records that can be kept and shared: ``ranks=Ranks(rank=32)``.
Nothing heavy is imported until a verb runs. ``__init__.pyi`` has the types.
"""

from __future__ import annotations

import importlib
from typing import Any

from lora_tools.options import RECORDS
from lora_tools.verbs import VERBS

_HOMES = {
    "errors": (
        "AdapterError",
        "CheckpointError",
        "ClusterError",
        "FileError",
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
    "options": tuple(record.__name__ for record in RECORDS),
    "schema": ("plan_schema", "report_schema"),
    "totals": tuple(verb.totals for verb in VERBS.values()),
    **{f"verbs.{name}": (name,) for name in VERBS},
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module(f"{__name__}.provenance").tool_version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
