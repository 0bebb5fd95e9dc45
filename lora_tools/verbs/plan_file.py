"""The file that ``--plan`` names: written, or compared with what a share of it is to be.

There is one line a job, so that two plans can be compared line by line, and neither needs to be
held: a plan can have hundreds of thousands.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_tools.errors import OutputError, UsageError
from lora_tools.formats.output import Prepared, real, staged
from lora_tools.jobs import Job, JobSums
from lora_tools.options import Writing
from lora_tools.watch.places import said_of


def write_or_compare(prepared: Prepared, writing: Writing, out: str) -> None:
    """Write the plan; where shares of one are done, look whether it is this one.

    Args:
        out: the output as given.

    Raises:
        UsageError: the work cannot be told beforehand, or the plan is another, or there is none.
        OutputError: it cannot be written.
    """
    assert writing.plan is not None
    path = Path(writing.plan)
    if prepared.jobs is None:
        raise UsageError(
            f"--plan {path}: with --budget, --calibrate or --eval-text, the jobs are not known in "
            "advance; leave those out, or --plan"
        )
    lines = _lines(prepared, out)
    is_shared = writing.shard is not None or writing.finish
    if is_shared or (writing.resume and path.exists()):
        _compare(path, lines)
    else:
        _write(path, lines)


def _lines(prepared: Prepared, out: str) -> Iterator[str]:
    """The file's. Raises what finding out the jobs does."""
    assert prepared.jobs is not None
    report = prepared.report
    head: dict[str, Any] = {
        "verb": report.verb,
        "version": report.version,
        "command": report.command,
        "inputs": [dataclasses.asdict(each) for each in report.inputs],
        "output": said_of(Path(out)),
    }
    yield "{\n"
    yield from (f'"{key}": {_json(value)},\n' for key, value in head.items())
    yield '"jobs": [\n'
    count = read = written = most = 0
    for job in prepared.jobs():
        yield f"{',' if count else ' '}{_json(_plain(job, prepared, out))}\n"
        count, most = count + 1, max(most, job.peak_memory)
        read, written = read + job.bytes_read, written + job.bytes_written
    sums = JobSums(count, read, written, most)
    yield "],\n"
    yield f'"totals": {_json(dataclasses.asdict(sums))}\n'
    yield "}\n"


def _plain(job: Job, prepared: Prepared, out: str) -> dict[str, Any]:
    found = dataclasses.asdict(job)
    found["action"] = str(job.action)
    found["output"] = job.output if prepared.is_folder else Path(out).name
    for each in found["inputs"]:
        each["path"] = said_of(Path(each["path"]))
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    try:
        with (
            staged(real(path), force=True) as staging,
            (staging / "out").open("w", encoding="utf-8") as file,
        ):
            file.writelines(lines)
    except OSError as error:
        raise OutputError(f"--plan {path}: {error.strerror or error}") from None


def _compare(path: Path, lines: Iterable[str]) -> None:
    """Raises UsageError where the file is not these lines."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for mine, there in itertools.zip_longest(lines, file):
                if mine != there:
                    raise UsageError(
                        f"--plan {path}: is a plan of other work: it has {_shown(there)}, but this "
                        f"command has {_shown(mine)}; give the same options and inputs, or write "
                        "the plan again with --dry-run"
                    )
    except FileNotFoundError:
        raise UsageError(
            f"--plan {path}: no such file; write it first, with the same command and --dry-run "
            "instead of --shard or --finish"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--plan {path}: cannot be read ({error})") from None


def _shown(line: str | None) -> str:
    """What a line of a plan is about."""
    if line is None:
        return "no more"
    text = line.strip().strip(",")
    try:
        job = json.loads(text)
        return f"{job['name']}: {job['action']} {job['reason']}".rstrip()
    except (ValueError, KeyError, TypeError):
        return f"{text:.200}"
