"""Names in memory: adapters that extract writes load in PEFT whatever transformers renames, fuses
or cuts on loading, and those that PEFT makes of such models merge into the files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import nn
from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.digest import tensor_hash
from lora_tools.formats.names import layout_name
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.records import TensorSpec
from lora_tools.sources import transformers_names as loading
from lora_tools.sources.as_loaded import LoadedView, loaded_view
from lora_tools.sources.checkpoints import open_checkpoint

from . import export_models, models

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = TEXT | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
VIEW: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _qwen2_vl() -> Any:
    text = TEXT | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    sight = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=sight | {"mlp_ratio": 2})
    )


def _deepseek() -> Any:
    config = hf.DeepseekV3Config(
        **MOE | {"num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _detr() -> Any:
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage4"],
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=4,
    )
    return hf.DetrForObjectDetection(config)


def _wav2vec2() -> Any:
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return hf.Wav2Vec2Model(config)


# Beside those of export: renamed, with experts to be fused (PEFT converts some of these itself),
# with blocks to be cut, with groups, or with parameters of their own.
OTHERS: dict[str, Callable[[], Any]] = {
    "BEiT": lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIEW)),
    "ViT-MAE": lambda: hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(
            **VIEW,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=48,
        )
    ),
    "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**VIEW, use_swiglu_ffn=True)),
    "Swin": lambda: hf.SwinModel(
        hf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        )
    ),
    "SegFormer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16)
    ),
    "RegNet": lambda: hf.RegNetModel(
        hf.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
    ),
    "DETR": _detr,
    "CLIP": lambda: hf.CLIPModel(
        hf.CLIPConfig(text_config=TEXT, vision_config=VIEW, projection_dim=16)
    ),
    "wav2vec 2.0": _wav2vec2,
    "LLaVA": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VIEW},
            text_config={"model_type": "llama", **TEXT},
            image_token_index=95,
        )
    ),
    "Qwen2-VL": _qwen2_vl,
    "Gemma-3, vision": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=TEXT | {"head_dim": 8}, vision_config=VIEW, mm_tokens_per_image=4
        )
    ),
    "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"})
    ),
    "BLOOM": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    ),
    "Qwen2-MoE": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**MOE, num_experts=3, shared_expert_intermediate_size=24)
    ),
    "DeepSeek-V3": _deepseek,
    "Granite-MoE": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **TEXT, head_dim=8, num_local_experts=3, num_experts_per_tok=2, rope_parameters=ROPE
        )
    ),
}
ALL = export_models.ARCHITECTURES | OTHERS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and tuned of an architecture; every tensor changed."""
    root = tmp_path_factory.mktemp("loading")

    def make(name: str) -> tuple[Path, Path]:
        base, tuned = root / name / "base", root / name / "tuned"
        if not base.exists():
            torch.manual_seed(0)
            model = ALL[name]().eval()
            for size, folder in ((0.1, base), (0.02, tuned)):
                models.perturb(model, size, int(folder is tuned))
                models.quietly(lambda folder=folder: models.save(model, folder))
        return base, tuned

    return make


def outputs(model: Any) -> torch.Tensor:
    """What the model gives for some tokens, pixels or sound."""
    torch.manual_seed(0)
    tokens = torch.arange(3, 12)[None]
    size = getattr(model.config, "image_size", 32)
    given: dict[str, dict[str, torch.Tensor]] = {
        "input_ids": {"input_ids": tokens},
        "pixel_values": {"pixel_values": torch.randn(1, 3, size, size)},
        "input_features": {"input_features": torch.randn(1, 8, 40)},
        "input_values": {"input_values": torch.randn(1, 400)},
    }
    inputs = given[model.main_input_name]
    if model.config.model_type == "clip":
        inputs = given["input_ids"] | {"pixel_values": torch.randn(1, 3, 16, 16)}
    if model.config.is_encoder_decoder and "pixel_values" not in inputs:
        inputs["decoder_input_ids"] = tokens
    if model.config.model_type == "vit_mae":
        inputs["noise"] = torch.rand(1, 16)
    with torch.no_grad():
        return models.quietly(lambda: model(**inputs))[0]


