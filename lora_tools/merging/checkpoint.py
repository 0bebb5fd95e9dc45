"""The checkpoint that a merge writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats import model_card
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.regular_files import is_there, read_file, refuse_outside
from lora_tools.formats.safetensors_writer import encode_header
from lora_tools.formats.sidecar import NAME as SIDECAR_NAME
from lora_tools.merging.changed import working_bytes
from lora_tools.merging.fitted import FittedBase
from lora_tools.merging.output_files import changed_files
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.rewrite import Rewrite
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import MergeTensor, survival_totals
from lora_tools.records import Report, TensorSpec
from lora_tools.totals import MergeTotals

if TYPE_CHECKING:
    from lora_tools.formats.sidecar import SidecarWriter
    from lora_tools.linalg.merge import Survival


def refuse_fitted(base: Checkpoint) -> None:
    """Raises UsageError for a base that was given a head, or another vocabulary."""
    if not isinstance(base, FittedBase):
        return
    for name, each in base.made.items():
        if not base.is_same(name) or name != each.source:
            raise UsageError(
                f"--reversible: {name} is new or has another shape than in the base, which a "
                "sidecar cannot undo; keep the base instead"
            )


def merge_tasks(
    base: Checkpoint, plan: MergePlan, specs: Mapping[str, TensorSpec], reversible: bool = False
) -> list[MergeTensor]:
    """What is to be done on each tensor of the output. ``specs``: as they are written, by name."""
    return [
        MergeTensor(
            target,
            specs[target.spec.name],
            max(target.spec.nbytes, base.decoded_bytes(target.base_name)) + working_bytes(target),
            reversible,
            base.scheme is not None,
        )
        for target in (*plan.targets, *plan.untied)
    ]


def merge_checkpoint(job: Rewrite, reversible: bool) -> Report[MergeTotals]:
    """Write the merged checkpoint, with a sidecar where it is to be reversible."""
    from lora_tools.formats.sidecar import SidecarWriter

    base, plan, out = job.source, job.plan, job.out
    specs = {spec.name: spec for shard in job.shards for spec in shard.specs}
    sidecar = SidecarWriter(out.parent) if reversible else None
    out_hashes: dict[str, str] = {}
    survivals: list[Survival] = []
    try:
        with job.writer() as writer:
            tasks = merge_tasks(base, plan, specs, reversible)
            for task, result in zip(tasks, job.run(tasks, writer), strict=True):
                target = task.target
                out_hashes[target.spec.name] = result.out_hash
                survivals += [result.survival] if result.survival else []
                listing = None if target in plan.untied else result.listing
                if sidecar is not None and listing is not None:
                    sidecar.add(target.base_name, listing)
            changed = changed_files(base, plan, specs)
            report = job.finish(writer, changed, (SIDECAR_NAME,))
        # What an adapter brought whole stands in the base already.
        brings = base.brings if isinstance(base, FittedBase) else lambda name: False
        mine = [t.target for t in tasks if not brings(t.target.base_name)]
        report = dataclasses.replace(
            report, notes=(*report.notes, *_unmoved(mine, job.hashes, out_hashes))
        )
        totals: MergeTotals = {
            **report.totals,
            "tensors_merged": sum(bool(t.parts) for t in plan.targets) + len(plan.untied),
            "tensors_copied": sum(not t.parts for t in plan.targets),
            "output_digest": hashing.digest(specs.values(), out_hashes),
            **survival_totals(survivals),
        }
        if sidecar is not None:
            path = out / SIDECAR_NAME if base.is_folder else out.with_name("out.sidecar")
            _write_sidecar(sidecar, path, job, changed)
            totals["sidecar_bytes"] = path.stat().st_size
            totals["sidecar_share"] = path.stat().st_size / report.totals["bytes"]
    finally:
        if sidecar is not None:
            sidecar.close()
    return dataclasses.replace(report, totals=totals)


def _unmoved(
    targets: Sequence[Target], base: Mapping[str, str], out: Mapping[str, str]
) -> list[str]:
    """A note where adapters act on tensors that are as they were, to the last bit."""
    acted_on = [t for t in targets if t.parts]
    same = [t.spec.name for t in acted_on if base.get(t.base_name) == out[t.spec.name]]
    if not same:
        return []
    why = "lora_B or lora_alpha is 0, or the change is smaller than the rounding of the dtype"
    if len(same) == len(acted_on):
        return [f"the adapters change nothing: the result is the base, bit for bit ({why})"]
    return [
        f"{len(same)} of the {len(acted_on)} tensors that adapters act on did not change, such as "
        f"{same[0]}: {why}"
    ]


def _write_sidecar(
    sidecar: SidecarWriter, path: Path, job: Rewrite, changed: dict[str, bytes]
) -> None:
    base = job.source
    for file in base.files:
        header = file.header or encode_header(file.specs.values())[0][8:]
        sidecar.add_header(file.path.with_suffix(".safetensors").name, header)
    for name in {*changed, *([base.index_name] if base.index_name else [])}:
        refuse_outside(base.path / name, base.path)
        sidecar.add_file(name, read_file(base.path / name))
    card = (base.pipeline.root if base.pipeline is not None else base.path) / model_card.NAME
    if base.is_folder and is_there(card):
        sidecar.add_card(read_file(card))
    digest, *others = job.digests
    used = [
        {"digest": other, "weight": w.weight} for other, w in zip(others, job.adapters, strict=True)
    ]
    sidecar.finish(path, digest, used)
