"""``rescale``: what becomes of the effect, that a resize is the best there is, and that PEFT reads
the result."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

import lora_tools
from lora_tools.adapting.convert_module import factor_bytes, rank_ceiling
from lora_tools.errors import (
    AdapterError,
    NonFiniteError,
    OutputError,
    UnsupportedAdapter,
    UsageError,
)
from lora_tools.linalg import factors
from lora_tools.linalg.ranks import RankRule
from lora_tools.sources.adapters import open_adapter

from . import models

R = 6
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    },
    "rslora": {
        "target_modules": ["q_proj", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"lm_head": 2},
    },
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm", "lm_head"],
        "bias": "all",
        "trainable_token_indices": [3, 9],
    },
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.make("llama"), tmp_path_factory.mktemp("base") / "b")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        config = {"r": R, "lora_alpha": 10, **config}
        models.train(base, root / name, config, save_embedding_layers=False)
    return {name: root / name for name in CONFIGS}


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT, having read every key, adds to each weight and bias."""
    model = models.attach_strictly(models.load(base), adapter)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double()
            if module.lora_bias["default"]:
                bias = module.lora_B["default"].bias.detach().double()
                found[f"{name}.bias"] = bias * module.scaling["default"]
    return found


def config(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


KEEP: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 3},
    "alpha-fraction": {"alpha": 0.3},
    "rslora": {"rslora": True},
    "no-rslora": {"rslora": False},
    "alpha-rslora": {"alpha": 7, "rslora": True},
    "scale-by-one": {"scale": 1},
    "full-rank": {"rank": R},
    "more-than-full-rank": {"rank": 100},
    "all-energy": {"energy": 1.0},
    "full-rank-alpha-rslora": {"rank": R, "alpha": 2, "rslora": True},
    "float64": {"dtype": "float64"},
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("options", KEEP)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_effect_is_kept(
    kind: str, options: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "dora" and "scale" in KEEP[options]:
        pytest.skip("refused: see below")
    lora_tools.rescale(adapters[kind], tmp_path / "a", **KEEP[options])
    models.assert_same(deltas(base, tmp_path / "a"), deltas(base, adapters[kind]), 1e-5)
    written = config(tmp_path / "a")
    if "rslora" in KEEP[options]:
        assert written["use_rslora"] is KEEP[options]["rslora"]
    if "alpha" in KEEP[options]:
        assert written["lora_alpha"] == KEEP[options]["alpha"]
        assert not written["alpha_pattern"]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0, 0.1, 0.0])
