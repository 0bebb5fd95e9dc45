"""``dequantize``: a quantized checkpoint as a plain one."""

from __future__ import annotations

from pathlib import Path

from lora_tools.formats.output import Prepared
from lora_tools.options import Storage
from lora_tools.quantizing.prepare import prepare_dequantize
from lora_tools.verbs.frame import Call, verb


@verb
def dequantize(call: Call, checkpoint: str | Path, storage: Storage) -> Prepared:
    """Write to ``out`` the plain checkpoint that a quantized one stands for.

    Each weight is computed in float32, as its format has it, and rounded once;
    ``quantization_config`` leaves config.json. Plain numbers that are not in safetensors (pickles,
    a distributed checkpoint) are written as they are.

    Args:
        checkpoint: a folder, a safetensors or GGUF file or a hub id.

    Raises:
        MismatchError: nothing there is quantized, and all is safetensors.
        LoraToolsError: any other of the tree, with nothing written.
    """
    return prepare_dequantize(checkpoint, storage, call.running, call.command)
