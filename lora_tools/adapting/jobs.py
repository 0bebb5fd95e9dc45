"""The jobs of what writes an adapter out of others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.jobs import Copying, Job, Sized, job
from lora_tools.merging.jobs import lying_in
from lora_tools.records import DTYPE_BITS, Fate


def module_jobs(
    given: Adapter,
    tasks: Mapping[str, Sized],
    ranks: Mapping[str, int],
    dtype: str | None,
    output: str,
    fates: Sequence[Fate],
) -> Iterator[Job]:
    """One for each module that is written out of one of ``given``.

    Args:
        tasks: by the names of the modules.
        ranks: that they come to have, at most.
        dtype: of the factors; None: each keeps its own.
        output: the file that is written.
    """
    known = {fate.tensor: fate for fate in fates}
    for name, task in tasks.items():
        module = given.modules[name]
        reads = lying_in(given, keys_of(module))
        nbytes = factors_nbytes(module, given, ranks[name], dtype)
        numbers = sum(given.file.specs[key].numel for key in (module.A, module.B))
        yield job(task, known.get(name), reads, output, (), numbers, nbytes)


def copying_jobs(
    given: Adapter, keys: Mapping[str, str], output: str, fates: Sequence[Fate]
) -> Iterator[Job]:
    """One for each tensor that is copied as it is; ``keys`` by the names of the fates."""
    known = {fate.tensor: fate for fate in fates}
    for name, key in keys.items():
        spec = given.file.specs[key]
        work, reads = Copying(name, spec.nbytes), lying_in(given, [key])
        yield job(work, known.get(name), reads, output, (), spec.numel, spec.nbytes)


def whole_keys(given: Adapter) -> dict[str, str]:
    """The tensors that replace the base's, by what fates call them."""
    return {**given.whole, **{name: rows.key for name, rows in given.tokens.items()}}


def keys_of(module: LoraModule) -> list[str]:
    """A module's tensors in the adapter's file."""
    found = (module.A, module.B, module.bias, module.magnitude)
    return [key for key in found if key is not None]


def factors_nbytes(module: LoraModule, given: Adapter, rank: int, dtype: str | None) -> int:
    """Bytes of both factors of a module at a rank, in ``dtype`` or their own."""
    specs = [given.file.specs[key] for key in (module.A, module.B)]
    bits = sum(math.prod(s.shape) * DTYPE_BITS[dtype or s.dtype] for s in specs)
    return math.ceil(bits * rank / max(module.r, 1) / 8)
