"""Records that several verbs take: how outputs are stored and written, and how the work is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from lora_tools.options.fields import option
from lora_tools.options.tables import (
    FROM_0,
    FROM_1,
    OUTPUT,
    RUNNING,
    dtype_help,
    engine,
    float_dtype,
    part,
    size,
)
from lora_tools.records import ProgressCallback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How a checkpoint's tensors are stored."""

    dtype: str | None = option(
        None,
        dtype_help,
        OUTPUT,
        metavar="DTYPE",
        unset="each tensor keeps its own",
        parse=float_dtype,
    )
    shard_size: str | None = option(
        None,
        "Most bytes of tensors in one file, such as 5GB.",
        OUTPUT,
        metavar="SIZE",
        unset="the input's files again",
        parse=size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """When something is written."""

    max_error: float | None = option(
        None,
        "Quality gate: exit 3 and write nothing but the report if the relative error of a module, "
        "or of all together, exceeds X.",
        OUTPUT,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
    force: bool = option(
        False, "Replace what is at --out, once the new one is complete.", OUTPUT, recorded=False
    )
    dry_run: bool = option(
        False,
        "Print what would become of every tensor; read headers only, write nothing.",
        OUTPUT,
        flags=("-n", "--dry-run"),
        recorded=False,
    )
    no_card: bool = option(
        False,
        "Write no README.md into a folder: the model card that the Hub reads (docs/hub.md).",
        OUTPUT,
        recorded=False,
    )
    plan: str | Path | None = option(
        None,
        "Write there which jobs the work is made of: what each reads, writes and needs of memory. "
        "With --shard and --finish: do no other work than that plan's (docs/tasks/machines.md).",
        OUTPUT,
        metavar="FILE",
        recorded=False,
        path="output",
    )
    resume: bool = option(
        False,
        "Go on with what an ended run to the same --out has done; where there is none, begin "
        "(docs/tasks/resume.md).",
        OUTPUT,
        recorded=False,
    )
    clean: bool = option(
        False,
        "Remove what an ended run to the same --out has left, and begin anew.",
        OUTPUT,
        recorded=False,
    )
    shard: str | None = option(
        None,
        "Do only the I-th of N shares of the work, and put nothing at --out: other processes do "
        "the other shares, then --finish completes it (docs/tasks/machines.md).",
        OUTPUT,
        metavar="I/N",
        parse=part,
        recorded=False,
    )
    finish: bool = option(
        False,
        "Put together at --out what all shares have done; a share that is missing is an error.",
        OUTPUT,
        recorded=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How the work is done; the tensors of the output are the same with any."""

    jobs: int | None = option(
        None,
        "Tensors worked on at a time; the output is the same with any number.",
        RUNNING,
        flags=("-j", "--jobs"),
        metavar="N",
        unset="the processors, or the quota of a container, at most 8",
        recorded=False,
    )
    allow_pickle: bool = option(
        False,
        "Also read .bin, .pt, .pth and .ckpt files, with weights_only=True, and what distributed "
        "training leaves (docs/inspect.md), of whose pickles nothing is run.",
        RUNNING,
        recorded=False,
    )
    variant: str | None = option(
        None,
        "Of a folder, or of each folder of a diffusers pipeline that has such: read the weight "
        "files of this variant, such as fp16. The output's files have plain names.",
        RUNNING,
        metavar="NAME",
    )
    digest: Literal["xxh3", "sha256"] = option(
        "xxh3",
        "What the digests of inputs and output are made of: xxh3 tells accidents; sha256 stands "
        "against attack as well (docs/verify.md).",
        RUNNING,
    )
    engine: str = option(
        "threads",
        "threads of this process, or dask: a cluster of --workers on this machine, or the one that "
        "DASK_SCHEDULER_ADDRESS names; dask://HOST:PORT for another (docs/tasks/machines.md).",
        RUNNING,
        metavar="ENGINE",
        parse=engine,
        recorded=False,
    )
    workers: int | None = option(
        None,
        "Processes of a Dask cluster on this machine.",
        RUNNING,
        metavar="N",
        unset="as --jobs",
        allowed=FROM_1,
        recorded=False,
    )
    progress: ProgressCallback | None = None  # called after each step; no option
