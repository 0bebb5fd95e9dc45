"""What files of LyCORIS, ComfyUI and ai-toolkit hold beside factors: differences of norms and
biases, tensors that replace the model's, DoRA over the inputs, bundled embeddings."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, QualityGateError, UnsupportedAdapter

from . import iotools, models
from .test_lycoris import CASES, LAYERS, _delta

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
    from lycoris.modules.lokr import LokrModule

Tensors = dict[str, torch.Tensor]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = {
            "lin": torch.nn.Linear(24, 36),
            "norm": torch.nn.LayerNorm(24),
            "group": torch.nn.GroupNorm(2, 12),
        }
        self.net = torch.nn.ModuleDict(parts)


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Net]:
    model = Net()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i))
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return iotools.checkpoint(tmp_path / "base", state), model


# What ComfyUI does with each part (comfy/lora.py and comfy/weight_adapter/lora.py, v0.3): "diff" is
# added, times the strength and no alpha; "set" takes the place of the tensor.
def comfy(base: Tensors, file: Tensors, prefix: str) -> Tensors:
    result = {}
    for name, weight in base.items():
        module, _, parameter = name.rpartition(".")
        key = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        wanted = weight.double()
        if parameter == "weight":
            if f"{key}.lora_up.weight" in file:
                up, down = (file[f"{key}.lora_{n}.weight"].double() for n in ("up", "down"))
                alpha = file.get(f"{key}.alpha", torch.tensor(float(len(down)))).double()
                wanted = wanted + alpha / len(down) * (up @ down)
            for part in ("w_norm", "diff"):
                wanted = wanted + file.get(f"{key}.{part}", torch.zeros(()))
            wanted = file.get(f"{key}.set_weight", wanted)
        for part in ("b_norm", "diff_b"):
            wanted = wanted + (file.get(f"{key}.{part}", 0) if parameter == "bias" else 0)
        if not parameter or f"{prefix}{name}.diff" in file:  # a tensor that is no module's
            wanted = wanted + file.get(f"{prefix}{name}.diff", 0)
        result[name] = wanted
    return result


def extras(prefix: str, sep: str = ".") -> Tensors:
    def key(module: str, part: str) -> str:
        return f"{prefix}{module.replace('.', sep)}.{part}"

    return {
        key("net.lin", "lora_down.weight"): noise(2, 24, seed=1),
        key("net.lin", "lora_up.weight"): noise(36, 2, seed=2),
        key("net.lin", "alpha"): torch.tensor(1.0),
        key("net.lin", "diff_b"): noise(36, seed=3),
        key("net.norm", "w_norm"): noise(24, seed=4),
        key("net.norm", "b_norm"): noise(24, seed=5),
        key("net.group", "diff"): noise(12, seed=6),
        key("net.group", "diff_b"): noise(12, seed=7),
    }


@pytest.mark.parametrize(
    ("prefix", "sep"),
    [("lora_unet_", "_"), ("lycoris_", "_"), ("diffusion_model.", "."), ("", ".")],
)
def test_merged_as_comfyui_does(
    prefix: str, sep: str, net: tuple[Path, Net], tmp_path: Path
) -> None:
    file = extras(prefix, sep)
    save_file(file, tmp_path / "l.safetensors")
    before = models.tensors(net[0])
    lora_tools.merge(net[0], [tmp_path / "l.safetensors"], tmp_path / "m")
    wanted = comfy(before, file, prefix)
    for name, tensor in models.tensors(tmp_path / "m").items():
        assert not torch.equal(tensor, before[name]), name
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6, msg=name)
    # with a weight, and taken out again
    half = [(tmp_path / "l.safetensors", 0.5)]
    lora_tools.merge(net[0], half, tmp_path / "h", reversible=True)
    for name, tensor in models.tensors(tmp_path / "h").items():
        middle = (before[name].double() + wanted[name]) / 2
        torch.testing.assert_close(tensor.double(), middle, rtol=1e-6, atol=1e-6)
    lora_tools.unmerge(tmp_path / "h", half, tmp_path / "b")
    models.assert_same(models.tensors(tmp_path / "b"), before, 0)
    lora_tools.unmerge(tmp_path / "h", half, tmp_path / "near", sidecar=False)
    models.assert_same(models.tensors(tmp_path / "near"), before, 1e-6)


@pytest.mark.parametrize("lightx2v", [False, True])
def test_a_tensor_that_is_no_modules(lightx2v: bool, tmp_path: Path) -> None:
    """Wan's ``modulation`` has no ``.weight``; files have ``.diff`` behind its name, and LightX2V's
    ``.diff_m`` behind the block's (the key of its distilled Wan that ComfyUI leaves out)."""
    base = {"blocks.0.modulation": noise(1, 6, 8), "blocks.0.ffn.0.weight": noise(6, 8)}
    file = {
        "diffusion_model.blocks.0.modulation.diff": noise(1, 6, 8, seed=1),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": noise(2, 8, seed=2),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": noise(6, 2, seed=3),
    }
    save_file(base, tmp_path / "b.safetensors")
    spelt = {k.replace("modulation.diff", "diff_m") if lightx2v else k: v for k, v in file.items()}
    save_file(spelt, tmp_path / "l.safetensors")
    lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")
    lora_tools.convert(
        tmp_path / "l.safetensors", tmp_path / "o", to="comfyui", base=tmp_path / "b.safetensors"
    )
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(tmp_path / "o")
    wanted = comfy(base, file, "diffusion_model.")
    for name, tensor in load_file(tmp_path / "m").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)


