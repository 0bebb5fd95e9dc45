"""The last part of ``extract``: tensors that are saved whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import UnsupportedAdapter
from lora_tools.extracting.pairs import Plan
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.records import Action

if TYPE_CHECKING:
    from lora_tools.extracting.pair_tasks import Outcome
    from lora_tools.formats.adapters.peft_writer import PeftWriter


def save_alone(outcomes: Sequence[Outcome], tuned: Checkpoint, writer: PeftWriter) -> None:
    """Write what is saved whole by itself: for readers that do not go by modules."""
    for outcome in outcomes:
        pair = outcome.pair
        if outcome.action == Action.SAVED_WHOLE and pair.tuned is not None:
            tensor = tuned.rounded(pair.tuned.name)
            for name in (pair.name, *(f"{module}.weight" for module in pair.followed_by)):
                writer.add_raw(f"base_model.model.{name}", tensor)


def complete_saved(
    outcomes: Sequence[Outcome], plan: Plan, tuned: Checkpoint, writer: PeftWriter
) -> list[str]:
    """Write what is saved whole, whole modules at a time, as PEFT reads them.

    PEFT keeps a copy of each module in modules_to_save and wants all of its tensors; and it selects
    such modules by how their names end, which may take in others: those are saved as well.
    """
    targeted = set(writer.ranks)
    saved = [o for o in outcomes if o.action == Action.SAVED_WHOLE]
    modules: set[str] = set()
    bare = []
    for outcome in saved:
        pair, (module, parameter) = outcome.pair, split_tensor(outcome.pair.name)
        assert pair.tuned is not None
        tensor = tuned.rounded(pair.tuned.name)
        if pair.action == "bias" and (module in targeted or not _is_norm(module, plan)):
            writer.add_bias(pair.name, tensor, module in targeted)
        elif parameter in ("weight", "bias") and module and module not in targeted:
            modules.add(module)
        else:
            bare.append((module, pair.name, tensor))
    taken_in = {m for m in plan.modules if any(m.endswith(s) for s in modules)} - modules
    clash = taken_in & targeted
    if clash:
        raise UnsupportedAdapter(
            f"{min(clash)} is decomposed, but PEFT would also save it whole, because its name ends "
            "like that of a module saved whole; leave one of the two out with --exclude"
        )
    for module, name, tensor in bare:
        if module not in modules | taken_in:  # PEFT loads it by its name
            writer.add_raw(f"base_model.model.{name}", tensor)
    for outcome in outcomes:
        pair = outcome.pair
        if pair.module in modules | taken_in and pair.tuned is not None:
            tensor = tuned.rounded(pair.tuned.name)
            writer.add_saved(pair.name, tensor)
            for follower in pair.followed_by:
                writer.add_saved(f"{follower}.weight", tensor)
            if outcome.action == Action.UNCHANGED:
                outcome.action = Action.SAVED_WHOLE
    if taken_in:
        return [
            "saved whole although unchanged, because PEFT matches the ends of names: "
            f"{sorted(taken_in)}"
        ]
    return []


def _is_norm(module: str, plan: Plan) -> bool:
    """Whether the module's weight, too, has no low-rank form: then it is saved as one."""
    return any(p.name == f"{module}.weight" and p.action == "save" for p in plan.pairs)
