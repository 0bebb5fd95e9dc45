"""Adapters on live models: they compute what the merged checkpoint does, and leave no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_tools
from lora_tools import nn
from lora_tools.errors import (
    AdapterError,
    LoraToolsError,
    MismatchError,
    NonFiniteError,
    UnsupportedAdapter,
    UsageError,
)
from lora_tools.formats.adapters.table import FORMATS

from . import models

LLAMA = {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
# Model kind, LoraConfig, and whether any parameter has to be replaced.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("llama", LLAMA, False),
    "rslora": ("llama", {**LLAMA, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, False),
    "dora": ("llama", {**LLAMA, "use_dora": True}, True),
    "lora-bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, True),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, True),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, True),
    "gpt2": ("gpt2", GPT2, False),
    "gpt2-tied": ("gpt2", {**GPT2, "target_modules": ["wte", "c_attn"]}, False),
    "tied-embedding": ("llama-tied", {"target_modules": ["embed_tokens"]}, False),
    "tied-both": (
        "llama-tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
    "tied-tokens": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 0]},
        True,
    ),
    "bert": ("bert", {"target_modules": ["query", "word_embeddings"]}, False),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """Base, adapter, and what the unmerged PEFT model computes, of each case."""
    root = tmp_path_factory.mktemp("attach")
    bases = {
        k: models.save(models.make(k), root / k) for k in ("llama", "llama-tied", "gpt2", "bert")
    }
    result = {}
    for case, (kind, config, _) in CASES.items():
        adapter = root / f"adapter-{case}"
        config = {"r": 4, "lora_alpha": 6, **config}
        tuned = models.adapt(bases[kind], adapter, config, save_embedding_layers=False)
        result[case] = bases[kind], adapter, models.outputs(tuned)
    return result


def state(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Every parameter, by identity and by value."""
    return {
        name: (id(p), p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def assert_untouched(model: torch.nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    after = state(model)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert after[name][0] == identity, name
        assert torch.equal(after[name][1].view(torch.uint8), value.view(torch.uint8)), name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
@pytest.mark.parametrize("case", CASES)
def test_computes_what_was_trained_and_leaves_no_trace(
    case: str, put: Any, given: dict[str, Any]
) -> None:
    base, adapter, wanted = given[case]
    model = models.load(base)
    before, out = state(model), models.outputs(model)
    assert put(model, adapter) is model
    torch.testing.assert_close(models.outputs(model), wanted, rtol=1e-4, atol=1e-4)
    replaced = [n for n, (i, _) in state(model).items() if i != before[n][0]]
    assert bool(replaced) == (CASES[case][2] or put is nn.merge_)
    with pytest.raises(UsageError, match="detach them first"):
        put(model, adapter)
    assert nn.detach(model) is model
    assert_untouched(model, before)
    assert torch.equal(models.outputs(model), out)
    with pytest.raises(UsageError, match="nothing is attached"):
        nn.detach(model)


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_comes_back(
    dtype: torch.dtype, put: Any, given: dict[str, Any], tmp_path: Path
) -> None:
    _, adapter, _ = given["plain"]
    base = models.save(models.load(given["plain"][0]).to(dtype), tmp_path / "base")
    lora_tools.merge(base, [adapter], tmp_path / "m")
    model = models.load(base)
    before = state(model)
    put(model, adapter)
    if put is nn.merge_:
        stored = models.tensors(tmp_path / "m")
        assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    else:
        merged = models.outputs(models.load(tmp_path / "m"))
        torch.testing.assert_close(models.outputs(model), merged, rtol=0.1, atol=0.1)
    nn.detach(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
def test_several_adapters_with_weights(put: Any, given: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, _ = given["plain"]
    both = [(adapter, 0.5), f"{given['dora'][1]}=-0.25"]
    lora_tools.merge(base, both, tmp_path / "m")
    model = put(models.load(base), both)
    wanted = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(models.outputs(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_parameter_stays_one_unless_the_adapter_parts_it(given: dict[str, Any]) -> None:
    for case, tied in (("tied-both", True), ("tied-tokens", True), ("tied-embedding", False)):
        base, adapter, _ = given[case]
        model = nn.merge_(models.load(base), adapter)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied, case
        nn.detach(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight


class Subclass(torch.nn.Linear):
    """One whose forward does more than the product: a branch beside it would be wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
def test_layers_that_do_more_and_all_other_kinds(put: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 4 * 3), torch.randn(5 * 3, 2)
    adapter = models.write_adapter(tmp_path / "a", torch.cat([A] * 3), torch.cat([B] * 3, 1), 6)
    conv = torch.nn.Module()
    conv.w = torch.nn.Conv2d(4, 5, 3)
    x = torch.randn(1, 4, 6, 6)
    wanted = copy.deepcopy(conv)
    wanted.w.weight.data += 3 * (B @ A).reshape(5, 4, 3, 3)
    before = state(conv)
    put(conv, adapter)
    torch.testing.assert_close(conv.w(x), wanted.w(x), rtol=1e-4, atol=1e-4)
    nn.detach(conv)
    assert_untouched(conv, before)
    linear = torch.nn.Module()
    linear.w = Subclass(12, 15)
    x = torch.randn(2, 12)
    delta = x @ (3 * B @ A).T
    out = linear.w(x)
    put(linear, adapter)
    torch.testing.assert_close(linear.w(x), out + 3 * delta, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """GPT-2, whose layers are Conv1D, and ViT, which has other names in memory than in its file:
    base, PEFT's adapter, and a call that gives the model's outputs."""
    root = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    vit = transformers.ViTModel(config)
    models.perturb(vit, 0.1, 0)
    pixels = torch.randn(1, 3, 16, 16)
    given: dict[str, tuple[Path, Path, Any]] = {}
    for name, model, targets, run in (
        ("gpt2", models.make("gpt2"), ["c_attn", "c_fc"], models.outputs),
        ("vit", vit, ["q_proj", "fc1"], lambda m: m(pixel_values=pixels)[0].detach()),
    ):
        base, adapter = models.save(model, root / name), root / f"{name}-adapter"
        models.train(base, adapter, {"target_modules": targets, "r": 4, "lora_alpha": 6})
        given[name] = base, adapter, run
    return given


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
@pytest.mark.parametrize("form", [name for name in FORMATS if name != "torchtune"])
@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_every_format_on_other_models(
    kind: str, form: str, put: Any, others: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, run = others[kind]
    if (kind, form) == ("vit", "gguf"):
        pytest.skip("llama.cpp has no ViT")
    wanted = run(models.attach(base, adapter))
    named = {"base": base} if form == "gguf" else {}
    lora_tools.convert(adapter, tmp_path / "a", to=form, **named)
    model = models.load(base)
    before, out = state(model), run(model)
    put(model, tmp_path / "a")
    torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)
    nn.detach(model)
    assert_untouched(model, before)
    assert torch.equal(run(model), out)


def test_fused_experts(tmp_path: Path) -> None:
    import peft

    config = transformers.MixtralConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(config).eval()
    tuned = models.quietly(
        lambda: peft.get_peft_model(
            copy.deepcopy(base),
            peft.LoraConfig(
                target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                target_modules=[],
                r=2,
            ),
        )
    )
    models.perturb(tuned, 0.2, 0, only="lora_")
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a"))
    wanted, before = models.outputs(tuned.eval()), state(base)
    nn.attach(base, tmp_path / "a")
    torch.testing.assert_close(models.outputs(base), wanted, rtol=1e-4, atol=1e-4)
    nn.detach(base)
    assert_untouched(base, before)


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
def test_a_layer_with_a_branch_of_its_own(put: Any, tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.w = nn.Linear(12, 15, r=2)
    models.perturb(model, 0.2, 0)
    A, B, x = torch.randn(2, 12), torch.randn(15, 2), torch.randn(3, 12)
    out = model.w(x)
    put(model, models.write_adapter(tmp_path / "a", A, B, 2))
    torch.testing.assert_close(model.w(x), out + x @ (B @ A).T, rtol=1e-4, atol=1e-4)
    nn.detach(model)
    assert torch.equal(model.w(x), out)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no-such-adapter": (lambda a: "./no/such/folder", AdapterError, "no/such/folder"),
    "tensors": (lambda a: {"w": torch.ones(1)}, TypeError, "save_pretrained writes one"),
    "nothing": (lambda a: [], UsageError, "at least one adapter"),
    "weight": (lambda a: [(a, float("nan"))], UsageError, "finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_as_it_was(case: str, given: dict[str, Any]) -> None:
    base, adapter, _ = given["plain"]
    adapters, kind, says = REFUSED[case]
    model = models.load(base)
    before = state(model)
    with pytest.raises(kind, match=says):
        nn.attach(model, adapters(adapter))
    assert_untouched(model, before)
    nn.attach(model, adapter)


def test_another_model_is_refused(given: dict[str, Any]) -> None:
    model = models.load(given["bert"][0])
    with pytest.raises(LoraToolsError, match="matches no tensor of BertModel"):
        nn.attach(model, given["plain"][1])
    with pytest.raises(LoraToolsError, match="no key of"):
        nn.attach(model, given["plain"][1], allow_unmatched=True)


def test_a_module_that_is_no_transformers_model_is_refused_as_others_are(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.other = torch.nn.Linear(12, 15)
    given = models.write_adapter(tmp_path / "a", torch.randn(2, 12), torch.randn(15, 2), 2)
    with pytest.raises(LoraToolsError, match="matches no tensor of Module"):
        nn.attach(model, given)


@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
def test_what_fails_half_way_is_undone(put: Any, given: dict[str, Any], tmp_path: Path) -> None:
    """An inf in the factors of the last layer that they act on."""
    from safetensors.torch import load_file, save_file

    base, adapter, _ = given["plain"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_bytes(
        (adapter / "adapter_config.json").read_bytes()
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = next(k for k in tensors if "layers.1.self_attn.q_proj.lora_A" in k)
    tensors[last][0, 0] = float("inf")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    model = models.load(base)
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        put(model, tmp_path / "a")
    assert_untouched(model, before)


def test_another_vocabulary_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    base = given["plain"][0]
    model = models.load(base)
    models.quietly(lambda: model.resize_token_embeddings(models.VOCAB + 5))
    models.save(model, tmp_path / "grown")
    config = {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["embed_tokens"]}
    models.train(tmp_path / "grown", tmp_path / "a", config)
    fresh = models.load(base)
    before = state(fresh)
    with pytest.raises(MismatchError, match="resize the model's vocabulary first"):
        nn.merge_(fresh, tmp_path / "a")
    assert_untouched(fresh, before)
    nn.merge_(model, tmp_path / "a")


def test_prompt_tuning_is_answered_by_name(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(UnsupportedAdapter, match="prompt tuning trains input vectors"):
        nn.attach(models.load(given["plain"][0]), tmp_path / "a")
