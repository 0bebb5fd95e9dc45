"""Records that several verbs take: what is worked on, and into what it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_tools.options.fields import option
from lora_tools.options.tables import (
    ABOVE_0,
    ADAPTER,
    ADAPTERS,
    DECOMPOSITION,
    FORMAT,
    INSIDE,
    RANK,
    TENSORS,
    conformed,
    dtype_help,
    float_dtype,
    formats,
    hub_id,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """How the rank of each module is chosen: by one of these, up to ``max_rank``."""

    rank: int | None = option(
        None,
        "Rank of each module, at most; a module whose change has a lower rank gets that.",
        RANK,
        metavar="N",
    )
    energy: float | None = option(
        None,
        "Instead of --rank: each module's smallest rank that holds this share of the squared "
        "norm of its change, such as 0.9.",
        RANK,
        metavar="SHARE",
    )
    error: float | None = option(
        None, "Each module's smallest rank whose relative error is at most X.", RANK, metavar="X"
    )
    ratio: float | None = option(
        None, "Each module's singular values above T times its largest.", RANK, metavar="T"
    )
    cumulative: float | None = option(
        None,
        "Each module's smallest rank that holds this share of the sum of its singular values.",
        RANK,
        metavar="SHARE",
    )
    threshold: float | None = option(
        None, "Each module's singular values above X.", RANK, metavar="X"
    )
    noise_floor: bool = option(
        False, "What stands above the rounding of the stored weights (docs/ranks.md).", RANK
    )
    gavish_donoho: bool = option(
        False, "The optimal hard threshold for white noise of unknown level.", RANK
    )
    budget: str | None = option(
        None,
        "Ranks shared out over all modules so that the whole error is least: a file no larger "
        "than 50MB, or factors of 10M numbers.",
        RANK,
        metavar="SIZE",
    )
    sv_fro: float | None = option(
        None,
        "kohya's: the smallest rank that holds this share of the norm.",
        RANK,
        flags=("--sv-fro", "--sv_fro"),
        metavar="SHARE",
    )
    sv_ratio: float | None = option(
        None,
        "kohya's: singular values above the largest divided by X.",
        RANK,
        flags=("--sv-ratio", "--sv_ratio"),
        metavar="X",
    )
    sv_cumulative: float | None = option(
        None,
        "kohya's name for --cumulative.",
        RANK,
        flags=("--sv-cumulative", "--sv_cumulative"),
        metavar="SHARE",
    )
    max_rank: int | None = option(
        None, "The largest rank that these rules may choose.", RANK, metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """Which tensors are worked on, as what, and what becomes of the others."""

    include: Sequence[str] = option(
        (),
        "Only modules in whose name this is found (model.layers.0.self_attn.q_proj); repeatable.",
        TENSORS,
        flags=("-i", "--include"),
        metavar="REGEX",
    )
    exclude: Sequence[str] = option(
        (),
        "No modules in whose name this is found; repeatable, stronger than --include.",
        TENSORS,
        flags=("-e", "--exclude"),
        metavar="REGEX",
    )
    lm_head: bool = option(
        False,
        "Quantize the output head as well, where it is not tied to the input embedding.",
        TENSORS,
    )
    embeddings: Literal["lora", "save", "skip"] = option(
        "lora", "Changed embeddings: decompose them, save them whole, or leave them out.", TENSORS
    )
    rest: Literal["save", "skip", "error"] = option(
        "save",
        "Changed tensors without a low-rank form (norms, biases): save them whole, leave them "
        "out, or stop.",
        TENSORS,
    )
    layout: Sequence[str] = option(
        (),
        "Layer kind of modules in whose name REGEX is found, where name and shape do not tell: "
        "conv:GROUPS, merged:3 (factors for each block), merged:64,16,16/101 (by size, first and "
        "last only), merged:3*12 (three in each of 12 heads), linear, conv1d, embedding, none "
        "(docs/layers.md); repeatable.",
        TENSORS,
        metavar="REGEX=KIND",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterForm:
    """How an adapter's factors are written, and for whom."""

    alpha: float | None = option(
        None,
        "lora_alpha; the effect is the same with any.",
        ADAPTER,
        metavar="A",
        unset="each module's rank",
        allowed=ABOVE_0,
    )
    rslora: bool = option(False, "Write use_rslora: scaling alpha/sqrt(r).", ADAPTER)
    dtype: str | None = option(
        None,
        dtype_help,
        ADAPTER,
        metavar="DTYPE",
        unset="each factor keeps its own",
        parse=float_dtype,
    )
    to: str | None = option(
        None, "The format to write (docs/formats.md).", ADAPTER, choices=formats, unset="peft"
    )
    base_name: str | None = option(
        None,
        "What adapter_config.json calls the base (base_model_name_or_path, revision), by which "
        "AutoPeftModel loads it: ORG/NAME[@REVISION].",
        ADAPTER,
        metavar="ORG/NAME",
        unset="the name that is there, else its hub id where that is certain, else its absolute "
        "path (docs/hub.md)",
        parse=hub_id,
    )
    consumer: str = option(
        "peft",
        "Write what this program reads: where it knows one rank only, all modules are padded to "
        "it with zeros. What it cannot read is refused, with the reason.",
        ADAPTER,
        flags=("--for",),
        choices=conformed,
    )
    names: Literal["loaded", "stored"] = option(
        "loaded",
        "Of modules: loaded, those that the installed transformers gives them in memory, which "
        "PEFT goes by; stored, those in BASE's files, as for all but peft always.",
        ADAPTER,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How singular directions are looked for."""

    activations: str | Path | None = option(
        None,
        "Make the error of the layers' outputs small, on inputs as collect-stats saw them.",
        RANK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    spectrum_cache: str | Path | None = option(
        None,
        "Keep the decompositions there, to the largest rank (--max-rank, or 128), and use those "
        "that are there: another rank or policy then costs seconds.",
        RANK,
        metavar="FILE",
        recorded=False,
        path="output",
    )
    svd: Literal["auto", "exact"] = option(
        "auto",
        "auto: iterate until --tolerance is met, small matrices exactly; exact: every matrix.",
        DECOMPOSITION,
    )
    tolerance: float = option(
        1e-3,
        "The energy captured may miss the best possible at that rank by this share.",
        DECOMPOSITION,
        metavar="X",
        allowed=INSIDE,
    )
    seed: int = option(0, "Seed of the random start.", DECOMPOSITION, metavar="N")
    device: str = option("cpu", "cpu, cuda, cuda:1, …", DECOMPOSITION, metavar="DEVICE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What an adapter was trained on."""

    base: str | Path | None = option(
        None,
        "The model the adapter was trained on: a checkpoint, or a diffusers pipeline's folder. "
        "Only names and shapes are read. Formats with names of their own need it.",
        FORMAT,
        metavar="PATH",
        recorded=False,
        path="input",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adding:
    """Adapters that go into the output in the same pass."""

    adapters: Sequence[str | Path | tuple[str | Path, float]] = option(
        (),
        "An adapter to merge in the same pass; may be given several times.",
        ADAPTERS,
        flags=("--adapter",),
        metavar="ADAPTER[=WEIGHT]",
        recorded=False,
        path="input",
    )
    runtime_adapters: bool = option(
        False,
        "Do not merge them: write each as an .onnx_adapter file that ONNX Runtime activates for a "
        "request, with optional inputs of the graph for its factors.",
        ADAPTERS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """What is let pass between adapters and their base."""

    allow_unmatched: bool = option(
        False, "Leave out adapter keys that match no tensor, instead of refusing.", ADAPTERS
    )
    allow_other_base: bool = option(
        False,
        "Also merge an adapter whose metadata names another base than the one given.",
        ADAPTERS,
    )
