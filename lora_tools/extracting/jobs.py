"""The jobs of ``extract``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_tools.extracting.decompose import Sides
from lora_tools.extracting.pair_tasks import extract_tasks
from lora_tools.extracting.pairs import Pair
from lora_tools.jobs import Job, Lying, job
from lora_tools.records import Fate


def extract_jobs(
    pairs: Sequence[Pair], sides: Sides, fates: Sequence[Fate], output: str
) -> Iterator[Job]:
    """One for each pair of tensors. Where ranks are chosen for all at once, its factors follow
    once all are decomposed.

    Args:
        fates: of the pairs, with the bytes that each may come to.
        output: the file that is written.
    """
    known = {fate.tensor: fate for fate in fates}
    for task in extract_tasks(pairs):
        pair = task.pair
        reads: list[Lying] = []
        for side, spec in zip(sides, (pair.base, pair.tuned), strict=True):
            reads += side.lies(spec.name) if spec is not None else ()
        fate = known[pair.name]
        yield job(task, fate, reads, output, (), pair.spec.numel, fate.nbytes)
