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
        "The rank of each module. If the change of a module has a lower rank, it gets that rank.",
        RANK,
        metavar="N",
    )
    energy: float | None = option(
        None,
        "Instead of --rank: for each module, the smallest rank that holds this share of the "
        "squared norm of its change, such as 0.9.",
        RANK,
        metavar="SHARE",
    )
    error: float | None = option(
        None,
        "For each module, the smallest rank whose relative error is at most X.",
        RANK,
        metavar="X",
    )
    ratio: float | None = option(
        None,
        "Keep the singular values above T times the largest one of the module.",
        RANK,
        metavar="T",
    )
    cumulative: float | None = option(
        None,
        "For each module, the smallest rank that holds this share of the sum of singular values.",
        RANK,
        metavar="SHARE",
    )
    threshold: float | None = option(None, "Keep the singular values above X.", RANK, metavar="X")
    noise_floor: bool = option(
        False,
        "Keep what is larger than the rounding noise of the stored weights (docs/ranks.md).",
        RANK,
    )
    gavish_donoho: bool = option(
        False,
        "Use the optimal hard threshold for white noise of unknown level (Gavish & Donoho).",
        RANK,
    )
    budget: str | None = option(
        None,
        "Choose the ranks of all modules together, for the smallest error in this size: a file of "
        "at most 50MB, or factors with at most 10M numbers.",
        RANK,
        metavar="SIZE",
    )
    sv_fro: float | None = option(
        None,
        "As in kohya: the smallest rank that holds this share of the norm.",
        RANK,
        flags=("--sv-fro", "--sv_fro"),
        metavar="SHARE",
    )
    sv_ratio: float | None = option(
        None,
        "As in kohya: keep singular values above the largest one divided by X.",
        RANK,
        flags=("--sv-ratio", "--sv_ratio"),
        metavar="X",
    )
    sv_cumulative: float | None = option(
        None,
        "Kohya's name for --cumulative.",
        RANK,
        flags=("--sv-cumulative", "--sv_cumulative"),
        metavar="SHARE",
    )
    max_rank: int | None = option(
        None, "The largest rank that the other options may choose.", RANK, metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """Which tensors are worked on, as what, and what becomes of the others."""

    include: Sequence[str] = option(
        (),
        "Use only modules whose name matches (model.layers.0.self_attn.q_proj); repeatable.",
        TENSORS,
        flags=("-i", "--include"),
        metavar="REGEX",
    )
    exclude: Sequence[str] = option(
        (),
        "Leave out modules whose name matches, even if --include matches too; repeatable.",
        TENSORS,
        flags=("-e", "--exclude"),
        metavar="REGEX",
    )
    lm_head: bool = option(
        False, "Also quantize the output head, if it is not tied to the input embedding.", TENSORS
    )
    embeddings: Literal["lora", "save", "skip"] = option(
        "lora",
        "What to do with changed embeddings: decompose them, save them whole, or leave them out.",
        TENSORS,
    )
    rest: Literal["save", "skip", "error"] = option(
        "save",
        "What to do with changed tensors that have no low-rank form (norms, biases): save them "
        "whole, leave them out, or stop with an error.",
        TENSORS,
    )
    layout: Sequence[str] = option(
        (),
        "The layer kind of modules whose name matches REGEX, if name and shape do not show it: "
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
        "Set lora_alpha. The effect of the adapter does not depend on it.",
        ADAPTER,
        metavar="A",
        unset="each module's rank",
        allowed=ABOVE_0,
    )
    rslora: bool = option(False, "Set use_rslora: the scaling is alpha/sqrt(r).", ADAPTER)
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
        "The name of the base in adapter_config.json (base_model_name_or_path, revision). "
        "AutoPeftModel loads the base by this name: ORG/NAME[@REVISION].",
        ADAPTER,
        metavar="ORG/NAME",
        unset="the present name, or else the hub id if it is certain, or else the absolute path "
        "(docs/hub.md)",
        parse=hub_id,
    )
    consumer: str = option(
        "peft",
        "Write an adapter that this program can read. If it needs one rank for all modules, they "
        "are padded with zeros. What it cannot read is refused, with the reason.",
        ADAPTER,
        flags=("--for",),
        choices=conformed,
    )
    names: Literal["loaded", "stored"] = option(
        "loaded",
        "Which module names to write. loaded: the names in memory, in the installed transformers; "
        "PEFT needs these. stored: the names in BASE's files; all other programs need these.",
        ADAPTER,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How singular directions are looked for."""

    activations: str | Path | None = option(
        None,
        "Make the error of the layers' outputs small instead, by statistics of collect-stats.",
        RANK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    spectrum_cache: str | Path | None = option(
        None,
        "Keep the decompositions in this file, up to --max-rank (or 128), and use those that it "
        "has. Trying another rank or policy then takes seconds.",
        RANK,
        metavar="FILE",
        recorded=False,
        path="output",
    )
    svd: Literal["auto", "exact"] = option(
        "auto",
        "auto: iterate until --tolerance is met, but decompose small matrices exactly. exact: "
        "decompose every matrix exactly.",
        DECOMPOSITION,
    )
    tolerance: float = option(
        1e-3,
        "How much less energy than the best possible at that rank is allowed, as a share.",
        DECOMPOSITION,
        metavar="X",
        allowed=INSIDE,
    )
    seed: int = option(0, "Seed of the random start.", DECOMPOSITION, metavar="N")
    device: str = option(
        "cpu", "Where to compute: cpu, cuda, cuda:1, …", DECOMPOSITION, metavar="DEVICE"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What an adapter was trained on."""

    base: str | Path | None = option(
        None,
        "The model that the adapter was trained on: a checkpoint, or the folder of a diffusers "
        "pipeline. Some formats need it for the module names. Only names and shapes are read.",
        FORMAT,
        metavar="PATH",
        recorded=False,
        path="tensors",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adding:
    """Adapters that go into the output in the same pass."""

    adapters: Sequence[str | Path | tuple[str | Path, float]] = option(
        (),
        "An adapter to merge in the same pass; repeatable.",
        ADAPTERS,
        flags=("--adapter",),
        metavar="ADAPTER[=WEIGHT]",
        recorded=False,
        path="tensors",
    )
    runtime_adapters: bool = option(
        False,
        "Do not merge the adapters. Write each as an .onnx_adapter file, which ONNX Runtime can "
        "activate for a request. The graph has optional inputs for the factors.",
        ADAPTERS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """What is let pass between adapters and their base."""

    allow_unmatched: bool = option(
        False, "Leave out adapter keys that match no tensor. By default this is an error.", ADAPTERS
    )
    allow_other_base: bool = option(
        False, "Also merge an adapter whose metadata names another base.", ADAPTERS
    )
