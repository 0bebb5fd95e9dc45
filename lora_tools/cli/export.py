"""``loratools export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.cli.options import OUTPUT
from lora_tools.records import ProgressCallback, Report

GRAPH, QUANTIZED, CHECK = "Graph", "Quantized", "Check"


@click.command(
    cls=GroupedCommand,
    options_metavar="-o OUT [OPTIONS]",
    short_help="Write CHECKPOINT as ONNX, checked against torch.",
    epilog="Example: loratools export base --adapter style=0.7 -o onnx",
)
@click.argument("checkpoint", type=click.Path())
@option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    group="Adapters",
    help="An adapter to merge in the same pass; may be given several times.",
)
@option(
    "--runtime-adapters",
    is_flag=True,
    group="Adapters",
    help="Do not merge them: write each as an .onnx_adapter file that ONNX Runtime activates for a "
    "request, with optional inputs of the graph for its factors.",
)
@options.unmatched_option
@options.other_base_option
@option(
    "--task",
    default="auto",
    show_default=True,
    group=GRAPH,
    help="features, classification, token-classification, masked-lm, question-answering, "
    "causal-lm, seq2seq, speech-seq2seq or image-classification; auto goes by config.json.",
)
@option("--no-cache", is_flag=True, group=GRAPH, help="A decoder without its key/value cache.")
@option(
    "--graph",
    type=click.Path(),
    metavar="MODEL.ONNX",
    group=GRAPH,
    help="Use this graph, exported from another checkpoint of the same architecture, again.",
)
@option("--opset", type=int, default=20, show_default=True, group=GRAPH, help="ONNX's opset.")
@option(
    "--trust-remote-code",
    is_flag=True,
    group=GRAPH,
    help="Run the modelling code that comes with the checkpoint.",
)
@options.out_option
@options.dtype_option("each tensor keeps its own; the graph computes in float32")
@option(
    "--weights",
    type=click.Choice(["shared", "bundled"]),
    group=OUTPUT,
    help="shared: the graph points into the output's safetensors files. bundled: one "
    "external-data file in their place.  [default: shared; bundled with --int8 and --int4]",
)
@option(
    "--nf4",
    is_flag=True,
    group=QUANTIZED,
    help="Linear layers in four bits, over the bytes that `loratools quantize` writes, or those of "
    "a CHECKPOINT that it wrote. For size, not speed: on a CPU, one token at a time, it is "
    "2 to 4 times slower than float32 (2.0 times on SmolLM2-135M).",
)
@option(
    "--int8",
    is_flag=True,
    group=QUANTIZED,
    help="Linear layers in eight bits by ONNX Runtime's quantizer, in blocks of 32.",
)
@option(
    "--int4",
    is_flag=True,
    group=QUANTIZED,
    help="The same in four bits: smaller, and further from the original.",
)
@option(
    "--eval-text",
    type=click.Path(),
    metavar="FILE",
    group=CHECK,
    help="Measure a decoder's perplexity on this text, and its divergence from the weights before "
    "they were quantized.",
)
@option(
    "--atol",
    type=float,
    default=1e-5,
    show_default=True,
    group=CHECK,
    help="Outputs may differ from torch's by this much",
)
@option(
    "--rtol",
    type=float,
    default=3e-4,
    show_default=True,
    group=CHECK,
    help="plus this share of their largest element; else the exit code is 3.",
)
@option("--no-verify", is_flag=True, group=CHECK, help="Do not run the graph.")
@option(
    "--keep-failed",
    is_flag=True,
    group=CHECK,
    help="Leave an output that differs too much, as OUT.failed.",
)
@options.verb
def export(checkpoint: str, out: Path, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Write CHECKPOINT's files and the ONNX graphs that run it, checked against torch.

    CHECKPOINT is a Hugging Face folder or a hub id (org/name[@revision]); with --out the same
    folder, only graphs are added to it. Needs: pip install 'loratools[onnx]'.
    """
    from lora_tools.verbs.export import export as work

    return work(checkpoint, out, progress=progress, **rest)
