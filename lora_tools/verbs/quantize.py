"""``quantize``: a checkpoint, perhaps with adapters added, in four bits as bitsandbytes has it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from lora_tools.errors import NonFiniteError, QualityGateError, UsageError
from lora_tools.formats.bitsandbytes import (
    ABSMAX,
    BLOCKSIZES,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    STATE,
    STORAGES,
    quantization_config,
)
from lora_tools.formats.checkpoint import Checkpoint, open_checkpoint
from lora_tools.formats.checkpoint_writer import Sink, parse_size
from lora_tools.formats.dtypes import FLOAT_NAMES, parse_float_dtype, torch_dtype
from lora_tools.formats.names import split_tensor
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.records import Input, ProgressCallback, Report, TensorResult
from lora_tools.verbs.common import command_of, name_filter, tool_version
from lora_tools.verbs.compensate import FOLDER, Compensation, Factors, finish, plan_compensation
from lora_tools.verbs.compensate import compensate as compensated
from lora_tools.verbs.merge import changed_files, out_specs, shown
from lora_tools.verbs.merge_plan import plan_merge
from lora_tools.verbs.merge_tensor import merge_tensor
from lora_tools.verbs.quantize_plan import (
    Item,
    QuantizePlan,
    Scheme,
    plan_quantize,
    refuse_quantized,
)
from lora_tools.verbs.rewrite import Rewrite, signed
from lora_tools.verbs.weighted import open_weighted

if TYPE_CHECKING:
    import torch

    from lora_tools.engine import Buffers


def quantize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8",
    scale_search: bool = False,
    compensate: int | None = None,
    compensate_iterations: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lm_head: bool = False,
    dtype: str | None = None,
    shard_size: str | None = None,
    max_error: float | None = None,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the checkpoint with its linear layers in four bits (bitsandbytes 0.50).

    The bytes are those of ``merge`` followed by transformers' ``load_in_4bit`` and
    ``save_pretrained`` on a CPU with one torch thread.

    Args:
        checkpoint: a folder, a safetensors file or a hub id.
        adapters: PEFT adapters to merge first: ``path``, ``"path=weight"`` or ``(path, weight)``.
        quant_type: the codebook.
        blocksize: numbers that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in eight bits.
        compute_dtype: what the loader computes in.
        quant_storage: the dtype whose elements hold the packed bytes.
        scale_search: choose each block's scale for the least error instead of as its largest
            magnitude. Loaders read it as ever; it takes up to ten times as long.
        compensate: rank of a PEFT adapter in the folder ``loftq_init`` of ``out`` that holds the
            best approximation of the quantization error (LoftQ, arXiv 2310.08659). ``adapters`` are
            not merged then, but put into that adapter as well, as they are.
        compensate_iterations: how often to quantize what the adapter leaves and fit it anew (1).
        include, exclude: regular expressions on module names.
        lm_head: quantize the output head too, where it has weights of its own.
        dtype: of the tensors that stay, and of what the quantized ones are made of and come back
            as; by default each keeps its own.
        allow_other_base: take an adapter whose metadata names another base.
        max_error: raise if a tensor's relative error, or the total's, exceeds this.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """
    command = command_of(quantize, locals())
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    chosen = name_filter(include, exclude)
    if blocksize not in BLOCKSIZES:
        raise UsageError(f"--blocksize {blocksize}: one of {', '.join(map(str, BLOCKSIZES))}")
    base = open_checkpoint(checkpoint, allow_pickle)
    refuse_quantized(base)
    if limit is not None and not base.is_folder:
        raise UsageError("--shard-size needs a folder: a bare file stays one file")
    weighted = open_weighted(adapters, allow_pickle, base) if adapters else []
    how = plan_compensation(base, compensate, compensate_iterations, weighted)
    merge = plan_merge(base, [] if how else weighted, allow_unmatched)
    scheme = Scheme(quant_type, blocksize, double_quant, STORAGES[quant_storage], scale_search)
    plan = plan_quantize(base, merge, out_specs(merge, wanted), scheme, chosen, lm_head)
    shards = signed(plan.shards(base, limit), command, weighted)
    fates = plan.fates() + (how.fates(plan) if how else ())
    nbytes = sum(shard.nbytes for shard in shards) + (fates[-1].nbytes if how else 0)
    notes = list(merge.notes)
    if lm_head and base.ties_embeddings and not merge.unties:
        notes.append("the output head is the input embedding and stays: --lm-head has no effect")
    settings = quantization_config(
        quant_type, double_quant, torch_name(compute_dtype), quant_storage, plan.skip
    )
    if not base.config:
        notes.append(
            "no config.json to write quantization_config into; a loader needs "
            + json.dumps(settings)
        )
    report = Report(
        "quantize",
        tool_version(),
        (Input("checkpoint", str(checkpoint)), *(Input("adapter", shown(w)) for w in weighted)),
        str(out),
        dry_run,
        fates,
        totals={"expected_bytes_at_most": nbytes},
        notes=tuple(notes),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [base.path, *(w.adapter.path for w in weighted)], force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            job = Rewrite(
                report,
                base,
                weighted,
                plan.merge,
                shards,
                staging / "out",
                jobs,
                progress,
                allow_other_base,
            )
            report = _quantize(job, plan, how, settings)
            _gate(report, max_error)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def torch_name(dtype: str) -> str:
    """``bf16`` → ``bfloat16``, as configs spell it. Raises UsageError."""
    wanted = parse_float_dtype(dtype)
    return next(name for name in FLOAT_NAMES if parse_float_dtype(name) == wanted)


def _quantize(
    job: Rewrite, plan: QuantizePlan, how: Compensation | None, settings: dict[str, Any]
) -> Report:
    from lora_tools import engine
    from lora_tools.formats.peft_writer import PeftWriter

    base, out = job.source, job.out
    buffers = engine.Buffers()
    results: list[TensorResult] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(job.writer())
        beside = out.with_name("compensation")
        if how:
            beside.mkdir()
            peft = PeftWriter(beside)
            stack.callback(peft.close)
        for item, done in job.run(
            plan.items,
            lambda item: work_on(item, base, writer, buffers, how),
            lambda item: _working_memory(item, how),
        ):
            if done.result is not None:
                results.append(done.result)
            if done.factors is not None and done.factors.lora_A.shape[0]:
                A, B = done.factors.lora_A, done.factors.lora_B
                peft.add_lora(split_tensor(item.name)[0], A, B, float(A.shape[0]))
                done.factors = None
        changed = changed_files(base, plan.merge, {item.name: item.spec for item in plan.items})
        config_with(base, changed, settings)
        report = job.finish(writer, changed)
        nbytes = writer.nbytes
        added = finish(peft, beside, base, how, out / FOLDER, job.jobs) if how else 0
    return dataclasses.replace(
        report, tensors=tuple(results), totals=totals_of(plan, results, nbytes + added)
    )


def config_with(base: Checkpoint, changed: dict[str, bytes], settings: Any) -> None:
    """Put ``quantization_config`` into the changed small files."""
    if base.config:
        config = json.loads(changed.get("config.json", b"null")) or dict(base.config)
        config["quantization_config"] = settings
        changed["config.json"] = (json.dumps(config, indent=2) + "\n").encode()


def _working_memory(item: Item, how: Compensation | None) -> int:
    """A merged or transposed tensor is held whole, and so are its codes; its error, and what is
    read back of it, too."""
    codes = item.spec.numel // 2 if item.packed else 0
    if how and item.packed:
        codes += 4 * item.spec.numel + item.spec.nbytes
    whole = item.spec.nbytes * (2 if item.transposed else bool(item.target.parts))
    return max(whole + codes, item.target.spec.nbytes)


@dataclasses.dataclass
class Done:
    """The hash of a base tensor, what quantizing it came to, and factors for what it lost."""

    base_hash: str
    result: TensorResult | None = None
    factors: Factors | None = None


def work_on(
    item: Item, base: Checkpoint, writer: Sink, buffers: Buffers, how: Compensation | None = None
) -> Done:
    """Merge one tensor, quantize it where it is to be, and write it."""
    if item.packed is None:
        done = merge_tensor(item.target, base, item.spec, writer.write)
        return Done(done.base_hash)
    import torch

    stored = base.specs[item.target.base_name]
    plain = not (item.target.parts or item.transposed or stored.dtype != item.spec.dtype)
    if plain and item.name == item.target.base_name:
        x, name = base.tensor(item.name), item.name
        state = xxhash.xxh3_128()
        raw, width = base.raw(name), x.element_size()

        def read(start: int, stop: int) -> None:
            base.release(name, start * width, stop * width)

        for start in range(0, raw.nbytes, 1 << 23):
            state.update(raw[start : start + (1 << 23)])
        if how:
            made = compensated(item, x, how, writer, buffers)
            base.release(name)
            return Done(state.hexdigest(), *made)
        return Done(state.hexdigest(), pack(item, x.reshape(-1), writer, buffers, read))
    dtype = torch_dtype(item.spec.dtype)
    with buffers.lend(item.spec.shape, dtype) as merged:
        into = merged.view(torch.uint8).reshape(-1).numpy().data

        def keep(name: str, data: memoryview, offset: int) -> None:
            into[offset : offset + data.nbytes] = data

        base_hash = merge_tensor(item.target, base, item.spec, keep).base_hash
        with contextlib.ExitStack() as stack:
            ready = merged
            if item.transposed:
                ready = stack.enter_context(buffers.lend(item.spec.shape[::-1], dtype))
                ready.copy_(merged.T)
            if how:
                return Done(base_hash, *compensated(item, ready, how, writer, buffers))
            return Done(base_hash, pack(item, ready.reshape(-1), writer, buffers))


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None] = lambda start, stop: None,
    back: torch.Tensor | None = None,
) -> TensorResult:
    """Quantize a flat tensor and write all that is stored of it, unless ``writer`` is None; into
    ``back`` (n,), if given, goes what a reader makes of that."""
    import torch

    from lora_tools.formats.tensors import as_bytes
    from lora_tools.linalg import nf4
    from lora_tools.linalg.nf4_search import quantize_searched

    assert item.packed is not None
    state, name = item.packed.state, item.name
    book = nf4.CODEBOOKS[state.quant_type]
    n = x.numel()
    with (
        buffers.lend((nf4.SCRATCH_BYTES,), torch.uint8) as store,
        buffers.lend((nf4.packed_size(n),), torch.uint8) as room,
    ):
        scratch = nf4.Scratch(store)
        work = quantize_searched if item.searched else nf4.quantize_whole
        made = work(x, book, state.blocksize, state.nested, room, scratch)
        if not made.is_finite:
            raise NonFiniteError(
                f"{name}: holds an inf or a NaN, which has no four-bit form, or its scales are so "
                "large that their mean overflows; see --no-double-quant"
            )
        if writer is not None:
            writer.write(name, as_bytes(room))
        error, energy = nf4.measure(
            x, made.packed, made.scales, book, state.blocksize, scratch, done
        )
        if back is not None:
            nf4.dequantize(made.packed, made.scales, book, state.blocksize, back, scratch)
    stored = dict(zip((ABSMAX, NESTED_ABSMAX), made.tensors(), strict=False))
    stored[QUANT_MAP] = torch.from_numpy(book.table)
    if made.nested is not None:
        stored[NESTED_MAP] = torch.from_numpy(nf4.dynamic_map())
        state = dataclasses.replace(state, nested_offset=float(made.nested.offset))
    text = state.to_json()
    if writer is not None:
        for end, tensor in stored.items():
            writer.write(name + end, as_bytes(tensor))
        writer.write_last(name + STATE + state.quant_type, text)
    nbytes = item.nbytes - item.packed.state.most_json + len(text)
    relative = math.sqrt(error / energy) if energy else 0.0
    return TensorResult(name, item.spec.shape, 8 * nbytes / n, relative, math.sqrt(energy))


