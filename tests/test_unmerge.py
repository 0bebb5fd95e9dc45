"""``unmerge``: with the sidecar it gives the base back byte for byte; without, within its bound."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, LoraToolsError, MismatchError, UnsupportedAdapter
from lora_tools.formats.sidecar import NAME as SIDECAR
from lora_tools.formats.sidecar import Listing, Packed

from . import iotools, models

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
LLAMA = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
ALL = ["q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"]

# Model kind, adapters as (LoraConfig, weight), further options of merge.
CASES: dict[str, tuple[str, list[tuple[dict[str, Any], float]], dict[str, Any]]] = {
    "plain": ("llama", [(LLAMA, 1.0)], {}),
    "rslora-huge": ("llama", [({**LLAMA, "use_rslora": True, "lora_alpha": 400}, 1.0)], {}),
    "dora": ("llama", [({**LLAMA, "use_dora": True}, 1.0)], {}),
    "dora-embeddings": ("llama", [({"target_modules": ALL, "use_dora": True}, 1.0)], {}),
    "dora-gpt2": (
        "gpt2",
        [({"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}, 0.7)],
        {},
    ),
    "several": (
        "llama",
        [(LLAMA, 0.5), ({**LLAMA, "use_dora": True}, -0.25), ({"target_modules": ALL}, 2.0)],
        {},
    ),
    "bias": ("llama", [({**LLAMA, "bias": "all"}, 1.0)], {}),
    "lora-bias": ("bert", [({"target_modules": ["query", "dense"], "lora_bias": True}, 0.3)], {}),
    "embeddings": ("llama", [({"target_modules": ALL}, 1.0)], {}),
    "saved": ("llama", [({**LLAMA, "modules_to_save": ["norm", "lm_head"]}, 1.0)], {}),
    "saved-in-part": ("llama", [({**LLAMA, "modules_to_save": ["norm"]}, 0.4)], {}),
    "tokens": ("llama-tied", [({**LLAMA, "trainable_token_indices": [3, 0, 95]}, 1.0)], {}),
    "tokens-in-part": ("llama", [({**LLAMA, "trainable_token_indices": [3, 0, 95]}, 0.5)], {}),
    "untied": ("llama-tied", [({"target_modules": ["embed_tokens"]}, 1.0)], {}),
    "untied-by-the-head": ("llama-tied", [({"target_modules": ["lm_head"]}, 1.0)], {}),
    "sharded": ("llama", [({"target_modules": ALL}, 1.0)], {"shards": "20KB"}),
    "sharded-anew": ("llama", [({"target_modules": ALL}, 1.0)], {"shard_size": "20KB"}),
    "shards-joined": (
        "llama-tied",
        [({"target_modules": ["embed_tokens"]}, 1.0)],
        {"shards": "20KB", "shard_size": "1GB"},
    ),
}


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def prepare(case: str, dtype: torch.dtype, root: Path) -> tuple[Path, list[Any], dict[str, Any]]:
    """Base folder, adapters with weights, and options of merge."""
    kind, adapters, options = CASES[case]
    options = dict(options)
    model = models.make(kind).to(dtype)
    base = models.save(model, root / "base", max_shard_size=options.pop("shards", "1GB"))
    (base / "tokenizer.json").write_text("{}\n")
    given = []
    for i, (config, weight) in enumerate(adapters):
        config = {"r": 4, "lora_alpha": 6, **config}
        models.train(base, root / str(i), config, seed=i, save_embedding_layers=False)
        given.append((root / str(i), weight))
    return base, given, options


@pytest.mark.sweep(6)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gives_the_base_back_byte_for_byte(case: str, dtype: str, tmp_path: Path) -> None:
    base, adapters, options = prepare(case, DTYPES[dtype], tmp_path)
    lora_tools.merge(base, adapters, tmp_path / "m", reversible=True, **options)
    plain = lora_tools.merge(base, adapters, tmp_path / "plain", **options)
    merged = digests(tmp_path / "m")
    assert merged.pop(SIDECAR)
    assert merged == digests(tmp_path / "plain"), "the sidecar is all that differs"
    assert merged != digests(base)
    report = lora_tools.unmerge(tmp_path / "m", adapters, tmp_path / "back")
    assert report.totals["exact"]
    assert report.totals["base_digest"] == plain.inputs[0].digest
    assert digests(tmp_path / "back") == digests(base)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    rank=st.integers(1, 3),
    data=st.data(),
    dora=st.booleans(),
    weight=st.sampled_from([1.0, -0.5, 3.0, 0.0]),
    alpha=st.sampled_from([1e-6, 0.1, 1.0, 1000.0]),
)
def test_law_for_any_numbers(
    dtype: str,
    rows: int,
    cols: int,
    rank: int,
    data: st.DataObject,
    dora: bool,
    weight: float,
    alpha: float,
) -> None:
    """Zeros of both signs, denormals, tiny and large numbers: every bit comes back."""
    width = 64 if dtype == "F64" else 32
    numbers = st.floats(-1e4, 1e4, width=width) | st.sampled_from([0.0, -0.0, 1e-44, 6e-8, -1e-39])

    def draw(*shape: int) -> torch.Tensor:
        drawn = data.draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(drawn, dtype=DTYPES[dtype]).reshape(shape)

    W, A, B = draw(rows, cols), draw(rank, cols), draw(rows, rank)
    magnitude = draw(rows).abs() if dora else None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_file({"w.weight": W}, root / "b.safetensors", {"format": "pt"})
        adapter = models.write_adapter(root / "a", A, B, alpha, magnitude)
        try:
            lora_tools.merge(
                root / "b.safetensors",
                [(adapter, weight)],
                root / "m.safetensors",
                reversible=True,
                jobs=1,
            )
        except lora_tools.NonFiniteError:
            hypothesis.reject()
        lora_tools.unmerge(
            root / "m.safetensors", [(adapter, weight)], root / "back.safetensors", jobs=1
        )
        assert (root / "back.safetensors").read_bytes() == (root / "b.safetensors").read_bytes()


def test_dora_norms_that_float32_does_not_hold(tmp_path: Path) -> None:
    W = torch.tensor([[0.0, 1.0], [0.0, 1e-100], [0.0, 1e100]], dtype=torch.float64)
    A, B = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    adapter = models.write_adapter(tmp_path / "a", A, B, 1, torch.zeros(3, dtype=torch.float64))
    save_file({"w.weight": W}, tmp_path / "b.safetensors", {"format": "pt"})
    given = [(adapter, -0.5)]
    out = tmp_path / "m.safetensors"
    lora_tools.merge(tmp_path / "b.safetensors", given, out, reversible=True)
    lora_tools.unmerge(out, given, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1e-6, 1e-2, 1.0, 1e3, 1e12])
def test_deltas_of_any_size(dtype: str, ratio: float, tmp_path: Path) -> None:
    """Where |Δ| dwarfs |W| nothing of W is left in the merged weight: the listing holds it all."""
    if dtype == "F16" and ratio > 1e3:
        pytest.skip("the merged weight would overflow")
    torch.manual_seed(0)
    W = (0.02 * torch.randn(300, 200)).to(DTYPES[dtype])
    A, B = torch.randn(4, 200), 0.01 * ratio * torch.randn(300, 4)
    adapter = models.write_adapter(tmp_path / "a", A, B, 4)
    save_file({"w.weight": W}, tmp_path / "b.safetensors")
    out = tmp_path / "m.safetensors"
    lora_tools.merge(tmp_path / "b.safetensors", [adapter], out, reversible=True)
    lora_tools.unmerge(out, [adapter], tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("change", [-0.9, -0.5, 0.5, 0.9])  # the rest is for this machine's own
def test_another_machines_arithmetic(
    change: float, dora: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products summed in another order move the estimate within the slack; the bytes do not."""
    from lora_tools.linalg.merge import TensorMerge

    base, adapters, _ = prepare("dora" if dora else "plain", DTYPES[dtype], tmp_path)
    lora_tools.merge(base, adapters, tmp_path / "m", reversible=True)
    real = TensorMerge.estimate

    def elsewhere(self: TensorMerge, merged: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        slack = self.slack(merged.clone(), start, stop)
        return real(self, merged, start, stop) + change * slack

    monkeypatch.setattr(TensorMerge, "estimate", elsewhere)
    lora_tools.unmerge(tmp_path / "m", adapters, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slack_covers_other_orders_of_summation(dtype: str) -> None:
    """Against the same estimate with the rank summed backwards, and in float64."""
    from lora_tools.linalg.layouts import LAYOUTS, Block
    from lora_tools.linalg.merge import LowRank, TensorMerge, working_dtype

    torch.manual_seed(0)
    working = working_dtype(DTYPES[dtype])
    left, right = torch.randn(90, 24), torch.randn(24, 70)
    merged = torch.randn(90, 70).to(DTYPES[dtype]).to(working)

    def work(left: torch.Tensor, right: torch.Tensor, kind: torch.dtype) -> TensorMerge:
        effect = LowRank(LAYOUTS["linear"], [Block(0, 0, left, right)], 0.3, 1.0)
        return TensorMerge([effect], (90, 70), None, kind)

    here = work(left, right, working)
    found, slack = here.estimate(merged.clone(), 0, 90), here.slack(merged.clone(), 0, 90)
    there = work(left.flip(1), right.flip(0), working).estimate(merged.clone(), 0, 90)
    exact = work(left, right, torch.float64).estimate(merged.double(), 0, 90)
    assert ((there - found).abs() <= slack).all()
    assert ((exact - found).abs() <= slack).all()


@pytest.fixture(scope="module")
def merged_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("merged")
    base, adapters, _ = prepare("several", torch.bfloat16, root)
    lora_tools.merge(base, adapters[:2], root / "m", reversible=True)
    return root, adapters


@pytest.fixture
def merged(merged_once: tuple[Path, list[Any]], tmp_path: Path) -> tuple[Path, list[Any]]:
    """A reversibly merged checkpoint of two adapters in bfloat16, in a folder of one's own."""
    root, adapters = merged_once
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return tmp_path / "m", [(tmp_path / path.name, weight) for path, weight in adapters]


def refuse(merged: Path, adapters: list[Any], reason: str, **options: Any) -> None:
    before = sorted(p.name for p in merged.parent.iterdir())
    with pytest.raises((MismatchError, CheckpointError), match=reason):
        lora_tools.unmerge(merged, adapters, merged.parent / "back", **options)
    assert sorted(p.name for p in merged.parent.iterdir()) == before


def test_other_adapters_are_refused(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    refuse(path, [adapters[2]], r"made with 2.*adapter")
    refuse(path, [adapters[0], adapters[2]], r"made with 2.*adapter")
    refuse(path, [adapters[0]], r"made with 2.*adapter")
    refuse(path, [*adapters[:2], adapters[2]], r"made with 2.*adapter")


def test_other_weights_and_orders_are_refused(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    refuse(path, [a for a, _ in adapters[:2]], r"merged with.*0.5, -0.25")
    refuse(path, adapters[1::-1], "in another order")


@pytest.mark.parametrize("field", [{"lora_alpha": 7}, {"use_rslora": True}])
def test_an_adapter_whose_config_changed_is_refused(
    field: dict[str, Any], merged: tuple[Path, list[Any]]
) -> None:
    """Alpha is in the config and not in the tensors, and it changes the delta all the same."""
    path, adapters = merged
    config = adapters[0][0] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **field}))
    refuse(path, adapters[:2], "made with 2 other adapter|the result is not the base")


def test_a_merged_file_that_was_changed_is_refused(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    refuse(path, adapters[:2], "the result is not the base .* changed after the merge")


def test_a_merged_file_without_a_tensor_is_refused(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    refuse(path, adapters[:2], "model.norm.weight")


def test_a_merged_tensor_of_another_shape_is_refused(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for other in (tensors[name][:-1].clone(), tensors[name].float(), tensors[name].repeat(2, 1)):
        save_file({**tensors, name: other}, path / "model.safetensors", {"format": "pt"})
        refuse(path, adapters[:2], "q_proj.weight|not the base")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("at", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_a_damaged_sidecar_never_gives_a_wrong_base(
    damage: str, at: float, merged: tuple[Path, list[Any]]
) -> None:
    """A clear error and no output, unless what was damaged is of no consequence."""
    path, adapters = merged
    data = bytearray((path / SIDECAR).read_bytes())
    place = int(len(data) * at)
    if damage == "flip":
        data[place] ^= 0x55
    elif damage == "cut":
        del data[place:]
    else:
        data[place : place + 40] = bytes(len(data[place : place + 40]))
    (path / SIDECAR).write_bytes(bytes(data))
    back = path.parent / "back"
    try:
        lora_tools.unmerge(path, adapters[:2], back)
    except LoraToolsError:
        assert not back.exists()
    else:
        assert digests(back) == digests(path.parent / "base")


def test_a_sidecar_can_be_demanded_or_ignored(merged: tuple[Path, list[Any]]) -> None:
    path, adapters = merged
    with pytest.raises(UnsupportedAdapter, match="DoRA needs the norms of the base"):
        lora_tools.unmerge(path, adapters[:2], path.parent / "back", sidecar=False)
    (path / SIDECAR).unlink()
    refuse(path, adapters[:2], "there is no sidecar", sidecar=True)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "rslora-huge", "embeddings", "lora-bias", "sharded"])
def test_without_the_sidecar_the_bound_holds(case: str, dtype: str, tmp_path: Path) -> None:
    base, adapters, _ = prepare(case, DTYPES[dtype], tmp_path)
    lora_tools.merge(base, adapters, tmp_path / "m")
    report = lora_tools.unmerge(tmp_path / "m", adapters, tmp_path / "back")
    assert not report.totals["exact"]
    found, wanted = models.tensors(tmp_path / "back"), models.tensors(base)
    touched = [f.tensor for f in report.plan if f.action == "subtract"]
    assert touched
    for name in wanted.keys() - set(touched):
        assert torch.equal(found[name], wanted[name])
    error = math.sqrt(
        sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in touched)
    )
    norm = math.sqrt(sum(float(found[n].double().square().sum()) for n in touched))
    assert error <= report.totals["error_bound"] * norm
    assert report.totals["error_bound"] < 30000 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.parametrize(
    ("case", "reason"),
    [("dora", "DoRA needs the norms"), ("saved", "replaced it whole"), ("tokens", "replaced rows")],
)
def test_without_the_sidecar_some_merges_cannot_be_undone(
    case: str, reason: str, tmp_path: Path
) -> None:
    base, adapters, _ = prepare(case, torch.float32, tmp_path)
    lora_tools.merge(base, adapters, tmp_path / "m")
    with pytest.raises(UnsupportedAdapter, match=rf"cannot be undone.*{reason}|{reason}.*sidecar"):
        lora_tools.unmerge(tmp_path / "m", adapters, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_covers_sums_that_cancel(dtype: str, tmp_path: Path) -> None:
    """A large rank whose directions cancel: float32 sums lose more than the last rounding."""
    torch.manual_seed(0)
    A, B = torch.randn(64, 50), torch.randn(40, 64)
    A, B = torch.cat((A, A)), torch.cat((B, -0.999 * B), 1)
    adapter = models.write_adapter(tmp_path / "a", A, B, 1280)
    W = (0.01 * torch.randn(40, 50)).to(DTYPES[dtype])
    save_file({"w.weight": W}, tmp_path / "b.safetensors")
    lora_tools.merge(tmp_path / "b.safetensors", [adapter], tmp_path / "m.safetensors")
    out = tmp_path / "back.safetensors"
    report = lora_tools.unmerge(tmp_path / "m.safetensors", [adapter], out)
    found = load_file(out)["w.weight"].double()
    assert (found - W.double()).norm() <= report.totals["error_bound"] * found.norm()


def test_without_the_sidecar_an_untied_head_stays_untied(tmp_path: Path) -> None:
    base, adapters, _ = prepare("untied", torch.float32, tmp_path)
    lora_tools.merge(base, adapters, tmp_path / "m")
    lora_tools.unmerge(tmp_path / "m", adapters, tmp_path / "back")
    wanted = models.tensors(base)
    wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    models.assert_same(models.tensors(tmp_path / "back"), wanted, 1e-5)
    models.load(tmp_path / "back")


def test_one_side_of_a_tied_pair_that_was_never_parted(tmp_path: Path) -> None:
    """As PEFT's merge_and_unload leaves it: the delta went into both, or into neither."""
    base, adapters, _ = prepare("untied", torch.float32, tmp_path)
    with pytest.raises(UnsupportedAdapter, match=r"lm_head.*but the adapter changes only one of"):
        lora_tools.unmerge(base, adapters, tmp_path / "back")


def test_resized_tensors_are_refused_before_work(tmp_path: Path) -> None:
    base, adapters, _ = prepare("plain", torch.float32, tmp_path)
    file = tmp_path / "0" / "adapter_model.safetensors"
    both = ("model.embed_tokens.weight", "lm_head.weight")
    more = {f"base_model.model.{name}": torch.ones(99, 32) for name in both}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(lora_tools.UsageError, match="another shape"):
        lora_tools.merge(base, adapters, tmp_path / "m", reversible=True)


# The share of the model that a sidecar takes for an adapter of rank 16, whose |Δ| is that share of
# |W|. What rounding lost is 1.7 % and 0.2 % of halves, and of float32, whose sums are formed in
# float64, half that.
@pytest.mark.parametrize(
    ("dtype", "change", "most"),
    [
        ("BF16", 0.17, 0.021),
        ("F16", 0.17, 0.02),
        ("F32", 0.17, 0.01),
        ("BF16", 0.01, 0.005),
        ("F16", 0.01, 0.004),
        ("F32", 0.01, 0.002),
    ],
)
def test_share_of_the_sidecar(dtype: str, change: float, most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    W = 0.02 * torch.randn(1024, 2048)
    A, B = torch.randn(16, 2048), torch.randn(1024, 16)
    B *= change * W.norm() / (B @ A).norm()
    adapter = models.write_adapter(tmp_path / "a", A, B, 16)
    save_file({"w.weight": W.to(DTYPES[dtype])}, tmp_path / "b.safetensors")
    out = tmp_path / "m.safetensors"
    report = lora_tools.merge(tmp_path / "b.safetensors", [adapter], out, reversible=True)
    print(f"sidecar share {dtype}: {report.totals['sidecar_share']:.4%}")
    assert report.totals["sidecar_share"] < most


def test_sidecars_of_the_first_version_are_read(tmp_path: Path) -> None:
    """One from before there were bit planes, of every dtype, of LoRA and DoRA."""
    old = Path(__file__).parent / "data" / "sidecar_version_1"
    given = [(old / "plain", 1.0), (old / "dora", 0.5)]
    report = lora_tools.unmerge(old / "merged.safetensors", given, tmp_path / "back.safetensors")
    assert report.totals["exact"]
    found = hashlib.sha256((tmp_path / "back.safetensors").read_bytes()).hexdigest()
    assert found == "0e3e300d267f45d0b3f532ad8b21a711abe4442f1ff90555bf23664fdaa4e3f0"
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "back.safetensors").values()}
    assert dtypes == set(DTYPES.values())


def test_an_alpha_that_was_changed_is_refused_without_a_sidecar(tmp_path: Path) -> None:
    """The digest is of the adapter's tensors only; fields that do nothing may change."""
    torch.manual_seed(0)
    save_file({"lin.weight": torch.randn(6, 4)}, tmp_path / "base.safetensors")
    factors = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(6, 2)}
    (tmp_path / "a").mkdir()
    names = {f"base_model.model.lin.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(names, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lin"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    merged = tmp_path / "m.safetensors"
    lora_tools.merge(tmp_path / "base.safetensors", [(tmp_path / "a", 0.5)], merged)
    for i, more in enumerate(({"inference_mode": True, "lora_dropout": 0.5}, {"lora_alpha": 8})):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | more))
        given = (merged, [(tmp_path / "a", 0.5)], tmp_path / f"{i}.safetensors")
        if "lora_alpha" not in more:
            lora_tools.unmerge(*given)
            continue
        with pytest.raises(MismatchError, match=r"other numbers \(alpha.*allow_other_base"):
            lora_tools.unmerge(*given)
        assert not given[2].exists()
        lora_tools.unmerge(*given, allow_other_base=True)


