"""A call whose inputs or output lie elsewhere: it works on what stands for them here, and speaks of
them by their addresses."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_tools import interruption
from lora_tools.errors import LoraToolsError, OutputError, QualityGateError, UsageError
from lora_tools.formats.stand_ins import StandIns, stand_ins
from lora_tools.options import Writing
from lora_tools.records import Progress, ProgressCallback, Report
from lora_tools.remote import urls
from lora_tools.remote.upload import Destination
from lora_tools.sources.weighted import split_weight
from lora_tools.verbs.row import Verb, called

T = TypeVar("T")
_OF_WEIGHTS = {"base", "against", "adapters", "tuned"}  # options that are inputs of weights


def refuse_files(
    row: Verb, given: Mapping[str, Any], asked: Mapping[str, Any], report: Path | None
) -> None:
    """Raises UsageError for a file beside the inputs or the output that is to lie elsewhere."""
    named = {"--report": report}
    for keyword in row.keywords:
        if keyword.option is not None and keyword.option.path and keyword.name not in _OF_WEIGHTS:
            named[keyword.flag] = getattr(asked[called(keyword.record)], keyword.name)
    if "text" in given:
        named["TEXT"] = given["text"]
    for flag, value in named.items():
        if value is not None and (address := urls.url(value)):
            raise UsageError(
                f"{flag} {urls.shown(address)}: this must be a local file; give a local path"
            )


@contextlib.contextmanager
def by_address() -> Iterator[None]:
    """Errors within speak of addresses."""
    try:
        yield
    except LoraToolsError as error:
        made = stand_ins()
        if made is not None and made.folders:
            error.args = tuple(_said(each, made) for each in error.args)
            if isinstance(error, QualityGateError):
                error.report = _said(error.report, made)
        raise


def reported(report: Report[Any]) -> Report[Any]:
    """A report that speaks of addresses."""
    made = stand_ins()
    return _said(report, made) if made is not None and made.folders else report


def _said(value: T, made: StandIns) -> T:
    found: Any = value
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        found = made.said(value)
    elif isinstance(value, dict):
        found = {key: _said(each, made) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(_said(each, made) for each in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        found = dataclasses.replace(value, **{k: _said(v, made) for k, v in fields.items()})
    return found  # type: ignore[no-any-return]


class Upload:
    """The output of a call, made here and then put where its address says.

    Raises:
        UsageError: it cannot be, or is an input.
    """

    def __init__(self, row: Verb, given: Mapping[str, Any], writing: Writing) -> None:
        self._destination = Destination(urls.url(given["out"]))
        shown = self._destination.shown
        if writing.resume or writing.clean or writing.finish or writing.shard is not None:
            raise UsageError(
                f"--out {shown}: --resume, --clean, --shard and --finish need a local output; name "
                "a folder, and upload it when it is complete"
            )
        for place in _places(row, given):
            if f"{shown}/".startswith(f"{place}/") or f"{place}/".startswith(f"{shown}/"):
                raise UsageError(
                    f"--out {shown} is the input {place}, or one contains the other; the input is "
                    "never modified: choose another output"
                )
        self._writing = writing

    @contextlib.contextmanager
    def here(self) -> Iterator[Path]:
        """Where it is made. On success it is uploaded; else nothing of it remains here, but where
        the upload fails."""
        if not self._writing.dry_run:
            self._destination.check(self._writing.force)
        home, made = Path(tempfile.mkdtemp(prefix="loratools-out-")), stand_ins()
        assert made is not None
        made.folders[home] = self._destination.shown.rpartition("/")[0]
        try:
            yield home / self._destination.name
        except BaseException as error:
            shutil.rmtree(home, ignore_errors=True)
            if isinstance(error, OutputError):  # such as a full disk: this one is meant
                here = (
                    f"it is made in {tempfile.gettempdir()} first; choose another folder with "
                    "TMPDIR"
                )
                error.args = (f"{error}; {here}",)
            raise
        if self._writing.dry_run:
            shutil.rmtree(home, ignore_errors=True)

    def put(self, out: Path, progress: ProgressCallback | None) -> None:
        """Upload it. Raises OutputError, and then it stays here."""
        files = [path for path in out.parent.rglob("*") if path.is_file()]
        total, count, done = sum(path.stat().st_size for path in files), len(files), [0, 0]

        def told(nbytes: int, name: str) -> None:
            done[0], done[1] = done[0] + nbytes, done[1] + 1
            if progress is not None:
                progress(Progress(done[0], total, f"upload {name}", done[1], count))

        try:
            self._destination.put(out, told)
        except BaseException as error:
            made = stand_ins()
            if made is not None:
                made.folders.pop(out.parent, None)  # that very place is meant
            how = urls.uploader(self._destination.address)
            said = (
                f"the result is in {out.parent}; upload it ({how}), with its index or config last"
            )
            if isinstance(error, OutputError):
                raise OutputError(f"{error}; {said}") from None
            interruption.current().kept.append(f"{self._destination.shown}: {said}")
            raise
        shutil.rmtree(out.parent, ignore_errors=True)


def _places(row: Verb, given: Mapping[str, Any]) -> Iterator[str]:
    """The addresses of a call's inputs, as they are shown."""
    for name in (*(a.name for a in row.arguments if a.name != "out"), *row.by_name):
        value = given.get(name)
        for given_one in value if isinstance(value, list | tuple) else (value,):
            each = given_one[0] if isinstance(given_one, tuple) else given_one
            if isinstance(each, str | Path) and urls.url(each):
                yield urls.shown(urls.url(split_weight(str(each))[0])).rstrip("/")
