"""LoHa, LoKr, LoCon and whole differences made by lycoris itself: merged as the exact LoRA that
each is, and cut."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter

from . import iotools, models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
    from lycoris.modules.full import FullModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

LAYERS: dict[str, torch.nn.Module] = {
    "linear": torch.nn.Linear(24, 36, bias=False),
    "conv": torch.nn.Conv2d(12, 16, (3, 3), bias=False),
    "line": torch.nn.Conv1d(12, 16, 3, bias=False),
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "loha": (LohaModule, {"lora_dim": 3, "alpha": 5}),
    "loha-tucker": (LohaModule, {"lora_dim": 3, "alpha": 5, "use_tucker": True}),
    "lokr": (LokrModule, {"lora_dim": 2, "alpha": 5}),
    "lokr-both": (LokrModule, {"lora_dim": 1, "alpha": 3, "decompose_both": True}),
    "lokr-whole": (LokrModule, {"lora_dim": 2, "alpha": 5, "full_matrix": True}),
    "lokr-factor": (LokrModule, {"lora_dim": 2, "alpha": 5, "factor": 2}),
    "lokr-tucker": (LokrModule, {"lora_dim": 2, "alpha": 5, "use_tucker": True, "factor": 2}),
    "lokr-tucker-1": (LokrModule, {"lora_dim": 1, "alpha": 5, "use_tucker": True, "factor": 2}),
    "locon": (LoConModule, {"lora_dim": 3, "alpha": 5}),
    "locon-tucker": (LoConModule, {"lora_dim": 3, "alpha": 5, "use_tucker": True}),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(1)
    tensors = {
        f"net.{name}.weight": torch.randn(layer.weight.shape, generator=noise)
        for name, layer in LAYERS.items()
    }
    return iotools.checkpoint(tmp_path / "base", tensors)


def made(case: str, path: Path, **more: Any) -> dict[str, torch.Tensor]:
    """A file by lycoris' modules with random numbers, and what each does to its weight."""
    torch.manual_seed(3)
    kind, options = CASES[case]
    state, deltas = {}, {}
    for name, layer in LAYERS.items():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = kind(f"lycoris_net_{name}", layer, **options, **more)
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
            own = module.custom_state_dict()
            state.update({f"lycoris_net_{name}.{k}": v for k, v in own.items()})
            deltas[f"net.{name}.weight"] = _delta(module, layer)
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, path)
    return deltas


def _delta(module: Any, layer: torch.nn.Module) -> torch.Tensor:
    """What the module adds to the weight. (lycoris 4.1's get_diff_weight applies the scale of a
    LoHa or LoKr twice, which its forward, and so the training, does not.)"""
    if isinstance(module, LoConModule):
        return module.get_diff_weight(shape=layer.weight.shape)[0]
    weight = module.get_weight(layer.weight.shape)
    if weight.dim() == 2:
        unit = torch.eye(weight.shape[1])
        torch.testing.assert_close((module(unit) - layer(unit)).T, weight, rtol=1e-4, atol=1e-4)
    return weight


@pytest.mark.parametrize("case", CASES)
def test_it_is_merged_as_the_lora_that_it_is(case: str, base: Path, tmp_path: Path) -> None:
    deltas = made(case, tmp_path / "a.safetensors")
    before = models.tensors(base)
    lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
    after = models.tensors(tmp_path / "m")
    for name, delta in deltas.items():
        wanted = before[name].double() + delta.double()
        assert delta.norm() > 0.1
        assert (after[name] - wanted).norm() <= 3e-6 * wanted.norm(), name


@pytest.mark.parametrize("case", ["loha", "lokr-whole", "lokr", "locon-tucker"])
def test_an_svd_with_its_error(case: str, base: Path, tmp_path: Path) -> None:
    """The error reported is the error there is, and the least there can be."""
    deltas = made(case, tmp_path / "a.safetensors")
    for to in ("peft", "kohya"):
        report = lora_tools.convert(
            tmp_path / "a.safetensors", tmp_path / to, to=to, base=base, rank=2
        )
        lora_tools.merge(base, [tmp_path / to], tmp_path / f"m-{to}")
        before, after = models.tensors(base), models.tensors(tmp_path / f"m-{to}")
        for module in report.modules:
            name = f"{module.module}.weight"
            delta = deltas[name].double().flatten(1)
            change = (after[name].double() - before[name].double()).flatten(1)
            best = torch.linalg.svdvals(delta)[2:].norm() / delta.norm()
            found = (change - delta).norm() / delta.norm()
            assert module.rank == min(2, torch.linalg.matrix_rank(delta))
            assert module.relative_error == pytest.approx(float(best), abs=1e-5)
            assert float(found) == pytest.approx(float(best), abs=1e-4)
        assert report.totals["rank_max"] == 2


