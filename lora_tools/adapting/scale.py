"""An adapter of another strength, alpha, rank or form: the work of ``rescale``."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.adapting.budget import shared_ranks
from lora_tools.adapting.convert_module import (
    check_finite,
    cut_module,
    factor_bytes,
    module_layout,
    rank_ceiling,
    strength_of,
)
from lora_tools.adapting.for_consumer import in_terms_of
from lora_tools.adapting.jobs import copying_jobs, module_jobs, whole_keys
from lora_tools.engine.tasks import Call
from lora_tools.figures import resized_totals
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.training_metadata import updated
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.jobs import Job
from lora_tools.linalg.layout import pad_rank
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.scaling import scaling
from lora_tools.merging.plan import adapter_digest
from lora_tools.options.ranks import Size
from lora_tools.provenance import handed_on, tool_version
from lora_tools.records import Fate, Input, ModuleResult, ProgressCallback, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.totals import RescaleTotals

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """What is asked of every module."""

    scale: float
    alpha: float | None
    keep_effect: bool
    rule: RankRule | None
    rslora: bool
    dtype: str | None
    consumer: Consumer
    pad_to: int | None  # the one rank of a consumer that reads no patterns
    size: Size | None = None  # what a shared rule must not exceed

    def with_rank(self, rank: int | None) -> Rescaling:
        """For a module whose rank a shared rule has chosen, if it has."""
        rule = self.rule if rank is None else RankRule("rank", rank)
        return dataclasses.replace(self, rule=rule)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """One module's new factors; ``result`` where its rank was chosen anew."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    r: int
    alpha: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    result: ModuleResult | None


def conform_in_place(folder: Path, consumer: Consumer, base: Checkpoint) -> None:
    """Rewrite an adapter folder as the consumer reads it: one rank, alpha = r, scale in lora_B; and
    experts in the form that it reads."""
    given = in_terms_of(open_adapter(folder), str(folder), base, consumer)[0]
    refuse_unread(given, consumer, False)
    pad_to = consumer.rank_for(max(m.r for m in given.modules.values()))
    options = Rescaling(1.0, None, True, None, False, None, consumer, pad_to)
    new = folder.with_name(folder.name + "-conformed")
    report: Report[RescaleTotals] = Report(
        "rescale", tool_version(), (Input("adapter", ""),), "", False, ()
    )
    rescale_adapter(report, given, options, new, 1, None)
    shutil.rmtree(folder)
    new.rename(folder)


def refuse_unread(given: Adapter, consumer: Consumer, tied: bool) -> None:
    """Raises UnsupportedAdapter for what the consumer does not read."""
    tied = tied or bool(given.config.get("ensure_weight_tying"))
    if tied and not consumer.head and any(m.form == "embedding" for m in given.modules.values()):
        raise consumer.refuse(
            "factors of an embedding that is the output head, too",
            "merge the adapter into the base instead",
        )
    if given.use_dora and not consumer.dora:
        raise consumer.refuse("DoRA", "merge the adapter into the base instead")
    if (given.whole or given.tokens) and not consumer.saved:
        first = min([*given.whole, *given.tokens])
        raise consumer.refuse(
            f"tensors saved whole ({first})", "merge the adapter into the base instead"
        )
    for module in given.modules.values():
        stacked = module.form == "experts" and consumer.stacked  # ``for_consumer`` sees to it
        if module.form not in consumer.forms and not stacked:
            raise consumer.refuse(
                f"factors of form {module.form} ({module.module})",
                "merge the adapter into the base instead",
            )
    if any(m.bias for m in given.modules.values()) and not consumer.bias:
        raise consumer.refuse("lora_bias", "merge the adapter into the base instead")


def rescale_adapter(
    report: Report[RescaleTotals],
    given: Adapter,
    options: Rescaling,
    folder: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report[RescaleTotals]:
    """Write it to ``folder``, which must not exist; the report then has its figures."""
    from lora_tools.engine import threads
    from lora_tools.formats.adapters.peft_writer import PeftWriter

    folder.mkdir()
    ranks: Mapping[str, int] = {}
    if options.size is not None and options.rule is not None:
        ranks = shared_ranks(given, options.rule, options.size, options.dtype, jobs)
    tasks = list(_tasks(given, ranks).values())
    writer = PeftWriter(folder)
    results = []
    try:
        for module, scaled in zip(
            given.modules.values(),
            threads.run(tasks, (given, options), None, jobs=jobs, progress=progress),
            strict=True,
        ):
            writer.add_lora(
                module.module,
                scaled.lora_A,
                scaled.lora_B,
                scaled.alpha,
                form=module.form,
                parameter=module.parameter,
                r=scaled.r,
                bias=scaled.bias,
                magnitude=scaled.magnitude,
            )
            if scaled.result is not None:
                results.append(scaled.result)
        for key in (*given.saved_keys, *(rows.key for rows in given.tokens.values())):
            writer.add_raw(key, given.tensor(key))
        config = {**given.config, "use_rslora": options.rslora and options.pad_to is None}
        config |= _unread(options.consumer)
        digest = adapter_digest(given.original)
        metadata = updated(given.file.metadata, writer.ranks.values(), writer.alphas.values())
        metadata.pop("format", None)
        if report.command:  # none: this is a step of another verb, which has signed it
            metadata |= handed_on(metadata, report.command, digest)
        writer.finish(config, None, metadata)
    finally:
        writer.close()
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    totals: RescaleTotals = {
        "modules": len(given.modules),
        "bytes": nbytes,
        **resized_totals(results),
    }
    inputs = tuple(dataclasses.replace(i, digest=digest) for i in report.inputs)
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)


