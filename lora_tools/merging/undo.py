"""The base restored out of a merged checkpoint: the work of ``unmerge``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lora_tools.errors import MismatchError, NonFiniteError, UnsupportedAdapter
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter, Shard
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.safetensors_file import parse_header, strict_json
from lora_tools.formats.sidecar import NAME as SIDECAR_NAME
from lora_tools.formats.sidecar import Sidecar
from lora_tools.merging.plan import MergePlan, build_effects
from lora_tools.merging.targets import BaseOutline, Target
from lora_tools.merging.tensor import Write, as_matrix, copy_tensor, working_dtype
from lora_tools.records import ProgressCallback, Report, TensorSpec
from lora_tools.sources.weighted import Weighted, digests_and_weights

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class _Restored:
    """Hash of a restored tensor, and of an inexact one ‖·‖² of the bound on its error."""

    hash: str
    energy: float = 0.0
    bound: float = 0.0


def check_recorded(
    merged: Checkpoint, weighted: Sequence[Weighted], digests: Sequence[str]
) -> None:
    """Without a sidecar, what the metadata says was merged. Raises MismatchError."""
    recorded = merged.files[0].metadata.get("adapter_digests", "").split()
    given = digests_and_weights(digests, weighted).split()
    for mine, each in zip(given, weighted, strict=True):
        if recorded and mine not in recorded:
            raise MismatchError(
                f"{each.path}: is not what was merged with that weight, by the metadata of "
                f"{merged.path} ({', '.join(recorded)}); pass --allow-other-base to subtract it "
                "all the same"
            )


def check_adapters(memory: Sidecar, weighted: Sequence[Weighted], digests: Sequence[str]) -> None:
    """The adapters given must be those merged, in their order and with their weights."""
    used = memory.adapters
    given = [(d, w.weight) for d, w in zip(digests, weighted, strict=True)]
    if given == used:
        return
    if sorted(given) == sorted(used):
        raise MismatchError("the adapters are those merged, in another order; give them in that")
    if [d for d, _ in given] == [d for d, _ in used]:
        weights = ", ".join(f"{w:g}" for _, w in used)
        raise MismatchError(f"the adapters were merged with weights {weights}: give ADAPTER=WEIGHT")
    raise MismatchError(
        f"{memory.path}: made with {len(used)} other adapter(s) than given here; an adapter that "
        "was changed since does not undo the merge"
    )


def base_outline(merged: Checkpoint, memory: Sidecar) -> tuple[BaseOutline, list[Shard]]:
    """The base's names, shapes and files as the sidecar remembers them."""
    specs: dict[str, TensorSpec] = {}
    shards = []
    for name, header in sorted(memory.headers().items()):
        mine, _, metadata = parse_header(header, None)
        specs.update(mine)
        shards.append(Shard(name, tuple(mine.values()), metadata, header))
    config = merged.config
    if "config.json" in memory.files():
        config = strict_json(memory.files()["config.json"])
    return BaseOutline(merged.path, specs, config), shards


def check_merged(merged: Checkpoint, plan: MergePlan) -> None:
    """Raises MismatchError where the checkpoint is not what was merged."""
    for target in plan.targets:
        found = merged.specs.get(target.spec.name)
        if found != target.spec:
            raise MismatchError(
                f"{merged.path}: {target.spec} was merged, and {found or 'nothing'} is there now: "
                "the checkpoint was changed after the merge"
            )


def refuse_lossy(plan: MergePlan) -> None:
    """Raises UnsupportedAdapter for what cannot be undone without a sidecar."""
    for target in (*plan.targets, *plan.untied):
        for part in target.parts:
            if part.kind in ("dora", "saved", "rows", "ia3"):
                why = {
                    "dora": "DoRA's norms are those of the base, which is lost",
                    "ia3": "IA³ multiplied it, and rounding was multiplied with it",
                    "saved": "the adapter replaced it whole",
                    "rows": "the adapter replaced rows of it",
                }[part.kind]
                raise UnsupportedAdapter(
                    f"{target.spec.name}: cannot be undone without a sidecar ({why}); merge with "
                    "--reversible to be able to"
                )
        if target in plan.untied:
            raise UnsupportedAdapter(
                f"{target.spec.name}: tied to {target.base_name} here, and the adapter acts on one "
                "of them only; merge parts them then, so this was merged by something else"
            )


