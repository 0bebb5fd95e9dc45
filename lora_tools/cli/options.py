"""Options that several commands share, and the frame every command runs in."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_tools.cli.groups import option
from lora_tools.errors import OutputError, QualityGateError, UsageError
from lora_tools.records import Report

F = TypeVar("F", bound=Callable[..., Any])

RANK, ADAPTER, OUTPUT, REPORT, RUNNING = "Rank", "Adapter", "Output", "Report", "Running"

out_option = option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), group=OUTPUT,
    help="Where to write. It must not exist yet, and its parent folder must.",
)  # fmt: skip
rank_option = option(
    "--rank", type=int, metavar="N", group=RANK,
    help="Rank of each module, at most; a module whose change has a lower rank gets that.",
)  # fmt: skip
energy_option = option(
    "--energy", type=float, metavar="SHARE", group=RANK,
    help="Instead of --rank: each module's smallest rank that holds this share of the squared "
    "norm of its change, such as 0.9.",
)  # fmt: skip
max_rank_option = option(
    "--max-rank", type=int, metavar="N", group=RANK, help="The most --energy may choose."
)
consumer_option = option(
    "--for", "consumer", type=click.Choice(["peft", "vllm", "llama.cpp"]), default="peft",
    show_default=True, group=ADAPTER,
    help="Write what this program reads: where it knows one rank only, all modules are padded to "
    "it with zeros. What it cannot read is refused, with the reason.",
)  # fmt: skip
unmatched_option = option(
    "--allow-unmatched", is_flag=True, group="Adapters",
    help="Leave out adapter keys that match no tensor, instead of refusing.",
)  # fmt: skip
_COMMON = (
    option("--force", is_flag=True, group=OUTPUT,
           help="Replace what is at --out, once the new one is complete."),
    option("--dry-run", is_flag=True, group=OUTPUT,
           help="Print what would become of every tensor; read headers only, write nothing."),
    option("--report", "report_file", type=click.Path(path_type=Path, dir_okay=False),
           group=REPORT, help="Write the report to this file as JSON (docs/report.md)."),
    option("--json", "as_json", is_flag=True, group=REPORT,
           help="Print the report to stdout as JSON."),
    option("-v", "--verbose", is_flag=True, group=REPORT,
           help="List every module and the fate of every tensor."),
    option("-q", "--quiet", is_flag=True, group=REPORT, help="Print nothing but errors."),
    option("-j", "--jobs", type=int, metavar="N", group=RUNNING,
           help="Tensors worked on at a time; the output is the same with any number.  "
           "[default: the processors, at most 8]"),
    option("--allow-pickle", is_flag=True, group=RUNNING,
           help="Also read .bin, .pt and .pth files, with weights_only=True."),
)  # fmt: skip


def dtype_option(default: str) -> Callable[[F], F]:
    """--dtype, with what it is if not given."""
    return option(
        "--dtype", metavar="DTYPE", group=ADAPTER if "factor" in default else OUTPUT,
        help=f"bfloat16, float16, float32 or float64.  [default: {default}]",
    )  # fmt: skip


def verb(function: F) -> F:
    """Add the common options to a command whose function returns ``call(progress) -> Report``.

    The frame runs the call under a progress bar, then prints people's text to stderr, JSON to
    stdout and the report to its file. A failed quality gate still leaves its report.
    """

    @functools.wraps(function)
    def command(
        report_file: Path | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
    ) -> None:
        from lora_tools.cli import render

        if report_file is not None:
            _check_report_file(report_file, options)
        with render.progress(quiet) as progress:
            try:
                report: Report = function(progress=progress, **options)
                failure = None
            except QualityGateError as error:
                if error.report is None:
                    raise
                report, failure = error.report, error
        data = render.plain(report)
        if report_file is not None:
            _write(report_file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        if as_json:
            click.echo(json.dumps(data))
        if not quiet:
            render.show(report, verbose=verbose, written=failure is None)
        if failure is not None:
            raise failure

    for each in reversed(_COMMON):
        command = each(command)
    return command  # type: ignore[return-value]


def _check_report_file(file: Path, options: Mapping[str, Any]) -> None:
    """Before hours of work, not after; and no input is ever written to."""
    given = [options.get(name) for name in ("base", "tuned", "merged", "adapter", "checkpoint")]
    for text in (*filter(None, given), *options.get("adapters", ())):
        for source in {Path(text), Path(text.rpartition("=")[0])} - {Path()}:
            if source.exists() and source.resolve() in (file.resolve(), *file.resolve().parents):
                raise UsageError(f"--report {file}: lies in the input {source}")
    if not file.parent.is_dir():
        raise UsageError(f"--report {file}: its folder does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"--report {file}: cannot be written")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--report {file}: {error.strerror or error}") from None
