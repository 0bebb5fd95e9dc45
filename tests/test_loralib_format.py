"""loralib's MergedLinear and convolutions: read, written, and loaded by loralib's own layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import nn
from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter, UsageError
from lora_tools.sources.adapters import open_adapter

from . import iotools, models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import loralib

CONVS: dict[str, tuple[Any, tuple[int, int, int], int]] = {
    "2d": (loralib.Conv2d, (4, 6, 3), 1),
    "2d-groups": (loralib.Conv2d, (4, 6, 3), 2),
    "2d-groups-3": (loralib.Conv2d, (6, 6, 3), 3),
    "2d-depthwise": (loralib.Conv2d, (4, 4, 2), 4),
    "1d-point": (loralib.Conv1d, (4, 6, 1), 2),
    "1d": (nn.Conv1d, (4, 6, 3), 1),
    "1d-groups": (nn.Conv1d, (4, 6, 3), 2),
    "3d": (nn.Conv3d, (4, 6, 2), 1),
    "3d-groups": (nn.Conv3d, (4, 6, 3), 2),
}


def conv(case: str) -> torch.nn.Module:
    kind, sizes, groups = CONVS[case]
    torch.manual_seed(1)
    layer = kind(*sizes, r=2, lora_alpha=5, groups=groups, bias=False)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def own_state(layer: torch.nn.Module, path: Path, name: str = "net.x") -> Path:
    """As loralib's ``lora_state_dict`` leaves it."""
    state = {f"{name}.lora_A": layer.lora_A.detach(), f"{name}.lora_B": layer.lora_B.detach()}
    save_file(state, path)
    return path


def effect(layer: Any) -> torch.Tensor:
    """What the layer's own eval() adds to its weight."""
    held = layer.conv if hasattr(layer, "conv") else layer
    layer.train()
    before = held.weight.detach().clone()
    layer.eval()
    return held.weight.detach() - before


def _what_it_says(path: Path) -> dict[str, str]:
    """Its metadata on layers. (The commands that made it are there, too.)"""
    with safe_open(path, "pt") as file:
        return {k: v for k, v in file.metadata().items() if k.startswith("lora_")}


def change(base: Path, adapter: Path, out: Path) -> torch.Tensor:
    lora_tools.merge(base, [adapter], out)
    name = "net.x.weight"
    return models.tensors(out)[name] - models.tensors(base)[name]


@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case: str, tmp_path: Path) -> None:
    """Read with the groups that the base's weight tells; written again, the same bytes."""
    layer = conv(case)
    base = iotools.checkpoint(tmp_path / "base", {"net.x.weight": layer.conv.weight.detach()})
    given = own_state(layer, tmp_path / "a.safetensors")
    lora_tools.convert(given, tmp_path / "p", to="peft", base=base, alpha=5)
    torch.testing.assert_close(
        change(base, tmp_path / "p", tmp_path / "m"), effect(layer), rtol=1e-4, atol=2e-6
    )
    lora_tools.convert(tmp_path / "p", tmp_path / "b.safetensors", to="loralib", base=base)
    here, there = load_file(tmp_path / "b.safetensors"), load_file(given)
    assert sorted(here) == sorted(there)
    assert all(torch.equal(here[k], there[k]) for k in there)
    [module] = open_adapter(tmp_path / "b.safetensors", base=base).modules.values()
    assert module.alpha * 2 == 5 * module.r  # loralib's alpha over its r


