"""IA³, which can be merged and is; and adapters that cannot, which are told what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter

from . import iotools, models

IA3: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "gpt2": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "square": (
        "gpt2",
        {
            "target_modules": ["attn.c_proj"],
            "feedforward_modules": ["attn.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "classifier": (
        "bert-classifier",
        {
            "target_modules": ["key", "value"],
            "feedforward_modules": [],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        },
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in {kind for kind, _ in IA3.values()}:
        models.save(models.make(kind), folder / kind)
    return folder


def trained(base: Path, out: Path, config: dict[str, Any]) -> peft.PeftModel:
    model = models.quietly(lambda: peft.get_peft_model(models.load(base), peft.IA3Config(**config)))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=noise))
    models.quietly(lambda: model.eval().save_pretrained(out))
    return model


@pytest.mark.parametrize("case", IA3)
def test_merged_as_peft_merges(case: str, bases: Path, tmp_path: Path) -> None:
    kind, config = IA3[case]
    model = trained(bases / kind, tmp_path / "a", config)
    lora_tools.merge(bases / kind, [tmp_path / "a"], tmp_path / "m", reversible=True)
    merged = models.quietly(lambda: model.merge_and_unload())
    models.save(merged, tmp_path / "wanted")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "wanted"), 1e-7)
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    assert iotools.tree(tmp_path / "back") == iotools.tree(bases / kind)


def test_weights_and_other_adapters_beside_it(bases: Path, tmp_path: Path) -> None:
    """W + w (l ∘ W − W) + Δ, in any order."""
    base = bases / "llama"
    trained(base, tmp_path / "a", IA3["llama"][1])
    models.train(base, tmp_path / "b", {"target_modules": ["k_proj"], "r": 2, "lora_alpha": 3})
    for name, order in (("m", [("a", 0.4), ("b", 2.0)]), ("n", [("b", 2.0), ("a", 0.4)])):
        given = [(tmp_path / adapter, weight) for adapter, weight in order]
        lora_tools.merge(base, given, tmp_path / name)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "only-a")
    lora_tools.merge(base, [tmp_path / "b"], tmp_path / "only-b")
    found, plain = models.tensors(tmp_path / "m"), models.tensors(base)
    a, b = models.tensors(tmp_path / "only-a"), models.tensors(tmp_path / "only-b")
    wanted = {k: w + 0.4 * (a[k] - w) + 2 * (b[k] - w) for k, w in plain.items()}
    models.assert_same(found, wanted, 1e-6)
    models.assert_same(models.tensors(tmp_path / "n"), found, 1e-6)


def test_a_vector_of_zeros_is_undone_from_the_sidecar(bases: Path, tmp_path: Path) -> None:
    trained(bases / "llama", tmp_path / "a", IA3["llama"][1])
    tensors = models.tensors(tmp_path / "a")
    for tensor in tensors.values():
        tensor.view(-1)[::2] = 0
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    lora_tools.merge(bases / "llama", [tmp_path / "a"], tmp_path / "m", reversible=True)
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    assert iotools.tree(tmp_path / "back") == iotools.tree(bases / "llama")
    with pytest.raises(UnsupportedAdapter, match="IA³ multiplied it"):
        lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "b", sidecar=False)


def test_convolutions(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 4, 3))
    config = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    state = {f"net.{k}": v.detach().clone() for k, v in layer.state_dict().items()}
    base = iotools.checkpoint(tmp_path / "base", state)
    model = models.quietly(lambda: peft.get_peft_model(torch.nn.ModuleDict({"net": layer}), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    models.quietly(lambda: model.save_pretrained(tmp_path / "a"))
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    wanted = models.quietly(lambda: model.merge_and_unload()).state_dict()
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-7)


def test_what_does_not_fit(bases: Path, tmp_path: Path) -> None:
    trained(bases / "llama", tmp_path / "a", IA3["llama"][1])
    with pytest.raises((MismatchError, AdapterError)):
        lora_tools.merge(bases / "gpt2", [tmp_path / "a"], tmp_path / "m")
    tensors = models.tensors(tmp_path / "a")
    key = min(tensors)
    save_file({**tensors, key: torch.ones(1, 7)}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises((MismatchError, AdapterError), match="puts"):
        lora_tools.merge(bases / "llama", [tmp_path / "a"], tmp_path / "m")


# ------------------------------------------------------------------------ told what they are


def config(**fields: Any) -> str:
    return json.dumps(fields)


def _folders(top: Path) -> dict[str, tuple[Path, str]]:
    """Adapters that are no change of weights, and what must be said of them."""
    made = {}

    def add(name: str, says: str, keys: list[str], text: str = "") -> None:
        folder = top / name
        folder.mkdir()
        tensors = {key: torch.ones(2, 2) for key in keys}
        save_file(tensors, folder / "adapter_model.safetensors")
        if text:
            (folder / "adapter_config.json").write_text(text)
        made[name] = folder, says

    add("prompt", "prompt tuning", ["prompt_embeddings"], config(peft_type="PROMPT_TUNING"))
    add("prefix", "prefix tuning", ["prompt_embeddings"], config(peft_type="PREFIX_TUNING"))
    add("bare-prompt", "soft prompts", ["prompt_embeddings"])
    add(
        "llama-adapter",
        "LLaMA-Adapter",
        ["l.0.self_attn.adaption_prompt", "l.0.self_attn.adaption_gate"],
    )
    add(
        "hub",
        "bottleneck adapter of AdapterHub",
        ["a.adapters.x.adapter_down.0.weight"],
        config(config={"mh_adapter": False, "reduction_factor": 16}, version="1.0"),
    )
    add(
        "hub-prefix",
        "prefix tuning of AdapterHub",
        ["p"],
        config(config={"architecture": "prefix_tuning"}, version="1.0"),
    )
    add(
        "bottleneck",
        "a bottleneck adapter",
        [
            "bert.layer.0.output.adapters.x.adapter_down.0.weight",
            "bert.layer.0.output.adapters.x.adapter_up.weight",
        ],
    )
    add("inversion", "textual inversion", ["emb_params"])
    add("lily", "routes every input", ["a.lily_A.weight"], config(peft_type="LILY"))
    return made


def test_every_command_says_what_it_is(tmp_path: Path) -> None:
    base = iotools.checkpoint(tmp_path / "base", iotools.weights())
    for name, (folder, says) in _folders(tmp_path).items():
        for verb in (
            lambda f: lora_tools.merge(base, [f], tmp_path / "out"),
            lambda f: lora_tools.unmerge(base, [f], tmp_path / "out"),
            lambda f: lora_tools.rescale(f, tmp_path / "out", scale=2),
            lambda f: lora_tools.combine([f], tmp_path / "out"),
            lambda f: lora_tools.convert(f, tmp_path / "out", to="kohya"),
        ):
            with pytest.raises(UnsupportedAdapter, match=says):
                verb(folder)
            assert not (tmp_path / "out").exists(), name


def test_ia3_in_commands_that_need_factors(bases: Path, tmp_path: Path) -> None:
    trained(bases / "llama", tmp_path / "a", IA3["llama"][1])
    for verb in (
        lambda: lora_tools.rescale(tmp_path / "a", tmp_path / "out", scale=2),
        lambda: lora_tools.combine([tmp_path / "a"], tmp_path / "out"),
        lambda: lora_tools.convert(tmp_path / "a", tmp_path / "out", to="kohya"),
    ):
        with pytest.raises(UnsupportedAdapter, match=r"IA³.*loratools merge"):
            verb()
