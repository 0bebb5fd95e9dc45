"""Records of one verb or two."""

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
    AGAINST,
    CHECK,
    FINITE,
    FORMAT,
    FROM_0,
    GRAPH,
    METHOD,
    OPSETS,
    OUTPUT,
    PICTURE,
    QUANTIZED,
    SHARE,
    STRENGTH,
    TENSORS,
    TEXT,
    consumers,
    features,
    formats,
    methods,
    task_help,
    tasks,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging:
    """What a merge writes besides."""

    reversible: bool = option(
        False,
        "Also write a small sidecar, from which unmerge gives BASE back bit for bit.",
        OUTPUT,
        recorded=False,
    )
    requantize: bool = option(
        False,
        "Where BASE is quantized, write its number format again, if quantize writes that one; in "
        "four bits most of a small change is lost, and the report says how much is kept.",
        OUTPUT,
        unset="a quantized BASE becomes plain",
    )
    activations: str | Path | None = option(
        None,
        "With --requantize: round so that the error of the layers' outputs is small, on inputs as "
        "collect-stats saw them in BASE; a small change outlasts that far better. The report says "
        "how much is kept with it and without.",
        OUTPUT,
        metavar="FILE",
        recorded=False,
        path="input",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undoing:
    """How a merge is undone."""

    sidecar: bool | None = option(
        None,
        "Refuse to go on without a sidecar, or ignore the one there is.",
        ADAPTERS,
        flags=("--sidecar/--no-sidecar",),
        unset="use it if it is there",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strength:
    """Another strength for an adapter."""

    scale: float | None = option(
        None,
        "Multiply the adapter's effect by F; lora_alpha changes, the factors do not.",
        STRENGTH,
        metavar="F",
        allowed=FINITE,
    )
    alpha: float | None = option(
        None, "Set lora_alpha; --effect says what follows.", STRENGTH, metavar="A", allowed=ABOVE_0
    )
    effect: Literal["keep", "change"] = option(
        "keep",
        "With --alpha: lora_B makes up for it, or the effect changes in proportion.",
        STRENGTH,
    )
    rslora: bool | None = option(
        None,
        "Write use_rslora (scaling alpha/sqrt(r)) or not; the effect is kept.",
        STRENGTH,
        flags=("--rslora/--no-rslora",),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """From which adapter format to which, and what the files do not say."""

    to: str = option(
        dataclasses.MISSING,
        "The format to write. docs/formats.md has what each one keeps.",
        FORMAT,
        choices=formats,
    )
    source: str | None = option(
        None,
        "The format of ADAPTER.",
        FORMAT,
        flags=("--from",),
        choices=formats,
        unset="its content tells",
    )
    drop: Sequence[str] = option(
        (),
        "Leave this out, where the format has no place for it (or you do not want it).",
        FORMAT,
        choices=features,
    )
    alpha: float | None = option(
        None,
        "lora_alpha it was trained with, where its format does not keep it (loralib, torchtune).",
        ADAPTER,
        metavar="A",
        allowed=ABOVE_0,
    )
    enable_lora: str | None = option(
        None, "Which blocks of loralib's MergedLinear layers are adapted.", ADAPTER, metavar="1,0,1"
    )
    layout: Sequence[str] = option(
        (),
        "With --to loralib: modules that are MergedLinear there, such as c_attn=merged:3/101.",
        FORMAT,
        metavar="REGEX=KIND",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audience:
    """Who is to load an adapter."""

    consumer: str = option(
        dataclasses.MISSING,
        "The program that is to load ADAPTER.",
        ADAPTER,
        flags=("--for",),
        choices=consumers,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combining:
    """How several adapters become one."""

    method: str = option(
        "cat",
        "cat, linear and svd add the changes of the weights up; the others prune them first "
        "(docs/combine.md).",
        METHOD,
        choices=methods,
    )
    density: float | None = option(
        None,
        "The share of elements that the pruning methods keep, such as 0.2.",
        METHOD,
        metavar="SHARE",
        allowed=SHARE,
    )
    majority_sign: Literal["total", "frequency", "weighted"] = option(
        "total",
        "ties and dare_ties elect each element's sign by the sum of the changes, by their count, "
        "or by their sum with the weights (mergekit's).",
        METHOD,
    )
    normalize: bool = option(
        False,
        "Divide by the sum of the weights (mergekit's default); of those that agree, where signs "
        "are elected.",
        METHOD,
    )
    seed: int = option(0, "Of the random choice of dare_linear and dare_ties.", METHOD, metavar="N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graphs:
    """Which ONNX graphs are made, or run."""

    task: str = option("auto", task_help, GRAPH, metavar="TASK", choices=tasks)
    no_cache: bool = option(False, "A decoder without its key/value cache.", GRAPH)
    graph: str | Path | None = option(
        None,
        "Use this graph, exported from another checkpoint of the same architecture, again.",
        GRAPH,
        metavar="MODEL.ONNX",
        recorded=False,
        path="input",
    )
    no_fuse: bool = option(
        False,
        "The graph as torch traces it, and not with attention, rotary embeddings and norms as one "
        "operator each.",
        GRAPH,
    )
    compute_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "What the graph computes in; norms and softmax stay in float32.", GRAPH
    )
    half_io: bool = option(
        False,
        "Inputs and outputs, the key/value cache among them, are in --compute-dtype, too.",
        GRAPH,
    )
    opset: int | None = option(
        None,
        "ONNX's opset.",
        GRAPH,
        metavar="N",
        allowed=OPSETS,
        unset="23, which fusing needs; 20 with --no-fuse, and where nothing is fused",
    )
    trust_remote_code: bool = option(
        False, "Run the modelling code that comes with the checkpoint.", GRAPH
    )
    weights: Literal["shared", "bundled"] | None = option(
        None,
        "shared: the graph points into the output's safetensors files. bundled: one "
        "external-data file in their place, in the dtype that the graph computes in, which loads "
        "faster; with --dtype, --int8 and --int4 in that in which weights are stored.",
        OUTPUT,
        unset="shared; bundled with --int8 and --int4",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """How an ONNX graph's linear layers are quantized: by one of these, or not."""

    nf4: bool = option(
        False,
        "Linear layers in four bits, over the bytes that `loratools quantize` writes, or those of "
        "a CHECKPOINT that it wrote. For size, not speed: on a CPU, one token at a time, it is "
        "2 to 4 times slower than float32 (2.0 times on SmolLM2-135M).",
        QUANTIZED,
    )
    int8: bool = option(
        False,
        "Linear layers in eight bits by ONNX Runtime's quantizer, in blocks of 32.",
        QUANTIZED,
    )
    int4: bool = option(
        False, "The same in four bits: smaller, and further from the original.", QUANTIZED
    )
    activations: str | Path | None = option(
        None,
        "With one of these: make the error of the layers' outputs small, on inputs as "
        "collect-stats saw them, as `loratools quantize --activations` does; the same scales and "
        "sizes.",
        QUANTIZED,
        metavar="FILE",
        recorded=False,
        path="input",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """How a graph is run to see whether it does what torch does."""

    eval_text: str | Path | None = option(
        None,
        "Measure a decoder's perplexity on this text, and its divergence from the weights before "
        "they were quantized.",
        CHECK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    atol: float = option(
        1e-5,
        "Outputs may differ from torch's by this much",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
    rtol: float | None = option(
        None,
        "plus this share of their largest element; else the exit code is 3.",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        unset="ten times what torch's float32 differs from its float64 by, and 1e-5",
        recorded=False,
    )
    no_verify: bool = option(False, "Do not run the graph.", CHECK, recorded=False)
    keep_failed: bool = option(
        False, "Leave an output that differs too much, as OUT.failed.", CHECK, recorded=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a file is compared with."""

    base: str | Path | None = option(
        None,
        "The base of a merged checkpoint (with --adapter) or of an adapter (with --tuned).",
        AGAINST,
        metavar="BASE",
        path="input",
    )
    against: str | Path | None = option(
        None,
        "PATH is quantized, or an ONNX model, and should be this.",
        AGAINST,
        metavar="CHECKPOINT",
        path="input",
    )
    adapters: Sequence[str | Path | tuple[str | Path, float]] = option(
        (),
        "PATH should be BASE, or CHECKPOINT, with this merged; repeatable.",
        AGAINST,
        flags=("--adapter",),
        metavar="ADAPTER[=WEIGHT]",
        path="input",
    )
    tuned: str | Path | None = option(
        None,
        "PATH is an adapter that should turn BASE into this.",
        AGAINST,
        metavar="TUNED",
        path="input",
    )
    max_error: float | None = option(
        None,
        "With --tuned: exit 3 if the relative error of a module, or of all together, exceeds X. "
        "Of quantized weights: take any codes whose relative error is at most X, tensor by tensor.",
        AGAINST,
        metavar="X",
        allowed=FROM_0,
    )
    weights_only: bool = option(
        False, "Compare the weights of an ONNX model and do not run it.", "Running an ONNX model"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a model is run over, and what is kept of it."""

    kind: Literal["full", "diagonal"] = option(
        "full", "The whole second moment of each layer's input, or its diagonal only.", TEXT
    )
    length: int = option(512, "Tokens a sequence.", TEXT, metavar="N")
    max_tokens: int | None = option(None, "Of the text, at most.", TEXT, metavar="N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """How findings are shown."""

    sort: Literal["change", "norm", "name"] = option(
        "change", "By relative change, by the norm of the change, or as in the file.", TENSORS
    )
    plot: str | Path | None = option(
        None,
        "Draw a picture, as .png, .svg or .html (needs loratools[plot]).",
        PICTURE,
        metavar="FILE",
        path="output",
    )
