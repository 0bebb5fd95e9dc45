"""What adapters save whole, by the tensors of a base that it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_tools.errors import MismatchError
from lora_tools.formats.adapters.components import aligned
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.names_in_memory import by_own_names
from lora_tools.merging.targets import Part
from lora_tools.records import TensorSpec
from lora_tools.sources.weighted import Weighted


@dataclasses.dataclass(frozen=True)
class Brought:
    """One tensor that an adapter saves whole.

    Attributes:
        name: by the adapter's own names.
        key: in its file; frozen: that of the tensor before training, or "".
    """

    weighted: Weighted
    name: str
    key: str
    frozen: str

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape in the adapter, under its own name."""
        return dataclasses.replace(self.weighted.adapter.file.specs[self.key], name=self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def has_other_rows(self, base: Checkpoint, name: str) -> bool:
        """Whether the base's tensor ``name`` is a matrix or a bias that differs from it in rows:
        another vocabulary, or other labels."""
        if name not in base.weights:
            return False
        weight = base.weights[name]
        shape = weight.spec.shape
        resizable = len(shape) == 2 or weight.parameter == "bias"
        return resizable and shape != self.shape and shape[1:] == self.shape[1:]


def brought_whole(base: Checkpoint, adapters: Sequence[Weighted]) -> dict[str, Brought]:
    """Everything that is saved whole, by the base's names where it has one for it. Of two adapters
    that bring one tensor, the first counts here.

    Raises:
        MismatchError: ambiguous prefixes.
    """
    found: dict[str, Brought] = {}
    for weighted in adapters:
        adapter = weighted.adapter
        names = {key: name for name, key in adapter.whole.items()}
        wanted = [(name, Part(weighted, key, "saved")) for key, name in names.items()]
        if not wanted:
            continue
        known = [*base.weights]  # for which its class may have to be asked
        # The others say which prefix the names have.
        wanted += [(m.weight, Part(weighted, m, "lora")) for m in adapter.modules.values()]
        wanted += [(f"{m}.weight", Part(weighted, t, "rows")) for m, t in adapter.tokens.items()]
        there = base.specs.keys() >= {name for name, _ in wanted}
        known = [*(base.specs if there else base.weights)]  # the class is asked for the others only
        wanted = by_own_names(wanted, base, known)
        trained_on = adapter.config.get("base_model_name_or_path")
        mapping, _ = aligned([name for name, _ in wanted], known, base.models, trained_on)
        for name, part in wanted:
            if isinstance(part.source, str) and not part.shape:
                own, key = names[part.source], part.source
                each = Brought(weighted, own, key, adapter.frozen.get(own, ""))
                found.setdefault(mapping[name], each)
    return found


def refuse_in_part(each: Brought, spec: TensorSpec) -> None:
    """Raises MismatchError where a tensor of another shape is to be merged with a weight."""
    if each.weighted.weight != 1 and spec.shape == each.shape:
        raise MismatchError(
            f"{spec.name}: {each.weighted.path} adds it as a whole, so it cannot be merged in "
            "part; give the adapter the weight 1"
        )
    if each.weighted.weight != 1:
        raise MismatchError(
            f"{spec.name}: base is {spec.shape}, and {each.weighted.path} replaces it by "
            f"{each.shape}, so it cannot be merged in part; give the adapter the weight 1"
        )