def unmerge_checkpoint(
    report: Report,
    merged: Checkpoint,
    plan: MergePlan,
    shards: Sequence[Shard],
    memory: Sidecar | None,
    out: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    """Write the base; with a sidecar its digest proves it."""
    from lora_tools.engine import threads

    hashes: dict[str, str] = {}
    energy = bound = 0.0
    with CheckpointWriter(out, shards, merged.is_folder) as writer:
        for target, outcome in zip(
            plan.targets,
            threads.run(
                plan.targets,
                lambda target: _restore(target, merged, memory, writer.write),
                jobs=jobs,
                nbytes=lambda target: target.spec.nbytes,
                label=lambda target: target.spec.name,
                progress=progress,
            ),
            strict=True,
        ):
            hashes[target.spec.name] = outcome.hash
            energy, bound = energy + outcome.energy, bound + outcome.bound
        specs = {target.spec.name: target.spec for target in plan.targets}
        digest = hashing.digest(specs.values(), hashes)
        if memory is not None and digest != memory.base_digest:
            raise MismatchError(
                f"the result is not the base ({digest} against {memory.base_digest}): the merged "
                "checkpoint, or an adapter's config, was changed after the merge"
            )
        files: Mapping[str, bytes] = memory.files() if memory is not None else {}
        index = next((name for name in files if name.endswith(".index.json")), None)
        writer.finish(
            merged,
            index or (merged.index_name if memory is None else None),
            files,
            leave=(SIDECAR_NAME,),
        )
    totals: dict[str, Any] = {**report.totals, "exact": memory is not None, "base_digest": digest}
    if memory is None:
        totals["error_bound"] = math.sqrt(bound / energy) if energy else 0.0
    return dataclasses.replace(report, totals=totals)


def _restore(target: Target, merged: Checkpoint, memory: Sidecar | None, write: Write) -> _Restored:
    """Restore one tensor, run by run."""
    import torch

    from lora_tools.formats.tensors import as_bytes
    from lora_tools.linalg import reversible as codec
    from lora_tools.linalg.lora import rows_per_run
    from lora_tools.linalg.merge import TensorMerge
    from lora_tools.linalg.svd import sum_of_squares

    name = target.spec.name
    if not target.parts:
        return _Restored(copy_tensor(merged, name, write))
    source = as_matrix(merged.tensor(name), target)
    listing = memory.listing(name) if memory is not None else None
    dtype = torch_dtype("F64") if source.element_size() >= 4 else working_dtype(source.dtype)
    norms = listing.norms if listing is not None else ()
    work = TensorMerge(
        build_effects(target), (source.shape[0], source.shape[1]), None, dtype, norms
    )
    state, offset, energy, bound = xxhash.xxh3_128(), 0, 0.0, 0.0
    step = rows_per_run(source.shape)
    unit = torch.finfo(source.dtype).eps / 2 if source.is_floating_point() else 0.0
    coarser = torch.finfo(working_dtype(source.dtype)).eps / torch.finfo(dtype).eps
    for i, start in enumerate(range(0, source.shape[0], step)):
        stop = min(start + step, source.shape[0])
        rows = source[start:stop]
        estimate = work.estimate(rows.to(dtype, copy=True), start, stop)
        if listing is not None:
            base = codec.decode(estimate, rows, *listing.runs[i])
        else:
            base = estimate.to(source.dtype)
            here = sum_of_squares(base.to(dtype))
            if not math.isfinite(here):
                raise NonFiniteError(
                    f"{name}: holds an inf or a NaN once the adapters are subtracted; check the "
                    "merged checkpoint and the adapters"
                )
            energy += here
            # Both roundings, of the merge and of this, are within half a unit in the last place;
            # the merge's sums were formed in its own working dtype.
            wide = rows.to(dtype)
            summed = math.sqrt(sum_of_squares(work.slack(wide, start, stop))) * coarser
            bound += (unit * (math.sqrt(sum_of_squares(wide)) + math.sqrt(here)) + summed) ** 2
        data = as_bytes(base)
        write(name, data, offset)
        state.update(data)
        offset += data.nbytes
    merged.release(name)
    return _Restored(state.hexdigest(), energy, bound)
