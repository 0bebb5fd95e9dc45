"""Adapters on experts: every form of adapter into every form of base, exactly or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import nn
from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter

from . import experts, models
from .experts import GPT_OSS, LLAMA4, MIXTRAL, PLAIN, Architecture

PAIRS = [
    *((MIXTRAL, b, a) for b in ("qwen", "mixtral", "memory") for a in ("qwen", "mixtral", "peft")),
    *((PLAIN, b, a) for b in ("qwen", "memory", "turned") for a in ("qwen", "peft", "peft-0.18")),
    *((LLAMA4, b, a) for b in ("qwen", "memory") for a in ("qwen", "peft", "peft-0.18")),
    *((GPT_OSS, b, a) for b in ("qwen", "unsloth", "memory") for a in ("qwen", "unsloth", "peft")),
]


# One matrix of an expert may be square. (transformers turns those that are not; a square one it
# takes as it lies there, and so does PEFT.)
CASES = [
    pytest.param(*pair, sizes, id=f"{pair[0].model_type}-{pair[2]}-into-{pair[1]}-{name}")
    for pair in PAIRS
    for sizes, name in (((8, 6), "oblong"), ((8, 4), "square gate_up"), ((6, 6), "square down"))
    if name == "oblong" or pair[1] != "turned" or not pair[2].startswith("peft")
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("arch", "base", "adapter", "sizes"), CASES)
def test_every_adapter_into_every_base(
    arch: Architecture, base: str, adapter: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    before = experts.matrices(sizes, 0)
    by = experts.products(before, 1)
    experts.write_base(tmp_path / "base", experts.stored(before, arch, base), arch)
    experts.write_adapter(tmp_path / "a", by, arch, adapter)
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m", reversible=True)
    wanted = experts.stored(experts.changed(before, by), arch, base)
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-6)
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    found = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert found == (tmp_path / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
@pytest.mark.parametrize(("base", "adapter"), [("memory", "qwen"), ("qwen", "peft")])
def test_under_another_prefix(prefix: str, base: str, adapter: str, tmp_path: Path) -> None:
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    tensors = experts.stored(before, PLAIN, base)
    tensors = {
        k.removeprefix("model.") if "model.l" in prefix else k: v for k, v in tensors.items()
    }
    experts.write_base(tmp_path / "base", tensors, PLAIN, prefix)
    experts.write_adapter(tmp_path / "a", by, PLAIN, adapter)
    if "model.l" in prefix:
        file = tmp_path / "a" / "adapter_model.safetensors"
        save_file(
            {k.replace("model.model.", "model."): v for k, v in load_file(file).items()}, file
        )
    report = lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    assert any("was added" in note for note in report.notes)
    wanted = experts.stored(experts.changed(before, by), PLAIN, base)
    found = sorted(models.tensors(tmp_path / "m").items(), key=lambda kv: kv[0][-60:])
    assert len(found) == len(wanted)
    for name, tensor in found:
        end = name.removeprefix(prefix)
        torch.testing.assert_close(
            tensor, wanted.get(end, wanted.get(f"model.{end}")), rtol=1e-5, atol=1e-5
        )


TEXT: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
CLASSES: dict[str, Any] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=3)),
    "phimoe": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(**TEXT, num_local_experts=3, bos_token_id=1, eos_token_id=2)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **TEXT, moe_intermediate_size=12, shared_expert_intermediate_size=12, num_experts=3
        )
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **TEXT,
            moe_intermediate_size=12,
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
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**TEXT, num_local_experts=3, head_dim=8)
    ),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**TEXT, num_local_experts=3)
    ),
    "nemotron_h": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"},
            layers_block_type=["moe", "attention"],
            n_routed_experts=4,
            moe_intermediate_size=12,
            moe_shared_expert_intermediate_size=12,
            moe_latent_size=None,
            head_dim=8,
        )
    ),
}


def per_expert(model: torch.nn.Module, out: Path) -> dict[str, torch.Tensor]:
    """An adapter of random numbers on each expert's projections; the model's tensors with it."""
    noise = torch.Generator().manual_seed(5)
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    factors = {}
    for name, tensor in wanted.items():
        holder, _, leaf = name.rpartition(".")
        if not holder.endswith(".experts") or tensor.dim() != 3:
            continue
        turned = model.config.model_type == "gpt_oss"
        for n in range(tensor.shape[0]):
            matrix = tensor[n].T if turned else tensor[n]
            halves = {f"{n}.{leaf}": matrix}
            if leaf == "gate_up_proj":
                gate, up = (matrix[::2], matrix[1::2]) if turned else matrix.chunk(2)
                halves = {f"{n}.gate_proj": gate, f"{n}.up_proj": up}
            for module, part in halves.items():
                A = torch.randn(2, part.shape[1], generator=noise) * 0.2
                B = torch.randn(part.shape[0], 2, generator=noise) * 0.2
                key = f"base_model.model.{holder}.{module}"
                factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"] = A, B
                part += B @ A
    assert factors
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", CLASSES)
def test_into_a_model_as_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    """Adapters of single experts, into the file that transformers writes, and the live model."""
    torch.manual_seed(0)
    model = CLASSES[kind]()
    models.perturb(model, 0.1, 0)
    models.save(model, tmp_path / "base")
    wanted = per_expert(model.eval(), tmp_path / "a")
    given = tmp_path / "a"
    if kind == "nemotron_h":  # calls its layers so in files
        given = shutil.copytree(given, tmp_path / "renamed")
        factors = load_file(given / "adapter_model.safetensors")
        factors = {k.replace(".model.model.", ".model.backbone."): v for k, v in factors.items()}
        save_file(factors, given / "adapter_model.safetensors")
    lora_tools.merge(tmp_path / "base", [given], tmp_path / "m")
    nn.merge_(model, tmp_path / "a")
    models.assert_same(dict(model.state_dict()), wanted, 1e-6)
    live = models.outputs(model)
    torch.testing.assert_close(models.outputs(models.load(tmp_path / "m")), live)
    nn.detach(model)
    assert not torch.allclose(models.outputs(model), live, atol=1e-3)


def test_an_adapter_of_transformers_4_as_peft_reads_it(tmp_path: Path) -> None:
    """PEFT makes one product of gate's and up's; the rank of both is twice that of one."""
    torch.manual_seed(0)
    model = CLASSES["mixtral"]()
    models.save(model, tmp_path / "base")
    per_expert(model, tmp_path / "a")
    file, path = (tmp_path / "a" / f"adapter_{n}" for n in ("model.safetensors", "config.json"))
    names = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    factors = load_file(file)
    for new, old in names.items():
        factors = {k.replace(f".{new}.", f".{old}."): v for k, v in factors.items()}
    save_file(factors, file)
    targets = ["w1", "w2", "w3"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    peft = models.attach(tmp_path / "base", tmp_path / "a")
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    found = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(found, models.outputs(peft))
    assert not torch.allclose(found, models.outputs(model), atol=1e-3)


@pytest.mark.parametrize("modules", [["k_proj"], r".*\.k_proj"], ids=["list", "regex"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_a_parameter_named_without_its_module(
    modules: list[str] | str, parameters: list[str], tmp_path: Path
) -> None:
    """It is that of the modules which hold such a one, not of linear layers beside them."""
    torch.manual_seed(0)
    model = CLASSES["qwen2_moe"]()
    models.save(model, tmp_path / "base")
    config = {"r": 2, "target_modules": modules, "target_parameters": parameters}
    peft = models.adapt(tmp_path / "base", tmp_path / "a", config)
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    found = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(found, models.outputs(peft), rtol=1e-5, atol=1e-5)


def test_tensors_saved_whole(tmp_path: Path) -> None:
    """They replace the experts', whatever form both are in."""
    before, after = experts.matrices((8, 6), 0), experts.matrices((8, 6), 1)
    for arch, base, saved in (
        (PLAIN, "memory", "qwen"),
        (PLAIN, "qwen", "memory"),
        (LLAMA4, "memory", "qwen"),
        (GPT_OSS, "memory", "unsloth"),
    ):
        folder = tmp_path / f"{arch.model_type}-{base}-{saved}"
        folder.mkdir()
        experts.write_base(folder / "base", experts.stored(before, arch, base), arch)
        (folder / "a").mkdir()
        tensors = experts.stored(after, arch, saved)
        tensors = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
        save_file(tensors, folder / "a" / "adapter_model.safetensors")
        (folder / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        lora_tools.merge(folder / "base", [folder / "a"], folder / "m")
        wanted = experts.stored(after, arch, base)
        models.assert_same(models.tensors(folder / "m"), wanted, 0)
    experts.write_base(tmp_path / "b", experts.stored(before, GPT_OSS, "qwen"), GPT_OSS)
    with pytest.raises(UnsupportedAdapter, match="saved whole, and its rows alternate"):
        lora_tools.merge(tmp_path / "b", [folder / "a"], tmp_path / "m")


def test_what_is_not_brought_into_another_form(tmp_path: Path) -> None:
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    base = experts.write_base(tmp_path / "f", experts.stored(before, PLAIN, "memory"), PLAIN)
    apart = experts.write_base(tmp_path / "s", experts.stored(before, PLAIN, "mixtral"), PLAIN)
    given = experts.write_adapter(tmp_path / "a", by, PLAIN, "qwen")
    factors = load_file(given / "adapter_model.safetensors")

    def adapter(name: str, config: dict[str, Any], more: dict[str, torch.Tensor]) -> Path:
        shutil.copytree(given, tmp_path / name)
        save_file({**factors, **more}, tmp_path / name / "adapter_model.safetensors")
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return tmp_path / name

    lefts = {k: v for k, v in factors.items() if "lora_B" in k}
    dora = adapter(
        "dora",
        {"use_dora": True},
        {k.replace("B.weight", "magnitude_vector"): torch.ones(len(v)) for k, v in lefts.items()},
    )
    with pytest.raises(UnsupportedAdapter, match=r"has dora for .*experts.0.down_proj.weight"):
        lora_tools.merge(base, [dora], tmp_path / "m")
    lora_tools.merge(apart, [dora], tmp_path / "m")  # of the same layers by other names
    bias = adapter(
        "bias",
        {"lora_bias": True},
        {k.replace("weight", "bias"): torch.ones(len(v)) for k, v in lefts.items()},
    )
    with pytest.raises(UnsupportedAdapter, match=r"has lora_bias for .*experts"):
        lora_tools.merge(base, [bias], tmp_path / "n")
    name = next(k for k in factors if "experts.0.down_proj" in k).partition(".lora")[0]
    extra = {
        f"{name.replace('experts.0', 'experts.3')}.lora_{p}.weight": torch.ones(*s)
        for p, s in (("A", (2, 6)), ("B", (8, 2)))
    }
    with pytest.raises(MismatchError, match=r"experts.3.down_proj.weight: .* has 3 experts"):
        lora_tools.merge(base, [adapter("more", {}, extra)], tmp_path / "n")
    whole = experts.write_adapter(tmp_path / "w", by, PLAIN, "peft")
    fewer = {k: v for k, v in experts.stored(before, PLAIN, "qwen").items() if "experts.2" not in k}
    less = experts.write_base(tmp_path / "less", fewer, PLAIN)
    with pytest.raises(MismatchError, match=r"has 2 experts, .* has 3"):
        lora_tools.merge(less, [whole], tmp_path / "n")
    wide = experts.stored(experts.matrices((10, 6), 0), PLAIN, "memory")
    other = experts.write_base(tmp_path / "wide", wide, PLAIN)
    with pytest.raises(MismatchError, match=r"gate_up_proj|down_proj: base is .* \(out, in\)"):
        lora_tools.merge(other, [given], tmp_path / "n")
    swapped = {  # which fits the stored shape the other way about
        k: torch.zeros(2, 12) if "lora_A" in k else torch.zeros(4, 2)
        for k in factors
        if "gate_proj" in k
    }
    with pytest.raises(MismatchError, match=r"for \(out, in\) = \(4, 12\)"):
        lora_tools.merge(base, [adapter("swapped", {}, swapped)], tmp_path / "n")
    gates = {k: v for k, v in experts.stored(before, PLAIN, "qwen").items() if "gate" not in k}
    gateless = experts.write_base(tmp_path / "gateless", gates, PLAIN)
    with pytest.raises(AdapterError, match=r"gate_up_proj matches no tensor"):
        lora_tools.merge(gateless, [whole], tmp_path / "n")


def test_biases_beside_say_that_the_order_is_not_known(tmp_path: Path) -> None:
    """An architecture like gpt-oss, whose gate and up may alternate, or not."""
    arch = Architecture("of-tomorrow", held=True)
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    tensors = experts.stored(before, arch, "memory")
    tensors |= {
        f"{k}_bias": torch.zeros(3, v.shape[2]) for k, v in tensors.items() if "gate_up" in k
    }
    base = experts.write_base(tmp_path / "base", tensors, arch)
    given = experts.write_adapter(tmp_path / "a", by, arch, "qwen")
    with pytest.raises(UnsupportedAdapter, match=r"is not known.*this architecture"):
        lora_tools.merge(base, [given], tmp_path / "m")


def vllm_reads(folder: Path, arch: Architecture, stacked: bool) -> experts.Matrices:
    """The changes that vLLM makes of it (``_stack_moe_lora_weights`` and ``pack_moe`` of its
    model_manager.py): of classes with ``is_3d_moe_weight`` it takes both pairs of all experts, of
    others three pairs of each; all are wanted there."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] in (1, 8, 16, 32, 64)
    scale = config["lora_alpha"] / config["r"]
    given = {k.removeprefix("base_model.model."): v for k, v in models.tensors(folder).items()}

    def pair(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return given.pop(f"{module}.lora_A.weight"), given.pop(f"{module}.lora_B.weight")

    found: experts.Matrices = {}
    for layer in range(2):
        inside = "block_sparse_moe" if arch is MIXTRAL else arch.inside
        holder = f"model.layers.{layer}.{inside}.experts"
        if stacked:
            for name, key in (("gate_up", f"{holder}.base_layer"), ("down", holder)):
                A, B = pair(key)
                A = A.reshape(experts.E, -1, A.shape[1])
                B = B.reshape(B.shape[0], -1, experts.E).permute(2, 0, 1)
                for n, delta in enumerate(B @ A * scale):
                    alternate = arch.interleaved and name == "gate_up"
                    found[layer, n, name] = (
                        torch.cat((delta[::2], delta[1::2])) if alternate else delta
                    )
            continue
        names = ("w1", "w3", "w2") if arch is MIXTRAL else ("gate_proj", "up_proj", "down_proj")
        for n in range(experts.E):
            gate, up, down = (B @ A * scale for A, B in (pair(f"{holder}.{n}.{m}") for m in names))
            found |= {(layer, n, "gate_up"): torch.cat((gate, up)), (layer, n, "down"): down}
    assert not given, "keys that vLLM does not look for"
    return found


QWEN35 = Architecture("qwen3_5_moe_text")
FOR_VLLM = [
    *((PLAIN, b, a, False) for b in ("qwen", "memory", "turned") for a in ("qwen", "peft")),
    (PLAIN, "memory", "peft-0.18", False),
    *((MIXTRAL, b, a, False) for b in ("mixtral", "memory") for a in ("qwen", "mixtral", "peft")),
    *((LLAMA4, "memory", a, False) for a in ("qwen", "peft", "peft-0.18")),
    *((GPT_OSS, "memory", a, True) for a in ("qwen", "unsloth", "peft")),
    (GPT_OSS, "unsloth", "unsloth", True),
    *((QWEN35, b, a, True) for b in ("qwen", "memory") for a in ("qwen", "peft", "peft-0.18")),
]


@pytest.mark.sweep(8)
@pytest.mark.parametrize(
    ("arch", "base", "adapter", "stacked", "part"),
    [
        pytest.param(*v, part, id=f"{v[0].model_type}-{v[2]}-for-{v[1]}-{part}")
        for v in FOR_VLLM
        for part in ("", "gate_up", "down")
        if not part or not v[2].startswith("peft")
    ],
)
def test_for_vllm(
    arch: Architecture, base: str, adapter: str, stacked: bool, part: str, tmp_path: Path
) -> None:
    """Cut and put together exactly; ``part``: with nothing but this in the adapter."""
    before = experts.matrices((8, 6), 0)
    by = {k: v for k, v in experts.products(before, 1).items() if not part or k[2] == part}
    experts.write_base(tmp_path / "base", experts.stored(before, arch, base), arch)
    experts.write_adapter(tmp_path / "a", by, arch, adapter)
    report = lora_tools.rescale(
        tmp_path / "a", tmp_path / "v", consumer="vllm", base=tmp_path / "base"
    )
    assert all("experts" in fate.tensor for fate in report.plan)
    found = vllm_reads(tmp_path / "v", arch, stacked)
    assert found.keys() == before.keys()
    for key, delta in found.items():
        B, A = by.get(key, (torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1])))
        torch.testing.assert_close(delta, experts.ALPHA / experts.R * B @ A, rtol=1e-5, atol=1e-5)
    lora_tools.merge(tmp_path / "base", [tmp_path / "v"], tmp_path / "m")
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "n")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "n"), 1e-6)


def test_a_rank_that_grew_is_cut_exactly(tmp_path: Path) -> None:
    """Gate and up of single experts are one pair of twice their rank, which is no more than needed
    where their lora_A are not the same."""
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    base = experts.write_base(tmp_path / "base", experts.stored(before, GPT_OSS, "memory"), GPT_OSS)
    given = experts.write_adapter(tmp_path / "a", by, GPT_OSS, "qwen")
    report = lora_tools.rescale(given, tmp_path / "v", consumer="vllm", base=base)
    assert any(
        "18 pairs became 4, of rank 2, 4. The effect is exactly the same" in note
        for note in report.notes
    )
    report = lora_tools.rescale(given, tmp_path / "w", consumer="vllm", base=base, rank=2)
    assert report.totals["relative_error"] < 1e-6
    for key, delta in vllm_reads(tmp_path / "w", GPT_OSS, stacked=True).items():
        wanted = experts.ALPHA / experts.R * by[key][0] @ by[key][1]
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-4)


def test_other_modules_beside_and_another_prefix_for_vllm(tmp_path: Path) -> None:
    """What is written has the base's names, and one rank."""
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    attention = "model.layers.0.self_attn.q_proj.weight"
    tensors = experts.stored(before, PLAIN, "memory") | {attention: torch.ones(8, 8)}
    base = experts.write_base(tmp_path / "base", tensors, PLAIN, "language_model.")
    experts.write_adapter(tmp_path / "a", by, PLAIN, "peft", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    q_proj = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2)}
    save_file(load_file(file) | q_proj, file)
    report = lora_tools.rescale(tmp_path / "a", tmp_path / "v", consumer="vllm", base=base)
    assert any("added: 1 modules now have the base's names" in note for note in report.notes)
    assert any(
        "4 pairs became 18, of rank 2. The effect is exactly the same" in note
        for note in report.notes
    )
    found = models.tensors(tmp_path / "v")
    assert len(found) == 2 * (1 + 2 * 3 * experts.E)
    names = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in found}
    assert "language_model.model.layers.1.mlp.experts.2.up_proj" in names
    assert all(name.startswith("language_model.") for name in names)
    assert {v.shape[0] for k, v in found.items() if "lora_A" in k} == {8}
    lora_tools.merge(base, [tmp_path / "v"], tmp_path / "m")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "n")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tmp_path / "n"), 1e-6)


