"""Are the modules of a sentence-transformers folder outside the transformer those of another's?"""

from __future__ import annotations

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.records import Action, Fate
from lora_tools.sources.pipelines import other_modules


def compare_modules(found: Checkpoint, wanted: Checkpoint, allow_pickle: bool) -> list[Fate]:
    """What became of each of their tensors, on which no adapter acts.

    Raises:
        UnsafeInput: they are pickles and ``allow_pickle`` is false.
    """
    mine, theirs = (other_modules(side.pipeline, allow_pickle) for side in (found, wanted))
    fates = []
    for name in (*theirs.specs, *(name for name in mine.specs if name not in theirs.specs)):
        if name not in mine.specs:
            fate = Fate(name, Action.MISSING, "it is in the base")
        elif name not in theirs.specs:
            fate = Fate(name, Action.EXTRA, "it is not in the base")
        elif mine.specs[name] != theirs.specs[name] or (
            hashing.tensor_hash(mine.raw(name)) != hashing.tensor_hash(theirs.raw(name))
        ):
            fate = Fate(name, Action.CHANGED, "no adapter acts on it, but it differs from the base")
        else:
            fate = Fate(name, Action.COPIED)
        fates.append(fate)
    return fates
