"""``merge`` against PEFT itself: adapters that PEFT makes, on tiny models that transformers makes.

The yardstick is ``merge_and_unload`` in float32. Where that is wrong (embeddings that are tied, see
``TIED``) it is the unmerged PEFT model's output instead, which is what the adapter was trained for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, MismatchError, UnsafeInput, UnsupportedAdapter
from lora_tools.formats.adapters.changes import CHANGES

from . import models

LLAMA = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
BERT = {"target_modules": ["query", "value", "intermediate.dense"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}

# Model kind, LoraConfig, arguments of save_pretrained.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", LLAMA, {}),
    "rslora": ("llama", {**LLAMA, "use_rslora": True}, {}),
    "alpha-is-a-float": ("llama", {**LLAMA, "lora_alpha": 2.5}, {}),
    "patterns": (
        "llama",
        {
            **LLAMA,
            "rank_pattern": {"k_proj": 2, r".*\.1\.mlp\.down_proj": 5, "0.self_attn.q_proj": 1},
            "alpha_pattern": {r"layers.1.*proj": 3, "down_proj": 16},
        },
        {},
    ),
    "rslora-patterns": ("llama", {**LLAMA, "use_rslora": True, "rank_pattern": {"q_proj": 3}}, {}),
    "gaussian": ("llama", {**LLAMA, "init_lora_weights": "gaussian"}, {}),
    "orthogonal": ("llama", {**LLAMA, "init_lora_weights": "orthogonal"}, {}),
    "mica": ("llama", {**LLAMA, "init_lora_weights": "mica"}, {}),
    "dora": ("llama", {**LLAMA, "use_dora": True}, {}),
    "dora-rslora": ("llama", {**LLAMA, "use_dora": True, "use_rslora": True}, {}),
    "lora-bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, {}),
    "lora-bias-rslora": (
        "llama",
        {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True},
        {},
    ),
    "bias-all": ("llama", {**LLAMA, "bias": "all"}, {}),
    "bias-lora-only": ("llama", {**LLAMA, "bias": "lora_only"}, {}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, {}),
    "embeddings-dora": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        {},
    ),
    "save-embedding-layers": ("llama", LLAMA, {"save_embedding_layers": True}),
    "saved-norm-and-head": ("llama", {**LLAMA, "modules_to_save": ["norm", "lm_head"]}, {}),
    "saved-layer-norm": ("llama", {**LLAMA, "modules_to_save": ["input_layernorm"]}, {}),
    "saved-embedding": ("llama", {**LLAMA, "modules_to_save": ["embed_tokens"]}, {}),
    "tokens": ("llama", {**LLAMA, "trainable_token_indices": [3, 0, 95]}, {}),
    "tokens-two-modules": (
        "llama",
        {**LLAMA, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
        {},
    ),
    "all-linear": ("llama", {"target_modules": "all-linear"}, {}),
    "some-layers": ("llama", {**LLAMA, "layers_to_transform": [1]}, {}),
    "tied-untouched": ("llama-tied", LLAMA, {}),
    "tied-saved-both": (
        "llama-tied",
        {**LLAMA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
    "tied-tokens": ("llama-tied", {**LLAMA, "trainable_token_indices": [3, 0, 95]}, {}),
    "bert": ("bert", BERT, {}),
    "bert-dora": ("bert", {**BERT, "use_dora": True}, {}),
    "bert-bias-all": ("bert", {**BERT, "bias": "all"}, {}),
    "bert-lora-bias": ("bert", {**BERT, "lora_bias": True}, {}),
    "bert-embeddings": (
        "bert",
        {"target_modules": ["word_embeddings", "position_embeddings", "query"]},
        {},
    ),
    "bert-embeddings-dora": (
        "bert",
        {"target_modules": ["token_type_embeddings", "query"], "use_dora": True},
        {},
    ),
    "bert-norms": ("bert", {**BERT, "modules_to_save": ["LayerNorm"]}, {}),
    "bert-classifier": ("bert-classifier", {**BERT, "task_type": "SEQ_CLS"}, {}),
    "bert-classifier-saved": ("bert-classifier", {**BERT, "modules_to_save": ["classifier"]}, {}),
    "gpt2": ("gpt2", GPT2, {}),
    "gpt2-dora": ("gpt2", {**GPT2, "use_dora": True}, {}),
    "gpt2-rslora-pattern": (
        "gpt2",
        {**GPT2, "use_rslora": True, "rank_pattern": {"attn.c_proj": 2}},
        {},
    ),
    "gpt2-lora-bias": ("gpt2", {**GPT2, "lora_bias": True}, {}),
    "gpt2-bias-all": ("gpt2", {**GPT2, "bias": "all"}, {}),
    "gpt2-positions": ("gpt2", {**GPT2, "target_modules": ["wpe", "c_attn"]}, {}),
    "gpt2-tokens": ("gpt2", {**GPT2, "trainable_token_indices": {"wte": [2, 9]}}, {}),
}

# One side of a tied pair, or both. PEFT's merge_and_unload adds every such effect to the one shared
# weight: what the head gets the embedding gets too, and an adapter with ensure_weight_tying, which
# stands on both sides, is added twice.
TIED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}, False),
    "both-apart": ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}, False),
    "embedding-ensured": (
        "llama-tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "head-ensured": (
        "llama-tied",
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        True,
    ),
    "rslora-ensured": (
        "llama-tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_rslora": True},
        True,
    ),
    "dora-ensured": (
        "llama-tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        False,  # a magnitude for each dimension on one side, for each token on the other
    ),
    "tokens-apart": (
        "llama-tied",
        {**LLAMA, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2, 3]}},
        False,
    ),
    "gpt2-embedding": ("gpt2", {**GPT2, "target_modules": ["wte", "c_attn"]}, False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: models.save(models.make(kind), root / kind) for kind in models.MODELS}


def ranked(config: dict[str, Any]) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **config}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("case", CASES)
def test_equals_merge_and_unload(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, config, saving = CASES[case]
    tuned = models.adapt(bases[kind], tmp_path / "adapter", ranked(config), **saving)
    unmerged = models.outputs(tuned)
    report = lora_tools.merge(bases[kind], [tmp_path / "adapter"], tmp_path / "merged")
    assert any(fate.action == "merge" for fate in report.plan)
    merged = models.quietly(tuned.merge_and_unload)
    wanted = models.tensors(models.save(merged, tmp_path / "peft"))
    models.assert_same(models.tensors(tmp_path / "merged"), wanted, 1e-6)
    found = models.outputs(models.load(tmp_path / "merged"))
    torch.testing.assert_close(found, unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_keep_the_unmerged_function(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Against the unmerged PEFT model, since ``merge_and_unload`` changes what it computes."""
    kind, config, stays_tied = TIED[case]
    tuned = models.adapt(bases[kind], tmp_path / "adapter", ranked(config))
    unmerged = models.outputs(tuned)
    lora_tools.merge(bases[kind], [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    torch.testing.assert_close(models.outputs(merged), unmerged, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in models.tensors(tmp_path / "merged")) is not stays_tied
    peft_merged = models.outputs(models.quietly(tuned.merge_and_unload))
    assert (peft_merged - unmerged).abs().max() > 0.1, "PEFT does this right now: move the case"


def test_gpt2_head_ensured_is_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT cannot read this one back: it writes target_modules=["transformer.wte"], and looks for
    "embed_tokens" or "lm_head" there before it ties, so that the head's factors are left out."""
    config = ranked({**GPT2, "target_modules": ["lm_head"], "ensure_weight_tying": True})
    trained = models.outputs(models.train(bases["gpt2"], tmp_path / "adapter", config))
    read_back = models.outputs(models.attach(bases["gpt2"], tmp_path / "adapter"))
    assert (read_back - trained).abs().max() > 0.1, "PEFT does this right now: join TIED"
    lora_tools.merge(bases["gpt2"], [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    torch.testing.assert_close(models.outputs(merged), trained, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings


def test_resized_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    model = models.load(bases["llama"])
    models.quietly(lambda: model.resize_token_embeddings(models.VOCAB + 5))
    models.perturb(model, 0.1, 3, only="embed_tokens")
    torch.manual_seed(1)
    tuned = models.quietly(lambda: peft.get_peft_model(model, peft.LoraConfig(**ranked(LLAMA))))
    models.perturb(tuned, 0.1, 4, only="lora_B")
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True))
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    assert merged.config.vocab_size == models.VOCAB + 5
    torch.testing.assert_close(
        models.outputs(merged), models.outputs(tuned.eval()), rtol=1e-5, atol=1e-5
    )


def effect(base: torch.Tensor, adapter: Path, module: str, strength: float) -> torch.Tensor:
    """What one adapter of rank 4 and alpha 6 adds to a Linear weight, densely in float64."""
    factors = models.tensors(adapter)
    A, B, magnitude = (
        factors.get(f"base_model.model.{module}.{part}")
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    if A is None or B is None:
        return torch.zeros_like(base)
    delta = 6 / 4 * B.double() @ A.double()
    if magnitude is not None:
        moved = base + delta
        delta = magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - base
    return strength * delta


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.25, 2.0), (0.0, 1.0, 0.0)])
def test_several_adapters_in_one_pass(
    weights: tuple[float, ...], bases: dict[str, Path], tmp_path: Path
) -> None:
    """W + Σ weight · effect, every effect as it is on the base alone, in any order."""
    configs = [
        LLAMA,
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["up_proj", "q_proj"]},
    ]
    paths = [tmp_path / str(i) for i in range(3)]
    for i, (path, config) in enumerate(zip(paths, configs, strict=True)):
        models.train(bases["llama"], path, ranked(config), seed=i)
    given = list(zip(paths, weights, strict=True))
    lora_tools.merge(bases["llama"], given, tmp_path / "merged")
    as_text = [f"{path}={weight}" for path, weight in reversed(given)]
    lora_tools.merge(bases["llama"], as_text, tmp_path / "reversed")
    wanted = models.tensors(bases["llama"])
    for name, tensor in wanted.items():
        base, module = tensor.double(), name.removesuffix(".weight")
        wanted[name] = base + sum(effect(base, p, module, w) for p, w in given)
    models.assert_same(models.tensors(tmp_path / "merged"), wanted, 1e-6)
    models.assert_same(models.tensors(tmp_path / "reversed"), wanted, 1e-6)


