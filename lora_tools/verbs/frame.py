"""The frame that every verb runs in.

A verb is a function from options to something prepared. What comes before and after is the same
for all and stands here: records out of keywords, the list of all paths and what must not be
written over, room on the disk, staging, the time, the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_tools.errors import QualityGateError, UsageError, errors_of_the_tree
from lora_tools.formats import digest as hashing
from lora_tools.formats import hub_progress, variants
from lora_tools.formats.adapters.format import refuse_file_name
from lora_tools.formats.checkpoint import PICKLE_SUFFIXES
from lora_tools.formats.output import Prepared
from lora_tools.formats.pipeline_output import copied_files
from lora_tools.formats.stand_ins import standing_in
from lora_tools.formats.synced import held_bytes
from lora_tools.options import RECORDS, Running, Storage, Writing
from lora_tools.options.spelling import errors_for_python
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.remote import urls
from lora_tools.verbs import VERBS, elsewhere, plan_file
from lora_tools.verbs.in_memory import as_files
from lora_tools.verbs.needs import with_needs
from lora_tools.verbs.paths import Paths
from lora_tools.verbs.report_file import check_report_file, write_report
from lora_tools.verbs.row import Verb
from lora_tools.verbs.writing import write
from lora_tools.watch import files

# What the types of keywords are written by.
_NAMES = {
    **{record.__name__: record for record in RECORDS},
    "Any": Any,
    "Literal": Literal,
    "Mapping": Mapping,
    "Path": Path,
    "ProgressCallback": ProgressCallback,
    "Sequence": Sequence,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a verb is told besides its own arguments and records.

    Attributes:
        out: the output as given; "" for a verb that looks.
        command: what artifacts record.
    """

    verb: str
    out: str
    command: str
    writing: Writing
    running: Running

    def report(
        self, inputs: Sequence[Input], fates: Sequence[Fate] = (), **more: Any
    ) -> Report[Any]:
        """A report of this call, its end aside."""
        return Report(
            self.verb,
            tool_version(),
            tuple(inputs),
            self.out,
            False,
            tuple(fates),
            command=self.command,
            **more,
        )


@dataclasses.dataclass(frozen=True)
class Look:
    """What a verb that writes nothing prepares: all that it reads, and the work."""

    inputs: tuple[Path, ...]
    run: Callable[[], Report[Any]]


Prepare = Callable[..., "Prepared | Look"]


def verb(prepare: Prepare) -> Callable[..., Report[Any]]:
    """The public function of the verb of that name, whose row says how it is called.

    Args:
        prepare: takes a ``Call``, the positional arguments but ``out``, and the records, all by
            their names; ``writing`` and ``running`` are the call's.
    """
    row = VERBS[prepare.__name__]

    @functools.wraps(prepare)
    def function(*args: Any, **keywords: Any) -> Report[Any]:
        with errors_for_python(), as_files(row, row.bind(args, keywords)) as given:
            return carry_out(row, given)

    signature = row.signature(_NAMES)
    hints = {p.name: p.annotation for p in signature.parameters.values()}
    function.__annotations__ = {**hints, "return": signature.return_annotation}
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__doc__ = row.documented(prepare.__doc__ or "")
    return function


@errors_of_the_tree()
def carry_out(row: Verb, given: Mapping[str, Any], report_file: Path | None = None) -> Report[Any]:
    """Run a verb.

    Args:
        given: its arguments by name, records or their fields.
        report_file: where the report is written, too, also that of a failed quality gate.

    Raises:
        QualityGateError: what was measured is worse than allowed; its report is written.
        LoraToolsError: any other of the tree, with nothing written.
    """
    started = time.perf_counter()
    _refuse_no_place()
    asked = row.ask(given)
    elsewhere.refuse_files(row, given, asked, report_file)
    writing: Writing = asked.get("writing", Writing())
    failure = None
    try:
        is_plan = writing.dry_run or row.name == "inspect"
        with standing_in(is_plan), elsewhere.by_address():
            report = elsewhere.reported(_with_output(row, given, asked, report_file))
    except QualityGateError as error:
        if error.report is None:
            raise
        report, failure = error.report, error
    report = dataclasses.replace(
        report,
        output=_shown_output(given) if writing.shard is None else "",
        dry_run=writing.dry_run,
        seconds=time.perf_counter() - started,
    )
    if report_file is not None:
        write_report(report, report_file)
    if failure is not None:
        failure.report = report
        raise failure
    return report