@pytest.mark.parametrize("more", [{}, {"alpha": 3}, {"rslora": True}, {"rank": R}])
@pytest.mark.parametrize("kind", ["patterns", "rslora", "lora-bias"])
def test_scale_multiplies_the_effect(
    kind: str,
    more: dict[str, Any],
    scale: float,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    lora_tools.rescale(adapters[kind], tmp_path / "a", scale=scale, **more)
    wanted = {name: scale * delta for name, delta in deltas(base, adapters[kind]).items()}
    models.assert_same(deltas(base, tmp_path / "a"), wanted, 1e-5)
    if not more:  # only alpha moved: not one factor was rounded
        mine, theirs = models.tensors(tmp_path / "a"), models.tensors(adapters[kind])
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["plain", "patterns", "rslora"])
def test_changing_alpha_changes_the_effect_in_proportion(
    kind: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = lora_tools.rescale(adapters[kind], tmp_path / "a", alpha=20, effect="change")
    assert any("in proportion" in note for note in report.notes)
    before = deltas(base, adapters[kind])
    five = "base_model.model.model.layers.1.self_attn.q_proj"
    wanted = {
        name: delta * (4 if kind == "patterns" and name == five else 2)
        for name, delta in before.items()
    }
    models.assert_same(deltas(base, tmp_path / "a"), wanted, 1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    first=st.floats(0.01, 100),
    second=st.floats(-100, -0.01),
    alpha=st.floats(0.5, 64),
    seed=st.integers(0, 99),
)
def test_scaling_twice_is_scaling_by_the_product(
    first: float, second: float, alpha: float, seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    A, B = torch.randn(3, 7, generator=noise), torch.randn(5, 3, generator=noise)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given = models.write_adapter(root / "a", A, B, alpha)
        lora_tools.rescale(given, root / "once", scale=first)
        lora_tools.rescale(root / "once", root / "twice", scale=second)
        lora_tools.rescale(given, root / "product", scale=first * second)
        twice, product = config(root / "twice"), config(root / "product")
        assert twice["lora_alpha"] == pytest.approx(product["lora_alpha"], rel=1e-12)
        assert product["lora_alpha"] == pytest.approx(first * second * alpha, rel=1e-12)
        one, other = (load_file(root / n / "adapter_model.safetensors") for n in ("twice", "a"))
        assert all(torch.equal(one[key], other[key]) for key in other)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    rows=st.integers(2, 40),
    cols=st.integers(2, 40),
    r=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
    rslora=st.booleans(),
)
def test_resize_is_the_best_of_its_rank(
    rows: int, cols: int, r: int, rank: int, seed: int, rslora: bool
) -> None:
    """Against a dense SVD of the product: Eckart and Young's error, and no other."""
    noise = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, cols, generator=noise), torch.randn(rows, r, generator=noise)
    dense = 2 / r * B.double() @ A.double()
    S = torch.linalg.svdvals(dense)
    with tempfile.TemporaryDirectory() as folder:
        given = models.write_adapter(Path(folder) / "a", A, B, 2)
        out = Path(folder) / "out"
        report = lora_tools.rescale(given, out, rank=rank, rslora=rslora)
        factors = load_file(out / "adapter_model.safetensors")
        written = config(out)
    scale = written["lora_alpha"] / (written["r"] ** 0.5 if rslora else written["r"])
    A, B = (factors[f"base_model.model.w.lora_{part}.weight"] for part in "AB")
    error = float((dense - scale * B.double() @ A.double()).norm())
    best = float(S[rank:].square().sum().sqrt())
    assert A.shape[0] == B.shape[1] == written["r"] <= min(rank, r, rows, cols)
    assert error == pytest.approx(best, rel=1e-4, abs=1e-5 * float(S[0]))
    stated = report.modules[0].relative_error * float(dense.norm())
    assert stated == pytest.approx(error, rel=1e-3, abs=1e-6 * float(S[0]))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_energy_is_the_smallest_rank_that_holds_it(
    share: float, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = lora_tools.rescale(adapters["patterns"], tmp_path / "a", energy=share)
    before = deltas(base, adapters["patterns"])
    assert len(report.modules) == len(before)
    for module in report.modules:
        squared = torch.linalg.svdvals(before[f"base_model.model.{module.module}"]).square()
        kept = squared.cumsum(0) / squared.sum()
        assert kept[module.rank - 1] >= share * (1 - 1e-9)
        assert module.rank == 1 or kept[module.rank - 2] < share
    capped = lora_tools.rescale(adapters["patterns"], tmp_path / "b", energy=share, max_rank=2)
    assert max(m.rank for m in capped.modules) <= 2
    models.attach_strictly(models.load(base), tmp_path / "b")


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("more", [{}, {"rank": 2}, {"scale": 1.0}, {"energy": 0.99}])
@pytest.mark.parametrize("kind", ["plain", "patterns", "rslora"])
def test_padding_for_a_consumer_keeps_the_effect(
    kind: str,
    more: dict[str, Any],
    consumer: str,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    lora_tools.rescale(adapters[kind], tmp_path / "a", consumer=consumer, **more)
    written = config(tmp_path / "a")
    shapes = {k: v.shape for k, v in models.tensors(tmp_path / "a").items()}
    ranks = {shape[1 if "_B" in key else 0] for key, shape in shapes.items()}
    assert ranks == {written["r"]} == {written["lora_alpha"]}
    assert not any(written[key] for key in ("rank_pattern", "alpha_pattern"))
    assert written["use_rslora"] is False
    if consumer == "vllm":
        assert written["r"] == 8
    wanted = adapters[kind]
    if {"rank", "energy"} & set(more):
        wanted = tmp_path / "free"
        lora_tools.rescale(adapters[kind], wanted, **more)
    models.assert_same(deltas(base, tmp_path / "a"), deltas(base, wanted), 1e-5)


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(
    ("kind", "part"),
    [("dora", "DoRA"), ("saved", r"tensors saved whole \(\S+\)"), ("lora-bias", "lora_bias")],
)
def test_parts_that_a_consumer_does_not_read(
    kind: str, part: str, consumer: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"{consumer} does not read {part}"):
        lora_tools.rescale(adapters[kind], tmp_path / "a", consumer=consumer)
    assert not (tmp_path / "a").exists()


def test_a_rank_that_vllm_does_not_have(tmp_path: Path) -> None:
    given = models.write_adapter(tmp_path / "a", torch.randn(600, 700), torch.randn(700, 600), 1)
    with pytest.raises(UnsupportedAdapter, match=r"reads ranks up to 512.*600"):
        lora_tools.rescale(given, tmp_path / "out", consumer="vllm")
    lora_tools.rescale(given, tmp_path / "out", consumer="vllm", rank=300)
    assert config(tmp_path / "out")["r"] == 320


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"alpha": 3, "effect": "change"}])
def test_dora_is_not_scaled(
    options: dict[str, Any], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedAdapter, match="DoRA adapter cannot be scaled"):
        lora_tools.rescale(adapters["dora"], tmp_path / "a", **options)