def test_weighted_sum_of_plain_adapters_is_pefts_cat(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for i in range(2):
        models.train(bases["llama"], tmp_path / str(i), ranked(LLAMA), seed=i)
    tuned = models.attach(bases["llama"], tmp_path / "0")
    models.quietly(lambda: tuned.load_adapter(tmp_path / "1", "other"))
    models.quietly(
        lambda: tuned.add_weighted_adapter(["default", "other"], [0.75, 0.5], "both", "cat")
    )
    tuned.set_adapter("both")
    merged = models.quietly(tuned.merge_and_unload)
    lora_tools.merge(
        bases["llama"], [(tmp_path / "0", 0.75), (tmp_path / "1", 0.5)], tmp_path / "m"
    )
    models.assert_same(models.tensors(tmp_path / "m"), merged.state_dict(), 1e-6)


@pytest.mark.parametrize("weight", [0.5, 0.0, 2.0])
def test_weight_of_what_is_replaced(weight: float, bases: dict[str, Path], tmp_path: Path) -> None:
    """A tensor or a row that is saved whole moves ``weight`` of the way."""
    config = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
        "bias": "all",
        "trainable_token_indices": [4, 2],
    }
    models.train(bases["llama"], tmp_path / "a", ranked(config))
    lora_tools.merge(bases["llama"], [(tmp_path / "a", weight)], tmp_path / "m")
    base, saved, found = map(models.tensors, (bases["llama"], tmp_path / "a", tmp_path / "m"))
    for name, key in (
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.base_layer.bias"),
    ):
        wanted = torch.lerp(base[name], saved[f"base_model.model.{key}"], weight)
        torch.testing.assert_close(found[name], wanted)
    rows = saved["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    wanted = base["model.embed_tokens.weight"].clone()
    wanted[[4, 2]] = torch.lerp(wanted[[4, 2]], rows, weight)
    torch.testing.assert_close(found["model.embed_tokens.weight"], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_is_rounded_once(dtype: torch.dtype, dora: bool, tmp_path: Path) -> None:
    """The stored number is the one next to W + Δ, but where float32 arithmetic crosses a tie."""
    base = models.save(models.make("llama").to(dtype), tmp_path / "base")
    models.train(base, tmp_path / "a", ranked({**LLAMA, "use_dora": dora}))
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    found, touched = models.tensors(tmp_path / "m"), 0
    for name, tensor in models.tensors(base).items():
        exact = tensor.double() + effect(
            tensor.double(), tmp_path / "a", name.removesuffix(".weight"), 1.0
        )
        assert found[name].dtype == dtype
        other = found[name] != exact.to(dtype)
        touched += int((found[name] != tensor).sum())
        assert other.float().mean() < 1e-3, name
        error = (found[name].double() - exact).abs()
        assert (error <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 2e-6).all(), name
    assert touched > 1000
    assert models.load(tmp_path / "m").dtype == dtype


def test_dtype_of_the_output(bases: dict[str, Path], tmp_path: Path) -> None:
    models.train(bases["llama"], tmp_path / "a", ranked(LLAMA))
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "wide")
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "half", dtype="bf16")
    wanted = {k: v.bfloat16() for k, v in models.tensors(tmp_path / "wide").items()}
    found = models.tensors(tmp_path / "half")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert models.load(tmp_path / "half").dtype == torch.bfloat16


