"""DoRA over the inputs (LyCORIS' ``wd_on_out=False``), for formats that have a place for it."""

from __future__ import annotations

from lora_tools.formats.adapters.changes import INPUT_DORA
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter, LoraModule


def take_input_dora(given: Adapter, to: Format) -> None:
    """Have the adapter's changes of that kind be factors with magnitudes, where the format takes
    such; PEFT has none, so that they are no modules otherwise."""
    if not to.input_dora:
        return
    mine = {k: change for k, change in given.changes.items() if change.kind is INPUT_DORA}
    for name, change in mine.items():
        A, B, magnitude = (change.keys[part] for part in ("lora_A", "lora_B", "dora_scale"))
        rank, *kernel = given.shape(A)
        alpha = change.numbers["alpha"] * rank / change.numbers["r"]
        form = "conv" if len(kernel) > 1 else "matrix"
        given.modules[name] = LoraModule(
            name, form, A, B, None, magnitude, rank, alpha, on_inputs=True
        )
    given.changes = {k: change for k, change in given.changes.items() if k not in mine}