@pytest.mark.parametrize("kind", ["saved", "dora"])
@pytest.mark.parametrize("options", [{"alpha": 3}, {"rank": 2}, {"dtype": "bfloat16"}])
def test_what_is_not_a_factor_travels_as_it_is(
    kind: str, options: dict[str, Any], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora_tools.rescale(adapters[kind], tmp_path / "a", **options)
    mine, theirs = models.tensors(tmp_path / "a"), models.tensors(adapters[kind])
    assert mine.keys() == theirs.keys()
    others = [key for key in theirs if "lora_A" not in key and "lora_B" not in key]
    others = [key for key in others if "lora_embedding" not in key]
    assert len(others) >= 2
    assert all(torch.equal(mine[key], theirs[key]) for key in others)
    models.attach_strictly(models.load(base), tmp_path / "a")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype_is_that_of_the_factors(
    dtype: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora_tools.rescale(adapters["lora-bias"], tmp_path / "a", dtype=dtype)
    found = {str(v.dtype) for v in models.tensors(tmp_path / "a").values()}
    assert found == {f"torch.{dtype}"}
    tolerance = 2 * torch.finfo(getattr(torch, dtype)).eps + 1e-6
    wanted = deltas(base, adapters["lora-bias"])
    models.assert_same(deltas(base, tmp_path / "a"), wanted, tolerance)


def test_overflow_is_an_error(tmp_path: Path) -> None:
    given = models.write_adapter(tmp_path / "a", torch.ones(1, 4), torch.full((4, 1), 1e6), 1)
    with pytest.raises(NonFiniteError, match="w: the factors hold an inf"):
        lora_tools.rescale(given, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"effect": "change"},
        {"alpha": 0},
        {"alpha": -1},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"rank": 0},
        {"rank": 2, "energy": 0.5},
        {"max_rank": 4},
        {"rank": 2, "alpha": 3, "effect": "change"},
        {"dtype": "int4"},
        {"consumer": "tgi"},
        {"energy": 0},
    ],
)
def test_calls_that_make_no_sense(
    options: dict[str, Any], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        lora_tools.rescale(adapters["plain"], tmp_path / "a", **options)


def test_dry_run_and_existing_output(adapters: dict[str, Path], tmp_path: Path) -> None:
    report = lora_tools.rescale(adapters["saved"], tmp_path / "a", alpha=2, dry_run=True)
    assert not (tmp_path / "a").exists()
    assert len(report.plan) == 2 + 6 + 8 + 1  # factors, saved tensors, biases, tokens
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        lora_tools.rescale(adapters["saved"], tmp_path / "a", alpha=2)
    lora_tools.rescale(adapters["saved"], tmp_path / "a", alpha=2, force=True)
    with pytest.raises(OutputError, match="input"):
        lora_tools.rescale(tmp_path / "a", tmp_path / "a", alpha=2, force=True)


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"alpha": 5}, {"rslora": True}, {"dtype": "bf16"}]
)
def test_tied_embeddings_stay_tied(options: dict[str, Any], tmp_path: Path) -> None:
    """Both sides of the pair are rescaled, each by itself; a merge finds them alike still."""
    base = models.save(models.make("llama-tied"), tmp_path / "b")
    config = {"r": R, "lora_alpha": 10, "target_modules": ["lm_head"], "ensure_weight_tying": True}
    models.train(base, tmp_path / "a", config)
    lora_tools.rescale(tmp_path / "a", tmp_path / "out", **options)
    lora_tools.merge(base, [tmp_path / "out"], tmp_path / "m")
    assert models.tensors(tmp_path / "m").keys() == models.tensors(base).keys()
    found = models.outputs(models.load(tmp_path / "m"))
    tolerance = 1e-4 if "dtype" not in options else 0.1
    torch.testing.assert_close(
        found, models.outputs(models.attach(base, tmp_path / "out")), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("verb", ["rescale", "convert"])
def test_magnitudes_are_checked(verb: str, tmp_path: Path) -> None:
    """Of a number that does not fit the factors, or not finite: refused before anything is
    written, as merge does."""
    noise = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 8, generator=noise), torch.randn(6, 2, generator=noise)

    def run(given: Path) -> None:
        if verb == "rescale":
            lora_tools.rescale(given, tmp_path / "out", rank=1)
        else:
            lora_tools.convert(given, tmp_path / "out", to="kohya")

    few = models.write_adapter(tmp_path / "few", A, B, 4, m=torch.ones(5))
    with pytest.raises(AdapterError, match="numbers, one for each row of"):
        run(few)
    nan = models.write_adapter(tmp_path / "nan", A, B, 4, m=torch.full((6,), torch.nan))
    with pytest.raises(NonFiniteError, match="w: "):
        run(nan)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ convolutions