def test_prefix_that_one_side_lacks(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter for BertForSequenceClassification on the headless BertModel."""
    config = ranked({**BERT, "modules_to_save": ["pooler.dense"]})
    models.train(bases["bert-classifier"], tmp_path / "a", config)
    headless = models.load(bases["bert-classifier"]).bert
    base = models.save(headless, tmp_path / "base")
    report = lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    assert any("'bert.'" in note for note in report.notes)
    lora_tools.merge(bases["bert-classifier"], [tmp_path / "a"], tmp_path / "whole")
    whole = models.tensors(tmp_path / "whole")
    for name, tensor in models.tensors(tmp_path / "m").items():
        assert torch.equal(tensor, whole[f"bert.{name}"]), name


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter on "llama", to be spoilt in copies."""
    out = tmp_path_factory.mktemp("plain") / "adapter"
    models.train(bases["llama"], out, ranked(LLAMA))
    return out


def spoil(
    adapter: Path,
    out: Path,
    config: dict[str, Any] | None = None,
    add: dict[str, torch.Tensor] | None = None,
    drop: str = "\0",
) -> Path:
    """A copy with other config fields, further tensors, and without those named like ``drop``."""
    out.mkdir()
    old = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**old, **(config or {})}))
    kept = {k: v for k, v in models.tensors(adapter).items() if drop not in k}
    save_file({**kept, **(add or {})}, out / "adapter_model.safetensors")
    return out


