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
TENSORS, DECOMPOSITION = "Which tensors", "Decomposition"

out_option = option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    group=OUTPUT,
    help="Where to write. It must not exist yet, and its parent folder must.",
)
rank_option = option(
    "--rank",
    type=int,
    metavar="N",
    group=RANK,
    help="Rank of each module, at most; a module whose change has a lower rank gets that.",
)
energy_option = option(
    "--energy",
    type=float,
    metavar="SHARE",
    group=RANK,
    help="Instead of --rank: each module's smallest rank that holds this share of the squared "
    "norm of its change, such as 0.9.",
)
_POLICIES = (
    energy_option,
    option(
        "--error",
        type=float,
        metavar="X",
        group=RANK,
        help="Each module's smallest rank whose relative error is at most X.",
    ),
    option(
        "--ratio",
        type=float,
        metavar="T",
        group=RANK,
        help="Each module's singular values above T times its largest.",
    ),
    option(
        "--cumulative",
        type=float,
        metavar="SHARE",
        group=RANK,
        help="Each module's smallest rank that holds this share of the sum of its singular values.",
    ),
    option("--threshold", type=float, metavar="X", group=RANK, help="All singular values above X."),
)
_BUDGET = option(
    "--budget",
    metavar="SIZE",
    group=RANK,
    help="Ranks shared out over all modules so that the whole error is least: a file no larger "
    "than 50MB, or factors of 10M numbers.",
)
_FROM_NOISE = (
    option(
        "--noise-floor",
        is_flag=True,
        group=RANK,
        help="What stands above the rounding of the stored weights (docs/ranks.md).",
    ),
    option(
        "--gavish-donoho",
        is_flag=True,
        group=RANK,
        help="The optimal hard threshold for white noise of unknown level.",
    ),
)
_KOHYA = (
    option(
        "--sv-fro",
        "--sv_fro",
        type=float,
        metavar="SHARE",
        group=RANK,
        help="kohya's: the smallest rank that holds this share of the norm.",
    ),
    option(
        "--sv-ratio",
        "--sv_ratio",
        type=float,
        metavar="X",
        group=RANK,
        help="kohya's: singular values above the largest divided by X.",
    ),
    option(
        "--sv-cumulative",
        "--sv_cumulative",
        type=float,
        metavar="SHARE",
        group=RANK,
        help="kohya's name for --cumulative.",
    ),
)
max_rank_option = option(
    "--max-rank", type=int, metavar="N", group=RANK, help="The most that these may choose."
)


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


extract_ranks = _all(rank_option, *_POLICIES, *_FROM_NOISE, _BUDGET, max_rank_option)
rescale_ranks = _all(rank_option, *_POLICIES, _BUDGET, *_KOHYA, max_rank_option)
consumer_option = option(
    "--for",
    "consumer",
    type=click.Choice(["peft", "vllm", "llama.cpp"]),
    default="peft",
    show_default=True,
    group=ADAPTER,
    help="Write what this program reads: where it knows one rank only, all modules are padded to "
    "it with zeros. What it cannot read is refused, with the reason.",
)
unmatched_option = option(
    "--allow-unmatched",
    is_flag=True,
    group="Adapters",
    help="Leave out adapter keys that match no tensor, instead of refusing.",
)
include_option = option(
    "-i",
    "--include",
    multiple=True,
    metavar="REGEX",
    group=TENSORS,
    help="Only modules in whose name this is found (model.layers.0.self_attn.q_proj); repeatable.",
)
exclude_option = option(
    "-e",
    "--exclude",
    multiple=True,
    metavar="REGEX",
    group=TENSORS,
    help="No modules in whose name this is found; repeatable, stronger than --include.",
)
shard_size_option = option(
    "--shard-size",
    metavar="SIZE",
    group=OUTPUT,
    help="Most bytes of tensors in one file, such as 5GB.  [default: the input's files again]",
)
seed_option = option(
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    group=DECOMPOSITION,
    help="Of the random start.",
)
device_option = option(
    "--device",
    metavar="DEVICE",
    default="cpu",
    show_default=True,
    group=DECOMPOSITION,
    help="cpu, cuda, cuda:1, …",
)
_WRITING = (
    option(
        "--force",
        is_flag=True,
        group=OUTPUT,
        help="Replace what is at --out, once the new one is complete.",
    ),
    option(
        "--dry-run",
        is_flag=True,
        group=OUTPUT,
        help="Print what would become of every tensor; read headers only, write nothing.",
    ),
)
_READING = (
    option(
        "--report",
        "report_file",
        type=click.Path(path_type=Path, dir_okay=False),
        group=REPORT,
        help="Write the report to this file as JSON (docs/report.md).",
    ),
    option(
        "--json", "as_json", is_flag=True, group=REPORT, help="Print the report to stdout as JSON."
    ),
    option(
        "-v",
        "--verbose",
        is_flag=True,
        group=REPORT,
        help="List every module and the fate of every tensor.",
    ),
    option("-q", "--quiet", is_flag=True, group=REPORT, help="Print nothing but errors."),
    option(
        "-j",
        "--jobs",
        type=int,
        metavar="N",
        group=RUNNING,
        help="Tensors worked on at a time; the output is the same with any number.  "
        "[default: the processors, at most 8]",
    ),
    option(
        "--allow-pickle",
        is_flag=True,
        group=RUNNING,
        help="Also read .bin, .pt and .pth files, with weights_only=True.",
    ),
)


other_base_option = option(
    "--allow-other-base",
    is_flag=True,
    group="Adapters",
    help="Also merge an adapter whose metadata names another base than the one given.",
)


base_option = option(
    "--base",
    type=click.Path(),
    group="Format",
    help="The model the adapter was trained on: a checkpoint, or a diffusers pipeline's folder. "
    "Only names and shapes are read. Formats with names of their own need it.",
)


def dtype_option(default: str) -> Callable[[F], F]:
    """--dtype, with what it is if not given."""
    return option(
        "--dtype",
        metavar="DTYPE",
        group=ADAPTER if "factor" in default else OUTPUT,
        help=f"bfloat16, float16, float32 or float64.  [default: {default}]",
    )


def max_error_option(what: str) -> Callable[[F], F]:
    """--max-error, the quality gate."""
    return option(
        "--max-error",
        type=float,
        metavar="X",
        group=OUTPUT,
        help=f"Quality gate: exit 3 and write nothing but the report if the relative error of "
        f"{what}, or of all together, exceeds X.",
    )


def verb(function: F) -> F:
    """Add the common options to a command that writes something."""
    return _all(*_WRITING)(reading_verb(function))


def reading_verb(function: F) -> F:
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

    return _all(*_READING)(command)  # type: ignore[return-value]


def _check_report_file(file: Path, options: Mapping[str, Any]) -> None:
    """Before hours of work, not after; and no input is ever written to."""
    names = ("base", "tuned", "merged", "adapter", "path", "against", "model", "text", "checkpoint")
    given = [options.get(name) for name in names]
    for text in map(str, (*filter(None, given), *options.get("adapters", ()))):
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
