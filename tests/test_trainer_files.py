"""Files as trainers of diffusion models write them (ai-toolkit, OneTrainer, DiffSynth, musubi):
whatever prefix and parts, the same change of the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import (
    AdapterError,
    MismatchError,
    UnsafeInput,
    UnsupportedAdapter,
    UsageError,
)
from lora_tools.sources.adapters import open_adapter

MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2")
PREFIXES = ("diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "")
PARTS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
BASES = ("", "model.diffusion_model.", "diffusion_model.")
CASES = [
    case
    for case in itertools.product(PREFIXES, PARTS, (None, 1.0))
    if case[0] or not case[1][0].startswith("lora.down")
]


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, generator=noise), torch.randn(6, 2, generator=noise)


def file(path: Path, prefix: str, parts: tuple[str, str], alpha: float | None) -> Path:
    tensors = {}
    for i, module in enumerate(MODULES):
        for part, factor in zip(parts, factors(i), strict=True):
            tensors[f"{prefix}{module}.{part}"] = factor
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def a_base(path: Path, wrapper: str) -> Path:
    model = {f"{wrapper}{module}.weight": torch.zeros(6, 8) for module in MODULES}
    if wrapper:  # beside the other parts of a pipeline
        model["first_stage_model.transformer_blocks.0.attn.to_q.weight"] = torch.zeros(6, 8)
    save_file(model, path)
    return path


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("prefix", "parts", "alpha"), CASES)
@pytest.mark.parametrize("wrapper", BASES)
def test_merged(
    prefix: str, parts: tuple[str, str], alpha: float | None, wrapper: str, tmp_path: Path
) -> None:
    given = file(tmp_path / "l.safetensors", prefix, parts, alpha)
    base = a_base(tmp_path / "base.safetensors", wrapper)
    lora_tools.merge(base, [given], tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    for i, module in enumerate(MODULES):
        A, B = factors(i)
        wanted = B @ A * (1.0 if alpha is None else alpha / 2)
        torch.testing.assert_close(found.pop(f"{wrapper}{module}.weight"), wanted)
    assert not any(rest.any() for rest in found.values())


def test_rescale_keeps_the_names(tmp_path: Path) -> None:
    given = file(tmp_path / "l.safetensors", "diffusion_model.", PARTS[0], None)
    lora_tools.rescale(given, tmp_path / "o.safetensors", scale=2.0)
    before, after = load_file(given), load_file(tmp_path / "o.safetensors")
    alphas = {f"diffusion_model.{module}.alpha" for module in MODULES}
    assert after.keys() == before.keys() | alphas
    base = a_base(tmp_path / "base.safetensors", "")
    lora_tools.merge(base, [tmp_path / "o.safetensors"], tmp_path / "m.safetensors")
    A, B = factors(0)
    merged = load_file(tmp_path / "m.safetensors")[f"{MODULES[0]}.weight"]
    torch.testing.assert_close(merged, 2 * B @ A)


def test_an_alpha_that_nobody_says_is_asked_for(tmp_path: Path) -> None:
    """Bare names of a language model may be PEFT's, without the config that has the alpha."""
    A, B = factors(0)
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, tmp_path / "l.safetensors")
    save_file({f"{name}.weight": torch.zeros(6, 8)}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="does not store lora_alpha"):
        lora_tools.merge(
            tmp_path / "base.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m.safetensors"
        )
    given = open_adapter(tmp_path / "l.safetensors", alpha=4.0)
    assert [m.alpha for m in given.modules.values()] == [4.0]


@pytest.mark.parametrize(
    "key",
    [
        "double_blocks.0.processor.qkv_lora3.down.weight",  # none of XLabs'
        "diffusion_model.blocks.0.q.lora_C.weight",
        "blocks.0.mlp.down.weight",  # a layer of a model
    ],
)
def test_other_keys_are_refused(key: str, tmp_path: Path) -> None:
    given = file(tmp_path / "l.safetensors", "diffusion_model.", PARTS[0], None)
    save_file({**load_file(given), key: torch.ones(2, 2)}, given)
    with pytest.raises(AdapterError, match=f"key '{key}' is unknown"):
        open_adapter(given)


