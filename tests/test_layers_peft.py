"""Every layer kind against PEFT: adapters that PEFT makes merge to what its ``merge_and_unload``
gives, and those written here load in PEFT with no key missing or left over."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import MismatchError, NonFiniteError, UnsupportedAdapter, UsageError

from . import models


class Net(torch.nn.Module):
    """A layer of each kind that a convolutional model has; the model never runs as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = torch.nn.Conv1d(6, 8, 5, stride=2)
        self.image = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.wide = torch.nn.Conv2d(4, 6, (3, 5), bias=False)
        self.point = torch.nn.Conv2d(4, 8, 1)
        self.video = torch.nn.Conv3d(3, 6, (2, 3, 3))
        self.grouped = torch.nn.Conv2d(8, 12, 3, groups=4)
        self.wte = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 9)
        self.norm = torch.nn.GroupNorm(2, 8)


PLAIN = ["audio", "image", "wide", "point", "video", "wte", "head"]
INPUTS = {
    "audio": (2, 6, 23),
    "image": (2, 4, 7, 7),
    "wide": (2, 4, 7, 9),
    "point": (2, 4, 5, 5),
    "video": (2, 3, 4, 5, 6),
    "grouped": (2, 8, 6, 6),
}


def store(model: torch.nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    models.perturb(model, 0.1, seed)
    return model.eval()


def trained(model: torch.nn.Module, out: Path, **config: Any) -> peft.PeftModel:
    """An adapter whose every number is random, saved to ``out``."""
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 6} | config
    wrapped = models.quietly(lambda: peft.get_peft_model(model, peft.LoraConfig(**config)))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                new = parameter + 0.2 * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(new.abs() if "magnitude" in name else new)
    models.quietly(lambda: wrapped.save_pretrained(out))
    return wrapped.eval()


def with_adapter(base: torch.nn.Module, adapter: Path) -> peft.PeftModel:
    """As PEFT loads it, having made sure that nothing is missing or left over."""
    model = models.quietly(lambda: peft.PeftModel.from_pretrained(base, adapter)).eval()
    read = models.quietly(lambda: peft.get_peft_model_state_dict(model))
    written = models.tensors(adapter)
    assert sorted(read) == sorted(written)
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor), name
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"video": 2, "image": 8}, "alpha_pattern": {"audio": 3}},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "lora-bias": {"lora_bias": True, "target_modules": ["audio", "image", "video", "head"]},
    "bias-all": {"bias": "all"},
}


@pytest.mark.parametrize("case", CASES)
def test_convolutions_merge_as_in_peft(case: str, tmp_path: Path) -> None:
    base = store(net(), tmp_path / "base")
    tuned = trained(net(), tmp_path / "a", **{"target_modules": PLAIN, **CASES[case]})
    report = lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m", reversible=True)
    targets = CASES[case].get("target_modules", PLAIN)
    assert {f.tensor for f in report.plan if f.action == "merge"} >= {
        f"{m}.weight" for m in targets
    }
    wanted = models.quietly(tuned.merge_and_unload).state_dict()
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-6)
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    found = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert found == (base / "model.safetensors").read_bytes()


def test_subtracting_a_convolutional_adapter(tmp_path: Path) -> None:
    base = store(net(), tmp_path / "base")
    trained(net(), tmp_path / "a", target_modules=PLAIN)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    report = lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    assert report.totals["error_bound"] < 1e-5
    models.assert_same(models.tensors(tmp_path / "back"), models.tensors(base), 1e-5)