def load_in_peft(base: Path, adapter: Path) -> peft.PeftModel:
    """PEFT's model; it has said nothing of keys."""
    model = models.load(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert not [w for w in caught if "adapter keys" in str(w.message)]
    return model


@pytest.mark.sweep(8)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_an_extracted_adapter_makes_the_tuned_model(
    name: str, pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """In PEFT, tensor by tensor; and merged into the file."""
    base, tuned = pairs(name)
    report = lora_tools.extract(base, tuned, tmp_path / "a", rank=512)
    assert report.totals["relative_error"] < 1e-5
    model, wanted = load_in_peft(base, tmp_path / "a"), models.load(tuned)
    before, found, out = outputs(models.load(base)), outputs(model), outputs(wanted)
    assert (before - out).abs().max() > 1e-3
    torch.testing.assert_close(found, out, rtol=1e-3, atol=1e-3)
    if name != "RegNet":  # PEFT does not merge convolutions in groups
        tied = set(wanted.all_tied_weights_keys) | set(wanted.all_tied_weights_keys.values())
        merged = models.quietly(model.merge_and_unload).state_dict()
        for key, tensor in wanted.state_dict().items():
            if key not in tied:  # PEFT adds the factors of both to the one tensor
                torch.testing.assert_close(merged[key], tensor, rtol=1e-4, atol=1e-4, msg=key)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m", reversible=True)
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tuned), 1e-4)
    assert lora_tools.verify(tmp_path / "m", base=base, adapters=[tmp_path / "a"]).totals["same"]
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    assert models.tensors(tmp_path / "back").keys() == models.tensors(base).keys()
    for key, tensor in models.tensors(base).items():
        assert torch.equal(models.tensors(tmp_path / "back")[key], tensor)


def keys(adapter: Path) -> set[str]:
    return {k.removeprefix("base_model.model.") for k in models.tensors(adapter)}