def test_the_exact_rank_is_said(base: Path, tmp_path: Path) -> None:
    made("loha", tmp_path / "a.safetensors")
    report = lora_tools.convert(tmp_path / "a.safetensors", tmp_path / "p", to="peft", base=base)
    assert {f.reason.split(",")[0] for f in report.plan} == {"rank 9"}
    [note] = report.notes
    assert note.startswith("3 modules are LoHa, LoKr or whole differences")
    assert "of rank 9;" in note


@pytest.fixture
def full(base: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base with biases, a file of whole differences by lycoris, and what it has of every tensor
    afterwards."""
    tensors = models.tensors(base)
    tensors |= {f"net.{n}.bias": torch.ones(layer.weight.shape[0]) for n, layer in LAYERS.items()}
    folder = iotools.checkpoint(tmp_path / "biased", tensors)
    torch.manual_seed(3)
    state, wanted = {}, {}
    for name, layer in LAYERS.items():
        own = copy.deepcopy(layer)
        own.weight = torch.nn.Parameter(tensors[f"net.{name}.weight"])
        own.bias = torch.nn.Parameter(tensors[f"net.{name}.bias"])
        module = FullModule(f"lycoris_net_{name}", own)
        module.apply_to()  # from here on it holds the layer's own weight, which is trained
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn_like(parameter)
        for key, value in module.custom_state_dict().items():
            state[f"lycoris_net_{name}.{key}"] = value.clone()
        wanted[f"net.{name}.weight"] = module.weight.detach()
        wanted[f"net.{name}.bias"] = module.bias.detach()
    save_file(state, tmp_path / "full.safetensors")
    return folder, tmp_path / "full.safetensors", wanted


def test_whole_differences(
    full: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, given, wanted = full
    lora_tools.merge(folder, [given], tmp_path / "m")
    for name, tensor in models.tensors(tmp_path / "m").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_whole_differences_cut(
    full: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """To the best LoRA of a rank, with its error; the biases' change stays whole."""
    folder, given, wanted = full
    report = lora_tools.convert(given, tmp_path / "p", to="peft", base=folder, rank=6)
    lora_tools.merge(folder, [tmp_path / "p"], tmp_path / "m")
    before, after = models.tensors(folder), models.tensors(tmp_path / "m")
    for module in report.modules:
        name = f"{module.module}.weight"
        delta = (wanted[name] - before[name]).double().flatten(1)
        best = torch.linalg.svdvals(delta)[6:].norm() / delta.norm()
        found = ((after[name] - before[name]).double().flatten(1) - delta).norm() / delta.norm()
        assert module.relative_error == pytest.approx(float(best), abs=1e-5)
        assert float(found) == pytest.approx(float(best), abs=1e-5)
        bias = f"{module.module}.bias"
        torch.testing.assert_close(after[bias], wanted[bias], rtol=1e-6, atol=1e-6)


def test_a_difference_of_a_bias_where_there_is_none(
    full: tuple[Path, Path, dict[str, torch.Tensor]], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"net\.\w+\.bias matches no tensor"):
        lora_tools.merge(base, [full[1]], tmp_path / "m")


@pytest.mark.parametrize("case", ["loha", "lokr", "locon", "loha-tucker", "locon-tucker"])
def test_dora_of_lycoris(case: str, base: Path, tmp_path: Path) -> None:
    """weight_decompose over the outputs is PEFT's DoRA; over the inputs it is another thing."""
    kind, options = CASES[case]
    tensors, state, wanted = models.tensors(base), {}, {}
    torch.manual_seed(3)
    for name, layer in LAYERS.items():
        own = copy.deepcopy(layer)
        own.weight = torch.nn.Parameter(tensors[f"net.{name}.weight"])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = kind(f"lycoris_net_{name}", own, **options, weight_decompose=True)
            for part, parameter in module.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise.abs() + 1 if part == "dora_scale" else noise)
            saved = module.custom_state_dict()
            state.update({f"lycoris_net_{name}.{k}": v for k, v in saved.items()})
            delta = (
                _delta(copy.copy(module), own)
                if case.startswith("locon")
                else (module.get_weight(own.weight.shape))
            )
            wanted[f"net.{name}.weight"] = module.apply_weight_decompose(own.weight + delta)
    save_file(
        {k: v.detach().clone().contiguous() for k, v in state.items()}, tmp_path / "a.safetensors"
    )
    lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
    for name, tensor in models.tensors(tmp_path / "m").items():
        torch.testing.assert_close(tensor, wanted[name].detach(), rtol=1e-4, atol=1e-5)