def test_two_adapters_of_unlike_kinds_on_one_convolution(tmp_path: Path) -> None:
    """Each with its weight; factors of the reshaped form see the weight as another matrix."""
    base = store(net(), tmp_path / "base")
    trained(net(), tmp_path / "a", target_modules=["image"])
    A, B = torch.randn(3 * 2, 4 * 3), torch.randn(8 * 3, 3 * 2)
    models.write_adapter(tmp_path / "b", A, B, 5)
    text = tmp_path / "b" / "adapter_model.safetensors"
    save_file({k.replace("model.w.", "model.image."): v for k, v in load_file(text).items()}, text)
    both = [(tmp_path / "a", 0.5), (tmp_path / "b", 2.0)]
    for name, adapters in (("one", both[:1]), ("both", both), ("other", both[1:])):
        lora_tools.merge(base, adapters, tmp_path / name, reversible=True)
        lora_tools.unmerge(tmp_path / name, adapters, tmp_path / f"{name}-back")
        found = (tmp_path / f"{name}-back" / "model.safetensors").read_bytes()
        assert found == (base / "model.safetensors").read_bytes()
    start, one, other, found = (
        models.tensors(tmp_path / name)["image.weight"].double()
        for name in ("base", "one", "other", "both")
    )
    exact = 2 * 5 / 6 * (B.double() @ A.double()).reshape(8, 4, 3, 3)
    torch.testing.assert_close(other - start, exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, one + exact, atol=1e-6, rtol=1e-5)


def test_peft_groups_read_all_channels_and_are_refused(tmp_path: Path) -> None:
    base = store(net(), tmp_path / "base")
    trained(net(), tmp_path / "a", target_modules=["grouped"])
    with pytest.raises(UnsupportedAdapter, match=r"grouped:.*own input"):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("rslora", [False, True])
