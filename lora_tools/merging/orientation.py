"""Whether a linear layer's weight is stored as (in, out), which a square shape does not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.names import is_output_head, may_be_conv1d, stores_transposed
from lora_tools.linalg.layouts import Layout
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    from lora_tools.formats.checkpoint import Checkpoint
    from lora_tools.merging.targets import BaseOutline

FLAG = "fan_in_fan_out"


def is_transposed(spec: TensorSpec, base: Checkpoint | BaseOutline, adapter: Adapter) -> bool:
    """As the architecture has it, else as the adapter says. (PEFT 0.21 goes by the layer's class,
    too, and sets the flag by it; of an adapter of several kinds of layers it keeps the last one's.)
    """
    weight = base.weights.of(spec)
    if weight.layout == "embedding" or is_output_head(spec.name):  # its factors are those of a head
        return False
    if stores_transposed(spec, base.config):
        return True
    # Only where the answer may matter: to ask the class may mean to import transformers.
    if adapter.fan_in_fan_out or may_be_conv1d(spec.name):
        known = base.weights.is_conv1d(weight.module)
        if known is not None:
            return known
    return adapter.fan_in_fan_out


def as_stored(
    fitting: Sequence[Layout], spec: TensorSpec, base: Checkpoint | BaseOutline, adapter: Adapter
) -> Layout:
    """Of the layer kinds that have the weight's shape, the one that is stored so.

    Raises:
        MismatchError: the shape fits the other way only. What is said of this weight is then wrong
            of its square ones, too.
    """
    transposed = is_transposed(spec, base, adapter)
    found = [kind for kind in fitting if kind.transposed == transposed]
    if found or FLAG not in adapter.config:
        return (found or fitting)[0]
    raise contradicted(spec, adapter, transposed)


def contradicted(spec: TensorSpec, adapter: Adapter, transposed: bool) -> MismatchError:
    """The error for a weight whose shape fits the other way only than it is said to be stored."""
    way = "(in, out)" if transposed else "(out, in)"
    return MismatchError(
        f"{spec.name}: base is {spec.shape}, and the adapter {adapter.path} fits only if it is not "
        f"stored as {way}, but {FLAG}: {str(adapter.fan_in_fan_out).lower()} in "
        "adapter_config.json and the base's config.json say that it is; give the base's folder "
        f"with the right config.json, or set {FLAG} to the way the model stores its linear layers"
    )
