"""JSON Schemas of reports and plans, out of the types that they have in Python."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from lora_tools import totals
from lora_tools.jobs import JobPlan
from lora_tools.records import Report
from lora_tools.verbs import VERBS
from lora_tools.verbs.row import Verb

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: dict[Any, dict[str, Any]] = {
    Any: {},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},  # of a number that is not finite
    type(None): {"type": "null"},
}


def report_schema(verb: str | None = None) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what ``--json`` and ``--report`` write.

    Args:
        verb: a command (``collect-stats``) or its function's name; None: of any of them.

    Raises:
        ValueError: there is no such command.
    """
    known = {name: row for row in VERBS.values() for name in (row.name, row.command)}
    if verb is not None and verb not in known:
        raise ValueError(f"{verb!r}: one of {', '.join(VERBS)} is needed")
    defs: dict[str, Any] = {}
    rows = VERBS.values() if verb is None else [known[verb]]
    reports = [_report(row, defs) for row in rows]
    return {
        "$schema": _DIALECT,
        "title": f"report of loratools {verb or ''}".strip(),
        **(reports[0] if verb is not None else {"oneOf": reports}),
        "$defs": defs,
    }


def plan_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the plan of jobs that ``--plan`` writes."""
    defs: dict[str, Any] = {}
    hints = get_type_hints(JobPlan)
    return {
        "$schema": _DIALECT,
        "title": "plan of jobs of loratools",
        **_object(JobPlan, hints, list(hints), defs),
        "$defs": defs,
    }


def _report(row: Verb, defs: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(Report) | {"totals": getattr(totals, row.totals)}
    found = _object(Report, hints, list(hints), defs)
    found["properties"]["verb"] = {"const": row.command}
    return found


def _object(
    kind: type[Any], hints: dict[str, Any], required: Sequence[str], defs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").partition("\n\n")[0].split()),
        "properties": {name: _schema(hint, defs) for name, hint in hints.items()},
        "required": sorted(required),
        "additionalProperties": False,
    }


def _schema(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """Of a type. Raises TypeError for one that is not known here."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, defs) for each in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], defs)}
    if origin in (list, tuple) and args[1:] in ((), (...,)):
        return {"type": "array", "items": _schema(args[0], defs)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [each.value for each in hint]}
    if dataclasses.is_dataclass(hint) or is_typeddict(hint):
        name = hint.__name__
        if name not in defs:
            defs[name] = {}  # one that holds itself ends here
            hints = get_type_hints(hint)
            required = getattr(hint, "__required_keys__", hints)
            defs[name] = _object(hint, hints, list(required), defs)
        return {"$ref": f"#/$defs/{name}"}
    raise TypeError(f"no schema for {hint}")
