"""``extract`` against PEFT: every adapter loads with no missing and no unexpected key, and at full
rank the base with it computes what the tuned model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import (
    LoraToolsError,
    MismatchError,
    NonFiniteError,
    QualityGateError,
    UnsupportedAdapter,
    UsageError,
)

from . import models

KINDS = ("llama", "llama-tied", "bert", "gpt2")
FULL = 64  # no matrix here has a higher rank


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Base and tuned of each kind; every tensor of the tuned one differs."""
    root = tmp_path_factory.mktemp("pairs")
    result = {}
    for kind in models.MODELS:
        base = models.save(models.make(kind), root / kind / "base")
        tuned = models.load(base)
        models.perturb(tuned, 0.05, seed=1)
        result[kind] = base, models.save(tuned, root / kind / "tuned")
    return result


def assert_computes(
    base: Path, adapter: Path, wanted: torch.Tensor, tolerance: float = 1e-4
) -> None:
    found = models.outputs(models.attach_strictly(models.load(base), adapter))
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def mixed(pair: tuple[Path, Path], tuned: Callable[[str], bool]) -> torch.Tensor:
    """Outputs of the model that has the tensors chosen by ``tuned``, and the base's others."""
    base, other = models.load(pair[0]), models.tensors(pair[1])
    own = base.state_dict()
    base.load_state_dict({k: other.get(k, v) if tuned(k) else v for k, v in own.items()})
    base.tie_weights()
    return models.outputs(base)


