"""``check``: does a program read all of an adapter?"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import LoraToolsError, QualityGateError
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.options import Audience, Origin, Running
from lora_tools.options.parse import consumer_named
from lora_tools.records import Input, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.base_names import model_at
from lora_tools.totals import CheckFinding, CheckTotals
from lora_tools.verbs.convert import convert
from lora_tools.verbs.frame import Call, Look, verb
from lora_tools.verbs.rescale import rescale
from lora_tools.verifying.consumer import Base, Finding, findings, heads_to_add

_EXAMPLES = 3  # of the keys of a finding


@verb
def check(call: Call, adapter: str | Path, audience: Audience, origin: Origin) -> Look:
    """Say whether a program reads all of an adapter, from headers alone: its format and keys, ranks
    and scales, and with ``base`` whether every module is there and has those shapes.

    Args:
        adapter: a folder, a file or a hub id, of any format that is read.

    Returns:
        the report; ``totals["fits"]`` is True.

    Raises:
        QualityGateError: the program would refuse it, pass parts of it by or scale it otherwise,
            with the report; ``totals["next"]`` is the command that makes what it reads.
        LoraToolsError: the adapter, or the base, cannot be read as one.
    """
    consumer, allow_pickle = consumer_named(audience.consumer), call.running.allow_pickle
    base = origin.base
    checkpoint, names = model_at(base, allow_pickle)
    given = open_adapter(adapter, allow_pickle, base=names, as_stored=names is None)
    side = Base.of(given, consumer, names, checkpoint) if names is not None else None

    def look() -> Report[CheckTotals]:
        found = findings(given, consumer, side)
        remedy = Remedy(str(adapter), given, consumer, base, side, call.running.allow_pickle)
        totals = _totals(given, consumer, side, found, remedy.command(found) if found else "")
        report = call.report(
            [Input("adapter", str(adapter)), *([Input("base", str(base))] if base else [])],
            totals=totals,
            notes=(*given.notes, *_notes(given, consumer, side)),
        )
        if found:
            raise QualityGateError(_said(totals), report)
        return report

    read = (given.path, *([names.path] if names is not None else []))
    return Look(read, look)


def _totals(
    given: Adapter, consumer: Consumer, side: Base | None, found: Sequence[Finding], command: str
) -> CheckTotals:
    rows: list[CheckFinding] = [
        {
            "what": f.what,
            "keys": {"count": len(f.keys), "examples": sorted(f.keys)[:_EXAMPLES]},
            "verdict": f.verdict(consumer),
            "next": command,
        }
        for f in found
    ]
    left = list(consumer.unsure)
    if side is None:
        left.insert(0, "whether its modules fit the base (give --base)")
    elif side.unknown:
        left.insert(0, f"names in memory: {side.unknown}")
    reads = "does not read all of it correctly" if found else "reads all of it"
    return {
        "consumer": consumer.name,
        "as_of": consumer.version,
        "fits": not found,
        "verdict": f"{consumer.name} (as of {consumer.version}) {reads}",
        "findings": rows,
        "next": command,
        "not_checked": left,
        "modules": len(given.modules),
    }


def _said(totals: CheckTotals) -> str:
    """The verdict with its first reason, and the next step."""
    first, more = totals["findings"][0], len(totals["findings"]) - 1
    text = f"{totals['verdict']}; {first['verdict']}: {first['what']}"
    text += f" (and {more} more)" if more else ""
    if totals["next"]:
        return f"{text}. Next: `{totals['next']}`"
    return f"{text}. No command can change that, and merge cannot apply all of it either"


def _notes(given: Adapter, consumer: Consumer, side: Base | None) -> list[str]:
    notes = []
    heads = heads_to_add(given, consumer, side)
    if heads:
        notes.append(
            f"saved whole, but not in the base: {', '.join(heads[:_EXAMPLES])}; it is read if the "
            "model is loaded with such a head"
        )
    top = max((module.r for module in given.modules.values()), default=0)
    if consumer.rank_option and top and (not consumer.ranks or top <= consumer.ranks[-1]):
        room = consumer.rank_for(top)
        notes.append(f"start {consumer.name} with {consumer.rank_option} {room} or more")
    return notes


@dataclasses.dataclass(frozen=True)
class Remedy:
    """How an adapter comes to be what a program reads."""

    adapter: str
    given: Adapter
    consumer: Consumer
    base: str | Path | None
    side: Base | None
    allow_pickle: bool

    def command(self, found: Sequence[Finding]) -> str:
        """The one that writes what the program reads, tried as far as headers go; else the merge
        into the base, which every program of models reads; else "": they do not go together."""
        return (all(f.mended for f in found) and self._written(found)) or self._merged()

    def _written(self, found: Sequence[Finding]) -> str:
        form = FORMATS[self.consumer.to or "peft"]
        function, options = _WRITERS[self.consumer.command], self._options(found)
        wanted = form.base or self.given.unresolved or self.consumer.pipelines
        needed = self.base is None and bool(wanted)
        if not needed:
            running = Running(allow_pickle=self.allow_pickle)
            try:
                function(self.adapter, self._out(), dry_run=True, running=running, **options)
            except LoraToolsError:
                return ""
        words = [self.consumer.command, self.adapter, "-o", self._out()]
        for name, value in (options | ({"base": self._base()} if needed else {})).items():
            words += ["--for" if name == "consumer" else f"--{name}", str(value)]
        return self._words(*words)

    def _options(self, found: Sequence[Finding]) -> dict[str, Any]:
        if self.consumer.to:
            options: dict[str, Any] = {"to": self.consumer.to}
        else:
            options = {"consumer": self.consumer.name}
        if any(finding.code == "rank" for finding in found):
            options["rank"] = self.consumer.ranks[-1]
        return options | ({"base": self.base} if self.base is not None else {})

    def _merged(self) -> str:
        if self.side is not None and not self.side.mergeable:
            return ""
        return self._words("merge", self._base(), self.adapter, "-o", f"{self._stem()}-merged")

    def _words(self, *words: str) -> str:
        pickles = ["--allow-pickle"] if self.allow_pickle else []
        return shlex.join(["loratools", *words, *pickles])

    def _base(self) -> str:
        return str(self.base or self.given.config.get("base_model_name_or_path") or "BASE")

    def _stem(self) -> str:
        """Where outputs go: beside the adapter, or here for one of the hub."""
        path = Path(self.adapter)
        return str(path.with_suffix("") if path.is_file() else path if path.exists() else path.name)

    def _out(self) -> str:
        form = FORMATS[self.consumer.to or "peft"]
        end = "" if form.is_folder else form.suffix
        return f"{self._stem()}-for-{self.consumer.name}{end}"


_WRITERS: dict[str, Callable[..., Report[Any]]] = {"rescale": rescale, "convert": convert}