@pytest.fixture
def convolutions(tmp_path: Path) -> Path:
    """Of an adapter by PEFT: a 2-D, a 3-D and a grouped convolution, and a linear layer."""
    net = torch.nn.ModuleDict(
        {
            "image": torch.nn.Conv2d(3, 40, 5),
            "video": torch.nn.Conv3d(2, 12, 3),
            "grouped": torch.nn.Conv2d(8, 12, 3, groups=4),
            "head": torch.nn.Linear(6, 9),
        }
    )
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=list(net), r=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT itself merges no groups
        model = peft.get_peft_model(net, config)
    models.perturb(model, 0.3, seed=1)
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def sizes(adapter: Path) -> dict[str, tuple[int, int]]:
    """Of each module: its rank, and the numbers in its factors."""
    given = open_adapter(adapter)
    numbers = {
        name: given.tensor(m.A).numel() + given.tensor(m.B).numel()
        for name, m in given.modules.items()
    }
    return {name: (given.modules[name].r, numbers[name]) for name in numbers}


@pytest.mark.parametrize("budget", [600, 900, 1400])
def test_a_budget_counts_the_kernels(budget: int, convolutions: Path, tmp_path: Path) -> None:
    """What is written is no larger, and one more direction of no module would fit."""
    before = sizes(convolutions)
    lora_tools.rescale(convolutions, tmp_path / "r", budget=str(budget))
    after = sizes(tmp_path / "r")
    taken = sum(numbers for _, numbers in after.values())
    assert taken <= budget
    for name, (r, numbers) in after.items():
        if r < before[name][0]:
            step = 4 if name == "grouped" else 1  # a direction of each group
            assert taken + numbers // (r // step) > budget, name
    given = convolutions / "adapter_model.safetensors"
    most = given.stat().st_size * 2 // 3
    lora_tools.rescale(convolutions, tmp_path / "b", budget=f"{most}B")
    assert (tmp_path / "b" / "adapter_model.safetensors").stat().st_size <= most


def test_a_convolution_can_have_a_rank_above_its_channels(convolutions: Path) -> None:
    """Its kernel multiplies them: 3 · 5 · 5 columns, and not 3."""
    given = open_adapter(convolutions)
    ceilings = {
        name: rank_ceiling(module, given, RankRule("rank", 7))
        for name, module in given.modules.items()
    }
    assert ceilings["image"] == ceilings["video"] == 7
    assert ceilings["head"] == 6
    assert rank_ceiling(given.modules["image"], given, None) == 8


def test_memory_is_that_of_all_numbers_of_the_factors(convolutions: Path) -> None:
    given = open_adapter(convolutions)
    for name, (_, numbers) in sizes(convolutions).items():
        assert factor_bytes(given.modules[name], given) == 8 * numbers


def test_zeros_for_a_higher_rank_keep_a_convolution(convolutions: Path) -> None:
    given = open_adapter(convolutions)
    for module in given.modules.values():
        if module.name == "grouped":
            continue  # its rank is shared among its groups
        A, B = given.tensor(module.A), given.tensor(module.B)
        wide_A, wide_B = factors.padded(A, B, 11)
        assert wide_A.shape == (11, *A.shape[1:])
        assert wide_B.shape == (B.shape[0], 11, *B.shape[2:])
        torch.testing.assert_close(
            wide_B.flatten(1) @ wide_A.flatten(1), B.flatten(1) @ A.flatten(1)
        )