@pytest.mark.parametrize("embeddings", ["lora", "save"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_tuned_model(
    kind: str, embeddings: Any, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs[kind]
    report = lora_tools.extract(base, tuned, tmp_path / "a", rank=FULL, embeddings=embeddings)
    assert report.totals["relative_error"] < 1e-5
    assert {fate.action for fate in report.plan} <= {"decomposed", "saved whole", "tied"}
    assert_computes(base, tmp_path / "a", models.outputs(models.load(tuned)))


@pytest.mark.parametrize("embeddings", ["lora", "save"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_it_gives_the_tuned_checkpoint(
    kind: str, embeddings: Any, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs[kind]
    lora_tools.extract(base, tuned, tmp_path / "a", rank=FULL, embeddings=embeddings)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(tuned), 1e-5)
    assert models.load(tmp_path / "m").config.to_dict() == models.load(tuned).config.to_dict() | {
        "_name_or_path": models.load(tmp_path / "m").config.to_dict().get("_name_or_path")
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "alpha": {"alpha": 7},
    "alpha-fraction": {"alpha": 0.5},
    "rslora-alpha": {"rslora": True, "alpha": 16},
    "exact": {"svd": "exact"},
    "float32": {"dtype": "float32"},
    "energy": {"rank": None, "energy": 1.0},
    "jobs": {"jobs": 3},
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_keep_the_function(
    kind: str, options: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs[kind]
    lora_tools.extract(base, tuned, tmp_path / "a", **{"rank": FULL, **OPTIONS[options]})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["use_rslora"] is OPTIONS[options].get("rslora", False)
    if "alpha" in OPTIONS[options]:
        assert config["lora_alpha"] == OPTIONS[options]["alpha"]
        assert not config["alpha_pattern"]
    assert_computes(base, tmp_path / "a", models.outputs(models.load(tuned)))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_differ_by_module(
    kind: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """An energy share gives each module its own rank; PEFT finds all of them in the patterns."""
    base, tuned = pairs[kind]
    report = lora_tools.extract(base, tuned, tmp_path / "a", energy=0.8, rslora=True)
    assert len({m.rank for m in report.modules}) > 2
    model = models.attach_strictly(models.load(base), tmp_path / "a")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    torch.testing.assert_close(
        models.outputs(models.load(tmp_path / "m")), models.outputs(model), rtol=1e-4, atol=1e-4
    )


LLAMA_PARTS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "embeddings-skip": ({"embeddings": "skip"}, lambda n: "embed" not in n),
    "rest-skip": ({"rest": "skip"}, lambda n: "norm" not in n and "bias" not in n),
    "include": ({"include": ["q_proj", "norm"]}, lambda n: "q_proj" in n or "norm" in n),
    "exclude": ({"exclude": [r"layers\.0\.", "norm$"]}, lambda n: not (".0." in n or "norm." in n)),
    "include-exclude": (
        {"include": ["mlp"], "exclude": ["up"]},
        lambda n: "mlp" in n and "up" not in n,
    ),
    "one-module": ({"include": [r"layers\.1\.mlp\.up_proj"]}, lambda n: "1.mlp.up_proj" in n),
    "no-head": ({"exclude": ["lm_head"]}, lambda n: "lm_head" not in n),
}


@pytest.mark.parametrize("case", LLAMA_PARTS)
def test_what_is_left_out_stays_the_base(
    case: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    options, tuned = LLAMA_PARTS[case]
    lora_tools.extract(*pairs["llama"], tmp_path / "a", rank=FULL, **options)
    assert_computes(pairs["llama"][0], tmp_path / "a", mixed(pairs["llama"], tuned))


@pytest.mark.parametrize("embeddings", ["skip", "lora", "save"])
def test_tied_head_follows_its_embedding(
    embeddings: Any, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    pair = pairs["llama-tied"]
    lora_tools.extract(*pair, tmp_path / "a", rank=FULL, embeddings=embeddings, rest="skip")
    left_out = ("norm", "bias", "embed", "lm_head") if embeddings == "skip" else ("norm", "bias")
    wanted = mixed(pair, lambda name: not any(part in name for part in left_out))
    assert_computes(pair[0], tmp_path / "a", wanted)


@pytest.mark.parametrize("embeddings", ["lora", "save"])
@pytest.mark.parametrize("task", ["bert-classifier", "bert"])
def test_headless_base(
    task: str, embeddings: Any, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """One side is BertModel, the other BertForSequenceClassification: "bert." is aligned. Where the
    classifier is only in the tuned side, it is saved, and the adapter is for the tuned class."""
    headless = models.save(models.load(pairs["bert-classifier"][0]).bert, tmp_path / "base")
    tuned = models.load(pairs["bert-classifier"][1])
    if task == "bert":
        base, target = pairs["bert-classifier"][0], models.save(tuned.bert, tmp_path / "tuned")
    else:
        base, target = headless, pairs["bert-classifier"][1]
    report = lora_tools.extract(base, target, tmp_path / "a", rank=FULL, embeddings=embeddings)
    assert any("'bert.'" in note for note in report.notes)
    model = models.quietly(lambda: type(tuned).from_pretrained(base)).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    found = models.attach_strictly(model, tmp_path / "a")
    if task == "bert":
        model.classifier.load_state_dict(tuned.classifier.state_dict())
    torch.testing.assert_close(models.outputs(found), models.outputs(tuned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_only_some_modules_changed(
    seed: int, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Whichever modules changed, target_modules and modules_to_save select exactly those."""
    base = pairs["gpt2"][0]
    tuned = models.load(base)
    names = [n for n, _ in tuned.named_parameters()]
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:6]
    for i in picked.tolist():
        models.perturb(tuned, 0.05, seed, only=names[i])
    models.perturb(tuned, 0.05, seed, only="h.1.attn.c_proj.weight")
    models.save(tuned, tmp_path / "tuned")
    lora_tools.extract(base, tmp_path / "tuned", tmp_path / "a", rank=FULL)
    assert_computes(base, tmp_path / "a", models.outputs(tuned))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_factors(
    dtype: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs["llama"]
    report = lora_tools.extract(base, tuned, tmp_path / "a", rank=FULL, dtype=dtype)
    factors = {k: v for k, v in models.tensors(tmp_path / "a").items() if "lora_" in k}
    assert {str(v.dtype) for v in factors.values()} == {f"torch.{dtype}"}
    assert 1e-5 < report.totals["relative_error"] < 1e-2, "measured after the cast"
    assert_computes(base, tmp_path / "a", models.outputs(models.load(tuned)), 0.05)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float64", "float32"),
    ],
)
def test_dtypes_of_the_two_sides_may_differ(
    one: str, other: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The delta of the values; what only the cast changed in neither side is not an update."""
    sides = []
    for name, dtype, path in zip("bt", (one, other), pairs["llama"], strict=True):
        model = models.load(path).to(torch.bfloat16).to(getattr(torch, dtype))
        sides.append(models.save(model, tmp_path / name))
    report = lora_tools.extract(*sides, tmp_path / "a", rank=FULL, dtype="float32")
    assert report.totals["relative_error"] < 1e-4
    lora_tools.merge(sides[0], [tmp_path / "a"], tmp_path / "m", dtype="float32")
    models.assert_same(models.tensors(tmp_path / "m"), models.tensors(sides[1]), 1e-4)
    same = models.save(models.load(sides[0]).to(getattr(torch, other)), tmp_path / "same")
    with pytest.raises(LoraToolsError, match="PEFT does not load an adapter without factors"):
        lora_tools.extract(sides[0], same, tmp_path / "none", rest="skip")


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("rslora", [False, True])
def test_consumers_read_one_rank_and_no_patterns(
    consumer: str, rslora: bool, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pairs["llama"]
    options: dict[str, Any] = {"rest": "skip", "energy": 0.8, "rslora": rslora, "alpha": 5}
    lora_tools.extract(base, tuned, tmp_path / "a", consumer=consumer, **options)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {v.shape[1 if "_B" in k else 0] for k, v in models.tensors(tmp_path / "a").items()}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert not any(config[k] for k in ("rank_pattern", "alpha_pattern", "modules_to_save"))
    assert config["use_rslora"] is False
    if consumer == "vllm":
        assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    lora_tools.extract(base, tuned, tmp_path / "free", **options)
    wanted = models.outputs(models.attach_strictly(models.load(base), tmp_path / "free"))
    assert_computes(base, tmp_path / "a", wanted)


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
def test_consumers_that_read_no_saved_tensors(
    consumer: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedAdapter, match=rf"{consumer} does not read .*norm.*rest=.skip"):
        lora_tools.extract(*pairs["llama"], tmp_path / "a", consumer=consumer)
    with pytest.raises(UnsupportedAdapter, match="embed_tokens"):
        lora_tools.extract(
            *pairs["llama"], tmp_path / "a", consumer=consumer, rest="skip", embeddings="save"
        )
    assert not (tmp_path / "a").exists()


def grown(pair: tuple[Path, Path], out: Path) -> Path:
    model = models.load(pair[1])
    models.quietly(lambda: model.resize_token_embeddings(models.VOCAB + 3))
    return models.save(model, out)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_grown_vocabulary(kind: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tuned = grown(pairs[kind], tmp_path / "tuned")
    with pytest.raises(MismatchError, match=r"\(96, 32\), tuned is \(99, 32\).*embeddings=.save"):
        lora_tools.extract(pairs[kind][0], tuned, tmp_path / "a")
    lora_tools.extract(pairs[kind][0], tuned, tmp_path / "a", rank=FULL, embeddings="save")
    wanted = models.outputs(models.load(tuned))
    model = models.load(pairs[kind][0])
    models.quietly(lambda: model.resize_token_embeddings(models.VOCAB + 3))
    torch.testing.assert_close(
        models.outputs(models.attach_strictly(model, tmp_path / "a")), wanted, rtol=1e-4, atol=1e-4
    )
    lora_tools.merge(pairs[kind][0], [tmp_path / "a"], tmp_path / "m")
    torch.testing.assert_close(
        models.outputs(models.load(tmp_path / "m")), wanted, rtol=1e-4, atol=1e-4
    )
    assert models.load(tmp_path / "m").config.vocab_size == models.VOCAB + 3


def bare(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("_", "."): t.clone() for name, t in tensors.items()}, path)
    return path


def test_tensors_on_one_side_only(tmp_path: Path) -> None:
    W, D = torch.randn(8, 6), torch.randn(8, 6)
    base = bare(tmp_path / "b.safetensors", a_weight=W, old_weight=W, n_weight=W[0])
    tuned = bare(tmp_path / "t.safetensors", a_weight=W + D, new_weight=W, n_weight=W[0])
    report = lora_tools.extract(base, tuned, tmp_path / "saved")
    fates = {fate.tensor: fate.action for fate in report.plan}
    assert fates == {
        "a.weight": "decomposed",
        "n.weight": "unchanged",
        "new.weight": "saved whole",
        "old.weight": "only in base",
    }
    assert torch.equal(models.tensors(tmp_path / "saved")["base_model.model.new.weight"], W)
    report = lora_tools.extract(base, tuned, tmp_path / "skipped", rest="skip")
    assert {f.tensor: f.action for f in report.plan}["new.weight"] == "skipped"
    assert not [k for k in models.tensors(tmp_path / "skipped") if "new" in k]
    with pytest.raises(MismatchError, match="only on the tuned side"):
        lora_tools.extract(base, tuned, tmp_path / "none", rest="error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_weight_has_nothing_to_decompose(dtype: torch.dtype, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    q, empty = torch.randn(8, 6, generator=noise), torch.zeros(4, 0)
    base = bare(tmp_path / "base", **{"m.q.weight": q, "m.e.weight": empty})
    changed = {"m.q.weight": q + 1, "m.e.weight": empty.to(dtype)}
    report = lora_tools.extract(base, bare(tmp_path / "tuned", **changed), tmp_path / "a", rank=1)
    assert {f.tensor: f.action for f in report.plan}["m.e.weight"] == "unchanged"
    assert [m.module for m in report.modules] == ["m.q"]


def test_rest_error_names_what_changed(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(norm|bias)\S*: changed, .* rest=.save"):
        lora_tools.extract(*pairs["llama"], tmp_path / "a", rest="error")


def test_nothing_in_common(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no tensor name in common"):
        lora_tools.extract(pairs["llama"][0], pairs["gpt2"][1], tmp_path / "a")


@pytest.mark.parametrize("rest", ["save", "skip", "error"])
def test_unchanged_is_an_error_and_no_empty_adapter(
    rest: Any, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base = pairs["llama"][0]
    with pytest.raises(MismatchError, match="PEFT does not load an adapter without factors"):
        lora_tools.extract(
            base, models.save(models.load(base), tmp_path / "t"), tmp_path / "a", rest=rest
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]


def test_only_norms_changed_is_an_error(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    tuned = models.load(pairs["llama"][0])
    models.perturb(tuned, 0.1, 0, only="norm")
    models.save(tuned, tmp_path / "t")
    with pytest.raises(MismatchError, match="PEFT does not load an adapter without factors"):
        lora_tools.extract(pairs["llama"][0], tmp_path / "t", tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_non_finite_input_names_tensor_and_side(value: float, side: str, tmp_path: Path) -> None:
    W = torch.randn(80, 70)
    spoilt = W.clone()
    spoilt[3, 4] = value
    ours, theirs = (spoilt, W) if side == "base" else (W, spoilt)
    base = bare(tmp_path / "b.safetensors", a_weight=ours)
    tuned = bare(tmp_path / "t.safetensors", a_weight=theirs)
    with pytest.raises(NonFiniteError, match=rf"a\.weight: the {side} side"):
        lora_tools.extract(base, tuned, tmp_path / "a")


def test_gate_writes_nothing(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(QualityGateError, match=r"worst is \S+ with 0\.\d+ at rank 1") as caught:
        lora_tools.extract(*pairs["llama"], tmp_path / "a", rank=1, max_error=0.1)
    assert caught.value.report is not None
    assert not (tmp_path / "a").exists()
    lora_tools.extract(*pairs["llama"], tmp_path / "a", rank=FULL, max_error=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 4, "energy": 0.5},
        {"energy": 1.5},
        {"alpha": 0},
        {"alpha": -1},
        {"include": ["("]},
        {"dtype": "int8"},
        {"tolerance": 2},
        {"consumer": "tgi"},
        {"alpha": float("inf")},
        {"alpha": float("nan")},
    ],
)
def test_calls_that_make_no_sense(
    options: dict[str, Any], pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        lora_tools.extract(*pairs["llama"], tmp_path / "a", **options)


def test_dry_run_states_every_fate(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pairs["llama"]
    report = lora_tools.extract(base, tuned, tmp_path / "a", dry_run=True)
    assert sorted(f.tensor for f in report.plan) == sorted(models.tensors(base))
    done = lora_tools.extract(base, tuned, tmp_path / "a")
    assert sorted(f.tensor for f in done.plan) == sorted(models.tensors(base))
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 0.5 * size < report.totals["expected_bytes_at_most"]
    assert (
        sum(v.nbytes for v in models.tensors(tmp_path / "a").values())
        <= (report.totals["expected_bytes_at_most"])
    )


@pytest.mark.parametrize("tied_side", ["base", "tuned"])
def test_tied_on_one_side_only(
    tied_side: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The head of the side that ties is its embedding: the other's is compared with that."""
    kinds = ("llama-tied", "llama") if tied_side == "base" else ("llama", "llama-tied")
    base, tuned = pairs[kinds[0]][0], pairs[kinds[1]][1]
    report = lora_tools.extract(base, tuned, tmp_path / "a", rank=FULL)
    assert "lm_head" in {m.module for m in report.modules}
    wanted = models.outputs(models.load(tuned))
    found = models.outputs(models.attach(base, tmp_path / "a"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    found = models.outputs(models.load(tmp_path / "m"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_tied_head_for_a_consumer(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """vLLM gets factors for both sides. llama.cpp keeps one tensor for both, and aborts on factors
    of it."""
    base, tuned = pairs["llama-tied"]
    lora_tools.extract(base, tuned, tmp_path / "a", rest="skip", consumer="vllm")
    assert len([key for key in models.tensors(tmp_path / "a") if "lm_head" in key]) == 2
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m")
    assert models.load(tmp_path / "m").config.tie_word_embeddings
    with pytest.raises(UnsupportedAdapter, match=r"embeddings=.skip"):
        lora_tools.extract(base, tuned, tmp_path / "l", rest="skip", consumer="llama.cpp")
    lora_tools.extract(
        base, tuned, tmp_path / "l", rest="skip", embeddings="skip", consumer="llama.cpp"
    )
    assert not [key for key in models.tensors(tmp_path / "l") if "embed" in key]
