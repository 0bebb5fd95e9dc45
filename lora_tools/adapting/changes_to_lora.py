"""An adapter of one of PEFT's types that are no LoRA, made one: each module's change is formed,
decomposed as ``extract`` decomposes a difference, measured as written, and let go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.adapting.jobs import copying_jobs
from lora_tools.engine.tasks import Call
from lora_tools.errors import NonFiniteError, UnsupportedAdapter, UsageError
from lora_tools.figures import Total
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.jobs import Job, job
from lora_tools.linalg.layouts import LAYOUTS, Layout
from lora_tools.linalg.ranks import RankRule
from lora_tools.merging.changed import change_of, is_turned, layer_of, product_of, working_bytes
from lora_tools.merging.jobs import lying_in
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.targets import Part, Target
from lora_tools.records import DTYPE_BITS, Fate, ModuleResult, ProgressCallback
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.adapters.writer import Factors
    from lora_tools.linalg.changes.on import Product
    from lora_tools.linalg.factors import BestProduct

_SEED = 0
# Fields of a config that mean the same of a LoRA.
_KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "modules_to_save",
    "bias",
)


@dataclasses.dataclass(frozen=True)
class ToLora:
    """A module to be made LoRA: what acts on which tensor of the base, and as which kind of layer
    its factors are held."""

    target: Target
    layout: Layout

    @property
    def part(self) -> Part:
        """The one that changes."""
        [part] = [p for p in self.target.parts if isinstance(p.source, ChangedModule)]
        return part

    @property
    def source(self) -> ChangedModule:
        """The change."""
        assert isinstance(self.part.source, ChangedModule)
        return self.part.source


def plan_lora(given: Adapter, base: Checkpoint | None, to: str) -> list[ToLora]:
    """What is to be done, by the names and shapes of the base.

    Raises:
        UsageError: no base, or a format that is not written in one step.
        UnsupportedAdapter: what a LoRA has no place for.
    """
    title = next(iter(given.changes.values())).kind.title
    if to != "peft":
        raise UsageError(
            f"{given.path} is an adapter of {title}; make it a LoRA of PEFT first (--to peft), and "
            f"convert that with --to {to}"
        )
    if given.modules or given.differences:
        raise UnsupportedAdapter(
            f"{given.path}: some modules are {title} ({min(given.changes)}) and others are not "
            f"({min([*given.modules, *given.differences])}), and such a mixture cannot be "
            "converted; merge the adapter into the base instead"
        )
    if base is None:
        raise UsageError(
            f"{given.path} is an adapter of {title}, which does not say what kind of layer each "
            "module is; give the checkpoint it was trained on with --base"
        )
    found = []
    for target in plan_merge(base, [Weighted(given, 1.0, str(given.path))]).targets:
        changes = [p for p in target.parts if isinstance(p.source, ChangedModule)]
        if not changes:
            continue
        weight = base.weights.of(target.spec)
        if target.spec.name.endswith(".bias") or weight.layout is None:
            raise UnsupportedAdapter(
                f"{target.spec.name}: {title} changes it, and a LoRA cannot hold such a change; "
                "merge the adapter, then run `loratools extract --rest save` on the result"
            )
        kind = "conv1d" if is_turned(changes[0]) else weight.layout
        layout = LAYOUTS[kind].having(groups=weight.groups) if kind == "conv" else LAYOUTS[kind]
        found.append(ToLora(target, layout))
    return found


def _best_of(name: str, values: torch.Tensor, rule: RankRule, dtype: torch.dtype) -> BestProduct:
    """The best product for a matrix at the rank that the rule chooses. Raises NonFiniteError."""
    from lora_tools.linalg import lora
    from lora_tools.linalg.delta import Delta
    from lora_tools.linalg.factors import BestProduct
    from lora_tools.linalg.svd import truncated

    delta = Delta(values, values.new_zeros(()).expand(values.shape))
    energies = delta.measure()
    total = energies.delta
    if not math.isfinite(total):
        raise NonFiniteError(f"{name}: its change holds an inf or a NaN; check the adapter")
    svd = truncated(values, rule, total=total, noise=energies.noise, seed=_SEED)
    if not svd.rank:
        return BestProduct.nothing(values.shape, dtype, total, svd.method)
    left, right, fit = lora.balanced_factors(svd, delta, 1.0, dtype)
    if not math.isfinite(fit.error):
        raise NonFiniteError(f"{name}: its factors overflow {dtype}; choose a wider --dtype")
    gain = max(svd.captured + svd.gain - fit.captured, 0.0)
    return BestProduct(left, right, total, max(fit.error, 0.0), gain, svd.method)


def _best_of_product(
    name: str, product: Product, rule: RankRule, dtype: torch.dtype
) -> BestProduct:
    """The same of a matrix that is a product of small factors, which is never formed. Raises
    NonFiniteError."""
    from lora_tools.linalg.factors import best_of_product

    left, right = product.left.double() * product.scale, product.right
    if not (left.isfinite().all() and right.isfinite().all()):
        raise NonFiniteError(f"{name}: its change holds an inf or a NaN; check the adapter")
    best = best_of_product(left, right, rule, dtype)
    if not math.isfinite(best.error):
        raise NonFiniteError(f"{name}: its factors overflow {dtype}; choose a wider --dtype")
    return best


def _of_regions(
    work: ToLora, base: Checkpoint, rule: RankRule, dtype: torch.dtype
) -> list[BestProduct]:
    """The products of the layer's regions."""
    spec, layout = work.target.spec, work.layout
    regions = layout.regions(spec.shape)
    if len(regions) == 1 and (product := product_of(work.part, spec)) is not None:
        return [_best_of_product(spec.name, product, rule, dtype)]
    weight = None
    if work.source.kind.of_base:
        weight = layer_of(work.target, work.part, base.tensor).float()
    change = change_of(work.part, spec, weight).reshape(layout.matrix(spec.shape))
    base.release(work.target.base_name)
    return [
        _best_of(
            spec.name,
            change[at.row : at.row + at.rows, at.col : at.col + at.cols].contiguous(),
            rule,
            dtype,
        )
        for at in regions
    ]


