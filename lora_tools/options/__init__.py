"""What a user asks for: frozen records, whose fields describe the options of every verb.

``parse`` has what the values of some options stand for, ``ranks`` of those that choose ranks,
``gate`` whether a measured error is within what is allowed.
"""

from __future__ import annotations

from lora_tools.options.number_format import Evaluation, NumberFormat
from lora_tools.options.own import (
    Audience,
    Check,
    Combining,
    Comparison,
    Formats,
    Graphs,
    Merging,
    Quantized,
    Sampling,
    Strength,
    Undoing,
    View,
)
from lora_tools.options.shared import AdapterForm, Adding, Matching, Origin, Ranks, Search, Tensors
from lora_tools.options.work import Running, Storage, Writing

__all__ = [
    "AdapterForm",
    "Adding",
    "Audience",
    "Check",
    "Combining",
    "Comparison",
    "Evaluation",
    "Formats",
    "Graphs",
    "Matching",
    "Merging",
    "NumberFormat",
    "Origin",
    "Quantized",
    "Ranks",
    "Running",
    "Sampling",
    "Search",
    "Storage",
    "Strength",
    "Tensors",
    "Undoing",
    "View",
    "Writing",
]
RECORDS: tuple[type, ...] = tuple(globals()[name] for name in __all__)
