"""Live torch modules: layers with a low-rank branch, and adapters put onto a model and taken off.

The layers are those of the LoRA paper's own code (arXiv 2106.09685, loralib 0.1.2), and their state
dicts are interchangeable with its.
"""

from lora_tools.nn.attach import attach, detach, merge_
from lora_tools.nn.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from lora_tools.nn.trained import lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "attach",
    "detach",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_",
]