def test_a_tensor_that_replaces_the_models(net: tuple[Path, Net], tmp_path: Path) -> None:
    file = {"diffusion_model.net.lin.set_weight": noise(36, 24, seed=9)}
    file |= {"diffusion_model.net.norm.set_weight": noise(24, seed=8)}
    given = tmp_path / "l.safetensors"
    save_file(file, given)
    lora_tools.merge(net[0], [given], tmp_path / "m", reversible=True)
    found = models.tensors(tmp_path / "m")
    assert torch.equal(found["net.lin.weight"], noise(36, 24, seed=9))
    assert torch.equal(found["net.norm.weight"], noise(24, seed=8))
    lora_tools.unmerge(tmp_path / "m", [given], tmp_path / "b")
    models.assert_same(models.tensors(tmp_path / "b"), models.tensors(net[0]), 0)
    with pytest.raises(UnsupportedAdapter, match="replaced it whole"):
        lora_tools.unmerge(tmp_path / "m", [given], tmp_path / "c", sidecar=False)
    # PEFT keeps such: modules_to_save
    lora_tools.convert(given, tmp_path / "p", to="peft", base=net[0])
    lora_tools.merge(net[0], [tmp_path / "p"], tmp_path / "again")
    models.assert_same(models.tensors(tmp_path / "again"), found, 0)


def trained(model: Net, **options: Any) -> tuple[Tensors, Tensors]:
    """A file by lycoris with random numbers, and the model that it makes."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        LycorisNetwork.apply_preset({"target_module": ["Net"]})
        made = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, **options)
        made.apply_to()
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=20 + i))
        state = {k: v.detach().clone().contiguous() for k, v in made.state_dict().items()}
        made.restore()
        made.merge_to(1.0)
    return state, {k: v.detach() for k, v in model.state_dict().items()}


def test_norms_as_lycoris_merges_them(net: tuple[Path, Net], tmp_path: Path) -> None:
    state, wanted = trained(net[1], algo="locon", train_norm=True)
    assert {"lycoris_net_norm.w_norm", "lycoris_net_group.b_norm"} <= state.keys()
    save_file(state, tmp_path / "l.safetensors")
    lora_tools.merge(net[0], [tmp_path / "l.safetensors"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), wanted, 1e-6)


def test_norms_are_written_for_lycoris_and_read_by_it(
    net: tuple[Path, Net], tmp_path: Path
) -> None:
    _, wanted = trained(net[1], algo="locon", train_norm=True)
    state, _ = trained(net[1], algo="locon", train_norm=True)
    save_file(
        {k.replace("lycoris_", "lora_unet_"): v for k, v in state.items()},
        tmp_path / "l.safetensors",
    )
    out = tmp_path / "o.safetensors"
    lora_tools.convert(tmp_path / "l.safetensors", out, to="lycoris", base=net[0])
    assert load_file(out).keys() == state.keys()
    model = copy.deepcopy(net[1])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded, _ = create_lycoris_from_weights(1.0, str(out), model)
        loaded.merge_to(1.0)
    models.assert_same({k: v.detach() for k, v in model.state_dict().items()}, wanted, 1e-6)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_biases_beside_factors_become_lora_bias(
    to: str, net: tuple[Path, Net], tmp_path: Path
) -> None:
    """alpha / r multiplies PEFT's bias, and no difference."""
    file = {k: v for k, v in extras("diffusion_model.").items() if ".lin." in k}
    save_file(file, tmp_path / "l.safetensors")
    lora_tools.convert(tmp_path / "l.safetensors", tmp_path / "o", to=to, base=net[0])
    for given, out in (("l.safetensors", "m"), ("o", "n")):
        lora_tools.merge(net[0], [tmp_path / given], tmp_path / out)
    models.assert_same(models.tensors(tmp_path / "n"), models.tensors(tmp_path / "m"), 1e-6)
    if to == "peft":
        assert json.loads((tmp_path / "o/adapter_config.json").read_text())["lora_bias"] is True