@pytest.mark.parametrize("keys", ["lora_unet_proj_in", "unet.proj_in"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_a_kernel_of_one_is_no_difference(
    kernel: tuple[int, ...], dora: bool, keys: str, tmp_path: Path
) -> None:
    """Trainers take a transformer's ``proj_in`` for a linear layer or for a convolution."""
    A, B = factors(0)
    m = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5
    weight = torch.ones(6, 8)
    merged = []
    for mine in (kernel, (1, 1) if not kernel else ()):
        tensors = {
            f"{keys}.lora_down.weight": A.reshape(*A.shape, *mine),
            f"{keys}.lora_up.weight": B.reshape(*B.shape, *mine),
        }
        if dora:
            tensors[f"{keys}.dora_scale"] = m.reshape(6, 1, *mine)
        save_file(tensors, tmp_path / "l.safetensors")
        save_file({"proj_in.weight": weight.reshape(6, 8, *kernel)}, tmp_path / "b.safetensors")
        out = tmp_path / "m.safetensors"
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], out, force=True)
        merged.append(load_file(out)["proj_in.weight"])
    whole = weight + B @ A
    wanted = m[:, None] * whole / whole.norm(dim=1, keepdim=True) if dora else whole
    torch.testing.assert_close(merged[0], wanted.reshape(6, 8, *kernel))
    assert torch.equal(merged[0], merged[1])


def test_a_kernel_of_three_is_no_matrix(tmp_path: Path) -> None:
    A, B = factors(0)
    tensors = {
        "unet.proj_in.lora_A.weight": A[:, :, None, None].expand(2, 8, 3, 3).contiguous(),
        "unet.proj_in.lora_B.weight": B[:, :, None, None],
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "l.safetensors")
    save_file({"proj_in.weight": torch.ones(6, 8)}, tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match=r"proj_in: base is \(6, 8\)"):
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")


