"""The live layers against loralib 0.1.2, and where that is wrong against the dense definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import loralib

from lora_tools import nn
from lora_tools.errors import UsageError

TOKENS = torch.tensor([[0, 3, 6], [2, 2, 5]])
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))

# What makes a layer, from loralib's module or ours, and its input. loralib gets all of these right.
SHARED: dict[str, tuple[Callable[[Any], torch.nn.Module], torch.Tensor]] = {
    "linear": (lambda lib: lib.Linear(8, 6, r=3, lora_alpha=6), X),
    "linear-transposed": (lambda lib: lib.Linear(8, 6, r=3, fan_in_fan_out=True, bias=False), X),
    "linear-without": (lambda lib: lib.Linear(8, 6), X),
    "embedding": (lambda lib: lib.Embedding(7, 5, r=2, lora_alpha=3), TOKENS),
    "embedding-padded": (lambda lib: lib.Embedding(7, 5, r=2, padding_idx=2), TOKENS),
    "merged": (
        lambda lib: lib.MergedLinear(8, 12, r=2, lora_alpha=5, enable_lora=[True, False, True]),
        X,
    ),
    "merged-all": (lambda lib: lib.MergedLinear(8, 12, r=2, enable_lora=[True] * 4), X),
    "merged-transposed": (
        lambda lib: lib.MergedLinear(8, 12, r=2, enable_lora=[False, True], fan_in_fan_out=True),
        X,
    ),
    "conv2d": (lambda lib: lib.Conv2d(4, 6, 3, r=2, lora_alpha=5, padding=1), IMAGE),
    "conv2d-groups": (lambda lib: lib.Conv2d(4, 6, 3, r=2, groups=2, stride=2), IMAGE),
    "conv2d-reflect": (
        lambda lib: lib.Conv2d(4, 6, 3, r=1, padding=1, padding_mode="reflect"),
        IMAGE,
    ),
    "conv1d-1": (lambda lib: lib.Conv1d(4, 6, 1, r=2), IMAGE[..., 0]),
    "conv3d-1": (lambda lib: lib.Conv3d(4, 6, 1, r=2), IMAGE[:, :, None]),
}
OTHERS: dict[str, tuple[Callable[[Any], torch.nn.Module], torch.Tensor]] = {
    "merged-unequal": (
        lambda lib: lib.MergedLinear(8, 9, r=2, enable_lora=[True, False, True], sizes=[4, 3, 2]),
        X,
    ),
    "merged-unequal-transposed": (
        lambda lib: lib.MergedLinear(
            8, 9, r=2, enable_lora=[False, True, True], sizes=[4, 3, 2], fan_in_fan_out=True
        ),
        X,
    ),
    "merged-none": (lambda lib: lib.MergedLinear(8, 12, r=2, enable_lora=[False, False]), X),
    "conv1d-3": (lambda lib: lib.Conv1d(4, 6, 3, r=2, groups=2, padding=1), IMAGE[..., 0]),
    "conv2d-3x2": (lambda lib: lib.Conv2d(4, 6, (3, 2), r=2, stride=(1, 2)), IMAGE),
    "conv3d-3": (lambda lib: lib.Conv3d(4, 6, 3, r=2, padding=1), IMAGE[:, :, None]),
    "conv3d-mixed": (lambda lib: lib.Conv3d(4, 6, (1, 3, 2), r=2, groups=2), IMAGE[:, :, None]),
}
ALL = SHARED | OTHERS


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    """With every parameter random, the factors too."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
    return layer


def weight(layer: Any) -> torch.Tensor:
    return (layer.conv if hasattr(layer, "conv") else layer).weight


def change(layer: Any) -> torch.Tensor:
    """s · B · A as the stored weight has it, from the definition, in float64."""
    if not hasattr(layer, "lora_A"):
        return torch.zeros_like(weight(layer), dtype=torch.float64)
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    scale = layer.lora_alpha / layer.r
    if isinstance(layer, nn.MergedLinear):
        result = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        start, row, rank = 0, 0, 0
        for size, on in zip(layer.sizes, layer.enable_lora, strict=True):
            if on:
                block = B[row : row + size] @ A[rank : rank + layer.r]
                result[start : start + size] = block
                row, rank = row + size, rank + layer.r
            start += size
    else:
        result = B @ A
        if isinstance(layer, nn.Embedding):
            result = result.T
    transposed = getattr(layer, "fan_in_fan_out", False)
    return scale * (result.T if transposed else result).reshape(weight(layer).shape)