def _spoilt() -> Iterator[tuple[str, dict[str, torch.Tensor], str]]:
    name = "lycoris_net_linear"
    one = torch.ones
    loha = {
        "hada_w1_a": one(36, 2),
        "hada_w1_b": one(2, 24),
        "hada_w2_a": one(36, 2),
        "hada_w2_b": one(2, 24),
    }
    yield "a part missing", {k: v for k, v in loha.items() if k != "hada_w2_b"}, r"no.*LoHa"
    yield "half of tucker", {**loha, "hada_t1": one(2, 2, 3, 3)}, r"no.*LoHa"
    yield "another weight", {**loha, "hada_w1_b": one(2, 25), "hada_w2_b": one(2, 25)}, "36 x 25"
    yield "LoKr by half", {"lokr_w1": one(6, 6), "lokr_w2_a": one(6, 2)}, r"no.*LoKr"
    yield (
        "whole and factored",
        {
            "lokr_w1": one(6, 6),
            "lokr_w1_a": one(6, 2),
            "lokr_w1_b": one(2, 6),
            "lokr_w2": one(6, 4),
        },
        r"no.*LoKr",
    )
    yield "an alpha of two", {**loha, "alpha": one(2)}, "one number"
    yield "full, of a vector", {"diff": one(36)}, r"base is \(36, 24\)"
    yield "full and more", {"diff": one(36, 24), **loha}, "beside .*hada_w1_a"
    yield "full, another weight", {"diff": one(24, 36)}, "36, 24"
    yield "a norm", {"w_norm": one(36)}, r"base is \(36, 24\)"
    yield "a norm and factors", {"w_norm": one(36), **loha}, "and each of them defines the whole"
    yield (
        "another weight and factors",
        {"set_weight": one(36, 24), **loha},
        "and each of them defines the whole",
    )
    yield "a larger weight", {**loha, "reshape_weight": one(2)}, "a weight of another shape than a"
    yield "parts of other ranks", {**loha, "hada_w1_a": one(36, 3)}, "the shapes make"
    locon = {"lora_down.weight": one(2, 24), "lora_up.weight": one(36, 3)}
    yield (
        "a middle for a matrix",
        {**locon, "lora_mid.weight": one(3, 4, 1, 1)},
        "do not fit together",
    )
    yield "OFT", {"oft_blocks": one(2, 3, 3)}, "make no lycoris_oft"
    yield "OFT and factors", {"oft_blocks": one(2, 3, 3), **loha}, "no whole OFT"
    yield "a bias", {**loha, "diff_b": one(36)}, r"net\.linear\.bias matches no tensor"
    yield (
        "magnitudes of neither side",
        {**loha, "dora_scale": one(1, 25)},
        "numbers, one for each row of",
    )
    yield (
        "two magnitudes",
        {**loha, "dora_scale": one(36), "magnitude": one(36)},
        "remove the wrong one",
    )
    _ = name


@pytest.mark.parametrize(("what", "parts", "says"), list(_spoilt()), ids=lambda x: str(x)[:20])
def test_what_is_refused(
    what: str, parts: dict[str, torch.Tensor], says: str, base: Path, tmp_path: Path
) -> None:
    save_file({f"lycoris_net_linear.{k}": v for k, v in parts.items()}, tmp_path / "a.safetensors")
    with pytest.raises((AdapterError, MismatchError), match=says) as caught:
        lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
    assert "net" in str(caught.value)