def test_a_pickle_is_told_by_its_bytes(tmp_path: Path) -> None:
    """Whatever the name; and nothing of it is read before it is allowed."""
    plain = load_file(file(tmp_path / "l.safetensors", "unet.", PARTS[2], 1.0))
    base = a_base(tmp_path / "b.safetensors", "")
    lora_tools.merge(base, [tmp_path / "l.safetensors"], tmp_path / "wanted.safetensors")
    wanted = load_file(tmp_path / "wanted.safetensors")
    for name, state in (("a.ckpt", plain), ("b.ckpt", {"state_dict": plain}), ("c.lora", plain)):
        for legacy in (False, True):
            given = tmp_path / name
            torch.save(state, given, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(UnsafeInput, match=r"a pickle.*allow_pickle=True"):
                lora_tools.merge(base, [given], tmp_path / "m.safetensors")
            lora_tools.merge(base, [given], tmp_path / "m.safetensors", allow_pickle=True)
            found = load_file(tmp_path / "m.safetensors")
            assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
            (tmp_path / "m.safetensors").unlink()
    save_file(plain, tmp_path / "s.pt")
    lora_tools.merge(base, [tmp_path / "s.pt"], tmp_path / "m.safetensors")
    assert lora_tools.inspect(tmp_path / "s.pt").totals["format"] == "diffusers"


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_no_name_of_a_pickle_is_written(suffix: str, tmp_path: Path) -> None:
    given = file(tmp_path / "l.safetensors", "unet.", PARTS[2], 1.0)
    with pytest.raises(UsageError, match="pickles cannot be written"):
        lora_tools.convert(given, tmp_path / f"o{suffix}", to="loralib")
    assert not (tmp_path / f"o{suffix}").exists()


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("wrapper", BASES)
def test_onetrainers_flat_names(wrapper: str, alpha: float | None, tmp_path: Path) -> None:
    """OneTrainer has ``lora_transformer_`` before diffusers' names."""
    given = file(tmp_path / "d.safetensors", "", PARTS[2], alpha)
    flat = {}
    for key, tensor in load_file(given).items():
        module = next(m for m in MODULES if key.startswith(m))
        flat[f"lora_transformer_{module.replace('.', '_')}{key.removeprefix(module)}"] = tensor
    save_file(flat, tmp_path / "l.safetensors")
    base = a_base(tmp_path / "base.safetensors", wrapper)
    found = []
    for name in "dl":
        out = tmp_path / f"{name}-merged.safetensors"
        lora_tools.merge(base, [tmp_path / f"{name}.safetensors"], out)
        found.append(load_file(out))
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    assert any(tensor.any() for tensor in found[0].values())


def test_a_weight_where_none_is_taken_is_named(tmp_path: Path) -> None:
    given = file(tmp_path / "l.safetensors", "unet.", PARTS[2], 1.0)
    with pytest.raises(
        AdapterError, match=r"make an adapter of another strength first: loratools rescale .* 0\.5"
    ):
        lora_tools.convert(f"{given}=0.5", tmp_path / "o", to="peft")


@pytest.mark.parametrize("parts", [PARTS[2], ("lokr_w1", "lokr_w2")])
def test_flat_names_of_another_part_are_left_out_where_that_is_asked(
    parts: tuple[str, str], tmp_path: Path
) -> None:
    """Most files have the text encoder's modules beside the UNet's, which may be the whole base."""
    flat = {}
    for module in ("lora_unet_net_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        shapes = ((2, 8), (6, 2)) if parts[0].startswith("lora") else ((2, 2), (3, 4))
        for seed, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            noise = torch.Generator().manual_seed(seed)
            flat[f"{module}.{part}"] = torch.randn(shape, generator=noise)
    save_file(flat, tmp_path / "l.safetensors")
    save_file({"net.to_q.weight": torch.zeros(6, 8)}, tmp_path / "b.safetensors")
    given = (tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m.safetensors")
    with pytest.raises(AdapterError, match=r"lora_te_\w+: .* is not a module of .*allow_unmatched"):
        lora_tools.merge(*given)
    report = lora_tools.merge(*given, allow_unmatched=True)
    assert [fate.tensor for fate in report.plan if fate.action == "unmatched"] == [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.weight"
    ]
    one, two = (flat[f"lora_unet_net_to_q.{part}"] for part in parts)
    wanted = two @ one if parts[0].startswith("lora") else torch.kron(one, two)
    found = load_file(tmp_path / "m.safetensors")["net.to_q.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    back = (tmp_path / "m.safetensors", given[1], tmp_path / "back.safetensors")
    lora_tools.unmerge(*back, allow_unmatched=True)
    assert load_file(back[2])["net.to_q.weight"].abs().max() < 1e-6
    with pytest.raises(AdapterError, match=r"such as the whole pipeline\.$"):  # no option for it
        lora_tools.convert(given[1][0], tmp_path / "c", to="peft", base=given[0])


def test_magnitudes_of_some_modules_alone(tmp_path: Path) -> None:
    """kohya's files may have DoRA here and LoRA there, which PEFT, whose flag is one, has not."""
    tensors, wanted, ones = {}, {}, torch.ones(6, 1)
    for i, module in enumerate(MODULES):
        A, B = factors(i)
        flat = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
        wanted[f"{module}.weight"] = B @ A
    tensors[f"{flat}.dora_scale"] = ones
    wanted[f"{module}.weight"] /= wanted[f"{module}.weight"].norm(dim=1, keepdim=True)
    save_file(tensors, tmp_path / "l.safetensors")
    base = a_base(tmp_path / "b.safetensors", "")
    for given in ("l", "again"):
        lora_tools.merge(
            base, [tmp_path / f"{given}.safetensors"], tmp_path / f"m_{given}.safetensors"
        )
        found = load_file(tmp_path / f"m_{given}.safetensors")
        for name, change in wanted.items():
            torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-5)
        out = tmp_path / "again.safetensors"
        lora_tools.convert(tmp_path / "l.safetensors", out, to="kohya", base=base, force=True)
    for to in ("peft", "diffusers"):
        with pytest.raises(UnsupportedAdapter, match=r"magnitudes and .* has none"):
            lora_tools.convert(tmp_path / "l.safetensors", tmp_path / "o", to=to, base=base)
