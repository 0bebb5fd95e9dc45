"""``combine``: what it does is a statement about true deltas, so each method is compared with its
definition on dense deltas, by PEFT's own functions where PEFT has one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
import torch
from hypothesis import strategies as st
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import MismatchError, NonFiniteError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.linalg.combine import keep_by_chance, keep_largest
from lora_tools.sources.adapters import open_adapter

from . import iotools, models
from .test_layers_peft import PLAIN, mixtral, net, store, trained

CONFIGS: dict[str, dict[str, Any]] = {
    "one": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    },
    "two": {
        "target_modules": ["q_proj", "embed_tokens"],
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
    },
    "three": {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 4},
    "biased": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, "lora_bias": True},
    "biased-too": {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 3, "lora_bias": True},
    "dora": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, "modules_to_save": ["norm"]},
}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combine")
    base = models.save(models.make("llama"), folder / "base")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        models.train(base, folder / name, config, seed, save_embedding_layers=False)
    return folder


def deltas(root: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight and bias, having read every key."""
    model = models.attach_strictly(models.load(root / "base"), adapter)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            short = name.removeprefix("base_model.model.")
            found[short] = module.get_delta_weight("default").detach().double()
            if module.lora_bias["default"]:
                bias = module.lora_B["default"].bias.detach().double()
                found[f"{short}.bias"] = bias * module.scaling["default"]
    return found


