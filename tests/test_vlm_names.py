"""Adapters of vision-language models by all the names that their layers have had: transformers 4's
and 5's, those of the language model alone, and those of a server."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, MismatchError
from lora_tools.formats.alignment import align
from lora_tools.nn import attach

from . import iotools, models

PREFIX, WEIGHTS = "base_model.model.", "adapter_model.safetensors"
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"type": "default", "mrope_section": [1, 1, 2]}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 14}
T = transformers
MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(
            text_config=T.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16),
            vision_config=T.SiglipVisionConfig(**CLIP),
            mm_tokens_per_image=4,
            image_token_index=120,
            boi_token_index=121,
            eoi_token_index=122,
        )
    ),
    "qwen2-vl": lambda: T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(
            text_config={**TEXT, "rope_scaling": {**ROPE, "type": "mrope"}},
            vision_config={**QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        )
    ),
    "qwen2.5-vl": lambda: T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": {**ROPE, "type": "mrope"}},
            vision_config={
                **QWEN,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "fullatt_block_indexes": [0],
            },
        )
    ),
    "qwen3-vl": lambda: T.Qwen3VLForConditionalGeneration(
        T.Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 8, "rope_scaling": ROPE},
            vision_config={
                **QWEN,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "deepstack_visual_indexes": [],
            },
        )
    ),
    "llava": lambda: T.LlavaForConditionalGeneration(
        T.LlavaConfig(
            text_config=T.LlamaConfig(**TEXT),
            vision_config=T.CLIPVisionConfig(**CLIP),
            image_token_index=120,
        )
    ),
}
# What the language model's layers come after, for ``model.language_model.`` of transformers 5.
FORMS = {
    "5": "model.language_model.",
    "4": "language_model.model.",
    "alone": "model.",
    "server": "language_model.",
    "bare": "",
}
X = torch.randint(5, 100, (1, 9), generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass
class Vlm:
    """A folder with the base by the names of files and of memory, adapters by all forms, and the
    base merged with the first of them."""

    top: Path
    live: Any
    wanted: torch.Tensor

    def merged(self, base: str, adapter: str, out: Path) -> dict[str, torch.Tensor]:
        lora_tools.merge(self.top / base, [self.top / adapter], out)
        return models.tensors(out)


# Both ways that files of before are named; the others with --full.
PARAMS = [
    pytest.param(name, marks=() if name in ("llava", "qwen2-vl") else pytest.mark.sweep(0))
    for name in MODELS
]


@pytest.fixture(scope="module", params=PARAMS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    top = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    live = MODELS[request.param]().float().eval()
    live.save_pretrained(top / "base")
    state = {k: v.clone() for k, v in live.state_dict().items() if k != "lm_head.weight"}
    if not live.config.tie_word_embeddings:
        state["lm_head.weight"] = live.lm_head.weight.detach().clone()
    iotools.checkpoint(top / "in memory", state)
    shutil.copy(top / "base" / "config.json", top / "in memory")
    config = {"target_modules": r".*language_model.*\.(q_proj|down_proj)", "r": 2}
    model = models.train(top / "base", top / "5", config)
    with torch.no_grad():
        wanted = model.eval()(input_ids=X).logits
    for form, prefix in FORMS.items():
        if form != "5":
            rename(top / "5", top / form, PREFIX + FORMS["5"], PREFIX + prefix)
    lora_tools.merge(top / "base", [top / "5"], top / "merged")
    lora_tools.merge(top / "in memory", [top / "5"], top / "merged in memory")
    fresh = type(live).from_pretrained(top / "base", dtype=torch.float32).eval()
    return Vlm(top, fresh, wanted)


def rename(source: Path, out: Path, old: str, new: str) -> Path:
    shutil.copytree(source, out)
    tensors = {k.replace(old, new): v for k, v in load_file(source / WEIGHTS).items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


def test_what_is_merged_is_peft_s(vlm: Vlm) -> None:
    loaded = type(vlm.live).from_pretrained(vlm.top / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(input_ids=X).logits
    assert (found - vlm.wanted).norm() <= 1e-5 * vlm.wanted.norm()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_alike(form: str, vlm: Vlm, tmp_path: Path) -> None:
    models.assert_same(
        vlm.merged("base", form, tmp_path / "a"), models.tensors(vlm.top / "merged"), 0
    )
    found = vlm.merged("in memory", form, tmp_path / "b")
    models.assert_same(found, models.tensors(vlm.top / "merged in memory"), 0)
    before = models.tensors(vlm.top / "in memory")
    moved = sorted(name for name in found if not found[name].equal(before[name]))
    assert len(moved) == 4
    assert all("language_model.layers" in name for name in moved)


@pytest.mark.parametrize("form", FORMS)
def test_a_live_model(form: str, vlm: Vlm) -> None:
    attach(vlm.live, vlm.top / form)
    try:
        with torch.no_grad():
            found = vlm.live(input_ids=X).logits
    finally:
        lora_tools.nn.detach(vlm.live)
    assert (found - vlm.wanted).norm() <= 1e-5 * vlm.wanted.norm()


def test_other_verbs(vlm: Vlm, tmp_path: Path) -> None:
    adapter = vlm.top / "alone"
    lora_tools.verify(vlm.top / "merged", base=vlm.top / "base", adapters=[adapter])
    totals = lora_tools.verify(adapter, base=vlm.top / "base", tuned=vlm.top / "merged").totals
    assert totals["relative_error"] < 1e-5
    lora_tools.merge(vlm.top / "base", [adapter], tmp_path / "m", reversible=True)
    lora_tools.unmerge(tmp_path / "m", [adapter], tmp_path / "back")
    models.assert_same(models.tensors(tmp_path / "back"), models.tensors(vlm.top / "base"), 0)
    out = tmp_path / "a.safetensors"
    lora_tools.convert(adapter, out, to="kohya", base=vlm.top / "base")
    lora_tools.merge(vlm.top / "base", [out], tmp_path / "n")
    models.assert_same(models.tensors(tmp_path / "n"), models.tensors(vlm.top / "merged"), 1e-6)
    with pytest.raises(MismatchError, match=r"one.*two names"):
        lora_tools.combine([vlm.top / "5", adapter], tmp_path / "c")


def test_the_language_model_alone(vlm: Vlm, tmp_path: Path) -> None:
    """An adapter of the whole on the language model's own checkpoint."""
    text = {
        k.replace("model.language_model.", "model."): v
        for k, v in models.tensors(vlm.top / "in memory").items()
        if "language_model" in k or k.startswith("lm_head")
    }
    base = iotools.checkpoint(tmp_path / "text", text)
    whole = models.tensors(vlm.top / "merged in memory")
    for form in FORMS:
        lora_tools.merge(base, [vlm.top / form], tmp_path / form)
        for name, tensor in models.tensors(tmp_path / form).items():
            own = name.replace("model.", "model.language_model.", 1)
            assert tensor.equal(whole[name if name.startswith("lm_head") else own])