def test_alphas_that_changed_places_are_refused_without_a_sidecar(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({f"{n}.weight": torch.randn(6, 4) for n in "xy"}, tmp_path / "base.safetensors")
    (tmp_path / "a").mkdir()
    shapes = {"lora_A": (2, 4), "lora_B": (6, 2)}
    names = {
        f"base_model.model.{n}.{part}.weight": torch.randn(shape)
        for n in "xy"
        for part, shape in shapes.items()
    }
    save_file(names, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x", "y"]}
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps(config | {"alpha_pattern": {"x": 2}}))
    merged = tmp_path / "m.safetensors"
    lora_tools.merge(tmp_path / "base.safetensors", [tmp_path / "a"], merged)
    lora_tools.unmerge(merged, [tmp_path / "a"], tmp_path / "b.safetensors")
    place.write_text(json.dumps(config | {"alpha_pattern": {"y": 2}}))
    with pytest.raises(MismatchError, match="other numbers"):
        lora_tools.unmerge(merged, [tmp_path / "a"], tmp_path / "c.safetensors")


def test_what_waits_to_be_written_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is held of a listing that is in the sidecar, however many there are."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts: list[int] = []
    packed = Packed.of

    def counted(listing: Listing) -> Packed:
        made = packed(listing)
        alive.add(made)
        counts.append(len(alive))
        return made

    monkeypatch.setattr(Packed, "of", counted)
    most = {}
    for layers in (4, 16):
        top = tmp_path / str(layers)
        top.mkdir()
        base = iotools.weights(layers=layers)
        iotools.checkpoint(top / "base", base)
        iotools.adapter(top / "adapter", iotools.linear_shapes(base))
        lora_tools.merge(top / "base", [top / "adapter"], top / "m", reversible=True, jobs=1)
        assert len(counts) == 2 * layers
        most[layers] = max(counts)
        counts.clear()
    assert most[16] <= most[4] <= 5, "a thread is a few tasks ahead of the writer"