def test_groups_that_keep_to_their_channels_are_told_by_the_shapes(
    groups: int, rslora: bool, tmp_path: Path
) -> None:
    """PEFT does not merge such adapters (NotImplementedError), so its unmerged outputs are what is
    compared; 8 groups are a depthwise convolution."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, groups=groups, padding=1))

    base = store(make(), tmp_path / "base")
    trained(make(), tmp_path / "a", target_modules=["0"], r=8, use_rslora=rslora)
    file = tmp_path / "a" / "adapter_model.safetensors"
    factors = load_file(file)
    A = factors["base_model.model.0.lora_A.weight"]
    own = torch.block_diag(*[torch.ones(8 // groups, 8 // groups)] * groups)
    factors["base_model.model.0.lora_A.weight"] = A * own[:, :, None, None]
    save_file(factors, file)
    tuned = models.quietly(lambda: peft.PeftModel.from_pretrained(make(), tmp_path / "a")).eval()
    with pytest.raises(NotImplementedError):
        tuned.merge_and_unload()
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    layer = make()
    layer.load_state_dict(models.tensors(tmp_path / "m"))
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x), tuned(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(make()(x), tuned(x), atol=0.1)
    lora_tools.rescale(tmp_path / "a", tmp_path / "small", rank=1)
    found = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert found["base_model.model.0.lora_A.weight"].shape == (groups, 8, 3, 3)
    lora_tools.merge(base, [tmp_path / "small"], tmp_path / "ms")


def pair(tmp_path: Path, rank: int = 3) -> tuple[Path, Path, Net]:
    """The net and a copy whose every product of the weights changed by that rank."""
    tuned = net()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if weight.dim() > 1:
                groups = 4 if name.startswith("grouped") else 1
                for part in weight.chunk(groups):
                    left = torch.randn(part.shape[0], rank, generator=noise)
                    right = torch.randn(rank, part[0].numel(), generator=noise)
                    part += 0.1 * (left @ right).reshape(part.shape)
            elif name != "norm.weight":
                weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return store(net(), tmp_path / "base"), store(tuned, tmp_path / "tuned"), tuned


@pytest.mark.parametrize("rslora", [False, True])
def test_extracted_convolutions_load_in_peft(rslora: bool, tmp_path: Path) -> None:
    base, target, tuned = pair(tmp_path)
    report = lora_tools.extract(
        base, target, tmp_path / "a", rank=8, layout=["grouped=conv:4"], rest="skip", rslora=rslora
    )
    kinds = {m.module: (m.layout, m.rank) for m in report.modules}
    assert kinds == {
        "audio": ("conv", 3),
        "image": ("conv", 3),
        "wide": ("conv", 3),
        "point": ("conv", 3),
        "video": ("conv", 3),
        "grouped": ("conv", 12),
        "wte": ("embedding", 3),
        "head": ("linear", 3),
    }
    assert max(m.relative_error for m in report.modules) < 1e-6
    totals = report.totals
    assert totals["left_out"], "biases changed as well, and count"
    assert 1 - totals["energy"] == pytest.approx(totals["left_out_energy"], rel=1e-4)
    size = sum(t.numel() for t in models.tensors(tmp_path / "a").values())
    assert report.totals["parameters"] == size
    model = with_adapter(net(), tmp_path / "a")
    for name, shape in INPUTS.items():
        x = torch.randn(shape)
        found = getattr(model.base_model.model, name)(x)
        layer = getattr(tuned, name)
        if layer.bias is not None:
            layer.bias = getattr(net(), name).bias
        torch.testing.assert_close(found, layer(x), atol=1e-4, rtol=1e-4)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    found = models.tensors(tmp_path / "m")
    for name, tensor in models.tensors(target).items():
        if tensor.dim() > 1:
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_conv_resized_by_an_exact_svd(tmp_path: Path) -> None:
    base, target, _ = pair(tmp_path)
    lora_tools.extract(base, target, tmp_path / "a", rank=8, layout=["grouped=conv:4"], rest="skip")
    report = lora_tools.rescale(tmp_path / "a", tmp_path / "small", rank=2, rslora=True)
    assert {m.module: m.rank for m in report.modules}["grouped"] == 8
    with_adapter(net(), tmp_path / "small")
    best = lora_tools.extract(
        base, target, tmp_path / "b", rank=2, layout=["grouped=conv:4"], rest="skip", svd="exact"
    )
    errors = {module.module: module.relative_error for module in best.modules}
    for module in report.modules:
        assert module.relative_error == pytest.approx(errors[module.module], rel=1e-3)
    for name in ("b", "small"):
        lora_tools.merge(base, [tmp_path / name], tmp_path / f"m-{name}")
    models.assert_same(models.tensors(tmp_path / "m-small"), models.tensors(tmp_path / "m-b"), 1e-5)
    lora_tools.rescale(tmp_path / "a", tmp_path / "half", alpha=2)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m1")
    lora_tools.merge(base, [tmp_path / "half"], tmp_path / "m2")
    models.assert_same(models.tensors(tmp_path / "m1"), models.tensors(tmp_path / "m2"), 1e-6)


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
def test_consumers_without_convolutions(consumer: str, tmp_path: Path) -> None:
    base, target, _ = pair(tmp_path)
    with pytest.raises(UnsupportedAdapter, match=rf"{consumer} does not read .* kind conv"):
        lora_tools.extract(base, target, tmp_path / "a", rest="skip", consumer=consumer)
    lora_tools.extract(base, target, tmp_path / "a", rest="skip", exclude=["grouped"])
    with pytest.raises(UnsupportedAdapter, match=rf"{consumer} does not read .* form conv"):
        lora_tools.rescale(tmp_path / "a", tmp_path / "b", consumer=consumer)


# --------------------------------------------------------------- blocks of one weight

BLOCKS = {
    "equal": ([8, 8, 8], [True, True, True], "merged:3"),
    "unequal": ([12, 4, 6], [True, True, True], "merged:12,4,6"),
    "some": ([8, 8, 8], [True, False, True], "merged:3/101"),
    "unequal-some": ([12, 4, 6], [False, True, True], "merged:12,4,6/011"),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", BLOCKS)
def test_planted_blocks_are_recovered(case: str, transposed: bool, tmp_path: Path) -> None:
    sizes, enabled, kind = BLOCKS[case]
    kind = kind.replace("merged", "merged-conv1d") if transposed else kind
    rank, inside = 2, 10
    torch.manual_seed(0)
    W = torch.randn(sum(sizes), inside)
    planted = [
        0.1 * torch.randn(n, rank) @ torch.randn(rank, inside) if on else torch.zeros(n, inside)
        for n, on in zip(sizes, enabled, strict=True)
    ]
    sides = W, W + torch.cat(planted)
    for name, side in zip(("base", "tuned"), sides, strict=True):
        stored = side.T.contiguous() if transposed else side
        save_file({"attn.c_attn.weight": stored}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "a"
    report = lora_tools.extract(
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        out,
        rank=rank,
        layout=[f"c_attn={kind}"],
    )
    (module,) = report.modules
    assert module.rank == rank * sum(enabled)
    assert module.relative_error < 1e-6
    factors = models.tensors(out)
    A = factors["base_model.model.attn.c_attn.lora_A.weight"].double()
    B = factors["base_model.model.attn.c_attn.lora_B.weight"].double()
    start, column = 0, 0
    for size, on, change in zip(sizes, enabled, planted, strict=True):
        rows = B[start : start + size]
        if on:
            mine = slice(column, column + rank)
            torch.testing.assert_close(
                rows[:, mine] @ A[mine], change.double(), atol=1e-6, rtol=1e-5
            )
            rows = torch.cat((rows[:, :column], rows[:, column + rank :]), 1)
            column += rank
        assert not rows.any(), "a block's outputs are its own alone"
        start += size
    lora_tools.merge(tmp_path / "base.safetensors", [out], tmp_path / "m.safetensors")
    found, wanted = (load_file(tmp_path / f"{name}.safetensors") for name in ("m", "tuned"))
    models.assert_same(found, wanted, 1e-6)


HEADS: dict[str, tuple[Any, list[int], int, str]] = {
    "gpt_neox": (
        lambda: transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=models.VOCAB,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
            )
        ),
        [8, 8, 8],
        4,
        "merged:3*4/101",
    ),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=models.VOCAB, hidden_size=32, n_layer=1, n_head=4)
        ),
        [8, 8, 8],
        4,
        "merged:3*4/101",
    ),
    "falcon": (  # two queries to a key and a value
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(
                vocab_size=models.VOCAB,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_kv_heads=2,
                new_decoder_architecture=True,
            )
        ),
        [16, 8, 8],
        2,
        "merged:16,8,8*2/101",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_planted_blocks_of_every_head_are_recovered(kind: str, tmp_path: Path) -> None:
    """Query, key and value lie by heads; query and value get a change of rank 2 each."""
    make, sizes, heads, layout = HEADS[kind]
    torch.manual_seed(0)
    model = make().eval()
    models.perturb(model, 0.1, 0)
    base = models.save(model, tmp_path / "base")
    name = next(n for n, _ in model.named_parameters() if "query_key_value.weight" in n)
    weight = model.get_parameter(name)
    rows = torch.arange(weight.shape[0]).reshape(heads, sum(sizes))
    own = [part.flatten() for part in rows.split(sizes, 1)]
    planted = [0.05 * torch.randn(len(r), 2) @ torch.randn(2, 32) for r in own]
    with torch.no_grad():
        for i in (0, 2):
            weight[own[i]] += planted[i]
    tuned = models.save(model, tmp_path / "tuned")
    report = lora_tools.extract(
        base, tuned, tmp_path / "a", rank=2, layout=[f"query_key_value={layout}"]
    )
    (module,) = report.modules
    assert (module.layout, module.rank) == ("merged", 4)
    assert module.relative_error < 1e-5
    factors = models.tensors(tmp_path / "a")
    (B,) = (v.double() for k, v in factors.items() if "lora_B" in k)
    (A,) = (v.double() for k, v in factors.items() if "lora_A" in k)
    for i, part in ((0, slice(0, 2)), (2, slice(2, 4))):
        torch.testing.assert_close(
            B[own[i], part] @ A[part], planted[i].double(), atol=1e-6, rtol=1e-5
        )
        B[own[i], part] = 0
    assert not B.any(), "a block's outputs are its own alone"
    found = models.attach_strictly(models.load(base), tmp_path / "a")
    torch.testing.assert_close(models.outputs(found), models.outputs(model), rtol=1e-4, atol=1e-4)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tuned), 1e-6)


def test_blocks_of_gpt2_load_in_peft(tmp_path: Path) -> None:
    base = models.save(models.make("gpt2"), tmp_path / "base")
    tuned = models.load(base)
    models.perturb(tuned, 0.05, 1, only="c_attn.weight")
    models.save(tuned, tmp_path / "tuned")
    lora_tools.extract(
        base, tmp_path / "tuned", tmp_path / "a", rank=64, layout=["c_attn=merged-conv1d:3"]
    )
    model = models.attach_strictly(models.load(base), tmp_path / "a")
    torch.testing.assert_close(models.outputs(model), models.outputs(tuned), rtol=1e-4, atol=1e-4)


def test_a_change_in_a_block_left_out_is_in_the_error(tmp_path: Path) -> None:
    W = torch.randn(9, 5)
    changed = W.clone()
    changed[:6] += 1
    for name, side in (("b", W), ("t", changed)):
        save_file({"qkv.weight": side}, tmp_path / name)
    files = tmp_path / "b", tmp_path / "t"
    report = lora_tools.extract(*files, tmp_path / "a", layout=["qkv=merged:3/101"])
    assert report.modules[0].relative_error == pytest.approx(0.5**0.5)
    with pytest.raises(MismatchError, match="only in blocks that layout leaves out"):
        lora_tools.extract(*files, tmp_path / "none", layout=["qkv=merged:3/001"])
    changed[4] = float("nan")
    save_file({"qkv.weight": changed}, tmp_path / "t")
    with pytest.raises(NonFiniteError, match=r"qkv\.weight: a block that layout leaves out"):
        lora_tools.extract(*files, tmp_path / "none", layout=["qkv=merged:3/101"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("qkv", "REGEX=KIND"),
        ("=linear", "REGEX=KIND"),
        ("(=linear", "regular expression"),
        ("qkv=circle", r"no.*kind"),
        ("qkv=conv:0", r"no.*kind"),
        ("qkv=merged:3/11", r"no.*kind"),
        ("qkv=merged:3/000", r"no.*kind"),
        ("qkv=merged", r"no.*kind"),
        ("qkv=merged:3*0", r"no.*kind"),
        ("qkv=merged:3*", r"no.*kind"),
        ("qkv=merged-conv1d:3*3", r"no.*kind"),
        ("qkv=merged:3*2", "which is not merged's"),
        ("qkv=linear:3", r"no.*kind"),
        ("qkv=reshaped-conv", r"no.*kind"),
        ("qkv=conv", "which is not conv's"),
        ("qkv=merged:4", "which is not merged's"),
        ("qkv=merged:3,7", "which is not merged's"),
        ("qkv=experts", "which is not experts's"),
        ("other=linear", "matches no module name"),
    ],
)
def test_layouts_that_make_no_sense(given: str, says: str, tmp_path: Path) -> None:
    for name in "bt":
        save_file({"qkv.weight": torch.randn(9, 5)}, tmp_path / name)
    with pytest.raises(UsageError, match=says):
        lora_tools.extract(tmp_path / "b", tmp_path / "t", tmp_path / "a", layout=[given])


def test_a_layout_of_none_saves_whole(tmp_path: Path) -> None:
    base, target, _ = pair(tmp_path)
    report = lora_tools.extract(base, target, tmp_path / "a", layout=["grouped|video=none"])
    actions = {fate.tensor: fate.action for fate in report.plan}
    assert actions["grouped.weight"] == actions["video.weight"] == "saved whole"
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(target), 1e-5)


# --------------------------------------------------------------- fused experts


def mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    models.perturb(model, 0.1, 0)
    return model.eval()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtral with its experts stored one by one and fused, and what PEFT makes of it."""
    root = tmp_path_factory.mktemp("moe")
    paths = {"split": root / "split", "fused": root / "fused"}
    for name, path in paths.items():
        models.save(mixtral(), path, save_original_format=name == "split")
    for name, parameters in (
        ("both", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("one", ["experts.down_proj"]),
    ):
        tuned = trained(
            mixtral(),
            root / name,
            target_modules=["q_proj"],
            target_parameters=parameters,
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"gate_up_proj": 3},
        )
        paths[name] = root / name
        merged = models.quietly(tuned.merge_and_unload)
        for kind in ("split", "fused"):
            paths[f"{name}-{kind}"] = models.save(
                merged, root / f"{name}-{kind}", save_original_format=kind == "split"
            )
    return paths