def test_what_is_said_of_other_names(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs("ViT")
    report = lora_tools.extract(base, tuned, tmp_path / "a", rank=4)
    assert "vit.layers.0.attention.q_proj.lora_A.weight" in keys(tmp_path / "a")
    assert "vit.layers.0.attention.q_proj" in {m.module for m in report.modules}
    by = f"transformers {hf.__version__}"
    (said,) = (note for note in report.notes if by in note)
    assert said.startswith("80 tensors have the names")
    assert SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors").metadata["names"] == by
    report = lora_tools.extract(base, tuned, tmp_path / "s", rank=4, names="stored")
    assert not [note for note in report.notes if by in note]
    old = "vit.encoder.layer.0.attention.attention.query"
    assert f"{old}.lora_A.weight" in keys(tmp_path / "s")
    report = lora_tools.extract(
        base, tuned, tmp_path / "v", rank=4, consumer="vllm", rest="skip", exclude=["embeddings"]
    )
    assert f"{old}.lora_A.weight" in keys(tmp_path / "v")
    for name in "as":
        lora_tools.merge(base, [tmp_path / name], tmp_path / f"m-{name}")
    one, other = (models.tensors(tmp_path / f"m-{name}") for name in "as")
    models.assert_same(one, other, 1e-6)


def test_the_same_bytes_with_any_jobs(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    for name, jobs in (("a", 1), ("b", 3)):
        lora_tools.extract(*pairs("Mixtral"), tmp_path / name, rank=4, jobs=jobs)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("missing", ["library", "class", "config", "type", "layers", "none"])
def test_without_transformers_the_names_are_those_stored(
    missing: str,
    pairs: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned = pairs("ViT")
    config = json.loads((base / "config.json").read_text())
    if missing == "library":
        monkeypatch.setattr(loading, "find_spec", lambda name: None)
    elif missing == "config":
        config = {}
    else:
        config |= {
            "class": {"architectures": ["Mine"]},
            "type": {"model_type": "mine"},
            "layers": {"num_hidden_layers": 10**9},
            "none": {"architectures": ["Trainer"]},
        }[missing]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert loaded_view(side := open_checkpoint(tmp_path / "base")) is side
    report = lora_tools.extract(
        tmp_path / "base", tuned / "model.safetensors", tmp_path / "a", rank=4, include=["query"]
    )
    assert "vit.encoder.layer.0.attention.attention.query.lora_A.weight" in keys(tmp_path / "a")
    says = {
        "library": "transformers is not installed",
        "class": "transformers cannot make a Mine",
        "layers": "more layers than there are tensors",
        "none": "Trainer is not a model of",
    }
    noted = [note for note in report.notes if says.get(missing, "transformers cannot") in note]
    assert bool(noted) == (missing != "config"), "nothing is expected of a config that names none"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("ViT", ["q_proj", "fc1", "projection"]),
        ("LLaVA", ["q_proj", "fc1", "up_proj"]),
        ("Swin", ["q_proj", "reduction"]),
        ("Qwen2-VL", ["q_proj", "qkv"]),
    ],
)
def test_adapters_that_peft_makes_merge_into_the_file(
    name: str,
    targets: list[str],
    dora: bool,
    pairs: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    base, _ = pairs(name)
    config = {"target_modules": targets, "r": 3, "use_dora": dora, "lora_alpha": 5}
    tuned = models.train(base, tmp_path / "a", config)
    models.save(models.quietly(tuned.merge_and_unload), tmp_path / "peft")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "peft"), 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_for_a_part_of_a_stored_tensor(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """DINOv2 stores what are two layers in memory as one."""
    base, _ = pairs("DINOv2")
    config = {"target_modules": ["gate_proj"], "r": 3}
    tuned = models.train(base, tmp_path / "a", config)
    models.save(models.quietly(tuned.merge_and_unload), tmp_path / "peft")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "peft"), 1e-6)
    for case in ({"use_dora": True}, {"lora_bias": True}):
        models.train(base, tmp_path / "refused", config | case)
        with pytest.raises(UnsupportedAdapter, match=r"mlp\.weights_in.*and this cannot be merged"):
            lora_tools.merge(base, [tmp_path / "refused"], tmp_path / "none")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("put", [nn.attach, nn.merge_])
@pytest.mark.parametrize("name", ["ViT", "LLaVA", "Mixtral"])
def test_adapters_of_either_names_on_a_live_model(
    name: str, put: Any, pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs(name)
    wanted = outputs(models.load(tuned))
    for names in ("loaded", "stored"):
        if (name, names) == ("Mixtral", "stored"):
            continue  # a live model has no experts of their own
        lora_tools.extract(base, tuned, tmp_path / names, rank=512, names=names)
        model = models.load(base)
        before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
        put(model, tmp_path / names)
        torch.testing.assert_close(outputs(model), wanted, rtol=1e-3, atol=1e-3)
        nn.detach(model)
        for n, p in model.named_parameters():
            assert before[n][0] == id(p)
            assert torch.equal(before[n][1], p)


def test_names_of_old_files(tmp_path: Path) -> None:
    """LayerNorm.gamma, as the first BERTs have it."""
    base = models.save(models.make("bert"), tmp_path / "base")
    tuned = models.load(base)
    models.perturb(tuned, 0.05, 1)
    models.save(tuned, tmp_path / "tuned")
    for side in ("base", "tuned"):
        file = tmp_path / side / "model.safetensors"
        old = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in load_file(file).items()
        }
        save_file(old, file, {"format": "pt"})
    lora_tools.extract(base, tmp_path / "tuned", tmp_path / "a", rank=64)
    assert "embeddings.LayerNorm.weight" in keys(tmp_path / "a")
    model = load_in_peft(base, tmp_path / "a")
    torch.testing.assert_close(models.outputs(model), models.outputs(tuned), rtol=1e-4, atol=1e-4)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "tuned"), 1e-5)


