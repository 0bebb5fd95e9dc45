"""PEFT adapters that cannot be added to weights soundly, by their config, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.changes import change_of

_NOT_LORA = {
    "PREFIX_TUNING": "prefix tuning trains keys and values put before the sequence",
    "PROMPT_TUNING": "prompt tuning trains input vectors put before the sequence",
    "MULTITASK_PROMPT_TUNING": "prompt tuning trains input vectors put before the sequence",
    "CPT": "context-aware prompt tuning trains input vectors put before the sequence",
    "P_TUNING": "p-tuning trains an encoder of input vectors",
    "ADAPTION_PROMPT": "LLaMA-Adapter trains prompts inside attention",
    "LILY": "Lily routes every input to other experts",
    "XLORA": "X-LoRA weighs its adapters anew for every input",
    "POLY": "Poly weighs its modules by the task of every input",
    "SHADOW": "ShadowPEFT runs a second model beside the first",
    "CARTRIDGE": "a cartridge is keys and values put before the sequence",
    "PSOFT": "PSOFT rotates singular vectors of the base, and the file does not have their signs",
    "ADAMSS": "AdaMSS groups rows by a clustering of the base, which is not in the file",
    "OSF": "OSF replaces singular vectors of the base, which are not in the file",
}
_READ = ("LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_block_diagonal(config: Mapping[str, Any]) -> bool:
    """Whether a config is of BD-LoRA, and says of which modules' factors the file has blocks."""
    said = config.get("use_bdlora")
    if not isinstance(said, dict) or not said.get("nblocks", 0):
        return False
    named = [said.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    sound = all(isinstance(n, list) and all(isinstance(x, str) for x in n) for n in named)
    return sound and any(named) and type(said["nblocks"]) is int and said["nblocks"] > 0


def refuse_merge_only(
    path: Path,
    is_ia3: bool,
    titles: Sequence[str],
    of_attention: bool,
    what: str,
    differences: Collection[str] = (),
) -> None:
    """Raises UnsupportedAdapter for an adapter that can be merged and has no ``what``.

    Args:
        titles: of types that are no LoRA; of_attention: a LoRA of an nn.MultiheadAttention;
            differences: of tensors that have no factors.
    """
    if is_ia3:
        raise UnsupportedAdapter(
            f"{path}: an IA³ adapter multiplies activations by vectors and has no {what}; merge it "
            "into the weights (loratools merge)"
        )
    if titles:
        raise UnsupportedAdapter(
            f"{path}: an adapter of {titles[0]} has no {what}; merge it (loratools merge), or make "
            f"it a LoRA first: loratools convert {path} -o OUT --to peft --rank 16 --base BASE"
        )
    if differences:
        raise UnsupportedAdapter(
            f"{path}: holds changes of norms or biases ({min(differences)}), which have no {what}; "
            "merge it (loratools merge)"
        )
    if of_attention:
        raise UnsupportedAdapter(
            f"{path}: a LoRA of an nn.MultiheadAttention, which only PEFT can run: it has no "
            f"{what} that other programs read; merge it (loratools merge)"
        )


def refuse_unmergeable(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedAdapter, with the reason, for what cannot be added to weights soundly."""
    kind = str(config.get("peft_type", "LORA"))
    if kind not in _READ and change_of(config) is None:
        reason = _NOT_LORA.get(kind, "this type is unknown")
        raise UnsupportedAdapter(
            f"{path}: an adapter of PEFT's {kind} cannot be merged here: {reason}"
        )
    if config.get("alora_invocation_tokens"):
        raise UnsupportedAdapter(
            f"{path}: an activated LoRA (aLoRA) acts only after its invocation tokens, and merged "
            "weights would always act, so it cannot be merged"
        )
    for field, why in (
        ("arrow_config", "Arrow routes every token to other experts"),
        (
            "use_bdlora",
            "its factors are block-diagonal (BD-LoRA), and it does not say for which modules",
        ),
        ("use_qalora", "QA-LoRA pools its inputs"),
        ("layer_replication", "it repeats layers, so its modules are not the checkpoint's"),
        ("kasa_config", "KaSA changed the base"),
        ("megatron_config", "Megatron's parallel layers are not the checkpoint's"),
    ):
        if config.get(field) and not (field == "use_bdlora" and is_block_diagonal(config)):
            raise UnsupportedAdapter(f"{path}: cannot be merged: {why}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise UnsupportedAdapter(
            f"{path}: was initialized with {init!r}, which changed the base before training, so "
            "adding it to the original base is wrong; save it with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA, or, if BASE is the "
            "changed base itself, set init_lora_weights to true in its adapter_config.json"
        )
