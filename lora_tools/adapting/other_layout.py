"""Factors of a diffusion model's modules in the layout that a format's readers have: by other
names, cut where a module is several there, and stacked where several are one. All of it is exact:
what is cut keeps its rank, and what is stacked has the sum of the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from lora_tools.adapting.convert_module import strength_of
from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Made
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.reformed import NewModule, Reformed, renamed
from lora_tools.formats.counterparts.family import Layout, Pair
from lora_tools.formats.counterparts.table import other, shares
from lora_tools.formats.counterparts.unordered import refuse_unordered, refuse_untold
from lora_tools.linalg.scaling import scaling


@dataclasses.dataclass(frozen=True)
class _Job:
    """One pair of a part of the base, of which the adapter has modules in the other layout."""

    given: Adapter
    names: BaseNames
    wrapper: str
    pair: Pair
    there: Mapping[str, LoraModule]  # by their names, of those that the adapter has

    def rows(self, module: str) -> int:
        """How many outputs a module has."""
        name = self.wrapper + module
        spec = self.names.weight(name)
        if spec is None:
            raise self.refuse(f"{name} is not in {self.names.path}")
        return spec.shape[0]

    def refuse(self, why: str) -> UnsupportedAdapter:
        """The error for what cannot be stacked."""
        module = min(self.there)
        return UnsupportedAdapter(
            f"{self.given.path}: {module}: in the layout to write, {self.pair.original} is "
            f"{', '.join(self.pair.diffusers)}, and {why}; merge the adapter into the base instead"
        )


def in_layout(
    given: Adapter, target: Format, names: BaseNames | None, drop: Collection[str] = ()
) -> tuple[Adapter, list[str]]:
    """The adapter with the modules that the format's readers look for, and what was done. A format
    that does not ask for a layout has the base's own.

    Args:
        drop: features that are not to be written.

    Raises:
        UnsupportedAdapter: the order of a fused weight's rows is not known; modules that would be
            one have other scalings, or DoRA, or dtypes.
    """
    by_peft = given.original.format == "peft"
    if names is not None:
        refuse_unordered(given.path, by_peft, given.modules, names.path, names.parts)
    elif by_peft and target.name != "peft":
        refuse_untold(given.path, given.modules)
    made: dict[str, list[NewModule]] = {}
    for job, wanted in _jobs(given, target, names) if names is not None else ():
        if not made.keys() & job.there.keys():
            new = list(_made(job, wanted))
            made |= {name: new if name == min(job.there) else [] for name in job.there}
    if not made:
        return given, []
    if given.differences and "differences" in drop:
        beside = {f"{module.module}.bias" for module in given.modules.values()}
        given.differences = {k: key for k, key in given.differences.items() if k in beside}
    if given.differences:
        raise UnsupportedAdapter(
            f"{given.path}: {min(given.differences)}: a whole difference, which cannot be "
            "converted to the layout to write; merge the adapter into the base instead"
        )
    inputs = [module.name for module in given.modules.values() if module.on_inputs]
    if inputs:
        raise UnsupportedAdapter(
            f"{given.path}: {min(inputs)}: DoRA over the inputs, which cannot be converted to the "
            "layout to write; merge the adapter into the base instead"
        )
    modules = []
    for name, module in given.modules.items():
        modules += made.get(name, [renamed(given, module, name)])
    from lora_tools.linalg.recipes import compute

    return Reformed(given, modules, compute), [_sentence(given, made)]


def _jobs(given: Adapter, target: Format, names: BaseNames) -> Iterator[tuple[_Job, Layout]]:
    """What is to be done, and the layout wanted."""
    for part in names.parts:
        wanted = part.wanted(target.names)
        for pair in part.pairs:
            if wanted == "original" and pair.original.endswith("_"):
                continue  # no module
            mine = {part.wrapper + module for module in pair.modules(other(wanted))}
            mine -= {part.wrapper + module for module in pair.modules(wanted)}
            there = {name: given.modules[name] for name in sorted(mine & given.modules.keys())}
            if there:
                yield _Job(given, names, part.wrapper, pair, there), wanted


def _sentence(given: Adapter, made: Mapping[str, Sequence[NewModule]]) -> str:
    new = [module for each in made.values() for module in each]
    said = f"{len(made)} modules became {len(new)} in the layout that programs read"
    old, ranks = {given.modules[name].r for name in made}, {module.r for module in new}
    if max(ranks) > max(old):
        said += f". Modules made of several have ranks up to {max(ranks)}"
    return said


def _made(job: _Job, wanted: Layout) -> Iterator[NewModule]:
    """What takes the place of the modules."""
    names = [job.wrapper + module for module in job.pair.modules(wanted)]
    if wanted == "original" and len(job.pair.diffusers) > 1:
        yield _stacked(job, names[0])
        return
    [module] = job.there.values()
    new = renamed(job.given, module, names[0])
    rows, columns = job.given.shape(module.B)[0], job.given.shape(module.A)[1]
    if job.pair.swapped:
        yield _with_rows(new, names[0], (rows // 2, rows, 0, rows // 2))
        return
    if len(names) == 1:
        yield new
        return
    first, sizes = 0, shares(job.pair, (rows, columns))
    if not sizes:
        raise job.refuse(f"the order of its {rows} rows is not known")
    for name, count in zip(names, sizes, strict=True):
        yield _with_rows(new, name, (first, first + count))
        first += count


def _with_rows(module: NewModule, name: str, rows: tuple[int, ...]) -> NewModule:
    """Its outputs [first, after last), … alone."""
    count = sum(rows[1::2]) - sum(rows[::2])
    parts = {}
    for key, part in module.parts.items():
        if key != "lora_A.weight":
            spec = dataclasses.replace(part.spec, shape=(count, *part.spec.shape[1:]))
            part = Made(spec, part.keys, "rows", rows)
        parts[key] = part
    return dataclasses.replace(module, name=name, parts=parts)


def _stacked(job: _Job, name: str) -> NewModule:
    """One module, block-diagonal; zeros for those that the adapter has not."""
    modules = [job.there.get(job.wrapper + module) for module in job.pair.diffusers]
    held = [module for module in modules if module is not None]
    specs, strengths = job.given.file.specs, {strength_of(m, job.given) for m in held}
    if len(strengths) > 1:
        raise job.refuse("the others have another scaling (lora_alpha / rank)")
    if any(m.magnitude or m.bias for m in held):
        raise job.refuse("has DoRA or lora_bias")
    if len({(specs[m.A].dtype, specs[m.B].dtype) for m in held}) > 1:
        raise job.refuse("the others have another dtype; convert the file with --dtype first")
    rank, first = sum(m.r for m in held), held[0]
    sizes = [job.rows(module) for module in job.pair.diffusers]
    there = [int(module is not None) for module in modules]
    A, B = specs[first.A], specs[first.B]
    parts = {
        "lora_A.weight": Made(
            dataclasses.replace(A, shape=(rank, A.shape[1])), tuple(m.A for m in held), "stacked"
        ),
        "lora_B.weight": Made(
            dataclasses.replace(B, shape=(sum(sizes), rank)),
            tuple(m.B for m in held),
            "stacked_diagonal",
            (*sizes, *there),
        ),
    }
    alpha = strengths.pop() / scaling(1.0, rank, job.given.use_rslora)
    return NewModule(name, parts, rank, alpha)
