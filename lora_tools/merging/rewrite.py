"""A checkpoint written out of another: what merge, quantize and dequantize have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lora_tools.engine import threads
from lora_tools.engine.tasks import Task
from lora_tools.errors import MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter, Shard
from lora_tools.merging.plan import MergePlan, adapter_digest
from lora_tools.provenance import check_bases, digest_like, tool_version
from lora_tools.records import ProgressCallback, Report
from lora_tools.sources.weighted import Weighted, digests_and_weights, settings_of


class Hashed(Protocol):
    """What the work on one came to: at least the hash of the tensor it was made of."""

    @property
    def base_hash(self) -> str: ...


H = TypeVar("H", bound=Hashed)


def signed(shards: Sequence[Shard], command: str, adapters: Sequence[Weighted]) -> list[Shard]:
    """The files with metadata that says what made them; digests are left blank for now."""
    made = {
        "loratools": tool_version(),
        "command": command,
        **_digests([hashing.blank()] * (1 + len(adapters)), adapters),
    }
    if adapters:
        made["adapter_settings"] = settings_of(adapters)
    return [dataclasses.replace(s, metadata={**s.metadata, **made}) for s in shards]


def _digests(digests: Sequence[str], adapters: Sequence[Weighted]) -> dict[str, str]:
    base, *others = digests
    if not adapters:
        return {"base_digest": base}
    return {"base_digest": base, "adapter_digests": digests_and_weights(others, adapters)}


@dataclasses.dataclass
class Rewrite:
    """One checkpoint to be written, once its plan stands.

    Attributes:
        report: its inputs are the source and the adapters, in this order.
        shards: ``signed``.
        allow_other_base: do not look at which base the adapters were made for.
        hashes: of the source's tensors by name, once ``run`` is through.
        digests: of the source and of each adapter, once ``finish`` is.
    """

    report: Report[Any]
    source: Checkpoint
    adapters: Sequence[Weighted]
    plan: MergePlan
    shards: Sequence[Shard]
    out: Path
    jobs: int | None
    progress: ProgressCallback | None
    allow_other_base: bool = False
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: list[str] = dataclasses.field(default_factory=list)

    def writer(self) -> CheckpointWriter:
        """Makes the files and reserves their space."""
        return CheckpointWriter(self.out, self.shards, self.source.is_folder)

    def run(
        self, tasks: Sequence[Task[Checkpoint, CheckpointWriter, H]], writer: CheckpointWriter
    ) -> Iterator[H]:
        """The results of the tasks, which stand for the plan's targets in their order."""
        stored = len(self.plan.targets)  # those untied come after them
        done = threads.run(tasks, self.source, writer, jobs=self.jobs, progress=self.progress)
        for i, result in enumerate(done):
            if i < stored:
                self.hashes[self.plan.targets[i].base_name] = result.base_hash
            yield result

    def finish(
        self, writer: CheckpointWriter, changed: Mapping[str, bytes], leave: Sequence[str] = ()
    ) -> Report[Any]:
        """Fill in the digests, sync, and write the small files; the report then has its digests.

        Raises:
            MismatchError: an adapter was made for another base.
        """
        own = self.source.digest(self.hashes)
        self.digests = [own, *(adapter_digest(w.adapter) for w in self.adapters)]
        if not self.allow_other_base:
            self._check_bases(own)
        writer.seal(_digests(self.digests, self.adapters))
        index = self.source.index_name if len(self.shards) > 1 else None
        left = writer.finish(self.source, index, changed, leave)
        notes = list(self.report.notes)
        if left:
            notes.append(
                f"not copied, because they hold other weights: {', '.join(map(str, left))}"
            )
        notes += self._twice()
        pairs = zip(self.report.inputs, self.digests, strict=True)
        inputs = tuple(dataclasses.replace(given, digest=digest) for given, digest in pairs)
        return dataclasses.replace(self.report, inputs=inputs, notes=tuple(notes))

    def _twice(self) -> list[str]:
        """A note where two of the adapters hold the same tensors."""
        first: dict[str, str] = {}
        return [
            f"{first[digest]} and {w.path} hold the same tensors; both are added"
            for w, digest in zip(self.adapters, self.digests[1:], strict=True)
            if first.setdefault(digest, w.path) != w.path
        ]

    def _check_bases(self, own: str) -> None:
        made_of = ""
        if self.source.scheme is not None:
            # An adapter made for the base that was put into four bits is at home here; which one
            # that was, only this tool's own four-bit checkpoints say.
            made_of = self.source.files[0].metadata.get("base_digest", "")
            if not made_of:
                return
        given = [w for w in self.adapters if not self._is_of_its_part(w)]
        check_bases(((w.path, w.adapter.file.metadata) for w in given), own, self.source, made_of)

    def _is_of_its_part(self, weighted: Weighted) -> bool:
        """Whether an adapter was made for the one part of a pipeline that it acts on."""
        recorded = weighted.adapter.file.metadata.get("base_digest")
        if recorded is None or not self.source.models:
            return False
        acted = {
            target.base_name.partition(".")[0]
            for target in self.plan.targets
            if any(part.weighted is weighted for part in target.parts)
        }
        if len(acted) != 1 or not acted <= self.source.models.keys():
            return False
        [name] = acted
        part, prefix = self.source.models[name], f"{name}."
        known = {n.removeprefix(prefix): h for n, h in self.hashes.items() if n.startswith(prefix)}
        try:
            return recorded == digest_like(recorded, part.digest(known), part)
        except MismatchError:  # a digest of no kind that is known: said where the whole is checked
            return False