def test_dora_of_outputs(base: Path, tmp_path: Path) -> None:
    """LoCon with one magnitude for each output is PEFT's DoRA."""
    noise = torch.Generator().manual_seed(5)
    down, up = torch.randn(2, 24, generator=noise), torch.randn(36, 2, generator=noise)
    m = torch.rand(36, 1, generator=noise) + 1
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": m}
    name = "lora_unet_net_linear"
    save_file({f"{name}.{k}": v for k, v in parts.items()}, tmp_path / "a.safetensors")
    lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
    moved = models.tensors(base)["net.linear.weight"] + up @ down
    wanted = m * moved / moved.norm(dim=1, keepdim=True)
    found = models.tensors(tmp_path / "m")["net.linear.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_dora_in_some_modules_only(tmp_path: Path) -> None:
    """Written for LyCORIS, which loads it; PEFT and diffusers have one flag for all."""
    file, base, torch_model = {}, {}, torch.nn.Module()
    noise = torch.Generator().manual_seed(5)
    torch_model.net = torch.nn.ModuleDict()
    for name, wide in (("a", 8), ("b", 12)):
        layer = torch_model.net[name] = torch.nn.Linear(wide, 6, bias=False)
        file[f"lora_unet_net_{name}.lora_down.weight"] = torch.randn(2, wide, generator=noise)
        file[f"lora_unet_net_{name}.lora_up.weight"] = torch.randn(6, 2, generator=noise)
        base[f"net.{name}.weight"] = layer.weight.detach().clone()
    file["lora_unet_net_a.dora_scale"] = torch.rand(6, 1, generator=noise) + 1
    save_file(file, given := tmp_path / "k.safetensors")
    iotools.checkpoint(tmp_path / "base", base)
    out = tmp_path / "l.safetensors"
    lora_tools.convert(given, out, to="lycoris", base=tmp_path / "base")
    lora_tools.merge(tmp_path / "base", [given], tmp_path / "m")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded, _ = create_lycoris_from_weights(1.0, str(out), torch_model)
        for module in loaded.loras:
            name = module.lora_name.removeprefix("lycoris_").replace("_", ".")
            found = module.get_merged_weight()[0]
            wanted = models.tensors(tmp_path / "m")[f"{name}.weight"]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(loaded.loras) == 2
    for to in ("peft", "diffusers"):
        with pytest.raises(UnsupportedAdapter, match="for all modules or for none"):
            lora_tools.convert(given, tmp_path / to, to=to, base=tmp_path / "base")


# Types that are made of the base's weight: options, and parts that lycoris 4.1 writes.
OF_WEIGHT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "glora": ({"algo": "glora"}, {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),
    "ia3": ({"algo": "ia3"}, {"weight", "on_input"}),
    "ia3-inputs": ({"algo": "ia3", "train_on_input": True}, {"weight", "on_input"}),
    "oft": ({"algo": "diag-oft"}, {"oft_blocks"}),
    "oft-short": ({"algo": "diag-oft", "constraint": 0.01}, {"oft_blocks"}),
    "oft-rescaled": ({"algo": "diag-oft", "rescaled": True}, {"oft_blocks", "rescale"}),
    "boft": ({"algo": "boft", "constraint": 0.02}, {"oft_blocks"}),
    "boft-rescaled": ({"algo": "boft", "rescaled": True}, {"oft_blocks", "rescale"}),
}


@pytest.mark.parametrize("case", OF_WEIGHT)
def test_what_is_made_of_the_weight_is_merged_as_lycoris_does(case: str, tmp_path: Path) -> None:
    options, parts = OF_WEIGHT[case]
    before, made = trained(**options)
    file = {k: v.detach().clone().contiguous() for k, v in made.state_dict().items()}
    assert parts <= {key.partition(".")[2] for key in file}
    save_file(file, tmp_path / "a.safetensors")
    base = iotools.checkpoint(tmp_path / "base", before)
    with torch.no_grad():
        wanted = {
            f"{module.lora_name.removeprefix('lycoris_').replace('_', '.')}.weight": (
                module.get_merged_weight()[0]
            )
            for module in made.loras
        }
    lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m", reversible=True)
    models.assert_same(models.tensors(tmp_path / "m"), before | wanted, 1e-5)
    lora_tools.unmerge(tmp_path / "m", [tmp_path / "a.safetensors"], tmp_path / "b")
    models.assert_same(models.tensors(tmp_path / "b"), before, 0)


def test_what_is_made_of_the_weight_under_other_names(tmp_path: Path) -> None:
    """Names of kohya, names with dots, GLoRA's older order; a LoRA made of it; and refusals."""
    noise = torch.Generator().manual_seed(5)
    W, a1, a2, b1, b2 = (
        torch.randn(*shape, generator=noise) for shape in ((6, 8), (8, 2), (2, 8), (6, 2), (2, 8))
    )
    base = iotools.checkpoint(tmp_path / "base", {"net.lin.weight": W, "net.bias": W[0].clone()})
    now = dict(zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True))
    older = dict(zip(("a2", "a1", "b2", "b1"), (a1, a2, b1, b2), strict=True))
    wanted = W + 1.5 * (W @ a1 @ a2 + b1 @ b2)
    for name, parts in (
        ("lora_unet_net_lin", now),
        ("lora_unet_net_lin", older),
        ("diffusion_model.net.lin", now),
    ):
        file = {f"{name}.{part}.weight": x for part, x in parts.items()}
        given = tmp_path / "a.safetensors"
        save_file({**file, f"{name}.alpha": torch.tensor(3.0)}, given)
        lora_tools.merge(base, [given], tmp_path / "m", force=True)
        found = models.tensors(tmp_path / "m")["net.lin.weight"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    lora_tools.convert(given, tmp_path / "p", to="peft", base=base, rank=6)
    lora_tools.merge(base, [tmp_path / "p"], tmp_path / "n")
    found = models.tensors(tmp_path / "n")["net.lin.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    square = {part: torch.ones(8, 8) for part in now}
    for parts, says in (
        ({k: now[k] for k in ("a1", "a2", "b1")}, "no whole GLoRA"),
        ({**now, "b2": b2[:, :7].contiguous()}, r"make no lycoris_glora for \[6, 8\]"),
        (square, "make no lycoris_glora"),
    ):
        save_file({f"lora_unet_net_lin.{k}.weight": v for k, v in parts.items()}, given)
        with pytest.raises((AdapterError, MismatchError), match=says):
            lora_tools.merge(base, [given], tmp_path / "m", force=True)


def test_t_lora_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    save_file(network("lora_unet", algo="tlora"), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedAdapter, match=r"holds T-LoRA.*, which cannot be read"):
        lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")


def trained(**options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a model with a linear layer and a convolution, and a random network of lycoris
    for it."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv = torch.nn.Linear(24, 64), torch.nn.Conv2d(12, 16, 3)

    torch.manual_seed(3)
    model = Net()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Net"]})
        made = create_lycoris(model, 1.0, linear_dim=4, conv_dim=4, **options)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        made.apply_to()
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return before, made


def network(prefix: str, **options: Any) -> dict[str, torch.Tensor]:
    """A file that lycoris writes of a model with a linear layer, a convolution and a norm."""
    parts = {"lin": torch.nn.Linear(24, 64), "conv": torch.nn.Conv2d(12, 16, 3)}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.ModuleDict({**parts, "norm": torch.nn.LayerNorm(24)})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Net"]})
        made = create_lycoris(Net(), 1.0, linear_dim=4, conv_dim=4, **options)
        made.apply_to()
    return {
        key.replace("lycoris", prefix, 1): value.detach().clone().contiguous()
        for key, value in made.state_dict().items()
    }


def test_dylora_is_read_as_the_locon_that_it_is(tmp_path: Path) -> None:
    """Of a convolution it writes lora_up without a kernel."""
    state = network("lycoris", algo="dylora")
    noise = torch.Generator().manual_seed(5)
    state = {k: torch.randn(v.shape, generator=noise) if v.dim() else v for k, v in state.items()}
    weights = {"net.lin.weight": torch.zeros(64, 24), "net.conv.weight": torch.zeros(16, 12, 3, 3)}
    base = iotools.checkpoint(tmp_path / "zeros", weights)
    save_file(state, tmp_path / "a.safetensors")
    lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
    for name, found in models.tensors(tmp_path / "m").items():
        flat = "lycoris_" + name.removesuffix(".weight").replace(".", "_")
        down, up = state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"]
        scale = float(state[f"{flat}.alpha"]) / 4
        wanted = scale * (up.double() @ down.reshape(4, -1).double()).reshape(found.shape)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", ["lora", "loha"])
def test_an_alpha_of_zero_is_said(algo: str, tmp_path: Path) -> None:
    """LyCORIS takes it for the rank, and ComfyUI for no effect."""
    keys = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)}
    if algo == "loha":
        keys = {
            f"hada_w{i}_{x}": shape for i in "12" for x, shape in (("a", (8, 2)), ("b", (2, 6)))
        }
    file = {f"lycoris_a_b.{key}": torch.ones(shape) for key, shape in keys.items()}
    base, given = tmp_path / "b.safetensors", tmp_path / "l.safetensors"
    save_file({"a.b.weight": torch.zeros(8, 6)}, base)
    save_file({**file, "lycoris_a_b.alpha": torch.tensor(0.0)}, given)
    report = lora_tools.merge(base, [given], tmp_path / "m.safetensors")
    assert any("alpha of 0, such as a.b: the rank is used instead" in n for n in report.notes)
    assert (
        load_file(tmp_path / "m.safetensors")["a.b.weight"] == (4 if algo == "loha" else 2)
    ).all()
    save_file({**file, "lycoris_a_b.alpha": torch.tensor(2.0)}, given)
    assert not lora_tools.merge(base, [given], tmp_path / "n.safetensors").notes[
        int(algo == "loha") :
    ]