def lora_of(
    work: ToLora, base: Checkpoint, rule: RankRule, dtype: str | None
) -> tuple[Factors, ModuleResult]:
    """One module's factors, in ``dtype`` (by default the base's), and their measure.

    Raises:
        NonFiniteError: the change holds an inf or a NaN, or its factors overflow.
        MismatchError: the adapter's tensors are of another layer.
    """
    from lora_tools.formats.adapters.writer import Factors

    spec, layout, module = work.target.spec, work.layout, work.source.module
    found = _of_regions(work, base, rule, torch_dtype(dtype or spec.dtype))
    A, B = layout.factors([(each.left, each.right) for each in found], spec.shape)
    r = layout.r([each.right.shape[0] for each in found])
    total = Total.of((each.total, each.error) for each in found)
    result = ModuleResult(
        module=module,
        layout=layout.name,
        shape=spec.shape,
        rank=r,
        relative_error=total.relative_error,
        energy=1 - total.missing_share,
        gain_bound=sum(each.gain for each in found) / total.energy if total.energy else 0.0,
        delta_norm=math.sqrt(total.energy),
        relative_change=math.nan,
        method=found[0].method,
    )
    return Factors(module, A, B, float(r), 1.0, r, form=layout.written), result


def _tasks(works: Sequence[ToLora]) -> list[Call[tuple[Factors, ModuleResult]]]:
    return [Call(lora_of, (w,), w.source.module, working_bytes(w.target)) for w in works]


def lora_jobs(
    given: Adapter,
    works: Sequence[ToLora],
    base: Checkpoint,
    rule: RankRule,
    dtype: str | None,
    to: Format,
    fates: Sequence[Fate],
) -> Iterator[Job]:
    """One for each module, and for each tensor that is copied into the file."""
    known = {fate.tensor: fate for fate in fates}
    for work, task in zip(works, _tasks(works), strict=True):
        spec = work.target.spec
        reads = lying_in(given, work.source.keys.values())
        reads += base.lies(work.target.base_name) if work.source.kind.of_base else ()
        numbers = sum(map(math.prod, work.layout.shapes(spec.shape, 1)))
        rank = max(rule.ceiling(at.rows, at.cols) for at in work.layout.regions(spec.shape))
        nbytes = numbers * rank * DTYPE_BITS[dtype or spec.dtype] // 8
        yield job(task, known[task.label], reads, to.file_name, (), spec.numel, nbytes)
    yield from copying_jobs(given, given.whole, to.file_name, fates)


def write_lora(
    given: Adapter,
    works: list[ToLora],
    base: Checkpoint,
    names: BaseNames | None,
    rule: RankRule,
    dtype: str | None,
    made: Mapping[str, str],
    out: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> list[ModuleResult]:
    """Write the LoRA, and what the adapter saves whole, to a folder that does not exist."""
    from lora_tools.engine import threads
    from lora_tools.formats.adapters.peft_format import PeftFormat
    from lora_tools.linalg.recipes import compute

    tasks = _tasks(works)
    if names is not None:  # the adapter says how its layers are stored where the base does not
        layouts = {work.source.module: work.layout.name for work in works}
        names = dataclasses.replace(names, layouts={**names.layouts, **layouts})
    writer, results = PeftFormat(out, names, compute), []
    try:
        for factors, result in threads.run(
            tasks, (base, rule, dtype), None, jobs=jobs, progress=progress
        ):
            writer.add(factors)
            results.append(result)
        for key in given.saved_keys:
            writer.add_raw(key, given.tensor(key))
        config: dict[str, Any] = {k: v for k, v in given.config.items() if k in _KEPT}
        writer.config = {**config, "target_modules": [w.source.module for w in works]}
        writer.made = made
        writer.finish()
    finally:
        writer.close()
    return results
