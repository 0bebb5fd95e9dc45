"""``merge``: a base checkpoint with one or more adapters added to its weights."""

from __future__ import annotations

from pathlib import Path

from lora_tools.errors import UsageError
from lora_tools.formats.output import Prepared
from lora_tools.merging.prepare import Adapters, plan_merging, prepare_merge
from lora_tools.options import Matching, Merging, Storage
from lora_tools.verbs.frame import Call, verb


@verb
def merge(
    call: Call,
    base: str | Path,
    adapters: Adapters,
    matching: Matching,
    storage: Storage,
    merging: Merging,
) -> Prepared:
    """Write to ``out`` the base with every adapter added: W + Σ weight · (its effect on W).

    The sum is formed in float32, in float64 for what is written in more than half precision, and
    rounded once. A quantized base is dequantized on the way, and the report states how much of the
    adapters was kept.

    Args:
        base: a checkpoint folder, a diffusers pipeline's folder, a safetensors file or a hub id.
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``;
            none is enough where ``dtype`` is given.

    Raises:
        LoraToolsError: any of the tree; the destination is untouched then.
    """
    running = call.running
    planned = plan_merging(
        base, adapters, matching, running, needs_adapters=not storage.dtype, pipelines=True
    )
    if merging.requantize:
        if planned.source.models:
            raise UsageError(f"--requantize: {base} is a pipeline; give the folder of one model")
        from lora_tools.quantizing.requantize import prepare_requantize

        return prepare_requantize(planned, storage, running, call.command, merging)
    if merging.activations is not None:
        raise UsageError("--activations needs --requantize")
    return prepare_merge(planned, storage, running, call.command, merging.reversible)
