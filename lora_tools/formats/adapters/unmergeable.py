"""PEFT adapters that cannot be added to weights soundly, by their config, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter

_NOT_LORA = {
    "PREFIX_TUNING": "prefix tuning trains keys and values put before the sequence",
    "PROMPT_TUNING": "prompt tuning trains input vectors put before the sequence",
    "MULTITASK_PROMPT_TUNING": "prompt tuning trains input vectors put before the sequence",
    "CPT": "context-aware prompt tuning trains input vectors put before the sequence",
    "P_TUNING": "p-tuning trains an encoder of input vectors",
    "ADAPTION_PROMPT": "LLaMA-Adapter trains prompts inside attention",
    "ADALORA": "AdaLoRA holds three factors and its own ranks; save it as LoRA with PEFT first",
    "LOHA": "LoHa is a Hadamard product of two low-rank deltas",
    "LOKR": "LoKr is a Kronecker product",
    "OFT": "OFT rotates weights",
    "BOFT": "BOFT rotates weights",
    "HRA": "HRA reflects weights",
    "VERA": "VeRA shares random factors that are not in the file",
    "LN_TUNING": "it holds whole norms and no low-rank delta",
    "TRAINABLE_TOKENS": "it holds single embedding rows and no low-rank delta",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unmergeable(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedAdapter, with the reason, for what cannot be added to weights soundly."""
    kind = str(config.get("peft_type", "LORA"))
    if kind not in ("LORA", "IA3"):
        reason = _NOT_LORA.get(kind, "its weights are not those of LoRA")
        raise UnsupportedAdapter(
            f"{path}: an adapter of PEFT's {kind} cannot be merged here: {reason}"
        )
    if config.get("alora_invocation_tokens"):
        raise UnsupportedAdapter(
            f"{path}: an activated LoRA (aLoRA) acts only after its invocation tokens; weights "
            "cannot tell tokens apart, so it cannot be merged"
        )
    for field, why in (
        ("arrow_config", "Arrow routes every token to other experts"),
        ("use_bdlora", "its factors are block-diagonal (BD-LoRA)"),
        ("use_qalora", "QA-LoRA pools its inputs"),
        ("layer_replication", "it replicates layers, so its modules are not the checkpoint's"),
        ("kasa_config", "KaSA changed the base"),
        ("megatron_config", "Megatron's parallel layers are not the checkpoint's"),
    ):
        if config.get(field):
            raise UnsupportedAdapter(f"{path}: cannot be merged: {why}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise UnsupportedAdapter(
            f"{path}: initialised with {init!r}, which changed the base before training, so adding "
            "it to the pristine base is wrong. Save it with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA, or, if BASE is the "
            "changed base itself, set init_lora_weights to true in its adapter_config.json"
        )