def totals_of(plan: QuantizePlan, results: Sequence[TensorResult], nbytes: int) -> dict[str, Any]:
    """Figures over all tensors, errors weighted by their energy."""
    energy = math.fsum(r.norm**2 for r in results)
    error = math.fsum((r.relative_error * r.norm) ** 2 for r in results)
    left = [(r.compensated_error * r.norm) ** 2 for r in results if r.compensated_error is not None]
    more = {"compensated_error": math.sqrt(math.fsum(left) / energy)} if left and energy else {}
    sizes = [math.prod(r.shape) for r in results]
    bits = math.fsum(r.bits_per_parameter * n for r, n in zip(results, sizes, strict=True))
    return {
        "tensors_quantized": len(results),
        "tensors_kept": len(plan.items) - len(results),
        "quantization_error": math.sqrt(error / energy) if energy else 0.0,
        **more,
        "parameters": sum(item.spec.numel for item in plan.items),
        "parameters_quantized": sum(sizes),
        "bits_per_quantized_parameter": bits / sum(sizes),
        "bits_per_parameter": 8 * nbytes / sum(item.spec.numel for item in plan.items),
        "bytes": nbytes,
    }


def _gate(report: Report, max_error: float | None) -> None:
    if max_error is None:
        return

    def error(result: TensorResult) -> float:
        known = result.compensated_error
        return result.relative_error if known is None else known

    worst = max(report.tensors, key=error)
    total = report.totals.get("compensated_error", report.totals["quantization_error"])
    if error(worst) > max_error or total > max_error:
        raise QualityGateError(
            f"relative error above --max-error {max_error:g}: worst is {worst.tensor} with "
            f"{error(worst):.4g}, total is {total:.4g}; nothing was written. A smaller "
            "--blocksize, --scale-search or --compensate lowers it",
            report,
        )