@pytest.mark.parametrize("case", SHARED)
def test_equals_loralib(case: str) -> None:
    """State dicts go both ways and the outputs are equal, with the branch beside and folded in."""
    make, x = SHARED[case]
    theirs, ours = filled(make(loralib)), make(nn)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    again = make(loralib)
    again.load_state_dict(ours.state_dict())
    for mode in (True, False, True):
        for layer in (theirs, ours, again):
            layer.train(mode)  # loralib's returns nothing
        outputs = [layer(x) for layer in (theirs, ours, again)]
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(outputs[2], outputs[0])
        torch.testing.assert_close(weight(ours), weight(theirs))
    for bias in ("none", "all", "lora_only"):
        for layer, lib in ((theirs, loralib), (ours, nn)):
            lib.mark_only_lora_as_trainable(layer, bias)
    model, other = (torch.nn.Sequential(layer, torch.nn.Linear(2, 2)) for layer in (ours, theirs))
    for bias in ("none", "all"):
        found, wanted = nn.lora_state_dict(model, bias), loralib.lora_state_dict(other, bias)
        assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("case", ALL)
def test_is_the_dense_definition(case: str) -> None:
    make, x = ALL[case]
    layer: Any = filled(make(nn))
    plain = copy.deepcopy(layer)
    for name in ("lora_A", "lora_B"):
        if hasattr(plain, name):
            getattr(plain, name).data.zero_()
    before = weight(layer).clone()
    wanted = change(layer)
    with torch.no_grad():
        weight(plain).copy_(before.double() + wanted)
    out = plain.train()(x)
    torch.testing.assert_close(layer.train()(x), out)
    torch.testing.assert_close(layer.eval()(x), out)
    torch.testing.assert_close(
        weight(layer).double(), before.double() + wanted, atol=1e-7, rtol=1e-6
    )
    folded = weight(layer).clone()
    assert torch.equal(weight(layer.eval()), folded), "idempotent"
    assert torch.equal(weight(layer.train()), before)
    assert torch.equal(weight(layer.train()), before), "idempotent"
    assert any(wanted.flatten()) == hasattr(layer, "lora_A")


@pytest.mark.parametrize("case", [case for case in ALL if case != "embedding-padded"])
def test_gradients_are_those_of_the_dense_definition(case: str) -> None:
    make, x = ALL[case]
    layer: Any = filled(make(nn)).double()
    x = x if case.startswith("embedding") else x.double()
    nn.mark_only_lora_as_trainable(layer)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (2 if hasattr(layer, "lora_A") else 0)
    if not trained:
        return
    layer.train()(x).square().sum().backward()
    before = [p.detach().clone() for p in trained]
    direction = [torch.randn(p.shape, dtype=p.dtype) for p in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, direction, strict=True))
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for p, b, d in zip(trained, before, direction, strict=True):
                p.copy_(b + step * d)
            values.append(float(layer.eval()(x).square().sum()))
            layer.train()
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda lib: lib.Conv1d(4, 6, 3, r=2), lambda lib: lib.Conv3d(4, 6, 3, r=2)],
    ids=["conv1d", "conv3d"],
)
def test_loralib_has_no_conv1d_and_conv3d_of_larger_kernels(make: Any) -> None:
    """If this fails loralib has them: then compare with it."""
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        make(loralib).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_drift_in_half_precision(dtype: torch.dtype) -> None:
    theirs, ours = (filled(lib.Linear(64, 64, r=8)).to(dtype) for lib in (loralib, nn))
    before = theirs.weight.clone()
    assert torch.equal(ours.weight, before)
    exact = before.double() + change(ours)
    for _ in range(20):
        theirs.eval(), ours.eval()
        assert torch.equal(ours.weight, exact.float().to(dtype)), "rounded once"
        theirs.train(), ours.train()
        assert torch.equal(ours.weight, before)
    assert not torch.equal(theirs.weight, before), "loralib restores it now: compare with it"