def _tasks(given: Adapter, ranks: Mapping[str, int]) -> dict[str, Call[_Scaled]]:
    """What is to be done on each module, at the rank that a shared rule has chosen for it."""
    return {
        m.name: Call(_scale_module, (m, ranks.get(m.name)), m.module, factor_bytes(m, given))
        for m in given.modules.values()
    }


def rescale_jobs(
    given: Adapter, options: Rescaling, output: str, fates: Sequence[Fate]
) -> Iterator[Job]:
    """One for each module, and for each tensor that is copied into the file ``output``."""
    ranks = {
        m.name: options.pad_to or rank_ceiling(m, given, options.rule)
        for m in given.modules.values()
    }
    yield from module_jobs(given, _tasks(given, {}), ranks, options.dtype, output, fates)
    yield from copying_jobs(given, whole_keys(given), output, fates)


def _unread(consumer: Consumer) -> dict[str, Any]:
    """Fields of a config that name what the consumer does not read, and what is not there: some
    refuse an adapter by them alone."""
    fields: dict[str, Any] = {}
    if not consumer.saved:
        fields |= {"modules_to_save": None, "trainable_token_indices": None}
    if not consumer.bias:
        fields |= {"bias": "none", "lora_bias": False}
    return fields


def _scale_module(
    module: LoraModule, rank: int | None, given: Adapter, options: Rescaling
) -> _Scaled:
    """One module, of the rank that a shared rule has chosen for it, if one has."""
    import torch

    from lora_tools.linalg import factors

    options = options.with_rank(rank)
    A, B = given.tensor(module.A), given.tensor(module.B)
    bias = given.tensor(module.bias) if module.bias else None
    magnitude = given.tensor(module.magnitude) if module.magnitude else None
    strength = strength_of(module, given) * options.scale
    written = torch_dtype(options.dtype) if options.dtype is not None else None

    def new_scaling(r: int) -> float:
        """What the new factors will be multiplied by."""
        alpha = options.alpha if options.alpha is not None else float(r)
        return 1.0 if options.pad_to else scaling(alpha, r, options.rslora)

    if options.rule is not None:
        dtype = written or torch.promote_types(A.dtype, B.dtype)
        cut, result = cut_module(module, (A, B), strength, options.rule, dtype, new_scaling)
        A, B, r = cut.lora_A, cut.lora_B, cut.r
        alpha = options.alpha if options.alpha is not None else float(r)
        bias = factors.scaled(bias, strength / new_scaling(r), written)
    else:
        result, r = None, module.r
        alpha, fold = _alpha_and_fold(module, strength, given, options)
        A, B = factors.scaled(A, 1.0, written), factors.scaled(B, fold, written)
        bias = factors.scaled(bias, fold, written)
    if options.pad_to is not None:
        A, B = _padded(module, A, B, options.pad_to)
        r, alpha = options.pad_to, float(options.pad_to)
    check_finite(module, A, B, bias, magnitude)
    return _Scaled(A, B, r, alpha, bias, magnitude, result)


def _padded(
    module: LoraModule, A: torch.Tensor, B: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """With zeros up to rank r; of experts each."""
    from lora_tools.linalg import factors

    if module.form != "experts":
        return factors.padded(A, B, r)
    layout = module_layout(module, A, B)
    parts = [pad_rank(left, right, r) for left, right in layout.split(A, B)]
    return layout.join(parts, tuple(A.shape), tuple(B.shape))


def _alpha_and_fold(
    module: LoraModule, strength: float, given: Adapter, options: Rescaling
) -> tuple[float, float]:
    """lora_alpha at the rank that stays, and what lora_B is multiplied by.

    Strength goes into alpha, which costs no rounding, unless alpha is given, or is the rank that a
    consumer has for all.
    """
    alpha, fold = strength / scaling(1.0, module.r, options.rslora), 1.0
    if options.alpha is not None:
        alpha = options.alpha
        if options.keep_effect:
            fold = strength / scaling(alpha, module.r, options.rslora)
    elif options.scale == 1.0 and options.rslora == given.use_rslora:
        alpha = module.alpha
    if options.pad_to is not None:
        fold *= scaling(alpha, module.r, options.rslora)
    return alpha, fold