def test_gguf_by_the_base_s_names(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = models.save(models.make("llama"), tmp_path / "base")
    models.train(base, tmp_path / "a", {"target_modules": ["q_proj"]})
    given = rename(tmp_path / "a", tmp_path / "b", PREFIX + "model.", PREFIX + FORMS["5"])
    for name in "ab":
        lora_tools.convert(tmp_path / name, tmp_path / f"{name}.gguf", to="gguf", base=base)
        lora_tools.convert(tmp_path / f"{name}.gguf", tmp_path / f"{name}p", to="peft", base=base)
    assert given.is_dir()
    a, b = (load_file(tmp_path / f"{name}p" / WEIGHTS) for name in "ab")
    models.assert_same(b, a, 0)


# --------------------------------------------------------------------------------- towers beside it


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    models.save(MODELS["llava"](), top / "base")
    config = {"target_modules": ["q_proj"], "r": 2}
    models.train(top / "base", top / "both", config)
    lora_tools.merge(top / "base", [top / "both"], top / "merged")
    return top


def test_a_tower_s_layers_are_exchanged_for_its_own(llava: Path, tmp_path: Path) -> None:
    old = rename(
        llava / "both",
        tmp_path / "4",
        PREFIX + "model.language_model.",
        PREFIX + "language_model.model.",
    )
    old = rename(old, tmp_path / "44", "model.vision_tower.", "vision_tower.vision_model.")
    lora_tools.merge(llava / "base", [old], tmp_path / "out")
    models.assert_same(models.tensors(tmp_path / "out"), models.tensors(llava / "merged"), 0)


def test_a_tower_s_layers_never_become_text(llava: Path, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    text = {n: torch.randn(32, 32, generator=noise) for n in [*names, "model.embed_tokens.weight"]}
    base = iotools.checkpoint(tmp_path / "text", text)
    with pytest.raises(AdapterError, match=r"vision_tower\..* matches no tensor"):
        lora_tools.merge(base, [llava / "both"], tmp_path / "out")


Q = "layers.0.self_attn.q_proj.weight"
VLM = [
    f"model.language_model.{Q}",
    f"model.vision_tower.{Q}",
    "model.language_model.embed_tokens.weight",
]


@pytest.mark.parametrize(
    ("theirs", "ours", "wanted"),
    [
        (f"model.{Q}", VLM, VLM[0]),
        (f"language_model.model.{Q}", VLM, VLM[0]),
        (f"vision_tower.vision_model.{Q}", VLM, VLM[1]),
        (f"model.language_model.{Q}", [f"model.{Q}"], f"model.{Q}"),
        (f"vision_tower.{Q}", [Q, "embed_tokens.weight"], ""),
        (f"model.visual.{Q}", [f"model.{Q}"], ""),
        (f"encoder.{Q}", ["model.vision_tower.encoder." + Q, *VLM], ""),
        (f"model.decoder.{Q}", [f"model.encoder.{Q}"], ""),
        (f"mtp.{Q}", [f"model.{Q}"], ""),
        (f"vision_model.encoder.{Q}", [f"encoder.{Q}"], f"encoder.{Q}"),
        (f"thinker.{Q}", [Q], Q),
        ("model.embed_tokens.weight", VLM, VLM[2]),
        ("model.norm.weight", ["lm_head.weight"], ""),
    ],
)
def test_which_name_one_becomes(theirs: str, ours: list[str], wanted: str) -> None:
    mapping, said = align([theirs], ours)
    assert mapping == {theirs: wanted or theirs}
    assert bool(said) == bool(wanted)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (f"encoder.{Q}", [f"text_model.encoder.{Q}", f"vision_model.encoder.{Q}"]),
        (f"model.{Q}", [f"language_model.model.{Q}", f"vision_model.model.{Q}"]),
        (Q, [f"language_model.model.{Q}", f"audio_tower.{Q}"]),
        (f"model.{Q}", [f"language_model.{Q}", f"text_model.{Q}"]),
    ],
)
def test_two_ways_are_refused(theirs: str, ours: list[str]) -> None:
    with pytest.raises(MismatchError, match="in more than one way"):
        align([theirs], ours)


def test_what_is_alike_stays() -> None:
    names = [f"model.{Q}", "score.weight"]
    assert align(names, [f"model.{Q}", "model.score.bias"]) == ({n: n for n in names}, "")
