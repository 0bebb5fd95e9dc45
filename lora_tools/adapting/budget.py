"""``rescale --budget``: ranks for all modules of an adapter at once, by their exact spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lora_tools.adapting.convert_module import check_finite, module_layout, strength_of
from lora_tools.errors import UsageError
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.linalg.ranks import SHARED, RankRule, Spectrum
from lora_tools.options.ranks import Size


def shared_ranks(
    given: Adapter, rule: RankRule, size: Size, dtype: str | None, jobs: int | None
) -> Mapping[str, int]:
    """The rank of each module, at least 1, by which the whole error is least for that size.

    Raises:
        UsageError: the size does not hold one direction of each module.
        NonFiniteError: factors that hold an inf or a NaN.
    """
    from lora_tools.engine import threads
    from lora_tools.engine.tasks import Call

    modules = list(given.modules.values())
    tasks = [Call(_spectrum, (module,), module.module) for module in modules]
    sources = given, dtype if size.in_bytes else None
    found = list(threads.run(tasks, sources, None, jobs=jobs))
    spectra = [rule.capped(spectrum) for spectrum, _, _ in found]
    costs = [each * (width if size.in_bytes else 1) for _, each, width in found]
    factors = {key for module in modules for key in (module.A, module.B)}
    specs = given.file.specs
    left = size.left([spec.nbytes for key, spec in specs.items() if key not in factors], specs)
    left -= sum(costs)  # the first direction of each
    if left < 0:
        raise UsageError(
            f"--budget: rank 1 for each of {len(modules)} modules already needs more; allow "
            f"{-left:,} {'bytes' if size.in_bytes else 'numbers'} more"
        )
    rest = [Spectrum(s.squared[1:], s.total, True, s.shape) for s in spectra]
    ranks = SHARED[rule.policy](rest, costs, left)
    return {module.name: 1 + (more or 0) for module, more in zip(modules, ranks, strict=True)}


def _spectrum(module: LoraModule, given: Adapter, dtype: str | None) -> tuple[Spectrum, int, int]:
    """The spectrum of s·B·A, the k-th values of all of its products in one; the numbers that one
    direction takes in the factors, and the bytes of each."""
    import torch

    from lora_tools.linalg import lora

    A, B = given.tensor(module.A), given.tensor(module.B)
    check_finite(module, A, B)
    products = module_layout(module, A, B).split(A, B)
    strength = strength_of(module, given)
    values = [(lora.resize(*product)[1] * strength).square() for product in products]
    r = products[0][1].shape[0]
    squared = torch.zeros(r, dtype=torch.float64)
    for each in values:
        squared[: len(each)] += each
    width = torch_dtype(dtype).itemsize if dtype else torch.promote_types(A.dtype, B.dtype).itemsize
    numbers = math.prod(A.shape) + math.prod(B.shape)
    # Directions that only rounding holds are none.
    kept = max(int((squared > (1e-7**2) * squared[0]).sum()), 1)
    return Spectrum(squared[:kept], float(squared.sum()), True), numbers // r, width
