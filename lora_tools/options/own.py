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
        "Also write a small sidecar file, so that unmerge can restore BASE bit for bit.",
        OUTPUT,
        recorded=False,
    )
    requantize: bool = option(
        False,
        "If BASE is quantized, quantize the result in the same format again. In four bits, most "
        "of a small change is lost; the report says how much is kept.",
        OUTPUT,
        unset="a quantized BASE becomes plain",
    )
    activations: str | Path | None = option(
        None,
        "With --requantize: choose the rounding that makes the error of the layers' outputs small, "
        "by statistics that collect-stats made of BASE. Much more of a small change is kept; the "
        "report says how much, with and without this.",
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
        "--sidecar: fail if there is no sidecar. --no-sidecar: do not use it.",
        ADAPTERS,
        flags=("--sidecar/--no-sidecar",),
        unset="use it if it exists",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strength:
    """Another strength for an adapter."""

    scale: float | None = option(
        None,
        "Multiply the adapter's effect by F. This changes lora_alpha and not the factors.",
        STRENGTH,
        metavar="F",
        allowed=FINITE,
    )
    alpha: float | None = option(
        None, "Set lora_alpha. See --effect.", STRENGTH, metavar="A", allowed=ABOVE_0
    )
    effect: Literal["keep", "change"] = option(
        "keep",
        "With --alpha: keep the effect (lora_B is changed to match), or let it change with alpha.",
        STRENGTH,
    )
    rslora: bool | None = option(
        None,
        "Set or clear use_rslora (scaling alpha/sqrt(r)). The effect does not change.",
        STRENGTH,
        flags=("--rslora/--no-rslora",),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """From which adapter format to which, and what the files do not say."""

    to: str = option(
        dataclasses.MISSING,
        "The format to write. For what each format keeps, see docs/formats.md.",
        FORMAT,
        choices=formats,
    )
    source: str | None = option(
        None,
        "The format of ADAPTER.",
        FORMAT,
        flags=("--from",),
        choices=formats,
        unset="recognized by the content",
    )
    drop: Sequence[str] = option(
        (),
        "Leave this part out, because the format cannot hold it or you do not want it.",
        FORMAT,
        choices=features,
    )
    alpha: float | None = option(
        None,
        "The lora_alpha of the training, if the format does not store it (loralib, torchtune).",
        ADAPTER,
        metavar="A",
        allowed=ABOVE_0,
    )
    enable_lora: str | None = option(
        None,
        "Which blocks of loralib's MergedLinear layers have an adapter.",
        ADAPTER,
        metavar="1,0,1",
    )
    layout: Sequence[str] = option(
        (),
        "With --to loralib: which modules are MergedLinear there, such as c_attn=merged:3/101.",
        FORMAT,
        metavar="REGEX=KIND",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audience:
    """Who is to load an adapter."""

    consumer: str = option(
        dataclasses.MISSING,
        "The program that will load ADAPTER.",
        ADAPTER,
        flags=("--for",),
        choices=consumers,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combining:
    """How several adapters become one."""

    method: str = option(
        "cat",
        "cat, linear and svd add up the changes of the weights. The others prune them first "
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
        "How ties and dare_ties choose the sign of each element: by the sum of the changes, by "
        "how many have it, or by the weighted sum (as in mergekit).",
        METHOD,
    )
    normalize: bool = option(
        False,
        "Divide by the sum of the weights (mergekit's default). With ties and dare_ties: by the "
        "weights of those that agree.",
        METHOD,
    )
    seed: int = option(
        0, "Seed of the random choice of dare_linear and dare_ties.", METHOD, metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graphs:
    """Which ONNX graphs are made, or run."""

    task: str = option("auto", task_help, GRAPH, metavar="TASK", choices=tasks)
    no_cache: bool = option(False, "Export a decoder without its key/value cache.", GRAPH)
    graph: str | Path | None = option(
        None,
        "Use this existing graph of another checkpoint with the same architecture.",
        GRAPH,
        metavar="MODEL.ONNX",
        recorded=False,
        path="input",
    )
    no_fuse: bool = option(
        False,
        "Keep the graph as torch traces it. By default attention, rotary embeddings and norms "
        "become one operator each.",
        GRAPH,
    )
    compute_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "The dtype that the graph computes in. Norms and softmax stay in float32.", GRAPH
    )
    half_io: bool = option(
        False, "Use --compute-dtype for inputs, outputs and the key/value cache too.", GRAPH
    )
    opset: int | None = option(
        None,
        "ONNX's opset.",
        GRAPH,
        metavar="N",
        allowed=OPSETS,
        unset="23, which fusing needs; 20 if nothing is fused",
    )
    trust_remote_code: bool = option(
        False, "Run the Python code that comes with the checkpoint.", GRAPH
    )
    weights: Literal["shared", "bundled"] | None = option(
        None,
        "shared: the graph refers to the output's safetensors files. bundled: one external-data "
        "file replaces them, in the dtype that the graph computes in, and loads faster. With "
        "--dtype, --int8 and --int4 it keeps the dtype in which weights are stored.",
        OUTPUT,
        unset="shared; bundled with --int8 and --int4",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """How an ONNX graph's linear layers are quantized: by one of these, or not."""

    nf4: bool = option(
        False,
        "Store linear layers in four bits, with the bytes that `loratools quantize` writes (or "
        "those in CHECKPOINT, if it wrote that). This saves space, not time: on a CPU, one token "
        "at a time, it is 2 to 4 times slower than float32 (2.0 times on SmolLM2-135M).",
        QUANTIZED,
    )
    int8: bool = option(
        False,
        "Store linear layers in eight bits, with ONNX Runtime's quantizer, in blocks of 32.",
        QUANTIZED,
    )
    int4: bool = option(False, "The same in four bits: smaller, but less exact.", QUANTIZED)
    activations: str | Path | None = option(
        None,
        "With --nf4, --int8 or --int4: choose the rounding that makes the error of the layers' "
        "outputs small, by statistics of collect-stats (as `loratools quantize --activations` "
        "does). The size stays the same.",
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
        "Measure the perplexity of a decoder on this text, and how far it diverges from the model "
        "before quantization.",
        CHECK,
        metavar="FILE",
        recorded=False,
        path="input",
    )
    atol: float = option(
        1e-5,
        "Outputs may differ from torch's by this much,",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        recorded=False,
    )
    rtol: float | None = option(
        None,
        "plus this share of their largest element. If they differ more, the exit code is 3.",
        CHECK,
        metavar="X",
        allowed=FROM_0,
        unset="ten times the difference between torch's float32 and float64, plus 1e-5",
        recorded=False,
    )
    no_verify: bool = option(False, "Do not run the graph to check it.", CHECK, recorded=False)
    keep_failed: bool = option(
        False, "Keep an output that differs too much, as OUT.failed.", CHECK, recorded=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a file is compared with."""

    base: str | Path | None = option(
        None,
        "The base of a merged checkpoint (with --adapter) or of an adapter (with --tuned).",
        AGAINST,
        metavar="BASE",
        path="tensors",
    )
    against: str | Path | None = option(
        None,
        "The checkpoint that PATH, a quantized or ONNX model, should be made from.",
        AGAINST,
        metavar="CHECKPOINT",
        path="tensors",
    )
    adapters: Sequence[str | Path | tuple[str | Path, float]] = option(
        (),
        "An adapter that should be merged into BASE or CHECKPOINT; repeatable.",
        AGAINST,
        flags=("--adapter",),
        metavar="ADAPTER[=WEIGHT]",
        path="tensors",
    )
    tuned: str | Path | None = option(
        None,
        "The fine-tune that PATH, an adapter, should turn BASE into.",
        AGAINST,
        metavar="TUNED",
        path="tensors",
    )
    max_error: float | None = option(
        None,
        "With --tuned: exit 3 if the relative error of a module, or of all together, is above X. "
        "For quantized weights: accept a tensor if its relative error is at most X.",
        AGAINST,
        metavar="X",
        allowed=FROM_0,
    )
    weights_only: bool = option(
        False, "Compare the weights of an ONNX model, but do not run it.", "Running an ONNX model"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a model is run over, and what is kept of it."""

    kind: Literal["full", "diagonal"] = option(
        "full", "Store the whole second moment of each layer's input, or only its diagonal.", TEXT
    )
    length: int = option(512, "Tokens per sequence.", TEXT, metavar="N")
    max_tokens: int | None = option(None, "Use at most N tokens of the text.", TEXT, metavar="N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """How findings are shown."""

    sort: Literal["change", "norm", "name"] = option(
        "change", "Sort by relative change, by the norm of the change, or by name.", TENSORS
    )
    plot: str | Path | None = option(
        None,
        "Draw a picture, as .png, .svg or .html (needs loratools[plot]).",
        PICTURE,
        metavar="FILE",
        path="output",
    )