@pytest.mark.parametrize("stored", ["split", "fused"])
@pytest.mark.parametrize("adapter", ["both", "one"])
def test_target_parameters_merge_as_in_peft(
    stored: str, adapter: str, moe: dict[str, Path], tmp_path: Path
) -> None:
    """Into experts as transformers 5 holds them, and as it stores them by default."""
    lora_tools.merge(moe[stored], [moe[adapter]], tmp_path / "m", reversible=True)
    wanted = models.tensors(moe[f"{adapter}-{stored}"])
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-6)
    lora_tools.unmerge(tmp_path / "m", [moe[adapter]], tmp_path / "back")
    found = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert found == (moe[stored] / "model.safetensors").read_bytes()


def test_extracted_experts_load_in_peft(moe: dict[str, Path], tmp_path: Path) -> None:
    report = lora_tools.extract(moe["fused"], moe["both-fused"], tmp_path / "a", rank=8)
    assert report.totals["relative_error"] < 1e-6
    ranks = {m.module.rpartition(".")[2]: (m.layout, m.rank) for m in report.modules}
    assert ranks == {
        "gate_up_proj": ("experts", 4),
        "down_proj": ("experts", 2),
        "q_proj": ("linear", 4),
    }
    model = models.attach_strictly(models.load(moe["fused"]), tmp_path / "a")
    wanted = models.outputs(models.load(moe["both-fused"]))
    torch.testing.assert_close(models.outputs(model), wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    lora_tools.rescale(tmp_path / "a", tmp_path / "small", rank=2, alpha=5)
    models.attach_strictly(models.load(moe["fused"]), tmp_path / "small")
    lora_tools.extract(moe["fused"], moe["both-fused"], tmp_path / "best", rank=2)
    for name in ("small", "best"):
        # The same weights stored one by one have another digest.
        lora_tools.merge(
            moe["split"], [tmp_path / name], tmp_path / f"m-{name}", allow_other_base=True
        )
    found, best = (models.tensors(tmp_path / f"m-{name}") for name in ("small", "best"))
    models.assert_same(found, best, 1e-5)


@pytest.mark.parametrize("d1", [4, 6])
@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_both_historic_layouts(d1: int, version: Any, model_type: str, tmp_path: Path) -> None:
    """PEFT 0.18 took a weight (E, x, y) for (E, in, out); since, only where the model says so. The
    shapes tell, and where the experts are square, the version and the architecture."""
    E, d2, r = 3, 6, 2
    torch.manual_seed(0)
    W = torch.randn(E, d1, d2)
    as_in_out = version == "0.18.1" or model_type == "gpt_oss"
    out, inside = (d2, d1) if as_in_out else (d1, d2)
    A, B = torch.randn(E * r, inside), torch.randn(out, r * E)
    name = "model.layers.0.mlp.experts"
    (tmp_path / "base").mkdir()
    save_file({f"{name}.down_proj": W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
    models.write_adapter(tmp_path / "a", A, B, 2 * r)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k.replace("model.w", f"model.{name}"): v for k, v in load_file(file).items()}, file)
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"r": r, "target_parameters": ["experts.down_proj"]}
    path.write_text(json.dumps(config | ({"peft_version": version} if version else {})))
    lora_tools.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m")
    formula = "ore,eri->eio" if as_in_out else "ore,eri->eoi"  # PEFT's own, of each version
    delta = 2 * torch.einsum(formula, B.reshape(out, r, E), A.reshape(E, r, inside))
    found = models.tensors(tmp_path / "m")[f"{name}.down_proj"]
    torch.testing.assert_close(found, W + delta)


