"""Sentences for the figures of a report."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_tools.records import Report, counted


def recommendation(report: Report[Any]) -> Iterator[str]:
    """Which rank an adapter for what ``diff`` saw wants, and the command that makes it."""
    ranks = [s.rank for s in report.spectra]
    if report.verb != "diff" or not ranks:
        return
    known = sorted(rank for rank in ranks if rank is not None)
    deep = len(ranks) - len(known)
    if deep > len(known):
        yield (
            f"recommended: no low-rank adapter: {deep} of {counted(len(ranks), 'module')} change "
            "in more than 64 directions"
        )
        return
    more = f", {deep} need more than 64" if deep else ""
    base, tuned = (shlex.quote(each.path) for each in report.inputs)
    to = " --to diffusers" if report.totals.get("models") else ""  # PEFT's is for one
    yield (
        f"recommended: rank {known[-1]} ({counted(len(ranks), 'module')}: median "
        f"{known[len(known) // 2]}{more}): "
        f"loratools extract {base} {tuned} -o ADAPTER --rank {known[-1]}{to}"
    )


def sentences(report: Report[Any]) -> Iterator[str]:
    """For all figures that there are."""
    t = report.totals
    for part in (_errors, _quantized, _merged, _exported, _undone, _of_looks):
        yield from part(t)
    if "bytes" in t:
        yield f"size: {size(t['bytes'])}"
    if "disk_needed" in t:
        yield _needed(t)


def _needed(t: Mapping[str, Any]) -> str:
    """What a plan takes."""
    line = f"needs: {size(t['input_bytes'])} to read, "
    line += f"{size(t['output_bytes'])} to write, " if "output_bytes" in t else ""
    line += f"{size(t['disk_needed'])} of disk"
    if "disk_free" in t:
        short = "only " if t["disk_free"] < t["disk_needed"] else ""
        line += f", of which {short}{size(t['disk_free'])} are free"
    if "peak_memory" in t:
        line += f"; {size(t['peak_memory'])} of memory"
    if "expected_seconds" in t:
        line += f"; {_lasting(t['expected_seconds'])} here"
    return line


def _lasting(seconds: float) -> str:
    """ "about 40 s", "about 5 min", "about 3.5 h"."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.2g} h"


def _errors(t: Mapping[str, Any]) -> Iterator[str]:
    """Of factors against what they stand for."""
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


def _quantized(t: Mapping[str, Any]) -> Iterator[str]:
    """Of weights in few bits."""
    if "quantization_error" in t:
        error = f"{t['quantization_error']:.4g}"
        if "compensated_error" in t:
            error += f", {t['compensated_error']:.4g} with the adapter"
        line = f"total: relative error {error}"
        if "tensors_kept" in t:
            line += f" over {t['tensors_quantized']} quantized tensors, {t['tensors_kept']} kept"
        if "bits_per_parameter" in t:
            line += (
                f"; {t['bits_per_quantized_parameter']:.3f} bits per quantized parameter, "
                f"{t['bits_per_parameter']:.3f} over all {t['parameters']:,}"
            )
        yield line
    if "output_error" in t:
        made_up = ""
        if "compensated_output_error" in t:
            made_up = f", {t['compensated_output_error']:.4g} with the adapter"
        yield (
            f"outputs of {counted(t['tensors_fed'], 'error-fed layer')}: relative error "
            f"{t['output_error']:.4g}{made_up}; with plain rounding {t['output_error_unfed']:.4g}"
        )
    if "expected_bytes_at_most" in t:
        yield f"expected size: at most {size(t['expected_bytes_at_most'])}"


def _merged(t: Mapping[str, Any]) -> Iterator[str]:
    """Of adapters in weights."""
    if "tensors_merged" in t:
        yield f"{counted(t['tensors_merged'], 'tensor')} merged, {t['tensors_copied']} copied"
    if "delta_kept" in t:
        yield (
            f"{t['delta_kept']:.1%} of the adapters' change was kept, with a rounding error of "
            f"{t['delta_error']:.2%} of its norm"
        )
    if "output_delta_kept" in t:
        yield (
            f"in the layers' outputs {t['output_delta_kept']:.1%} was kept, with an error of "
            f"{t['output_delta_error']:.2%}; plain rounding would keep "
            f"{t['output_delta_kept_unfed']:.1%}, with an error of "
            f"{t['output_delta_error_unfed']:.2%}"
        )


