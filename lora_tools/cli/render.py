"""Reports and progress for people (stderr) and for programs (plain JSON types)."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_tools.cli import tables
from lora_tools.records import Progress, ProgressCallback, Report, counted

if TYPE_CHECKING:
    from rich.console import Console

_MOST_ROWS = 40


def _console() -> Console:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 1000  # a log has no width, and a name cut short cannot be searched for
    return console


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[ProgressCallback | None]:
    """A bar on a terminal; nothing in a pipe or with --quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=_console(),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def advance(step: Progress) -> None:
            bar.update(task, completed=step.done, total=step.total, description=step.label)

        yield advance


def size(nbytes: float) -> str:
    """1234567 → 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def show(report: Report[Any], *, verbose: bool, written: bool) -> None:
    """Print the report."""
    console = _console()
    if report.modules:
        _modules(console, report, verbose)
    if report.tensors:
        _tensors(console, report, verbose)
    if report.spectra:
        tables.spectra(console, report, None if verbose else _MOST_ROWS)
    if report.stored:
        tables.tensors(console, report, None if verbose else _MOST_ROWS)
    if verbose or report.dry_run:
        _fates(console, report)
    counts = Counter(fate.action for fate in report.plan)
    if counts:
        actions = ", ".join(f"{n} {action}" for action, n in counts.most_common())
        console.print("tensors: " + actions)
    for note in report.notes:
        console.print(f"note: {note}")
    for line in _totals(report):
        console.print(line)
    if report.dry_run:
        console.print("dry run: nothing was written")
    elif written and report.output:
        console.print(f"wrote {report.output} in {report.seconds:.1f} s")


def _modules(console: Console, report: Report[Any], verbose: bool) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("module", no_wrap=True, overflow="ellipsis")
    columns = ["kind", "shape", "rank", "rel. error", "energy"]
    searched = any(m.method not in ("resize", "difference") for m in report.modules)
    if searched:  # a resized adapter was not searched for, and no base is at hand to compare with
        columns += ["could gain", "rel. change"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    rows = report.modules
    if len(rows) > _MOST_ROWS and not verbose:
        rows = tuple(sorted(rows, key=lambda m: -m.relative_error)[:_MOST_ROWS])
    for m in rows:
        cells = [
            m.module,
            m.layout,
            "x".join(map(str, m.shape)),
            str(m.rank),
            *(
                (f"{m.relative_error:.4g}", f"{m.energy:.2%}")
                if math.isfinite(m.energy)
                else ("-", "no change")
            ),
        ]
        if searched:
            cells.append(f"{m.gain_bound:.1e}")
            cells.append(f"{m.relative_change:.3%}" if math.isfinite(m.relative_change) else "-")
        table.add_row(*cells)
    console.print(table)
    if len(rows) < len(report.modules):
        console.print(
            f"({len(rows)} of {len(report.modules)} modules, the largest errors first; "
            "-v shows all)"
        )


def _tensors(console: Console, report: Report[Any], verbose: bool) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensor", no_wrap=True, overflow="ellipsis")
    rows = report.tensors
    made_up = any(t.compensated_error is not None for t in rows)
    fed = any(t.output_error is not None for t in rows)
    both = made_up and fed
    more = [*(["with adapter"] if made_up else []), *(["of outputs", "unfed"] if fed else [])]
    more += ["with adapter"] if both else []
    for column in ("shape", "bits", "rel. error", *more):
        table.add_column(column, justify="right", no_wrap=True)
    if len(rows) > _MOST_ROWS and not verbose:
        rows = tuple(sorted(rows, key=lambda t: -t.relative_error)[:_MOST_ROWS])
    for t in rows:
        shape = "x".join(map(str, t.shape))
        errors = [t.relative_error, *([t.compensated_error] if made_up else [])]
        errors += [t.output_error, t.output_error_unfed] if fed else []
        errors += [t.compensated_output_error] if both else []
        shown = ["-" if e is None else f"{e:.4g}" for e in errors]
        table.add_row(t.tensor, shape, f"{t.bits_per_parameter:.3f}", *shown)
    console.print(table)
    if len(rows) < len(report.tensors):
        console.print(
            f"({len(rows)} of {len(report.tensors)} tensors, the largest errors first; "
            "-v shows all)"
        )


def _fates(console: Console, report: Report[Any]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensor", no_wrap=True, overflow="ellipsis")
    table.add_column("fate", no_wrap=True)
    table.add_column("bytes", justify="right")
    table.add_column("why")
    for fate in report.plan:
        table.add_row(fate.tensor, fate.action, str(fate.nbytes or ""), fate.reason)
    console.print(table)


def _totals(report: Report[Any]) -> Iterator[str]:
    t = report.totals
    if "relative_error" in t:
        ranks = f"{t['rank_min']}" + (f"-{t['rank_max']}" if t["rank_max"] != t["rank_min"] else "")
        line = "total: nothing changed"
        if math.isfinite(t["energy"]):
            line = f"total: relative error {t['relative_error']:.4g}, energy {t['energy']:.2%}"
            line += " of all that changed" if "left_out" in t else ""
        if "gain_bound" in t:
            line += f" (at most {t['gain_bound']:.1e} below the best possible at these ranks)"
        yield f"{line}, {counted(t['modules'], 'module')}, rank {ranks}"
    if t.get("left_out"):
        hold = "holds" if t["left_out"] == 1 else "hold"
        yield (
            f"left out: {counted(t['left_out'], 'changed tensor')}, which {hold} "
            f"{t['left_out_energy']:.2%} of the energy of all that changed"
        )
    if "parameters_replaced" in t:
        yield f"{t['parameters_replaced']:,} parameters become {t['parameters']:,}"
    if "quantization_error" in t:
        error = f"{t['quantization_error']:.4g}"
        if "compensated_error" in t:
            error += f", {t['compensated_error']:.4g} with the adapter"
        line = f"total: relative error {error}"
        if "tensors_kept" in t:
            line += f" over {t['tensors_quantized']} quantized tensors, {t['tensors_kept']} kept"
        if "bits_per_parameter" in t:
            line += (
                f"; {t['bits_per_quantized_parameter']:.3f} bits a quantized parameter, "
                f"{t['bits_per_parameter']:.3f} over all {t['parameters']:,}"
            )
        yield line
    if "output_error" in t:
        made_up = ""
        if "compensated_output_error" in t:
            made_up = f", {t['compensated_output_error']:.4g} with the adapter"
        yield (
            f"outputs of {counted(t['tensors_fed'], 'error-fed layer')}: relative error "
            f"{t['output_error']:.4g}{made_up}, where plain rounding has "
            f"{t['output_error_unfed']:.4g}"
        )
    if "expected_bytes_at_most" in t:
        yield f"expected size: at most {size(t['expected_bytes_at_most'])}"
    if "tensors_merged" in t:
        yield f"{counted(t['tensors_merged'], 'tensor')} merged, {t['tensors_copied']} copied"
    if "delta_kept" in t:
        yield (
            f"of the adapters' change {t['delta_kept']:.1%} was kept, beside a rounding error of "
            f"{t['delta_error']:.2%} of its norm"
        )
    if "output_delta_kept" in t:
        yield (
            f"in the layers' outputs {t['output_delta_kept']:.1%} was kept, beside "
            f"{t['output_delta_error']:.2%}, where plain rounding keeps "
            f"{t['output_delta_kept_unfed']:.1%} beside {t['output_delta_error_unfed']:.2%}"
        )
    if "graph_nodes" in t:
        yield f"graph: {t['graph_nodes']} nodes, {size(t['graph_bytes'])}"
    if "verified" in t:
        yield _difference(t)
    yield from _lost(t)
    if t.get("base_exact"):
        yield "without an adapter: bit for bit what the plain graph gives"
    for file, figures in t.get("runtime_adapters", {}).items():
        line = f"{file}: {counted(figures['modules'], 'module')}, {size(figures['bytes'])}"
        yield f"{line}; {_difference(figures)}" if "verified" in figures else line
    if "sidecar_bytes" in t:
        yield f"sidecar: {size(t['sidecar_bytes'])}, {t['sidecar_share']:.2%} of the model"
    if t.get("exact"):
        yield "the base, bit for bit: its digest is the one the sidecar holds"
    elif "error_bound" in t:
        yield (
            f"rounding lost at most {t['error_bound']:.2e} of the weights' norm; merge with "
            "--reversible to lose nothing"
        )
    yield from tables.totals(t)
    if "bytes" in t:
        yield f"size: {size(t['bytes'])}"


def _lost(t: dict[str, Any]) -> Iterator[str]:
    """What quantizing cost an exported graph."""
    if "loss_max_difference" in t:
        line = f"lost by quantizing: outputs differ by up to {t['loss_max_difference']:.3g} "
        line += f"(relative {t['loss_max_relative_difference']:.3g})"
        if "loss_tokens_same" in t:
            line += (
                f"; {t['loss_tokens_same']} of {t['tokens_generated']} generated tokens the same"
            )
        yield line
    if "perplexity" in t:
        line = f"perplexity {t['perplexity']:.4g}"
        if "kl_divergence" in t:
            line += f" (torch, unquantized: {t['perplexity_unquantized']:.4g}; "
            line += f"loss {t['loss_increase']:+.3g} and KL divergence {t['kl_divergence']:.3g} "
            line += "nats a token)"
        yield f"{line} on {t['eval_tokens']:,} tokens"


def _difference(t: dict[str, Any]) -> str:
    line = f"greatest difference from torch {t['max_difference']:.2e} (relative "
    line += f"{t['max_relative_difference']:.2e}) in {t['outputs_compared']} outputs"
    if "tokens_generated" in t:
        line += f"; {t['tokens_same']} of {t['tokens_generated']} generated tokens the same"
    return line