def _shown_output(given: Mapping[str, Any]) -> str:
    out = str(given.get("out", ""))
    return urls.shown(address) if (address := urls.url(out)) else out


def _with_output(
    row: Verb, given: Mapping[str, Any], asked: Mapping[str, Any], report_file: Path | None
) -> Report[Any]:
    """The verb, and its output where an address says, if it is one."""
    if not (row.writes and urls.url(given["out"])):
        return _here(row, given, asked, report_file)
    writing: Writing = asked.get("writing", Writing())
    upload = elsewhere.Upload(row, given, writing)
    with upload.here() as out:
        report = _here(row, {**given, "out": str(out)}, asked, report_file)
    if not writing.dry_run:
        upload.put(out, asked["running"].progress)
    return report


def _here(
    row: Verb, given: Mapping[str, Any], asked: Mapping[str, Any], report_file: Path | None
) -> Report[Any]:
    """The verb, with its output on a disk here."""
    call, paths = _call(row, given, asked), Paths.of(row, given, asked, report_file)
    _refuse_name(row, call.out)
    paths.check(call.writing.dry_run)
    if report_file is not None:
        check_report_file(report_file)
    with contextlib.ExitStack() as held:
        held.enter_context(hashing.using(call.running.digest))
        held.enter_context(variants.using(call.running.variant))
        held.enter_context(hub_progress.telling(call.running.progress))
        held.enter_context(files.unchanged())
        return _work(row, call, given, asked, paths)


def _refuse_no_place() -> None:
    """Raises UsageError where the working folder was deleted: no relative path leads anywhere."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError(
            "the current folder does not exist any more; change to another one (cd)"
        ) from None


def _call(row: Verb, given: Mapping[str, Any], asked: Mapping[str, Any]) -> Call:
    command = command_of(row.name, *asked.values(), order=row.order) if row.writes else ""
    return Call(
        row.command,
        str(given.get("out", "")),
        command,
        asked.get("writing", Writing()),
        asked["running"],
    )


def _refuse_name(row: Verb, out: str) -> None:
    """Raises UsageError where the output's name promises what is not written here: stdout, a
    GGUF model of a checkpoint, or a pickle."""
    if row.writes and out == "-":
        raise UsageError(
            "--out -: cannot write to stdout; name a folder or a file (./- for a file called -)"
        )
    if row.writes and Path(out).suffix in PICKLE_SUFFIXES:
        raise UsageError(
            f"--out {out}: pickles cannot be written; give a name that ends in .safetensors"
        )
    if row.writes and Storage in row.records.values() and Path(out).suffix == ".gguf":
        raise UsageError(
            f"--out {out}: GGUF models cannot be written; name a folder, and convert it with "
            "llama.cpp's convert_hf_to_gguf.py"
        )


def _work(
    row: Verb, call: Call, given: Mapping[str, Any], asked: Mapping[str, Any], paths: Paths
) -> Report[Any]:
    prepare: Prepare = row.function().__wrapped__  # type: ignore[attr-defined]
    arguments = {a.name: given[a.name] for a in row.arguments if a.name != "out"}
    records = {k: v for k, v in asked.items() if k not in ("writing", "running")}
    prepared = prepare(call, **arguments, **records)
    paths.read(prepared.inputs)
    if isinstance(prepared, Look):
        paths.check(dry_run=False)
        paths.check_kept()
        return prepared.run()
    refuse_file_name(call.out, prepared.is_folder)
    paths.write(prepared, Path(call.out))
    paths.check(call.writing.dry_run)
    copied = copied_files(prepared)  # on a dry run, too: it refuses what may not be copied
    nbytes = prepared.nbytes + sum(map(held_bytes, copied))
    paths.check_kept(call.writing.dry_run)
    if call.writing.plan is not None:
        plan_file.write_or_compare(prepared, call.writing, call.out)
    if call.writing.dry_run:
        return with_needs(prepared, Path(call.out), nbytes, call.running)
    return write(row, asked, prepared, call.out, call.command, nbytes)