def test_the_view_is_what_is_loaded(pairs: Callable[[str], tuple[Path, Path]]) -> None:
    """Every tensor of it, by bytes and row by row, is transformers' own."""
    for name in ("ViT", "Mixtral", "DINOv2", "Granite-MoE", "LLaVA"):
        base, _ = pairs(name)
        side = open_checkpoint(base)
        view, state = loaded_view(side), models.load(base).state_dict()
        assert isinstance(view, LoadedView)
        assert not view.how.other
        assert view.specs.keys() == state.keys() - view.how.tied.keys()
        for key in view.specs:
            assert torch.equal(view.tensor(key), state[key]), key
            assert view.hash(key) == tensor_hash(view.raw(key))
            rows = state[key].reshape(-1, state[key].shape[-1]) if state[key].dim() else None
            if rows is not None:
                found = view.rows(key, tuple(rows.shape), 1, rows.shape[0] - 1)  # type: ignore[arg-type]
                assert torch.equal(found, rows[1:-1])
            view.release(key, 8, 4096)
        assert view.digest({}) == side.digest({})
        assert view.digest({key: view.hash(key) for key in view.specs}) == side.digest({})


def test_common_models_do_not_wait_for_transformers(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "weightless", lambda *_: 1 / 0)
    report = lora_tools.extract(*pairs("Llama"), tmp_path / "a", rank=4)
    assert not [note for note in report.notes if "memory" in note or "transformers" in note]
    report = lora_tools.extract(*pairs("ViT"), tmp_path / "v", rank=4)
    assert [note for note in report.notes if "division by zero" in note], "these do"
    lora_tools.merge(pairs("Llama")[0], [tmp_path / "a"], tmp_path / "m")


@pytest.mark.parametrize("kind", loading.SAME_NAMES)
def test_models_that_keep_their_names_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has any of their layers another kind than its name tells; so that nothing is lost by not
    asking transformers."""
    small = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "intermediate_size")}
    config = hf.AutoConfig.for_model(kind, **small)
    for heads in (hf.AutoModelForCausalLM, hf.AutoModelForMaskedLM, hf.AutoModel):
        if type(config) in heads._model_mapping:
            break
    with torch.device("meta"):
        model = models.quietly(lambda: heads.from_config(config))
    saved = config.to_dict() | {"architectures": [type(model).__name__]}
    specs = {
        name: lora_tools.TensorSpec(name, "F32", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    assert loading.loaded(saved, specs) is None
    monkeypatch.setattr(loading, "SAME_NAMES", ())
    found = loading.loaded(saved, specs)
    assert found is not None
    assert not found.other
    assert {name: t.pieces[0].stored for name, t in found.tensors.items()} == {n: n for n in specs}
    for name, tensor in found.tensors.items():
        if name.endswith(".weight"):
            assert layout_name(tensor.spec, saved) == tensor.layer, name


def test_what_is_asked_again_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """But of other tensors, or of another config, it is."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT}
    name = "model.layers.0.mlp.up_proj.weight"
    specs = {name: TensorSpec(name, "F32", (48, 32))}
    seen, convert = [], loading.convert
    monkeypatch.setattr(loading, "convert", lambda *args: seen.append(1) or convert(*args))
    monkeypatch.setattr(loading, "_last", None)
    first, again = loading.look(config, specs)[0], loading.look(dict(config), dict(specs))[0]
    assert first is again
    assert len(seen) == 1
    other = loading.look(config, {"lm_head.weight": TensorSpec("lm_head.weight", "F32", (96, 32))})
    assert other[0] is not None
    assert other[0].tensors.keys() == {"lm_head.weight"}
    loading.look({**config, "num_hidden_layers": 1}, specs)
    assert len(seen) == 3
