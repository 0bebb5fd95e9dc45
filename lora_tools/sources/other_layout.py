"""A diffusion model in the layout that an adapter's readers have: other names, cut and joined."""

from __future__ import annotations

import functools

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.counterparts.table import Readers, counterparts
from lora_tools.formats.diffusion_pipeline import DiffusionPipeline
from lora_tools.sources.class_says import class_says
from lora_tools.sources.pieced import PiecedView


def in_layout_of(source: Checkpoint, readers: Readers) -> Checkpoint:
    """The checkpoint with the tensors that these readers' models have; itself where it has them."""
    if isinstance(source, DiffusionPipeline):
        return source.seen_as({k: in_layout_of(part, readers) for k, part in source.models.items()})
    tensors = counterparts(source.specs, lambda part: part.wanted(readers) != part.layout)
    if not tensors:
        return source
    taken = {piece.stored for tensor in tensors.values() for piece in tensor.pieces}
    view = PiecedView(source, tensors, [name for name in source.specs if name not in taken])
    view.says = functools.partial(class_says, view.config, view.specs)
    return view