def test_what_a_format_has_no_place_for_is_refused(net: tuple[Path, Net], tmp_path: Path) -> None:
    given = tmp_path / "l.safetensors"
    save_file(extras("diffusion_model."), given)
    for to in ("peft", "kohya", "diffusers", "mlx"):
        with pytest.raises(
            UnsupportedAdapter, match=r"differences of norms and the like \(net\.group\.bias\)"
        ):
            lora_tools.convert(given, tmp_path / "o", to=to, base=net[0])
    with pytest.raises(UnsupportedAdapter, match=r"lora_bias \(net\.lin\)"):
        lora_tools.convert(given, tmp_path / "o", to="lycoris", base=net[0])
    report = lora_tools.convert(
        given, tmp_path / "o", to="kohya", base=net[0], drop=["differences", "bias"]
    )
    assert any("left out: lora_bias and differences of norms" in note for note in report.notes)
    for verb in (
        lambda: lora_tools.rescale(given, tmp_path / "r", scale=2.0),
        lambda: lora_tools.combine([given], tmp_path / "r"),
    ):
        with pytest.raises(UnsupportedAdapter, match="of norms or biases"):
            verb()


def test_two_for_one_tensor_are_refused(net: tuple[Path, Net], tmp_path: Path) -> None:
    file = {"net.norm.diff": noise(24), "net.norm.w_norm": noise(24), **extras("")}
    save_file(file, tmp_path / "l.safetensors")
    with pytest.raises(AdapterError, match=r"second difference of net\.norm\.weight"):
        lora_tools.merge(net[0], [tmp_path / "l.safetensors"], tmp_path / "m")


@pytest.mark.parametrize("case", ["locon", "loha", "lokr", "locon-tucker"])
def test_dora_over_the_inputs(case: str, tmp_path: Path) -> None:
    """lycoris with ``wd_on_out=False``; ComfyUI (``weight_decompose``) takes the norms so, too."""
    kind, options = CASES[case]
    tensors, state, wanted = {}, {}, {}
    torch.manual_seed(3)
    for name, layer in LAYERS.items():
        own = copy.deepcopy(layer)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = kind(
                f"lycoris_net_{name}", own, **options, weight_decompose=True, wd_on_out=False
            )
            for part, parameter in module.named_parameters():
                given = torch.randn_like(parameter)
                parameter.copy_(given.abs() + 1 if part == "dora_scale" else given)
            saved = module.custom_state_dict()
            state.update({f"lycoris_net_{name}.{k}": v for k, v in saved.items()})
            plain = not case.startswith("locon")
            delta = module.get_weight(own.weight.shape) if plain else _delta(copy.copy(module), own)
            tensors[f"net.{name}.weight"] = own.weight.detach().clone()
            wanted[f"net.{name}.weight"] = module.apply_weight_decompose(own.weight + delta)
        magnitudes = saved["dora_scale"]
        assert magnitudes.shape[:2] == (1, own.weight.shape[1])
    base = iotools.checkpoint(tmp_path / "base", tensors)
    given = tmp_path / "a.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, given)
    lora_tools.merge(base, [given], tmp_path / "m", reversible=True)
    for name, tensor in models.tensors(tmp_path / "m").items():
        torch.testing.assert_close(tensor, wanted[name].detach(), rtol=1e-4, atol=1e-5)
    lora_tools.unmerge(tmp_path / "m", [given], tmp_path / "b")
    models.assert_same(models.tensors(tmp_path / "b"), tensors, 0)
    with pytest.raises(UnsupportedAdapter, match="DoRA over the inputs depends on the old weight"):
        lora_tools.unmerge(tmp_path / "m", [given], tmp_path / "c", sidecar=False)
    if case == "locon":
        lora_tools.convert(given, tmp_path / "p", to="peft", base=base, rank=24)
        lora_tools.merge(base, [tmp_path / "p"], tmp_path / "n")
        found = models.tensors(tmp_path / "n")["net.linear.weight"]
        torch.testing.assert_close(found, wanted["net.linear.weight"], rtol=1e-3, atol=1e-4)
        for to in ("diffusers", "lycoris"):  # whose create_lycoris_from_weights fails on it
            with pytest.raises(lora_tools.LoraToolsError, match="make it a LoRA of PEFT first"):
                lora_tools.convert(given, tmp_path / "k", to=to, base=base, rank=4)
    for to in ("kohya", "comfyui"):
        lora_tools.convert(given, tmp_path / to, to=to, base=base)
        scales = [x for k, x in load_file(tmp_path / to).items() if k.endswith("dora_scale")]
        assert {x.shape[0] for x in scales} == {1}
        lora_tools.merge(base, [tmp_path / to], tmp_path / f"m-{to}")
        models.assert_same(
            models.tensors(tmp_path / f"m-{to}"), models.tensors(tmp_path / "m"), 1e-6
        )
    if case == "locon":
        with pytest.raises(UnsupportedAdapter, match="DoRA over the inputs"):
            lora_tools.rescale(given, tmp_path / "k", scale=2.0, base=base)


