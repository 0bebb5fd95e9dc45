"""The plan's own check: that what a merge writes is found by the loader as well as the base is."""

from __future__ import annotations

from collections.abc import Mapping

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.plan import MergePlan
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import keeps_names
from lora_tools.sources.untying import loading_of


def refuse_unloadable(base: Checkpoint, plan: MergePlan, specs: Mapping[str, TensorSpec]) -> None:
    """Where the plan changes names, ties or config.json and transformers knows the class, build it
    without weights and look for every name. The output's tensors are ``specs``.

    Raises:
        UnsupportedAdapter: the loader would miss a tensor, or have no use for one, that it does not
            in the base.
    """
    if plan.config is None and not plan.untied:
        return
    before, after = loading_of(base.config, base.specs), None
    if before is not None:
        after = loading_of(plan.config or base.config, specs)
    if before is None or after is None:
        return
    missing, strange = after.missing - before.missing, after.unexpected - before.unexpected
    if missing or strange:
        said = [f"would not find {name}" for name in sorted(missing)[:4]]
        said += [f"would not use {name}" for name in sorted(strange)[:4]]
        raise UnsupportedAdapter(
            f"{base.path}: the merged model could not be loaded: transformers {'; '.join(said)}; "
            "train the adapter on all of the tied weights (ensure_weight_tying), or use it "
            "without merging"
        )


def notes_on_loading(base: Checkpoint) -> tuple[str, ...]:
    """What transformers would not find in a copy of a base whose format's library renames tensors.
    That library finds them, so nothing is refused."""
    scheme = base.scheme
    if scheme is None or not scheme.renames or keeps_names(base.config, base.specs):
        return ()
    loading = loading_of(base.config, base.specs)
    if loading is None or not (loading.missing or loading.unexpected):
        return ()
    missing, others = sorted(loading.missing), sorted(loading.unexpected)
    said = [f"would not find {missing[0]}"] if missing else []
    said += [f"would not use {others[0]}"] if others else []
    return (
        f"{base.path}: its tensors have {scheme.title}'s names, so the output has them too: "
        f"transformers {' and '.join(said)} ({len(missing)} and {len(others)} tensors); load it "
        f"with {scheme.title}, or give the model that it was made from",
    )
