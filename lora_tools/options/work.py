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
        "The largest size of one file, such as 5GB.",
        OUTPUT,
        metavar="SIZE",
        unset="the same files as the input",
        parse=size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """When something is written."""

    max_error: float | None = option(
        None,
        "Quality gate: if the relative error of a module, or of all together, is above X, exit "
        "with 3 and write nothing but the report.",
        OUTPUT,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
    force: bool = option(
        False, "Replace an existing --out, when the new one is complete.", OUTPUT, recorded=False
    )
    dry_run: bool = option(
        False,
        "Show what would happen to every tensor. Reads headers only, writes nothing.",
        OUTPUT,
        flags=("-n", "--dry-run"),
        recorded=False,
    )
    no_card: bool = option(
        False,
        "Do not write a model card (README.md) into the folder (docs/hub.md).",
        OUTPUT,
        recorded=False,
    )
    plan: str | Path | None = option(
        None,
        "Write a list of all jobs: what each one reads and writes, and how much memory it needs. "
        "With --shard and --finish: the work must match this list (docs/tasks/machines.md).",
        OUTPUT,
        metavar="FILE",
        recorded=False,
        path="output",
    )
    resume: bool = option(
        False,
        "Continue where an interrupted run with the same --out stopped, or start if there was "
        "none (docs/tasks/resume.md).",
        OUTPUT,
        recorded=False,
    )
    clean: bool = option(
        False,
        "Delete what an interrupted run with the same --out has left, and start again.",
        OUTPUT,
        recorded=False,
    )
    shard: str | None = option(
        None,
        "Do only the I-th of N shares of the work. When all shares are done, --finish writes --out "
        "(docs/tasks/machines.md).",
        OUTPUT,
        metavar="I/N",
        parse=part,
        recorded=False,
    )
    finish: bool = option(
        False,
        "Write --out from the work of all shares. If a share is missing, this is an error.",
        OUTPUT,
        recorded=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How the work is done; the tensors of the output are the same with any."""

    jobs: int | None = option(
        None,
        "How many tensors to work on at a time. The output does not depend on it.",
        RUNNING,
        flags=("-j", "--jobs"),
        metavar="N",
        unset="the number of CPUs, or a container's quota; at most 8",
        recorded=False,
    )
    allow_pickle: bool = option(
        False,
        "Also read pickles (.bin, .pt, .pth, .ckpt), with weights_only=True, and checkpoints of "
        "distributed training (docs/inspect.md). No code in them is run.",
        RUNNING,
        recorded=False,
    )
    variant: str | None = option(
        None,
        "Read the weight files of this variant, such as fp16, from the folder or from each folder "
        "of a diffusers pipeline that has it. The output's files have plain names.",
        RUNNING,
        metavar="NAME",
    )
    digest: Literal["xxh3", "sha256"] = option(
        "xxh3",
        "The kind of digest for inputs and output. xxh3 detects accidents. sha256 also protects "
        "against attacks (docs/verify.md).",
        RUNNING,
    )
    engine: str = option(
        "threads",
        "threads: in this process. dask: the cluster that DASK_SCHEDULER_ADDRESS names, or else "
        "--workers processes on this machine. dask://HOST:PORT: that cluster "
        "(docs/tasks/machines.md).",
        RUNNING,
        metavar="ENGINE",
        parse=engine,
        recorded=False,
    )
    workers: int | None = option(
        None,
        "The number of processes of a Dask cluster on this machine.",
        RUNNING,
        metavar="N",
        unset="the same as --jobs",
        allowed=FROM_1,
        recorded=False,
    )
    progress: ProgressCallback | None = None  # called after each step; no option