def total(root: Path, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Σ w · Δ by definition."""
    result: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for module, delta in deltas(root, root / name).items():
            result[module] = result.get(module, torch.zeros_like(delta)) + weight * delta
    return result


WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.5}


def given(root: Path, weights: dict[str, float]) -> list[Any]:
    return [(root / name, weight) for name, weight in weights.items()]


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "linear"}, {"method": "cat", "energy": 1.0}, {"method": "svd", "rank": 99}],
)
def test_the_sum_of_true_deltas(options: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """rsLoRA, patterns, unequal ranks, modules that one adapter alone has."""
    report = lora_tools.combine(given(root, WEIGHTS), tmp_path / "c", **options)
    models.assert_same(deltas(root, tmp_path / "c"), total(root, WEIGHTS), 1e-6)
    assert {f.action for f in report.plan} == {"combine"}
    ranks = {n: m.r for n, m in open_adapter(tmp_path / "c").modules.items()}
    assert ranks[Q0] == 4 + 2 + 3
    assert ranks["model.layers.0.mlp.down_proj"] == 3 + 3


def test_cat_keeps_lora_A_bit_for_bit(root: Path, tmp_path: Path) -> None:
    lora_tools.combine(given(root, WEIGHTS), tmp_path / "c")
    key = f"base_model.model.{Q0}.lora_A.weight"
    parts = [models.tensors(root / name)[key] for name in WEIGHTS]
    assert torch.equal(models.tensors(tmp_path / "c")[key], torch.cat(parts))


def test_peft_adds_factors_where_this_adds_deltas(root: Path, tmp_path: Path) -> None:
    """Why the name ``linear`` does not mean the same there: shown, so that a change is noticed."""
    model = models.attach(root / "base", root / "one")
    models.quietly(lambda: model.load_adapter(root / "three", "three"))
    models.quietly(
        lambda: model.add_weighted_adapter(
            ["default", "three"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=7
        )
    )
    wanted = total(root, {"one": 1.0, "three": 1.0})
    lora_tools.combine([root / "one", root / "three"], tmp_path / "c", method="linear")
    found = deltas(root, tmp_path / "c")
    assert peft.__version__
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
        module = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(
            module.get_delta_weight("sum").detach().double(), delta, rtol=1e-4, atol=1e-5
        )


def test_a_cut_is_the_best_there_is_and_its_error_is_stated(root: Path, tmp_path: Path) -> None:
    for method in ("cat", "linear", "svd"):
        report = lora_tools.combine(given(root, WEIGHTS), tmp_path / method, method=method, rank=2)
        found, wanted = deltas(root, tmp_path / method), total(root, WEIGHTS)
        for module in report.modules:
            exact = torch.linalg.svdvals(wanted[module.module])
            error = (found[module.module] - wanted[module.module]).norm()
            assert error == pytest.approx(float(exact[2:].norm()), rel=1e-4, abs=1e-6)
            assert module.relative_error == pytest.approx(float(error / exact.norm()), abs=1e-5)
        assert report.totals["rank_max"] == 2


def test_svd_cuts_to_the_largest_rank_given(root: Path, tmp_path: Path) -> None:
    report = lora_tools.combine([root / "one", root / "three"], tmp_path / "c", method="svd")
    assert report.totals["rank_max"] == 4


PRUNED = {
    "ties-total": ({"method": "ties"}, lambda d, w: merge_utils.ties(d, w, 0.4, "total")),
    "ties-frequency": (
        {"method": "ties", "majority_sign": "frequency"},
        lambda d, w: merge_utils.ties(d, w, 0.4, "frequency"),
    ),
    "magnitude": (
        {"method": "magnitude_prune"},
        lambda d, w: merge_utils.magnitude_prune(d, w, 0.4),
    ),
}


@pytest.mark.parametrize("what", PRUNED)
def test_pruning_is_pefts_on_dense_deltas(what: str, root: Path, tmp_path: Path) -> None:
    """PEFT's functions, given what PEFT itself gives them for ``…_svd``: the true deltas."""
    options, formula = PRUNED[what]
    weights = {"one": 0.7, "three": 1.5}
    report = lora_tools.combine(
        given(root, weights), tmp_path / "c", **options, density=0.4, rank=999
    )
    one, three = (deltas(root, root / name) for name in weights)
    found = deltas(root, tmp_path / "c")
    for name in one:
        wanted = formula([one[name], three[name]], torch.tensor([0.7, 1.5], dtype=torch.float64))
        assert (found[name] - wanted).norm() <= 2e-5 * wanted.norm(), name
    assert any("after pruning the change is not low-rank" in note for note in report.notes)
    assert max(m.relative_error for m in report.modules) < 1e-4


def test_mergekits_ties(root: Path, tmp_path: Path) -> None:
    """Signs by the weighted sum, and the mean by the weights that agree: by definition."""
    weights = {"one": 2.0, "three": 0.5}
    lora_tools.combine(
        given(root, weights),
        tmp_path / "c",
        method="ties",
        density=0.5,
        majority_sign="weighted",
        normalize=True,
        rank=999,
    )
    one, three = (deltas(root, root / name) for name in weights)
    found = deltas(root, tmp_path / "c")
    for name in one:
        stack = torch.stack([merge_utils.prune(d[name], 0.5, "magnitude") for d in (one, three)])
        factor = torch.tensor([2.0, 0.5], dtype=torch.float64).view(2, 1, 1)
        sign = torch.where((stack * factor).sum(0) >= 0, 1.0, -1.0)
        mask = ((stack * factor).sign() == sign).double()
        divisor = (factor * mask).sum(0)
        wanted = (stack * factor * mask).sum(0) / divisor.where(divisor.abs() > 1e-8, 1.0)
        assert (found[name] - wanted).norm() <= 2e-5 * wanted.norm(), name


def test_dare_is_seeded_and_right_in_expectation(root: Path, tmp_path: Path) -> None:
    weights = {"one": 0.7, "three": 1.5}

    def run(out: str, seed: int, method: str = "dare_linear", **more: Any) -> dict[str, Any]:
        lora_tools.combine(
            given(root, weights),
            tmp_path / out,
            method=method,
            density=0.5,
            seed=seed,
            rank=999,
            **more,
        )
        return deltas(root, tmp_path / out)

    first = run("a", 1)
    run("b", 1, jobs=1)
    assert iotools.tree(tmp_path / "a") == iotools.tree(tmp_path / "b")
    mean = {name: delta / 30 for name, delta in first.items()}
    for seed in range(2, 31):
        for name, delta in run(f"s{seed}", seed).items():
            mean[name] += delta / 30
    assert any((first[n] - d).abs().max() > 0.1 for n, d in run("x", 2).items())
    one, three = (deltas(root, root / name) for name in weights)
    for name in one:
        # Each element is 0 or twice itself: its variance is its square, over thirty runs.
        spread = ((0.7 * one[name]).square() + (1.5 * three[name]).square()).sum() / 30
        wanted = 0.7 * one[name] + 1.5 * three[name]
        assert (mean[name] - wanted).norm() < 1.3 * spread.sqrt()
        element = first[name] / torch.where(wanted == 0, 1.0, wanted)
        assert element.abs().max() > 1.5
    ties = run("t", 1, "dare_ties")
    assert any((first[name] - delta).abs().max() > 0.1 for name, delta in ties.items())


def test_density_one_prunes_nothing(root: Path, tmp_path: Path) -> None:
    for method in ("dare_linear", "magnitude_prune"):
        lora_tools.combine(
            given(root, WEIGHTS), tmp_path / method, method=method, density=1.0, rank=999
        )
        models.assert_same(deltas(root, tmp_path / method), total(root, WEIGHTS), 2e-5)


def test_normalize_divides_by_the_sum_of_the_weights(root: Path, tmp_path: Path) -> None:
    wanted = {k: v / sum(WEIGHTS.values()) for k, v in total(root, WEIGHTS).items()}
    lora_tools.combine(given(root, WEIGHTS), tmp_path / "c", normalize=True)
    models.assert_same(deltas(root, tmp_path / "c"), wanted, 1e-6)
    lora_tools.combine(
        given(root, WEIGHTS),
        tmp_path / "p",
        normalize=True,
        density=1.0,
        method="magnitude_prune",
        rank=999,
    )
    models.assert_same(deltas(root, tmp_path / "p"), wanted, 2e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "svd", "rank": 9}, {"method": "magnitude_prune", "density": 1.0, "rank": 99}],
)
def test_biases_are_added(options: dict[str, Any], root: Path, tmp_path: Path) -> None:
    weights = {"biased": 0.5, "biased-too": 2.0}
    lora_tools.combine(given(root, weights), tmp_path / "c", **options)
    models.assert_same(deltas(root, tmp_path / "c"), total(root, weights), 2e-5)


