"""What every stored number format says of itself, and of one weight, whatever that is stored as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lora_tools.errors import CheckpointError
from lora_tools.formats.dtypes import FLOAT_NAMES, parse_float_dtype
from lora_tools.records import TensorSpec

# What to do about a file that is broken, or in a variant that is not read.
AGAIN = "download the file again, or quantize the original model again"
ORIGINAL = "give the model that it was quantized from"
FETCH = f"download the file again, or {ORIGINAL}"
# Where a config.json says how numbers are stored.
ENTRIES = ("quantization_config", "compression_config")
# What the names of parts begin with that are of no use to a weight's numbers (scales of
# activations, marks): they are not read, and lie in no plain copy.
ASIDE = "aside: "
# Parameters of a module that are of its activations, or of its attention's keys, values, queries.
ACTIVATIONS = (
    *(
        f"{of}_{what}"
        for of in ("input", "output", "k", "v", "q")
        for what in ("scale", "zero_point", "global_scale")
    ),
    "activation_scale", "scale_input", "qscale_act", "kv_scale", "prob_scale", "input_scale_ub",
)  # fmt: skip


class PackedWeight(Protocol):
    """One weight that is stored as other numbers than its own, in one tensor or in several."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The stored tensors by what they are of it; the first lies where the weight would."""

    @property
    def plain(self) -> TensorSpec:
        """The weight as a plain checkpoint stores it: its name, dtype and shape."""

    @property
    def label(self) -> str:
        """How it is stored, in a word or two."""


class StoredFormat(Protocol):
    """A row of ``sources.schemes``, as far as it is known where its arithmetic is not."""

    @property
    def name(self) -> str:
        """A short one."""

    @property
    def title(self) -> str:
        """As people call it."""

    @property
    def rounding(self) -> Callable[..., float] | None:
        """What rounding to it is expected to have cost; None where that is not known."""

    @property
    def files(self) -> tuple[str, ...]:
        """Small files that say something of it, and do not go with plain numbers."""

    @property
    def renames(self) -> bool:
        """Whether its library has names of its own for some tensors."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A ``PackedWeight`` of which nothing more need be known; others add fields to it.

    Attributes:
        specs: the stored tensors by what they are of it; the first lies where the weight would, and
            what is of no use to its numbers (scales of activations) comes last.
    """

    plain: TensorSpec
    specs: Mapping[str, TensorSpec]
    label: str


def said_in(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[Any]:
    """What config.json says under these keys, of the model first and then of its text."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        yield from (holder[key] for key in keys if key in holder)


def entry_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of how numbers are stored; {} where it says nothing of it."""
    said = said_in(config, ENTRIES)
    return next((entry for entry in said if isinstance(entry, Mapping) and entry), {})


def plain_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a plain copy of a quantized checkpoint, by safetensors' name: what config.json
    says (``dtype``, ``torch_dtype``, of the model or of its text), and BF16 where it says none."""
    names = (str(said).removeprefix("torch.") for said in said_in(config, ("dtype", "torch_dtype")))
    known = next((name for name in names if name in FLOAT_NAMES), "bfloat16")
    return parse_float_dtype(known)


W = TypeVar("W", bound=Packed)


def refuse_left_over(
    found: Mapping[str, Packed], specs: Mapping[str, TensorSpec], parts: Collection[str], codes: str
) -> None:
    """Raises CheckpointError for a tensor that is called as what lies beside codes, and is of no
    weight that was found: then a weight, or what it takes, is missing.

    Args:
        parts: names of parameters that nothing else has.
        codes: what is expected beside one.
    """
    taken = {spec.name for weight in found.values() for spec in weight.specs.values()}
    for spec in specs.values():
        module, _, leaf = spec.name.rpartition(".")
        if leaf in parts and spec.name not in taken:
            lies = specs.get(f"{module}.weight", "none")
            raise CheckpointError(
                f"{spec.name}: {codes} is expected beside it in {module or 'the file'}, found "
                f"{lies}; {FETCH}"
            )


def with_activations(found: Mapping[str, W], specs: Mapping[str, TensorSpec]) -> dict[str, W]:
    """The weights with the ``ACTIVATIONS`` put aside, each with the first weight of the module, or
    the parameter, that it is named after: so they are in no plain copy."""
    if not found:
        return {}
    owners: dict[str, str] = {}
    for name in found:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            owners.setdefault(".".join(parts[:n]), name)
    result = dict(found)
    for name, spec in specs.items():
        ending = next((a for a in ACTIVATIONS if name.endswith((f".{a}", f"_{a}"))), "")
        owner = owners.get(name[: -len(ending) - 1]) if ending else None
        if owner is not None:
            result[owner] = put_aside(result[owner], spec)
    return result


def put_aside(weight: W, spec: TensorSpec) -> W:
    """The weight with a tensor that goes with it, and is of no use to its numbers."""
    return dataclasses.replace(weight, specs={**weight.specs, ASIDE + spec.name: spec})