def test_parameters_that_the_file_does_not_tell_apart(moe: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(moe["both"], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    text = path.read_text().replace("down_proj", "w_two")
    path.write_text(text)
    with pytest.raises(UnsupportedAdapter, match=r"experts: target_parameters name .* which"):
        lora_tools.merge(moe["fused"], [tmp_path / "a"], tmp_path / "m")


# --------------------------------------------------------------- real weights


@pytest.mark.skipif(find_spec("silero_vad") is None, reason="pip install --no-deps silero-vad")
def test_real_convolutional_weights(tmp_path: Path) -> None:
    """Silero's voice detector, and a copy of it after a short seeded change of every tensor."""
    spec = find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    base = Path(spec.origin).parent / "data" / "silero_vad_16k.safetensors"
    noise = torch.Generator().manual_seed(0)
    before = load_file(base)
    after = {}
    for name, tensor in before.items():
        new = tensor.clone()
        if tensor.dim() == 3:  # a direction that decays as a fine-tune's do, and a little noise
            flat = new.flatten(1)
            left = torch.randn(flat.shape[0], 6, generator=noise) * 0.5 ** torch.arange(6)
            right = torch.randn(6, flat.shape[1], generator=noise) / flat.shape[1] ** 0.5
            flat += tensor.std() * 0.1 * left @ right
        after[name] = new + 1e-4 * torch.randn(tensor.shape, generator=noise)
    save_file(after, tmp_path / "tuned.safetensors")
    report = lora_tools.extract(base, tmp_path / "tuned.safetensors", tmp_path / "a", rank=8)
    convolutions = {m.module: m for m in report.modules if m.layout == "conv"}
    assert set(convolutions) == {"conv1", "conv2", "conv3", "conv4", "final_conv"}
    assert all(m.energy > 0.9 for m in convolutions.values())
    actions = {fate.tensor: fate.action for fate in report.plan}
    assert actions["stft_conv.weight"] == "saved whole", "one input channel: perhaps depthwise"
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    for name, module in convolutions.items():
        target = after[f"{name}.weight"] - before[f"{name}.weight"]
        error = (found[f"{name}.weight"] - after[f"{name}.weight"]).norm() / target.norm()
        assert float(error) == pytest.approx(module.relative_error, rel=1e-2, abs=1e-5)
    lora_tools.extract(base, tmp_path / "tuned.safetensors", tmp_path / "full", rank=512)
    lora_tools.merge(base, [tmp_path / "full"], tmp_path / "f.safetensors")
    models.assert_same(load_file(tmp_path / "f.safetensors"), after, 1e-6)


def test_a_plain_matrix_as_a_target_parameter(tmp_path: Path) -> None:
    """PEFT takes it for one expert; factors for more do not fit it."""
    base = store(net(), tmp_path / "base")
    tuned = trained(net(), tmp_path / "a", target_modules=[], target_parameters=["head.weight"])
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    wanted = models.quietly(tuned.merge_and_unload).state_dict()
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-6)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2}))
    with pytest.raises(MismatchError, match="head: base is"):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "n")


def test_a_batch_norm_beside_a_convolution(tmp_path: Path) -> None:
    """Its counter is an integer, saved with it and put back exactly; and modules that only hold
    others are not taken for a target of the same last name."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3)),
            torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)),
        )

    tuned = make()
    models.perturb(tuned, 0.1, 0)
    tuned[0][0].num_batches_tracked += 2**40 + 1
    base, target = store(make(), tmp_path / "base"), store(tuned, tmp_path / "tuned")
    lora_tools.extract(base, target, tmp_path / "a", rank=64)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m", reversible=True)
    found, wanted = models.tensors(tmp_path / "m"), models.tensors(target)
    models.assert_same(found, wanted, 1e-5)
    assert torch.equal(found["0.0.num_batches_tracked"], wanted["0.0.num_batches_tracked"])
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a"], tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    x = torch.randn(2, 3, 8, 8)
    model = models.quietly(lambda: peft.PeftModel.from_pretrained(make(), tmp_path / "a")).eval()
    torch.testing.assert_close(model(x), tuned.eval()(x), atol=1e-5, rtol=1e-4)