def test_other_formats_come_in(root: Path, tmp_path: Path) -> None:
    lora_tools.convert(root / "three", tmp_path / "k.safetensors", to="kohya")
    mine = [(root / "one", 0.7), (tmp_path / "k.safetensors", 1.5)]
    lora_tools.combine(mine, tmp_path / "c", base=root / "base")
    models.assert_same(deltas(root, tmp_path / "c"), total(root, {"one": 0.7, "three": 1.5}), 1e-6)


@pytest.mark.parametrize("to", sorted(FORMATS.keys() - {"peft"}))
def test_what_came_in_one_format_goes_out_in_it(to: str, root: Path, tmp_path: Path) -> None:
    """A file stays a file; only those that need a base for their names are given one."""
    mine = []
    options = {"base": root / "base"} if FORMATS[to].base and not FORMATS[to].keeps_names else {}
    for name, weight in (("one", 0.7), ("three", 1.5)):
        lora_tools.convert(root / name, tmp_path / name, to=to, base=root / "base")
        mine.append((tmp_path / name, weight))
    report = lora_tools.combine(mine, tmp_path / "c", **options)
    assert (tmp_path / "c").is_dir() == FORMATS[to].is_folder
    assert open_adapter(tmp_path / "c", as_stored=True, guess=True).format == to
    assert any(f"written in the format {FORMATS[to].title}" in note for note in report.notes)
    lora_tools.combine(mine, tmp_path / "p", to="peft", base=root / "base")
    lora_tools.convert(tmp_path / "c", tmp_path / "again", to="peft", base=root / "base")
    for out in (tmp_path / "again", tmp_path / "p"):
        models.assert_same(deltas(root, out), total(root, {"one": 0.7, "three": 1.5}), 1e-6)