def test_extract_for_vllm(tmp_path: Path) -> None:
    before = experts.matrices((8, 6), 0)
    by = {k: v for k, v in experts.products(before, 1).items() if k[1] != 2}
    after = before | experts.changed({k: before[k] for k in by}, by)
    for form in ("memory", "qwen"):
        for name, parts in (("base", before), ("tuned", after)):
            folder = tmp_path / f"{name}-{form}"
            experts.write_base(folder, experts.stored(parts, PLAIN, form), PLAIN)
        sides = tmp_path / f"base-{form}", tmp_path / f"tuned-{form}"
        lora_tools.extract(*sides, tmp_path / form, rank=4, consumer="vllm")
        found = vllm_reads(tmp_path / form, PLAIN, stacked=False)
        for key, delta in found.items():
            torch.testing.assert_close(delta, after[key] - before[key], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_for_vllm(tmp_path: Path) -> None:
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    base = experts.write_base(tmp_path / "base", experts.stored(before, GPT_OSS, "memory"), GPT_OSS)
    given = experts.write_adapter(tmp_path / "a", by, PLAIN, "peft")
    with pytest.raises(UnsupportedAdapter, match=r"all experts in one .* with base, which"):
        lora_tools.rescale(given, tmp_path / "v", consumer="vllm")
    with pytest.raises(UnsupportedAdapter, match=r"llama.cpp does not read factors of all experts"):
        lora_tools.rescale(given, tmp_path / "v", consumer="llama.cpp")
    uneven = experts.write_adapter(
        tmp_path / "u", by, GPT_OSS, "qwen", alpha_pattern={"experts.1.gate_proj": 7}
    )
    with pytest.raises(UnsupportedAdapter, match="experts differ in rank or lora_alpha"):
        lora_tools.rescale(uneven, tmp_path / "v", consumer="vllm", base=base)


@pytest.mark.parametrize("consumer", ["vllm", "peft"])
def test_names_are_held_to_the_base_as_in_merge(consumer: str, tmp_path: Path) -> None:
    """Of an adapter for another model: the same refusal from merge, rescale and convert."""
    before = experts.matrices((8, 6), 0)
    by = experts.products(before, 1)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(6, 8) for n in range(2)}
    base = experts.write_base(tmp_path / "base", tensors, PLAIN)
    given = experts.write_adapter(tmp_path / "a", by, PLAIN, "qwen")
    said = r"experts.0.down_proj.weight matches no tensor of .*base; is this the right base\?"
    with pytest.raises(AdapterError, match=said):
        lora_tools.merge(base, [given], tmp_path / "m")
    with pytest.raises(AdapterError, match=said):
        lora_tools.rescale(given, tmp_path / "v", consumer=consumer, alpha=3, base=base)
    with pytest.raises(AdapterError, match=said):
        lora_tools.convert(given, tmp_path / "c", to="kohya", base=base)