READ = {"LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", *(row.peft_type for row in CHANGES)}


@pytest.mark.parametrize("kind", sorted(READ - {"LORA"}))
def test_other_methods_have_no_factors_of_lora(
    kind: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = spoil(plain, tmp_path / "a", {"peft_type": kind})
    with pytest.raises(AdapterError, match=rf"is unknown in PEFT's {kind}|AdaLoRA|init_r"):
        lora_tools.merge(bases["llama"], [adapter], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", sorted({t.value for t in peft.PeftType} - READ))
def test_other_methods_are_refused_by_name(
    kind: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = spoil(plain, tmp_path / "a", {"peft_type": kind})
    with pytest.raises(
        UnsupportedAdapter, match=rf"an adapter of PEFT's {kind} cannot be merged here: \w+"
    ):
        lora_tools.merge(bases["llama"], [adapter], tmp_path / "m")
    assert not (tmp_path / "m").exists()


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alora": (
        {"config": {"alora_invocation_tokens": [1]}},
        UnsupportedAdapter,
        r"an activated LoRA \(aLoRA\) acts only after",
    ),
    "arrow": ({"config": {"arrow_config": {"top_k": 2}}}, UnsupportedAdapter, "Arrow routes"),
    "target-parameters": (
        {"config": {"target_parameters": [Q.removeprefix("base_model.model.") + ".a", "q_proj.b"]}},
        AdapterError,
        r"q_proj: target_parameters name a, b,.*the file has factors for 1",
    ),
    "kasa": ({"config": {"kasa_config": {"beta": 1}}}, UnsupportedAdapter, "KaSA"),
    "bdlora": ({"config": {"use_bdlora": {"nblocks": 2}}}, UnsupportedAdapter, "block-diagonal"),
    "qalora": ({"config": {"use_qalora": True}}, UnsupportedAdapter, "QA-LoRA"),
    "replication": (
        {"config": {"layer_replication": [[0, 1]]}},
        UnsupportedAdapter,
        "it repeats layers, so its modules are",
    ),
    **{
        init: ({"config": {"init_lora_weights": init}}, UnsupportedAdapter, "changed the base")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    },
    "experts": (
        {"add": {f"{Q}.base_layer.lora_A.weight": torch.ones(4, 8)}},
        AdapterError,
        "base_layer, and no target_parameters",
    ),
    "rank": ({"config": {"r": 8}}, AdapterError, r"says rank 8,.*factors have rank 4"),
    "rank-pattern": (
        {"config": {"rank_pattern": {"q_proj": 2}}},
        AdapterError,
        "q_proj: .* says rank 2",
    ),
    "no-rank": ({"config": {"r": None}}, AdapterError, "rank None"),
    "no-alpha": ({"config": {"lora_alpha": None}}, AdapterError, "lora_alpha is None"),
    "dora-without-magnitude": (
        {"config": {"use_dora": True}},
        AdapterError,
        "lacks its lora_magnitude_vector",
    ),
    "magnitudes-too-few": (
        {
            "config": {"use_dora": True},
            "add": {
                f"base_model.model.model.layers.{i}.{m}.lora_magnitude_vector": torch.ones(31)
                for i in (0, 1)
                for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
            },
        },
        AdapterError,
        "numbers, one for each row of",
    ),
    "magnitude-without-dora": (
        {"add": {f"{Q}.lora_magnitude_vector": torch.ones(32)}},
        AdapterError,
        "use_dora is False",
    ),
    "half-a-pair": ({"drop": "layers.0.self_attn.q_proj.lora_B"}, AdapterError, "but needs both"),
    "no-tensors": ({"drop": ""}, AdapterError, "holds no tensors"),
    "unknown-key": ({"add": {f"{Q}.lora_C.weight": torch.ones(2)}}, AdapterError, "is unknown in"),
    "convolution": (
        {
            "drop": "layers.0.self_attn.q_proj",
            "add": {
                f"{Q}.lora_A.weight": torch.ones(4, 1, 3, 3),
                f"{Q}.lora_B.weight": torch.ones(32, 4, 1, 1),
            },
        },
        MismatchError,
        r"q_proj: base is \(32, 32\), .* lora_A \(4, 1, 3, 3\)",
    ),
    "factors-do-not-multiply": (
        {
            "drop": "layers.0.self_attn.q_proj.lora_B",
            "add": {f"{Q}.lora_B.weight": torch.ones(32, 5)},
        },
        AdapterError,
        "do not multiply",
    ),
    "no-such-module": (
        {
            "add": {
                "base_model.model.model.other.lora_A.weight": torch.ones(4, 8),
                "base_model.model.model.other.lora_B.weight": torch.ones(8, 4),
            }
        },
        AdapterError,
        "model.other.weight matches no tensor.*allow_unmatched=True",
    ),
    "bias-of-a-layer-without": (
        {"add": {"base_model.model.model.layers.0.mlp.down_proj.lora_B.bias": torch.ones(32)}},
        AdapterError,
        "down_proj.bias matches no tensor",
    ),
    "wrong-shape": (
        {
            "drop": "layers.0.self_attn.q_proj.lora_A",
            "add": {f"{Q}.lora_A.weight": torch.ones(4, 31)},
        },
        MismatchError,
        r"q_proj: base is \(32, 32\), .* \(32, 31\); is this the base",
    ),
    "saved-other-width": (
        {"add": {"base_model.model.model.norm.weight": torch.ones(3, 3)}},
        MismatchError,
        r"model.norm.weight: base is \(32,\)",
    ),
    "tokens-without-indices": (
        {"add": {TOKENS: torch.ones(2, 32)}},
        AdapterError,
        "no trainable_token_indices",
    ),
    "tokens-beyond-the-vocabulary": (
        {
            "config": {"trainable_token_indices": {"embed_tokens": [1, 96]}},
            "add": {TOKENS: torch.ones(2, 32)},
        },
        MismatchError,
        r"embed_tokens.weight: base is \(96, 32\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(
    case: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    changes, kind, reason = REFUSED[case]
    adapter = spoil(plain, tmp_path / "a", **changes)
    for dry_run in (True, False):
        with pytest.raises(kind, match=reason):
            lora_tools.merge(bases["llama"], [adapter], tmp_path / "m", dry_run=dry_run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_unmatched_keys_can_be_left_out(
    plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    more = {
        f"base_model.model.model.other.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    adapter = spoil(plain, tmp_path / "a", add=more)
    report = lora_tools.merge(bases["llama"], [adapter], tmp_path / "m", allow_unmatched=True)
    lora_tools.merge(bases["llama"], [plain], tmp_path / "wanted")
    assert [f.tensor for f in report.plan if f.action == "unmatched"] == ["model.other.weight"]
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "wanted"), 0)


def test_nothing_matching_is_an_error_even_if_unmatched_is_allowed(
    plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no key of"):
        lora_tools.merge(bases["bert"], [plain], tmp_path / "m", allow_unmatched=True)


def test_two_adapters_that_replace_one_tensor(bases: dict[str, Path], tmp_path: Path) -> None:
    config = ranked({**LLAMA, "modules_to_save": ["norm"]})
    for name in "ab":
        models.train(bases["llama"], tmp_path / name, config)
    with pytest.raises(AdapterError, match=r"norm\.weight: .*a and .*b each replace it"):
        lora_tools.merge(bases["llama"], [tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_a_pickled_adapter_needs_leave(plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = (plain / "adapter_config.json").read_bytes()
    (tmp_path / "a" / "adapter_config.json").write_bytes(config)
    torch.save(models.tensors(plain), tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UnsafeInput, match="allow_pickle=True"):
        lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m")
    lora_tools.merge(bases["llama"], [tmp_path / "a"], tmp_path / "m", allow_pickle=True)
    lora_tools.merge(bases["llama"], [plain], tmp_path / "wanted")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "wanted"), 0)


@pytest.mark.parametrize("given", ["", "=", "{}=x", "{}=nan", "{}=inf"])
def test_weights_that_are_none(
    given: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(lora_tools.LoraToolsError):
        lora_tools.merge(bases["llama"], [given.format(plain)], tmp_path / "m")


def test_a_weight_that_is_not_finite_is_refused(
    plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(lora_tools.UsageError, match="finite"):
        lora_tools.merge(bases["llama"], [(plain, float("nan"))], tmp_path / "m")


def test_overflow_names_the_tensor(plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(lora_tools.NonFiniteError, match=r"_proj\.weight: .*float16"):
        lora_tools.merge(bases["llama"], [(plain, 1e6)], tmp_path / "m", dtype="float16")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_square_weights_of_a_bare_file(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Without a config.json the shape does not tell Conv1D from Linear; the adapter does."""
    models.train(bases[kind], tmp_path / "a", ranked(GPT2 if kind == "gpt2" else LLAMA))
    lora_tools.merge(bases[kind], [tmp_path / "a"], tmp_path / "m")
    bare = bases[kind] / "model.safetensors"
    lora_tools.merge(bare, [tmp_path / "a"], tmp_path / "m.safetensors")
    wanted = models.tensors(tmp_path / "m")
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 0)