def _exported(t: Mapping[str, Any]) -> Iterator[str]:
    """Of an ONNX model."""
    if "graph_nodes" in t:
        kinds = [f"{n} {kind.replace('_', ' ')}" for kind, n in t.get("fused", {}).items()]
        fused = f"; fused: {', '.join(kinds)}" if kinds else ""
        yield f"graph: {t['graph_nodes']} nodes, {size(t['graph_bytes'])}{fused}"
    if "verified" in t:
        yield _difference(t)
    if "half_conditioning" in t:
        yield _half(t)
    yield from _lost(t)
    if t.get("base_exact"):
        yield "without an adapter: the same outputs as the plain graph, bit for bit"
    for file, figures in t.get("runtime_adapters", {}).items():
        line = f"{file}: {counted(figures['modules'], 'module')}, {size(figures['bytes'])}"
        yield f"{line}; {_difference(figures)}" if "verified" in figures else line


def _undone(t: Mapping[str, Any]) -> Iterator[str]:
    """Of a merge that can be taken back, or was."""
    if "sidecar_bytes" in t:
        yield f"sidecar: {size(t['sidecar_bytes'])}, {t['sidecar_share']:.2%} of the model"
    if t.get("exact"):
        yield "this is the base, bit for bit: its digest is the one in the sidecar"
    elif "error_bound" in t:
        yield (
            f"rounding lost at most {t['error_bound']:.2e} of the weights' norm; merge with "
            "--reversible to lose nothing"
        )


def _lost(t: Mapping[str, Any]) -> Iterator[str]:
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
            line += "nats per token)"
        yield f"{line} on {t['eval_tokens']:,} tokens"


def offence(t: Mapping[str, Any]) -> str:
    """By how much a graph differs from torch, and what it may."""
    own = f", torch itself in float64: {t['conditioning']:.3g}" if "conditioning" in t else ""
    found, allowed = t["max_relative_difference"], t["allowed_relative_difference"]
    said = (
        f"{t['worst_output']} differs from torch by {t['max_difference']:.3g} (relative "
        f"{found:.3g}; allowed: {allowed:.3g} of the largest element{own})"
    )
    if t.get("tokens_same") != t.get("tokens_generated"):
        said += f", and {t['tokens_same']} of {t['tokens_generated']} generated tokens are the same"
    if "half_conditioning" in t:
        said += f"; as it is, {_half(t)}, allowed: {t['half_allowed_relative_difference']:.3g}"
    return said


def _half(t: Mapping[str, Any]) -> str:
    line = f"in half precision {t['half_worst_output']} differs by a relative "
    line += f"{t['half_relative_difference']:.2e} (torch's own: {t['half_conditioning']:.2e})"
    if "half_tokens_same" in t:
        line += f", {t['half_tokens_same']} of {t['tokens_generated']} tokens the same"
    return line


def _difference(t: Mapping[str, Any]) -> str:
    line = f"greatest difference from torch {t['max_difference']:.2e} (relative "
    line += f"{t['max_relative_difference']:.2e}) in {t['outputs_compared']} outputs"
    if "conditioning" in t:
        line += f", torch's own from float64 {t['conditioning']:.2e}"
    if "tokens_generated" in t:
        line += f"; {t['tokens_same']} of {t['tokens_generated']} generated tokens the same"
    return line


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


def _hub(t: Mapping[str, Any]) -> str:
    """How a folder is filed on the Hub."""
    bases = ", ".join(t["base_model"])
    parts = [
        f"library {t['library_name']}" if t["library_name"] else "",
        f"task {t['pipeline_tag']}" if t["pipeline_tag"] else "",
        f"{t['base_model_relation'] or 'made'} of {bases}" if bases else "",
        f"license {t['license']}" if t["license"] else "",
        f"missing: {', '.join(t['missing'])}" if t["missing"] else "nothing is missing",
    ]
    return "on the Hub: " + "; ".join(part for part in parts if part)


def _findings(t: Mapping[str, Any]) -> Iterator[str]:
    for finding in t["findings"]:
        keys = finding["keys"]
        named = f" ({keys['count']}: {', '.join(keys['examples'])}" if keys["count"] else ""
        more = ", …" if keys["count"] > len(keys["examples"]) else ""
        yield f"{finding['verdict']}: {finding['what']}{named}{more}{')' if named else ''}"
    for text in t["not_checked"]:
        yield f"not checked: {text}"


def _of_looks(t: Mapping[str, Any]) -> Iterator[str]:
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
        if "hub" in t:
            yield _hub(t["hub"])
    if "relative_change" in t:
        yield (
            f"{counted(t['changed'], 'tensor')} changed, {t['unchanged']} did not; relative change "
            f"{number(t['relative_change'], '.3%')}"
        )
        if t["one_sided"]:
            yield f"on one side only, and not in the figures: {counted(t['one_sided'], 'tensor')}"
    if "verdict" in t:
        yield str(t["verdict"])
    if "findings" in t:
        yield from _findings(t)


def number(value: float, style: str) -> str:
    """A figure, or a dash where there is none."""
    return format(value, style) if math.isfinite(value) else "-"


def size(nbytes: float) -> str:
    """1234567 → 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