def test_metadata_of_trainers_is_kept_where_all_say_it(tmp_path: Path) -> None:
    said = [
        {"ss_base_model_version": "sd", "ss_network_dim": "2", "sshs_model_hash": "a", "ss_tag": t}
        for t in "xy"
    ]
    for i, metadata in enumerate(said):
        save_file(
            {
                "lora_unet_a_b.lora_down.weight": torch.randn(2, 6),
                "lora_unet_a_b.lora_up.weight": torch.randn(6, 2),
                "lora_unet_a_b.alpha": torch.tensor(1.0),
            },
            tmp_path / f"{i}.safetensors",
            metadata,
        )
    out = tmp_path / "c.safetensors"
    lora_tools.combine([tmp_path / "0.safetensors", (tmp_path / "1.safetensors", 0.5)], out)
    with safe_open(out, "pt") as file:
        found = {k: v for k, v in file.metadata().items() if k.startswith("ss")}
    assert found == {"ss_base_model_version": "sd", "ss_network_dim": "4"}


def test_adapters_of_two_layouts_are_added_in_one(tmp_path: Path) -> None:
    """FLUX: qkv of one file and q, k, v of another act on the same rows."""
    a, b = "double_blocks.0.img_attn", "transformer_blocks.0.attn"
    shapes = {f"{a}.qkv": (24, 8), f"{a}.proj": (8, 8), "single_blocks.0.linear2": (8, 16)}
    base = {f"{k}.weight": torch.zeros(shape) for k, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    fused = {"down": torch.randn(2, 8), "up": torch.randn(24, 2)}
    parts = {k: {"down": torch.randn(2, 8), "up": torch.randn(8, 2)} for k in "qkv"}
    one = {f"diffusion_model.{a}.qkv.lora_{k}.weight": x for k, x in fused.items()}
    two = {
        f"transformer.{b}.to_{k}.lora_{s}.weight": x
        for k, part in parts.items()
        for s, x in part.items()
    }
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file, tensors in zip(files, (one, two), strict=True):
        save_file(tensors, file)
    wanted = fused["up"] @ fused["down"]
    wanted += torch.cat([parts[k]["up"] @ parts[k]["down"] for k in "qkv"])
    for to in ("peft", "kohya", "diffusers", "comfyui"):
        lora_tools.combine(files, tmp_path / to, to=to, base=tmp_path / "base.safetensors")
        merged = tmp_path / f"{to}.safetensors"
        lora_tools.merge(tmp_path / "base.safetensors", [tmp_path / to], merged)
        torch.testing.assert_close(load_file(merged)[f"{a}.qkv.weight"], wanted)


def test_one_tensor_saved_whole_is_copied_and_two_are_refused(root: Path, tmp_path: Path) -> None:
    lora_tools.combine([root / "one", root / "saved"], tmp_path / "c")
    norm = "base_model.model.model.norm.weight"
    assert torch.equal(models.tensors(tmp_path / "c")[norm], models.tensors(root / "saved")[norm])
    models.attach_strictly(models.load(root / "base"), tmp_path / "c")
    shutil.copytree(root / "saved", tmp_path / "again")
    for adapters in ([root / "saved", tmp_path / "again"], [(root / "saved", 0.5), root / "one"]):
        with pytest.raises(UnsupportedAdapter, match=r"norm\.weight: .*replaces it whole"):
            lora_tools.combine(adapters, tmp_path / "d")


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    with pytest.raises(UnsupportedAdapter, match="DoRA"):
        lora_tools.combine([root / "one", root / "dora"], out)
    for options in (
        {"method": "ties"},
        {"density": 0.5},
        {"method": "mean"},
        {"majority_sign": "most"},
        {"method": "ties", "density": 0.0},
        {"method": "ties", "density": float("nan")},
        {"rank": 0},
        {"rank": 2, "energy": 0.5},
    ):
        with pytest.raises(UsageError):
            lora_tools.combine([root / "one"], out, **options)
    with pytest.raises(UsageError, match="sum of the weights"):
        lora_tools.combine([(root / "one", 1.0), (root / "two", -1.0)], out, normalize=True)
    other = iotools.adapter(tmp_path / "other", {Q0: (32, 48)})
    with pytest.raises(MismatchError, match=r"q_proj.*\[4, 32\].*\[2, 48\]"):
        lora_tools.combine([root / "one", other], out)
    huge = models.write_adapter(tmp_path / "h", torch.full((1, 4), 1e30), torch.ones(4, 1), 1e12)
    for more in ({}, {"method": "svd"}, {"method": "magnitude_prune", "density": 0.5}):
        with pytest.raises(NonFiniteError, match="w"):
            lora_tools.combine([huge], out, dtype="float16", **more)
    assert not out.exists()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    weight=st.floats(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_ranks_and_weights(
    ranks: list[int], seed: int, weight: float, dtype: torch.dtype
) -> None:
    noise = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        root, adapters, wanted = Path(folder), [], torch.zeros(5, 7, dtype=torch.float64)
        for i, r in enumerate(ranks):
            A = torch.randn(r, 7, generator=noise).to(dtype)
            B = torch.randn(5, r, generator=noise).to(dtype)
            adapters.append((models.write_adapter(root / str(i), A, B, 2 * r), weight + i))
            wanted += 2 * (weight + i) * (B.double() @ A.double())
        lora_tools.combine(adapters, root / "c")
        tensors = models.tensors(root / "c")
        A, B = (tensors[f"base_model.model.w.lora_{x}.weight"].double() for x in "AB")
        limit = 1e-6 if dtype == torch.float32 else 2e-2
        scale = sum(abs(weight + i) for i in range(len(ranks))) + 1e-9
        assert (B @ A - wanted).norm() <= limit * 40 * scale


def test_pruning_by_itself() -> None:
    x = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    assert torch.equal(
        keep_largest(x.clone(), 0.5), torch.tensor([[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]])
    )
    assert torch.equal(keep_largest(x.clone(), 1.0), x)
    big = torch.ones(300, 300)
    kept = keep_by_chance(big.clone(), 0.25, seed=3)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert abs(float(kept.mean()) - 1) < 0.03
    assert torch.equal(kept, keep_by_chance(big.clone(), 0.25, seed=3))


KINDS: dict[str, dict[str, Any]] = {
    "convolutions": {"target_modules": PLAIN, "rank_pattern": {"image": 2}},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_kind(kind: str, tmp_path: Path) -> None:
    """Merging the combined adapter is merging both; cut, resized and converted, it stays so."""
    make = net if kind == "convolutions" else mixtral
    if kind == "convolutions":
        base = store(make(), tmp_path / "base")
    else:
        base = models.save(make(), tmp_path / "base", save_original_format=False)
    trained(make(), tmp_path / "a", **KINDS[kind])
    trained(make(), tmp_path / "b", **KINDS[kind] | {"r": 3, "lora_alpha": 2})
    weighted = [(tmp_path / "a", 0.5), (tmp_path / "b", 2.0)]
    lora_tools.merge(base, weighted, tmp_path / "wanted")
    wanted = models.tensors(tmp_path / "wanted")
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "cat": ({}, 1e-6),
        "linear": ({"method": "linear"}, 1e-6),
        "pruned": ({"method": "magnitude_prune", "density": 1.0, "rank": 99}, 2e-5),
    }
    for name, (options, rtol) in ways.items():
        lora_tools.combine(weighted, tmp_path / name, **options)
        lora_tools.merge(base, [tmp_path / name], tmp_path / f"{name}-merged")
        models.assert_same(models.tensors(tmp_path / f"{name}-merged"), wanted, rtol)
    lora_tools.convert(tmp_path / "cat", tmp_path / "p", to="peft", energy=1.0)
    lora_tools.merge(base, [tmp_path / "p"], tmp_path / "p-merged")
    models.assert_same(models.tensors(tmp_path / "p-merged"), wanted, 1e-6)
