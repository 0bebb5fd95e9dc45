"""The jobs of what writes a checkpoint out of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard
from lora_tools.formats.sidecar import Sidecar
from lora_tools.jobs import Job, Lying, Sized, job
from lora_tools.merging.targets import Part, Target, key_of
from lora_tools.records import Fate, TensorSpec

# A task, the tensors that it reads, and what it writes.
Piece = tuple[Sized, Sequence[Target], Collection[TensorSpec]]


def rewriting_jobs(
    pieces: Iterable[Piece],
    source: Checkpoint,
    shards: Sequence[Shard],
    fates: Sequence[Fate],
    sidecar: Sidecar | None = None,
) -> Iterator[Job]:
    """One for each tensor of the output.

    Args:
        fates: of the output's tensors, by their names there.
        sidecar: what else is read of a tensor that is restored.
    """
    home = {spec.name: shard.name for shard in shards for spec in shard.specs}
    known = {fate.tensor: fate for fate in fates}
    for task, targets, specs in pieces:
        reads: list[Lying] = []
        for target in targets:
            reads += reads_of(target, source)
        if sidecar is not None:
            reads += sidecar.lies(task.label)
        names, nbytes = tuple([spec.name for spec in specs]), 0
        for spec in specs:
            nbytes += spec.nbytes
        numbers = targets[0].spec.numel
        yield job(task, known.get(task.label), reads, home[names[0]], names, numbers, nbytes)


def reads_of(target: Target, source: Checkpoint) -> Sequence[Lying]:
    """What is read for one tensor of the output: the source's, and what acts on it."""
    reads: Sequence[Lying] = source.lies(target.base_name)
    for part in target.parts:
        reads = [*reads, *lying_in(part.weighted.adapter, keys_of(part))]
    return reads


def lying_in(adapter: Adapter, keys: Iterable[str]) -> list[Lying]:
    """Tensors of an adapter, and where they lie."""
    file = adapter.file
    return [Lying(str(file.path), key, file.specs[key].nbytes) for key in keys]


def keys_of(part: Part) -> list[str]:
    """The adapter's tensors that a part reads."""
    source = part.source
    if isinstance(source, ChangedModule):
        return list(source.keys.values())
    if isinstance(source, LoraModule) and part.kind != "bias":
        magnitude = [source.magnitude] if part.kind == "dora" and source.magnitude else []
        return [source.A, source.B, *magnitude]
    return [key_of(part)]
