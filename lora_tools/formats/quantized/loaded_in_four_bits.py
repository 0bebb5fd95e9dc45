"""Which layers transformers loads in four bits, and whether a folder's config says the same.

The rules follow transformers 5.23: what a loader leaves alone must be listed in
``llm_int8_skip_modules``, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.bitsandbytes import QuantizedTensor
from lora_tools.formats.weights import Weight, weight_of
from lora_tools.records import TensorSpec

_CLASSIFIERS = re.compile(
    r"(classifier|score|scores|qa_outputs|seq_relationship|logits_proj|sop_classifier"
    r"|reward_head|value_head|v_head|summary|regression_head|prediction_head)"
)
# Heads that a folder may lack and its loader may add: tied ones, and those of a new task.
ADDED_HEADS = ("lm_head", "score", "classifier", "qa_outputs")
_ROUTERS = re.compile(r"(gate|router|shared_expert_gate|switch)")
# Linear layers that transformers 5.23 keeps out of every quantization (_keep_in_fp32_modules).
_KEPT = re.compile(r"(.*\.)?(qformer|compressor)\..*|(.*\.)?weights_proj")
_KEPT_WO = ("t5", "mt5", "umt5", "udop", "pop2piano")


def reason_to_keep(weight: Weight, config: Mapping[str, Any], head: bool) -> tuple[str, bool]:
    """Why a weight is not quantized ("" if it is to be), and whether it is a linear layer's.

    The rules follow transformers: linear layers only, without output heads (unless ``head``),
    classification heads, and what its models keep in full precision. Experts and their routers
    stay as they are: transformers 5 fuses experts into one tensor, which it does not quantize.
    """
    module = weight.module
    if weight.layout == "embedding":
        return "embedding", False
    if weight.layout not in ("linear", "conv1d"):
        return "not the weight of a linear layer", False
    last = module.rpartition(".")[2]
    if weight.is_head or module == "cls.predictions.decoder":
        return ("" if head else "output head"), True
    if _CLASSIFIERS.fullmatch(last):
        return "classification head", True
    if ".experts." in module:
        return "an expert, which transformers fuses", True
    if _ROUTERS.fullmatch(last):
        return "router", True
    if _KEPT.fullmatch(module) or (last == "wo" and config.get("model_type") in _KEPT_WO):
        return "kept in full precision by transformers", True
    if not weight.spec.numel:
        return "empty", True
    return "", True


def skip_entry(module: str) -> str:
    """What to list for a linear layer that stays: its name, or all experts of its layer."""
    before, experts, _ = module.partition(".experts.")
    return f"{before}.experts" if experts else module


_FEW = 16  # modules that are sooner looked through than looked up by each of a name's ends


def loader_skips(module: str, skip: Collection[str]) -> bool:
    """Whether transformers leaves a linear layer alone that has this set of modules to skip: its
    name ends like one of them, or begins with one up to a dot."""
    if len(skip) < _FEW:
        return any(module.startswith(f"{each}.") for each in skip) or any(
            each and module.endswith(each) for each in skip
        )
    parts = module.split(".")
    return any(module[i:] in skip for i in range(len(module))) or any(
        ".".join(parts[:n]) in skip for n in range(1, len(parts))
    )


_NAMED_IF_KEPT = ("", "output head", "classification head")  # the rest a loader leaves of itself


def config_faults(
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    quantized: Mapping[str, QuantizedTensor],
    layers: Mapping[str, str] | None = None,
) -> list[str]:
    """What keeps transformers from loading a four-bit folder as it is stored, in sentences.

    Args:
        config: its config.json.
        specs: every stored tensor.
        layers: the weights that the loader reads in four bits unless it is told to skip them, and
            their modules' names in memory, where the model's class is known; else names tell.
    """
    settings = config.get("quantization_config")
    if not (isinstance(settings, Mapping) and settings.get("load_in_4bit")):
        return [
            "has no quantization_config with load_in_4bit, so a loader would use the codes as "
            "weights"
        ]
    kinds = sorted({q.state.quant_type for q in quantized.values()})
    faults = []
    if [settings.get("bnb_4bit_quant_type", "fp4")] != kinds:
        faults.append(
            f"says {settings.get('bnb_4bit_quant_type')}, but the weights are {' and '.join(kinds)}"
        )
    listed = settings.get("llm_int8_skip_modules")
    if not isinstance(listed, list):
        return faults
    skip = {str(name) for name in listed}
    for name, spec in specs.items():
        module = split_tensor(name)[0]
        if layers is not None:
            module = layers.get(name, module)
        if name in quantized:
            if loader_skips(module, skip):
                faults.append(f"says that {module} is not in four bits, but it is")
            elif layers is not None and name not in layers:
                faults.append(f"cannot say that {module} is in four bits: it is not a linear layer")
            continue
        reason, linear = reason_to_keep(weight_of(spec, config), config, False)
        wanted = linear and reason in _NAMED_IF_KEPT if layers is None else name in layers
        if wanted and not loader_skips(module, skip):
            faults.append(
                f"does not list {module}, which is not in four bits, among the modules to skip"
            )
    return faults