@pytest.mark.parametrize("case", CONVS)
def test_convolutions_of_peft(case: str, tmp_path: Path) -> None:
    """Two stages of any rank, spread over loralib's layer, which loads them; and gathered again."""
    kind, sizes, groups = CONVS[case]
    noise = torch.Generator().manual_seed(2)
    weight = conv(case).conv.weight.detach()
    rank, kernel = 3, weight.shape[2:]
    A = torch.zeros(groups * rank, sizes[0], *kernel)
    for i in range(groups):  # each group's own channels
        own = slice(i * weight.shape[1], (i + 1) * weight.shape[1])
        rows = A[i * rank : (i + 1) * rank, own]
        A[i * rank : (i + 1) * rank, own] = torch.randn(rows.shape, generator=noise)
    B = torch.randn(weight.shape[0], rank, *[1] * len(kernel), generator=noise)
    base = iotools.checkpoint(tmp_path / "base", {"net.x.weight": weight})
    given = iotools.adapter(tmp_path / "p", {}, r=groups * rank)
    prefix = "base_model.model.net.x"
    save_file(
        {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B},
        given / "adapter_model.safetensors",
    )
    wanted = change(base, given, tmp_path / "m")
    out = tmp_path / "b.safetensors"
    lora_tools.convert(given, out, to="loralib", base=base)
    state = {k.removeprefix("net.x."): v for k, v in load_file(out).items()}
    r = state["lora_A"].shape[0] // kernel[-1]
    with_base = open_adapter(out, base=base)
    [module] = with_base.modules.values()
    layer = kind(*sizes, r=r, lora_alpha=module.alpha * r / module.r, groups=groups, bias=False)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["conv.weight"], [])
    torch.testing.assert_close(effect(layer), wanted, rtol=1e-4, atol=2e-6)
    # As metadata has it, the factors are PEFT's again, bit for bit.
    assert torch.equal(with_base.tensor(module.A), A)
    assert torch.equal(with_base.tensor(module.B), B)
    lora_tools.convert(out, tmp_path / "back", to="peft", base=base)
    lora_tools.convert(tmp_path / "back", tmp_path / "again.safetensors", to="loralib", base=base)
    assert _what_it_says(tmp_path / "again.safetensors") == _what_it_says(out)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[k], v) for k, v in load_file(out).items())
    # Without it, they have the same effect.
    save_file(load_file(out), tmp_path / "bare.safetensors")
    lora_tools.convert(
        tmp_path / "bare.safetensors",
        tmp_path / "q",
        to="peft",
        base=base,
        alpha=module.alpha * r / module.r,
    )
    found = change(base, tmp_path / "q", tmp_path / "m2")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_a_conv2d_keeps_its_rank(tmp_path: Path) -> None:
    """Of one group: a two-stage convolution of rank r is a loralib Conv2d of rank r."""
    noise = torch.Generator().manual_seed(2)
    given = iotools.adapter(tmp_path / "p", {}, r=5)
    factors = {
        "base_model.model.net.x.lora_A.weight": torch.randn(5, 4, 3, 3, generator=noise),
        "base_model.model.net.x.lora_B.weight": torch.randn(6, 5, 1, 1, generator=noise),
    }
    save_file(factors, given / "adapter_model.safetensors")
    lora_tools.convert(given, tmp_path / "b.safetensors", to="loralib")
    assert load_file(tmp_path / "b.safetensors")["net.x.lora_A"].shape == (5 * 3, 4 * 3)
    with pytest.raises(AdapterError, match=r"kernel.*--base"):  # of a file by itself
        open_adapter(tmp_path / "b.safetensors")


def merged_linear(blocks: str, transposed: bool = False) -> Any:
    torch.manual_seed(1)
    layer = loralib.MergedLinear(
        8,
        18,
        r=2,
        lora_alpha=6,
        enable_lora=[b == "1" for b in blocks.split(",")],
        bias=False,
        fan_in_fan_out=transposed,
    )
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("blocks", ["1,0,1", "1,1,1", "0,1,0"])
def test_merged_linear_there_and_back(blocks: str, tmp_path: Path) -> None:
    layer = merged_linear(blocks)
    base = iotools.checkpoint(tmp_path / "base", {"net.x.weight": layer.weight.detach().clone()})
    given = own_state(layer, tmp_path / "a.safetensors")
    lora_tools.convert(given, tmp_path / "p", to="peft", alpha=6, enable_lora=blocks, base=base)
    kind = "x=merged:3/" + blocks.replace(",", "")
    out = tmp_path / "b.safetensors"
    lora_tools.convert(tmp_path / "p", out, to="loralib", layout=[kind])
    here, there = load_file(out), load_file(given)
    assert all(torch.equal(here[k], there[k]) for k in there)
    other = merged_linear(blocks)
    missing, unexpected = other.load_state_dict(
        {k.removeprefix("net.x."): v for k, v in here.items()}, strict=False
    )
    assert (missing, unexpected) == (["weight"], [])
    # It says itself which blocks are on.
    torch.testing.assert_close(
        change(base, out, tmp_path / "m"), effect(layer), rtol=1e-4, atol=2e-6
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["111", "101", "010"])
def test_merged_linear_of_peft(kind: str, transposed: bool, tmp_path: Path) -> None:
    """Any product, its rows of the blocks that are off zero; and back, bit for bit."""
    noise = torch.Generator().manual_seed(3)
    on = [c == "1" for c in kind]
    A, B = torch.randn(4, 8, generator=noise), torch.randn(18, 4, generator=noise)
    B *= torch.tensor(on).repeat_interleave(6)[:, None]
    given = models.write_adapter(tmp_path / "p", A, B, 6)
    out = tmp_path / "b.safetensors"
    lora_tools.convert(given, out, to="loralib", layout=[f"^w$=merged:3/{kind}"])
    state = {k.removeprefix("w."): v for k, v in load_file(out).items()}
    layer = loralib.MergedLinear(
        8,
        18,
        r=state["lora_B"].shape[1],
        lora_alpha=6,
        enable_lora=on,
        bias=False,
        fan_in_fan_out=transposed,
    )
    assert layer.load_state_dict(state, strict=False).unexpected_keys == []
    wanted = (B @ A) * (6 / 4)
    torch.testing.assert_close(
        effect(layer), wanted.T if transposed else wanted, rtol=1e-4, atol=2e-6
    )
    lora_tools.convert(out, tmp_path / "q", to="peft")
    for key, tensor in models.tensors(given).items():
        assert torch.equal(models.tensors(tmp_path / "q")[key], tensor), key


