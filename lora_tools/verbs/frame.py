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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.engine import memo
from lora_tools.engine.threads import elsewhere
from lora_tools.errors import QualityGateError, UsageError, errors_of_the_tree
from lora_tools.formats import digest as hashing
from lora_tools.formats import model_card, variants
from lora_tools.formats.adapters.format import refuse_file_name
from lora_tools.formats.checkpoint import PICKLE_SUFFIXES
from lora_tools.formats.hub_headers import headers_only
from lora_tools.formats.ledger import Ledger
from lora_tools.formats.leftover import Way, reusable
from lora_tools.formats.output import Prepared, check_destination, check_space, staged
from lora_tools.formats.pipeline_output import copied_files, write_whole
from lora_tools.formats.synced import held_bytes, write_synced
from lora_tools.options import RECORDS, Running, Storage, Writing
from lora_tools.options.spelling import errors_for_python
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.verbs import VERBS
from lora_tools.verbs.card import card_of
from lora_tools.verbs.paths import Paths
from lora_tools.verbs.report_file import check_report_file, write_report
from lora_tools.verbs.row import Verb
from lora_tools.watch import files
from lora_tools.within import holding

if TYPE_CHECKING:
    from lora_tools.engine.dask import Cluster

# What the types of keywords are written by.
_NAMES = {
    **{record.__name__: record for record in RECORDS},
    "Literal": Literal,
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
        with errors_for_python():
            return carry_out(row, row.bind(args, keywords))

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
    call, paths = _call(row, given, asked), Paths.of(row, given, asked, report_file)
    _refuse_name(row, call.out)
    paths.check(call.writing.dry_run)
    if report_file is not None:
        check_report_file(report_file)
    failure = None
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(hashing.using(call.running.digest))
            held.enter_context(variants.using(call.running.variant))
            if call.writing.dry_run:
                held.enter_context(headers_only())
            held.enter_context(files.unchanged())
            report = _work(row, call, given, asked, paths)
    except QualityGateError as error:
        if error.report is None:
            raise
        report, failure = error.report, error
    report = dataclasses.replace(
        report, output=call.out, dry_run=call.writing.dry_run, seconds=time.perf_counter() - started
    )
    if report_file is not None:
        write_report(report, report_file)
    if failure is not None:
        failure.report = report
        raise failure
    return report


def _refuse_no_place() -> None:
    """Raises UsageError where the working folder was deleted: no relative path leads anywhere."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError(
            "the current folder does not exist any more; change to one that does (cd)"
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
    """Raises UsageError where the output's name promises what is not written here: stdout, a GGUF
    model of a checkpoint, or a pickle."""
    if row.writes and out == "-":
        raise UsageError(
            "--out -: nothing is written to stdout; name a folder or a file (./- for one of that "
            "name)"
        )
    if row.writes and Path(out).suffix in PICKLE_SUFFIXES:
        raise UsageError(
            f"--out {out}: pickles are read and not written; give a name that ends in .safetensors"
        )
    if row.writes and Storage in row.records.values() and Path(out).suffix == ".gguf":
        raise UsageError(
            f"--out {out}: GGUF models are read and not written; name a folder, which is written "
            "in safetensors, and make a GGUF of that with llama.cpp's convert_hf_to_gguf.py"
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
    if call.writing.dry_run:
        return prepared.report
    paths.check_kept()
    nbytes = prepared.nbytes + sum(map(held_bytes, copied))
    return _write(row, asked, prepared, call, nbytes)


def way_of(writing: Writing) -> Way:
    """What becomes of what a run that was ended has left. Raises UsageError."""
    if writing.resume and writing.clean:
        raise UsageError(
            "--resume goes on with what was left, --clean removes it: give one of them"
        )
    return "resume" if writing.resume else "clean" if writing.clean else "refuse"


def _versions() -> tuple[str, str]:
    """Of what does the work: loratools and torch."""
    return tool_version(), metadata.version("torch")


@contextlib.contextmanager
def _engine(running: Running) -> Iterator[Cluster | None]:
    """The cluster that does the work within; None where that is done here."""
    if running.engine == "threads":
        if running.workers is not None:
            raise UsageError(f"--workers {running.workers}: goes with --engine dask; see --jobs")
        yield None
        return
    from lora_tools.engine import remote
    from lora_tools.engine.dask import cluster

    setting = remote.Setting(hashing.used, hashing.using)
    with (
        cluster(running.engine, running.workers, _versions(), setting) as found,
        holding(elsewhere, found),
    ):
        yield found


def _write(
    row: Verb, asked: Mapping[str, Any], prepared: Prepared, call: Call, nbytes: int
) -> Report[Any]:
    """Make the output beside its place, and put it there once it is complete."""
    out, force, way = Path(call.out), call.writing.force, way_of(call.writing)
    made = [out / name for name in prepared.added] or [out]
    made += [out.with_name(out.name + suffix) for suffix in prepared.beside]
    for path in made:
        check_destination(path, force, way)
    resume = way == "resume"
    check_space(out, nbytes, reusable(made[0]) if resume else 0)
    with (
        _engine(call.running) as engine,
        staged(made[0], force=force, resume=resume) as staging,
        contextlib.closing(Ledger(staging)) as ledger,
        memo.using(account := memo.Account(ledger, (*_versions(), call.running.digest))),
    ):
        if engine is not None:
            engine.check_sees([*prepared.inputs, staging])
        report = write_whole(prepared, staging / "out")
        if (staging / "out").is_dir():
            _put_card(row, asked, prepared, report, staging / "out")
        files.check()
    if account.recalled:
        said = f"{account.recalled} pieces of work were found done, and not done again (--resume)"
        report = dataclasses.replace(report, notes=(*report.notes, said))
    for suffix in prepared.dropped if force else ():
        out.with_name(out.name + suffix).unlink(missing_ok=True)
    return report


def _put_card(
    row: Verb, asked: Mapping[str, Any], prepared: Prepared, report: Report[Any], folder: Path
) -> None:
    """Put the result's own card into its folder. What was copied from the input speaks of that, and
    is the right one only where that comes back."""
    place = folder / model_card.NAME
    if "no_card" not in row.by_name:
        if prepared.card is not None:
            place.unlink(missing_ok=True)
            write_synced(place, prepared.card)
        return
    place.unlink(missing_ok=True)
    if not asked["writing"].no_card:
        write_synced(place, card_of(row, asked, report, folder, prepared))
