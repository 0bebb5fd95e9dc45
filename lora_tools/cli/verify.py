"""``loratools verify``."""

from __future__ import annotations

from typing import Any

import click

from lora_tools.cli import options
from lora_tools.cli.groups import GroupedCommand, option
from lora_tools.records import ProgressCallback, Report

_AGAINST, _GRAPH = "Against what", "Running an ONNX model"


@click.command(
    cls=GroupedCommand,
    options_metavar="[OPTIONS]",
    short_help="Check a merged, quantized or exported model, or adapter.",
    epilog="Example: loratools verify merged --base org/base --adapter style=0.7",
)
@click.argument("path", type=click.Path())
@option(
    "--base",
    type=click.Path(),
    metavar="BASE",
    group=_AGAINST,
    help="The base of a merged checkpoint (with --adapter) or of an adapter (with --tuned).",
)
@option(
    "--against",
    type=click.Path(),
    metavar="CHECKPOINT",
    group=_AGAINST,
    help="PATH is in four bits, or an ONNX model, and should be this.",
)
@option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(),
    metavar="ADAPTER[=WEIGHT]",
    group=_AGAINST,
    help="PATH should be BASE, or CHECKPOINT, with this merged; repeatable.",
)
@option(
    "--tuned",
    type=click.Path(),
    metavar="TUNED",
    group=_AGAINST,
    help="PATH is an adapter that should turn BASE into this.",
)
@option(
    "--max-error",
    type=float,
    metavar="X",
    group=_AGAINST,
    help="With --tuned: exit 3 if the relative error of a module, or of all together, exceeds X. "
    "Of four bits: take any codes whose relative error is at most X, tensor by tensor.",
)
@option(
    "--weights-only",
    is_flag=True,
    group=_GRAPH,
    help="Compare the weights of an ONNX model and do not run it.",
)
@option(
    "--task",
    metavar="TASK",
    default="auto",
    show_default=True,
    group=_GRAPH,
    help="What it was exported for, as for export.",
)
@option(
    "--atol",
    type=float,
    metavar="X",
    default=1e-5,
    show_default=True,
    group=_GRAPH,
    help="An output may differ from torch's by this, and --rtol times its largest element.",
)
@option(
    "--rtol",
    type=float,
    metavar="X",
    default=3e-4,
    show_default=True,
    group=_GRAPH,
    help="See --atol.",
)
@option(
    "--trust-remote-code",
    is_flag=True,
    group=_GRAPH,
    help="Run code that comes with the checkpoint.",
)
@options.reading_verb
def verify(path: str, progress: ProgressCallback | None, **rest: Any) -> Report:
    """Check that PATH is what it is said to be: exit code 0 if so, 3 if not, with the worst tensor
    named.

    A merged checkpoint (--base, --adapter): base + adapter to rounding, and by which rounding; or
    the adapter applied twice, at another scale, to another base, tensors left out, tied ones apart.
    An adapter (--base, --tuned): its true error, from the merged weights and not from the factors.
    Four bits (--against): whether quantizing the checkpoint gives these bytes, else the error.
    ONNX (--against): every weight, bit for bit, and the outputs in ONNX Runtime against torch's.
    """
    from lora_tools.verbs.verify import verify as work

    return work(path, progress=progress, **rest)