def test_two_merged_linears_combined(tmp_path: Path) -> None:
    """The blocks' columns are told by what is zero: the rank is the sum, not three times it."""
    for i in range(2):
        layer = merged_linear("1,0,1")
        with torch.no_grad():
            layer.lora_A += i
        own_state(layer, tmp_path / f"{i}.safetensors")
        lora_tools.convert(
            tmp_path / f"{i}.safetensors",
            tmp_path / f"p{i}",
            to="peft",
            alpha=6,
            enable_lora="1,0,1",
        )
    lora_tools.combine([tmp_path / "p0", tmp_path / "p1"], tmp_path / "both")
    lora_tools.convert(tmp_path / "both", tmp_path / "b", to="loralib", layout=["x=merged:3/101"])
    state = load_file(tmp_path / "b")
    assert state["net.x.lora_A"].shape == (8, 8)
    assert state["net.x.lora_B"].shape == (12, 4)
    base = iotools.checkpoint(tmp_path / "base", {"net.x.weight": torch.zeros(18, 8)})
    found, wanted = (change(base, tmp_path / x, tmp_path / f"m-{x}") for x in ("b", "both"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_refused(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(3)
    A, B = torch.randn(4, 8, generator=noise), torch.randn(18, 4, generator=noise)
    given = models.write_adapter(tmp_path / "p", A, B, 6)
    for kinds, error, says in (
        (["w=merged:3/101"], UnsupportedAdapter, "outputs of a disabled block change"),
        (["w=merged:4"], UnsupportedAdapter, "the 4 equal blocks"),
        (["w=merged:2,16"], UsageError, "of equal size"),
        (["w=linear"], UsageError, "merged:3/101"),
        (["v=merged:3"], UsageError, "matches no module name"),
    ):
        with pytest.raises(error, match=says):
            lora_tools.convert(given, tmp_path / "b", to="loralib", layout=kinds)
        assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match=r"to=.loralib"):
        lora_tools.convert(given, tmp_path / "b", to="kohya", layout=["w=merged:3"])


def test_metadata_that_lies(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(3)
    A, B = torch.randn(4, 8, generator=noise), torch.randn(18, 4, generator=noise)
    given = models.write_adapter(tmp_path / "p", A, B, 6)
    lora_tools.convert(given, tmp_path / "b", to="loralib", layout=["w=merged:3"])
    state = load_file(tmp_path / "b")
    state["w.lora_A"][-1, -1] += 1  # trained on
    alpha = {"lora_alpha": '{"w": 6}'}
    base = iotools.checkpoint(tmp_path / "base", {"w.weight": torch.zeros(18, 8)})
    for text, says in (
        (
            '{"w": {"enable_lora": [1, 1, 1], "rank": 4}}',
            r"were they changed later\? Without the metadata,",
        ),
        ('{"w": {"enable_lora": [1, 1], "rank": 4}}', "do not fit a MergedLinear"),
        ('{"w": {"enable_lora": [0, 0]}}', "describes no layers"),
        ('{"w": {"enable_lora": 3}}', "describes no layers"),
        ('{"w": {"rank": -4}}', "describes no layers"),
        ('["w"]', "describes no layers"),
        ("{", "describes no layers"),
    ):
        save_file(state, tmp_path / "c.safetensors", {**alpha, "lora_layers": text})
        with pytest.raises((AdapterError, MismatchError), match=says):
            lora_tools.merge(base, [tmp_path / "c.safetensors"], tmp_path / "m")