@pytest.mark.parametrize("case", ["linear", "merged", "conv2d", "embedding"])
def test_loading_into_a_folded_layer(case: str) -> None:
    """What is loaded is the weight without the branch."""
    make, x = ALL[case]
    source = filled(make(nn)).train()
    layer = make(nn).eval()
    layer.load_state_dict(source.state_dict())
    assert layer.merged
    torch.testing.assert_close(layer(x), source(x))
    assert torch.equal(weight(layer.train()), weight(source))
    half = copy.deepcopy(source).eval().to(torch.float64).train()
    assert torch.equal(weight(half), weight(source).double()), "the kept weight moves along"


def test_merge_weights_off_keeps_the_branch_beside() -> None:
    layer: Any = filled(nn.Linear(8, 6, r=3, merge_weights=False))
    before, out = layer.weight.clone(), layer.train()(X)
    assert torch.equal(layer.eval()(X), out)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("case", ["linear", "merged", "conv2d"])
def test_dropout_is_on_the_branch_alone(case: str) -> None:
    makers: dict[str, Any] = {
        "linear": lambda **o: nn.Linear(8, 6, r=3, **o),
        "merged": lambda **o: nn.MergedLinear(8, 12, r=2, enable_lora=[True, False], **o),
        "conv2d": lambda **o: nn.Conv2d(4, 6, 3, r=2, **o),
    }
    x = ALL[case][1]
    layer, plain = (filled(makers[case](**o)) for o in ({"lora_dropout": 0.999999}, {}))
    base: Any = copy.deepcopy(plain)
    base.lora_A.data.zero_()
    torch.testing.assert_close(layer.train()(x), base.train()(x))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_the_unmerged_forward_forms_no_product() -> None:
    products: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "mm" in func.__name__:
                products.append(out.numel())
            return out

    tokens = torch.tensor([1, 2])
    for layer, x in (
        (nn.Linear(256, 256, r=2), torch.ones(2, 256)),
        (nn.MergedLinear(256, 256, r=2, enable_lora=[True, False]), torch.ones(2, 256)),
        (nn.Embedding(256, 256, r=2), tokens),
    ):
        with Watch(), torch.no_grad():
            layer.train()(x)
        assert products
        assert max(products) == 2 * 256
        products.clear()


def test_only_the_factors_are_trained_and_saved() -> None:
    model = torch.nn.Sequential(
        nn.Linear(4, 4, r=2), torch.nn.Linear(4, 4), nn.Linear(4, 4), torch.nn.LayerNorm(4)
    )
    wanted = {
        "none": {"0.lora_A", "0.lora_B"},
        "lora_only": {"0.lora_A", "0.lora_B", "0.bias"},
        "all": {"0.lora_A", "0.lora_B", "0.bias", "1.bias", "2.bias", "3.bias"},
    }
    for bias, names in wanted.items():
        nn.mark_only_lora_as_trainable(model, bias)  # type: ignore[arg-type]
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names
        assert set(nn.lora_state_dict(model, bias)) == names  # type: ignore[arg-type]
    conv = torch.nn.Sequential(nn.Conv2d(2, 2, 3, r=1))
    nn.mark_only_lora_as_trainable(conv, "lora_only")
    assert {n for n, p in conv.named_parameters() if p.requires_grad} == {
        "0.lora_A",
        "0.lora_B",
        "0.conv.bias",
    }
    with pytest.raises(UsageError, match="'some'"):
        nn.mark_only_lora_as_trainable(model, "some")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'some'"):
        nn.lora_state_dict(model, "some")  # type: ignore[arg-type]


def test_a_fresh_branch_is_zero_and_stays_so_when_drawn_anew() -> None:
    for make, x in ALL.values():
        layer: Any = make(nn)
        assert not change(layer).any() or isinstance(layer, nn.Embedding)
        filled(layer).eval()
        layer.reset_parameters()
        out = layer.train()(x)
        torch.testing.assert_close(layer.eval()(x), out)
        assert not change(layer).any()


def test_a_transposed_weight_is_drawn_for_its_own_fan_in() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 4, r=1, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.shape == (400, 4)
    assert layer.weight.abs().max() <= 400**-0.5


@pytest.mark.parametrize(
    "options",
    [
        {"enable_lora": [True, False], "sizes": [4, 4]},
        {"enable_lora": [True], "sizes": [4, 5]},
        {"enable_lora": [True] * 4},
    ],
)
def test_blocks_that_do_not_make_up_the_outputs(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="do not make up 9 outputs"):
        nn.MergedLinear(8, 9, r=2, **options)
