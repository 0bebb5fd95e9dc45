"""Tables and sentences of the verbs that look and do not write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_tools.records import Report, counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        left = i == 0
        table.add_column(
            column, no_wrap=True, justify="left" if left else "right", overflow="ellipsis"
        )
    return table


def spectra(console: Console, report: Report[Any], most: int | None) -> None:
    """One row a module."""
    change = not all(math.isnan(s.relative_change) for s in report.spectra)
    columns = ["module", "kind", "shape", "norm", "stable rank", "at 8", "at 16", "at 32", "at 64"]
    columns += ["noise floor", "rank", "rel. change"] if change else ["rank", "alpha", "scaling"]
    table = _table(*columns)
    for s in report.spectra[:most]:
        shares = [s.energy.get(r, math.nan) for r in ("8", "16", "32", "64")]
        cells = [
            s.module,
            s.layout,
            "x".join(map(str, s.shape)),
            f"{s.norm:.4g}",
            _number(s.stable_rank, ".1f"),
            *(_number(share, ".1%") for share in shares),
        ]
        rank = ">64" if s.rank is None else str(s.rank)  # 64: what verbs/spectra.DEPTH looks at
        if change:
            cells += [_number(s.noise_floor, ".2e"), rank, _number(s.relative_change, ".3%")]
        else:
            cells += [rank, f"{s.alpha:g}", f"{s.scaling:g}"]
        table.add_row(*cells)
    console.print(table)
    _left_out(console, len(report.spectra), most, "modules")


def tensors(console: Console, report: Report[Any], most: int | None) -> None:
    """One row a tensor; with modules above, only where all are asked for."""
    if report.spectra and most is not None:
        return
    table = _table("tensor", "dtype", "shape", "bytes", "hash")
    for t in report.stored[:most]:
        table.add_row(t.tensor, t.dtype, "x".join(map(str, t.shape)), str(t.nbytes), t.hash)
    console.print(table)
    _left_out(console, len(report.stored), most, "tensors")


def _left_out(console: Console, count: int, most: int | None, what: str) -> None:
    if most is not None and count > most:
        console.print(f"({most} of {count} {what}; -v shows all)")


def _number(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else "-"


def _graph(file: str, graph: Mapping[str, Any]) -> Iterator[str]:
    opset = ", ".join(f"{domain} {version}" for domain, version in graph["opset"].items())
    yield f"{file}: opset {opset}; made by {graph['producer'] or 'nobody named'}"
    for what in ("inputs", "outputs"):
        values = graph[what]
        more = f" and {len(values) - 8} more" if len(values) > 8 else ""
        yield f"  {what}: {'; '.join(values[:8])}{more}"
    kinds = list(graph["operators"].items())
    more = f" and {len(kinds) - 12} kinds more" if len(kinds) > 12 else ""
    nodes = ", ".join(f"{n} {kind}" for kind, n in kinds[:12])
    yield f"  nodes: {graph['nodes']} ({nodes}{more})"
    if graph["custom_domains"]:
        yield f"  custom domains: {', '.join(graph['custom_domains'])}"
    places = ", ".join(f"{name} ({n:,} bytes)" for name, n in graph["data"].items())
    yield f"  initializers: {graph['initializers']}, in {places or 'no file'}"


def _findings(t: Mapping[str, Any]) -> Iterator[str]:
    for finding in t["findings"]:
        keys = finding["keys"]
        named = f" ({keys['count']}: {', '.join(keys['examples'])}" if keys["count"] else ""
        more = ", …" if keys["count"] > len(keys["examples"]) else ""
        yield f"{finding['verdict']}: {finding['what']}{named}{more}{')' if named else ''}"
    for text in t["not_checked"]:
        yield f"not checked: {text}"


def totals(t: Mapping[str, Any]) -> Iterator[str]:
    """Sentences for the totals of inspect, diff, verify and check."""
    if "kind" in t:
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in t["dtypes"].items())
        yield f"{t['kind']}: {counted(t['tensors'], 'tensor')} ({dtypes}), {t['numbers']:,} numbers"
        for name, facts in t["metadata"].items():
            if facts:
                yield f"{name}: " + ", ".join(f"{k}={str(v)[:80]}" for k, v in facts.items())
        for key in (
            "format",
            "architectures",
            "ranks",
            "alphas",
            "with",
            "targets",
            "base_model_name_or_path",
            "base_digest",
        ):
            if t.get(key):
                value = t[key]
                yield f"{key}: " + (
                    ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                )
        if "quantized" in t:
            q = t["quantized"]
            schemes = "; ".join(f"{n} in {scheme}" for scheme, n in q["schemes"].items())
            yield (
                f"quantized: {counted(q['weights'], 'weight')} ({schemes}), "
                f"{q['numbers']:,} numbers at {q['bits_per_parameter']:.3f} bits, "
                f"read back as {', '.join(q['dtypes'])}"
            )
        for file, graph in t.get("graphs", {}).items():
            yield from _graph(file, graph)
    if "relative_change" in t:
        yield (
            f"{counted(t['changed'], 'tensor')} changed, {t['unchanged']} did not; relative change "
            f"{_number(t['relative_change'], '.3%')}"
        )
        if t["one_sided"]:
            yield f"on one side only, and in no figure: {counted(t['one_sided'], 'tensor')}"
    if "verdict" in t:
        yield str(t["verdict"])
    if "findings" in t:
        yield from _findings(t)
