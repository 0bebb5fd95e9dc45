"""Adapters that are not what their format says are refused by name: one row a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lora_tools
from lora_tools.errors import (
    AdapterError,
    CheckpointError,
    UnsafeInput,
    UnsupportedAdapter,
    UsageError,
)

from .refusals import (
    EMBED,
    WEIGHTS,
    Q,
    Row,
    X,
    bare,
    base,
    check,
    cut,
    diffusers,
    dora,
    factors,
    filled,
    gguf,
    loralib,
    merge,
    mlx,
    of_module,
    peft,
    save,
    to_peft,
    without,
)

PEFT: dict[str, Row] = {
    "a config that is no JSON": (
        AdapterError,
        r"adapter_config\.json: not JSON",
        lambda t: merge(t, filled(peft(t) / "adapter_config.json", "{").parent),
    ),
    "a config that is no object": (
        AdapterError,
        r"adapter_config\.json: not a JSON object",
        lambda t: merge(t, filled(peft(t) / "adapter_config.json", "[]").parent),
    ),
    "no weights": (
        AdapterError,
        r"has no adapter_model\.safetensors",
        lambda t: merge(t, without(peft(t), WEIGHTS)),
    ),
    "weights without a config": (
        AdapterError,
        r"PEFT's tensors without adapter_config\.json, .*alpha; put that file beside it",
        lambda t: merge(t, without(peft(t), "adapter_config.json")),
    ),
    "an empty folder": (
        AdapterError,
        r"no adapter_config\.json.*and no file of tensors; is it an adapter folder\?",
        lambda t: merge(t, without(peft(t), "adapter_config.json", WEIGHTS)),
    ),
    "a pickle": (
        UnsafeInput,
        "a pickle, which can hold code; convert it to safetensors, or pass --allow-pickle",
        lambda t: merge(t, cut(without(peft(t), WEIGHTS) / "adapter_model.bin", b"").parent),
    ),
    "a key that is none of LoRA's": (
        AdapterError,
        r"key 'base_model\.model\.model\.q_proj\.lora_C\.weight' is",
        lambda t: merge(t, peft(t, tensors=factors() | {f"base_model.model.{Q}.lora_C.weight": X})),
    ),
    "one factor alone": (
        AdapterError,
        r"model\.q_proj: has \['lora_A'\].*lora_B",
        lambda t: merge(t, peft(t, tensors=dict([min(factors().items())]))),
    ),
    "a factor twice": (
        AdapterError,
        r"without the parts that wrappers \(FSDP, compile,",
        lambda t: merge(
            t,
            peft(
                t,
                tensors=factors()
                | {f"base_model.model.{Q}.lora_A.default.weight": torch.ones(2, 8)},
            ),
        ),
    ),
    "factors that do not multiply": (
        AdapterError,
        r"lora_A \[2, 8\] and lora_B \[8, 3\] do not multiply",
        lambda t: merge(
            t,
            peft(t, tensors=factors() | {f"base_model.model.{Q}.lora_B.weight": torch.ones(8, 3)}),
        ),
    ),
    "factors of integers": (
        AdapterError,
        r"stored as I64, which.*them in bfloat16",
        lambda t: merge(t, peft(t, tensors={k: v.long() for k, v in factors().items()})),
    ),
    "another rank than the config's": (
        AdapterError,
        r"says rank 3,.*factors have rank 2",
        lambda t: merge(t, peft(t, r=3)),
    ),
    "an alpha that is no number": (
        AdapterError,
        r"lora_alpha is 'four' in adapter_config\.json",
        lambda t: merge(t, peft(t, lora_alpha="four")),
    ),
    "an alpha beyond all floats": (
        AdapterError,
        "a whole number of 401 digits",
        lambda t: merge(t, peft(t, lora_alpha=10**400)),
    ),
    "patterns that are none": (
        AdapterError,
        "alpha_pattern is not a mapping of names to numbers",
        lambda t: merge(t, peft(t, alpha_pattern=["q_proj"])),
    ),
    "a pattern that does not compile": (
        AdapterError,
        "is a pattern that cannot be read",
        lambda t: merge(t, peft(t, rank_pattern={"(": 2})),
    ),
    "parameters that are no names": (
        AdapterError,
        "target_parameters is not a list of names",
        lambda t: merge(t, peft(t, target_parameters={"q": 1})),
    ),
    "trained tokens without their indices": (
        AdapterError,
        "no trainable_token_indices for it",
        lambda t: merge(
            t,
            peft(
                t,
                tensors=factors() | of_module(EMBED, "token_adapter.trainable_tokens_delta", 1, 8),
            ),
        ),
    ),
    "too few magnitudes": (
        AdapterError,
        "numbers, one for each row of",
        lambda t: merge(t, dora(t, 5)),
    ),
    "magnitudes that were not announced": (
        AdapterError,
        r"use_dora is False .*,.*the file has its lora_magnitude_vector",
        lambda t: merge(
            t,
            peft(
                t,
                tensors=factors() | {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(8)},
            ),
        ),
    ),
    "a vector of IA³ along no side": (
        AdapterError,
        r"F32 \[3, 2\] is not a vector over the module.s outputs, .*feedforward_modules",
        lambda t: merge(
            t, peft(t, tensors={f"base_model.model.{Q}.ia3_l": torch.ones(3, 2)}, peft_type="IA3")
        ),
    ),
    "LoRA's factors in an IA³": (
        AdapterError,
        "is unknown in PEFT's",
        lambda t: merge(t, peft(t, peft_type="IA3")),
    ),
    "rescaling IA³": (
        UnsupportedAdapter,
        r"an IA³.*multiplies activations by vectors and has no rank or alpha to change",
        lambda t: lora_tools.rescale(
            peft(t, tensors={f"base_model.model.{Q}.ia3_l": torch.ones(8, 1)}, peft_type="IA3"),
            t / "out",
            scale=2,
        ),
    ),
    "an activated LoRA": (
        UnsupportedAdapter,
        r"an activated LoRA \(aLoRA\) acts only after its invocation tokens",
        lambda t: merge(t, peft(t, alora_invocation_tokens=[1])),
    ),
    **{
        field: (UnsupportedAdapter, f"cannot be merged: .*{why}", _with(field))
        for field, why in (
            ("arrow_config", "Arrow routes"),
            ("use_bdlora", "block-diagonal"),
            ("use_qalora", "QA-LoRA pools"),
            ("layer_replication", "it repeats layers"),
            ("kasa_config", "KaSA changed the base"),
            ("megatron_config", "Megatron"),
        )
        for _with in [lambda field: lambda t: merge(t, peft(t, **{field: [1]}))]
    },
    "an init that changed the base": (
        UnsupportedAdapter,
        "with 'pissa_niter_4', which changed the base before training",
        lambda t: merge(t, peft(t, init_lora_weights="pissa_niter_4")),
    ),
}

LINE = {"a__lora_a": torch.ones(8, 2), "a__lora_b": torch.ones(2, 8)}
KOHYA = {
    "lora_unet_q.lora_down.weight": torch.ones(2, 8),
    "lora_unet_q.lora_up.weight": torch.ones(8, 2),
}
FORMATS: dict[str, Row] = {
    "names that are no adapter's": (
        AdapterError,
        "and its tensors do not have the",
        lambda t: to_peft(t, bare(t, "x", weight=X)),
    ),
    "a file without tensors": (
        AdapterError,
        "holds no tensors",
        lambda t: to_peft(t, bare(t, "x"), source="kohya", base=base(t)),
    ),
    "a path that is not there": (
        AdapterError,
        r"no such adapter;.*there",
        lambda t: to_peft(t, t / "nowhere.safetensors"),
    ),
    "several files of tensors": (
        AdapterError,
        r"no adapter_config\.json.*one\.safetensors, two\.safetensors",
        lambda t: to_peft(t, bare(folder(t / "in"), "one", x=X).parent),
    ),
    "a kohya file without its base": (
        AdapterError,
        "its names have underscores instead of dots; give the model it was trained on with --base",
        lambda t: to_peft(t, save(t / "k.safetensors", KOHYA)),
    ),
    "a flattened name of two modules": (
        AdapterError,
        r"'a_b' can stand for a\.b or a_b of ",
        lambda t: to_peft(
            t,
            save(
                t / "k.safetensors", {k.replace("unet_q", "unet_a_b"): v for k, v in KOHYA.items()}
            ),
            base=bare(t, "b", a__b__weight=X, a_b__weight=X),
        ),
    ),
    "two modules of one flattened name": (
        AdapterError,
        r"both become lora_unet_a_b,.*cannot tell them apart",
        lambda t: lora_tools.convert(
            peft(t, tensors=factors("a.b") | factors("a_b"), target_modules=["b", "a_b"]),
            t / "out",
            to="kohya",
        ),
    ),
    "half a module": (
        AdapterError,
        "but needs both",
        lambda t: to_peft(
            t,
            save(t / "k.safetensors", {k: v for k, v in KOHYA.items() if "down" in k}),
            base=bare(t, "b", q__weight=torch.ones(8, 8)),
        ),
    ),
    "an alpha of several numbers": (
        AdapterError,
        "but must be one number",
        lambda t: to_peft(
            t,
            save(t / "k.safetensors", {**KOHYA, "lora_unet_q.alpha": torch.ones(2)}),
            base=bare(t, "b", q__weight=torch.ones(8, 8)),
        ),
    ),
    "a scale for each input": (
        UsageError,
        "DoRA over the inputs, which is not a product of two factors",
        lambda t: to_peft(
            t,
            save(t / "k.safetensors", {**KOHYA, "lora_unet_q.dora_scale": torch.ones(1, 8)}),
            base=bare(t, "b", q__weight=torch.ones(8, 8)),
        ),
    ),
    "whole weights of MLX": (
        UnsupportedAdapter,
        r"fine_tune_type 'full' in adapter_config\.json: the file holds whole weights",
        lambda t: to_peft(t, mlx(t, {"fine_tune_type": "full", "lora_parameters": {}}, **LINE)),
    ),
    "an MLX without its scale": (
        AdapterError,
        "lora_parameters does not give a scale",
        lambda t: to_peft(t, mlx(t, {"fine_tune_type": "lora", "lora_parameters": {}}, **LINE)),
    ),
    "MLX's DoRA of an embedding": (
        UnsupportedAdapter,
        "MLX's DoRA of an embedding norms each token, PEFT's each dimension",
        lambda t: to_peft(
            t,
            mlx(
                t,
                {"fine_tune_type": "dora", "lora_parameters": {"scale": 1}},
                **{k.replace("a__", "embed_tokens__", 1): v for k, v in LINE.items()},
                embed_tokens__m=torch.ones(8),
            ),
        ),
    ),
    "an MLX factor that is no matrix": (
        AdapterError,
        r"a\.lora_a: has shape \[8\],",
        lambda t: to_peft(
            t,
            mlx(
                t,
                {"fine_tune_type": "lora", "lora_parameters": {"scale": 1}},
                a__lora_a=torch.ones(8),
                a__lora_b=X,
            ),
        ),
    ),
    "a loralib of convolutions": (
        AdapterError,
        "lora_A and lora_B are no",
        lambda t: to_peft(
            t, bare(t, "l", q__lora_A=torch.ones(2, 4, 1), q__lora_B=torch.ones(4, 2)), alpha=2
        ),
    ),
    "a loralib without its alpha": (
        AdapterError,
        "loralib does not",
        lambda t: to_peft(t, bare(t, "l", q__lora_A=torch.ones(2, 4), q__lora_B=torch.ones(4, 2))),
    ),
    "alphas that are no numbers": (
        AdapterError,
        "its metadata lora_alpha is not a mapping of modules to numbers",
        lambda t: to_peft(t, loralib(t, lora_alpha='{"q": true}')),
    ),
    "alphas that are no JSON": (
        AdapterError,
        "its metadata lora_alpha: ",
        lambda t: to_peft(t, loralib(t, lora_alpha="{")),
    ),
    "a config of diffusers that is no object": (
        AdapterError,
        "its metadata lora_adapter_metadata is not a JSON object",
        lambda t: to_peft(t, diffusers(t, "[]")),
    ),
    "a config of diffusers that is no JSON": (
        AdapterError,
        "its metadata lora_adapter_metadata: ",
        lambda t: to_peft(t, diffusers(t, "{")),
    ),
    "a pattern of diffusers that does not compile": (
        AdapterError,
        "is not a pattern",
        lambda t: to_peft(
            t, diffusers(t, '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}')
        ),
    ),
    "an alpha of diffusers that is no number": (
        AdapterError,
        r"lora_adapter_metadata: unet\.lora_alpha is True",
        lambda t: to_peft(t, diffusers(t, '{"unet.lora_alpha": true}')),
    ),
    "half a GGUF": (
        CheckpointError,
        r"not a.*GGUF file",
        lambda t: to_peft(t, cut(t / "x.gguf", b"GGUF\3\0\0\0"), base=base(t)),
    ),
    "a GGUF of a control vector": (
        UnsupportedAdapter,
        "adapter.type is .control.; only lora can be read",
        lambda t: to_peft(t, gguf(t, adapter="control"), base=base(t)),
    ),
    "a GGUF of a model": (
        UnsupportedAdapter,
        r"a GGUF.*here",
        lambda t: to_peft(t, gguf(t, general="model"), base=base(t)),
    ),
    "a GGUF without its alpha": (
        AdapterError,
        r"gives no adapter\.lora\.alpha",
        lambda t: to_peft(t, gguf(t), base=base(t)),
    ),
    "a GGUF of quantized factors": (
        CheckpointError,
        r"tensor 'blk\.0\.attn_q\.weight\.lora_a' is quantized \(Q8_0\)",
        lambda t: to_peft(t, gguf(t, quantized=True), base=base(t)),
    ),
    "a module that GGUF has no name for": (
        UnsupportedAdapter,
        r"model\.q_proj:.*a llama model",
        lambda t: lora_tools.convert(peft(t), t / "out", to="gguf", base=base(t)),
    ),
    "a module that torchtune does not adapt": (
        UnsupportedAdapter,
        r"model\.q_proj: torchtune.*module",
        lambda t: lora_tools.convert(peft(t), t / "out", to="torchtune", base=base(t)),
    ),
    "what ends like ONNX Runtime's": (
        CheckpointError,
        r"not an ONNX Runtime adapter",
        lambda t: to_peft(t, cut(t / "x.onnx_adapter", b"\0\0\0\0TORT" + bytes(64))),
    ),
}

TABLE = {
    **{f"peft: {name}": row for name, row in PEFT.items()},
    **{f"formats: {name}": row for name, row in FORMATS.items()},
}


def folder(path: Path) -> Path:
    """With a file in it."""
    path.mkdir()
    bare(path, "two", x=X)
    return path


@pytest.mark.parametrize("name", TABLE)
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    check(TABLE[name], tmp_path)