def test_dora_over_the_inputs_beside_plain_factors(tmp_path: Path) -> None:
    file = {}
    for name in "ab":
        file[f"unet.{name}.lora_down.weight"] = noise(2, 8)
        file[f"unet.{name}.lora_up.weight"] = noise(6, 2)
    file["unet.a.dora_scale"] = noise(1, 8).abs() + 1
    save_file(file, tmp_path / "l.safetensors")
    base = {f"{name}.weight": noise(6, 8, seed=5) for name in "ab"}
    save_file(base, tmp_path / "b.safetensors")
    lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")
    found, product = load_file(tmp_path / "m"), noise(6, 2) @ noise(2, 8)
    torch.testing.assert_close(found["b.weight"], base["b.weight"] + product)
    V = base["a.weight"] + product
    wanted = file["unet.a.dora_scale"] * V / V.norm(dim=0, keepdim=True)
    torch.testing.assert_close(found["a.weight"], wanted)
    with pytest.raises(UnsupportedAdapter, match="and others are not"):
        lora_tools.convert(
            tmp_path / "l.safetensors",
            tmp_path / "o",
            to="peft",
            base=tmp_path / "b.safetensors",
            rank=2,
        )


def test_magnitudes_of_ai_toolkit(tmp_path: Path) -> None:
    """ai-toolkit's DoRA (toolkit/models/DoRA.py) takes the norm of each output, as PEFT does."""
    down, up, m = noise(2, 8), noise(6, 2), noise(6).abs() + 1
    for i, key in enumerate(("lora_unet_proj", "transformer.proj", "unet.proj")):
        parts = {"lora_down.weight": down, "lora_up.weight": up, "magnitude": m}
        save_file({f"{key}.{p}": v for p, v in parts.items()}, tmp_path / "l.safetensors")
        weight = noise(6, 8, seed=4)
        save_file({"proj.weight": weight}, tmp_path / "b.safetensors")
        out = tmp_path / f"m{i}.safetensors"
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], out)
        V = weight + up @ down
        wanted = m[:, None] * V / V.norm(dim=1, keepdim=True)
        torch.testing.assert_close(load_file(out)["proj.weight"], wanted)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_lokr_by_names_with_dots(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layer = torch.nn.Linear(24, 36, bias=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = LokrModule("x", layer, lora_dim=2, alpha=5)
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        delta = _delta(module, layer)
        state = {
            f"{prefix}net.linear.{k}": v.clone() for k, v in module.custom_state_dict().items()
        }
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "l.safetensors")
    weight = layer.weight.detach()
    base = iotools.checkpoint(tmp_path / "base", {"net.linear.weight": weight})
    report = lora_tools.merge(base, [tmp_path / "l.safetensors"], tmp_path / "m")
    assert any("LoHa, LoKr or whole differences" in note for note in report.notes)
    found = models.tensors(tmp_path / "m")["net.linear.weight"]
    torch.testing.assert_close(found, weight + delta, rtol=1e-5, atol=1e-5)


def test_bundled_embeddings_are_left_out(net: tuple[Path, Net], tmp_path: Path) -> None:
    file = extras("lora_unet_", "_") | {"bundle_emb.cat.clip_l": noise(2, 8)}
    file |= {"bundle_emb.cat.clip_g": noise(2, 8)}
    save_file(file, tmp_path / "l.safetensors")
    report = lora_tools.merge(net[0], [tmp_path / "l.safetensors"], tmp_path / "m")
    assert any("left out: 2 tensors of textual inversions" in note for note in report.notes)
    assert any("(cat)" in note for note in report.notes)
    wanted = comfy(models.tensors(net[0]), file, "lora_unet_")
    for name, tensor in models.tensors(tmp_path / "m").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)
    assert lora_tools.inspect(tmp_path / "l.safetensors").totals["kind"].startswith("adapter")


def test_no_program_is_said_to_read_what_it_does_not(tmp_path: Path) -> None:
    key = "unet.proj"
    file = {f"{key}.lora_down.weight": noise(2, 8), f"{key}.lora_up.weight": noise(6, 2)}
    save_file({**file, f"{key}.dora_scale": noise(1, 8)}, tmp_path / "a.safetensors")
    save_file({**file, "unet.norm.diff": noise(6)}, tmp_path / "b.safetensors")
    for name, says in (("a", "DoRA over the inputs"), ("b", "differences of norms")):
        with pytest.raises(QualityGateError, match=says):
            lora_tools.check(tmp_path / f"{name}.safetensors", consumer="diffusers")
