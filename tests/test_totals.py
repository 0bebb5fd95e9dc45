"""A total covers everything: what is left out, saved whole or of one side only counts in every
figure and gate, here against distances that are summed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.engine import threads
from lora_tools.errors import NonFiniteError, QualityGateError
from lora_tools.figures import Total
from lora_tools.totals import TimedTotals

Tensors = dict[str, torch.Tensor]
Q, K, NORM, EMBED = (f"model.{n}.weight" for n in ("q_proj", "k_proj", "norm", "embed_tokens"))


def weights(seed: int, **more: torch.Tensor) -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    shapes = {Q: (12, 10), K: (9, 10), NORM: (10,), EMBED: (7, 10), "model.q_proj.bias": (12,)}
    return {k: torch.randn(s, generator=noise) for k, s in shapes.items()} | more


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Every tensor changed, by a like amount."""
    return save(tmp_path / "base", weights(0)), save(tmp_path / "tuned", weights(1))


def save(path: Path, tensors: Tensors) -> Path:
    path = path.with_suffix(".safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def changed(path: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(path)
    change(tensors)
    return save(path, tensors)


def far(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """‖one − other‖², rows that one of them lacks taken for zeros."""
    shapes = [x.shape for x in (one, other) if x is not None]
    total = torch.zeros(max(shapes), dtype=torch.float64)
    for x, sign in ((one, 1), (other, -1)):
        if x is not None:
            total[: len(x)] += sign * x.double()
    return float(total.square().sum())


def share_missing(base: Path, tuned: Path, adapter: Path, work: Path) -> float:
    """‖merged − tuned‖² / ‖tuned − base‖² over all tensors, of a merge of its own."""
    lora_tools.merge(base, [adapter], work / "merged.safetensors", allow_unmatched=True)
    old, new, made = map(load_file, (base, tuned, work / "merged.safetensors"))
    names = [n for n in new if new[n].is_floating_point()]
    error = sum(far(made.get(n), new[n]) for n in names)
    return error / sum(far(old.get(n), new[n]) for n in names)


def grow(tensors: Tensors) -> None:
    tensors[EMBED] = torch.cat([tensors[EMBED], tensors[EMBED][:3] + 1])


def shrink(tensors: Tensors) -> None:
    tensors[EMBED] = tensors[EMBED][:4]


def add_head(tensors: Tensors) -> None:
    tensors["model.score.weight"] = torch.ones(4, 10)


def count(tensors: Tensors) -> None:
    tensors["model.norm.num_batches_tracked"] = torch.tensor([100000])


# What is done to the tuned side, how it is extracted, and how many tensors are left out.
CASES: dict[str, tuple[Callable[[Tensors], None] | None, dict[str, Any], int]] = {
    "all held": (None, {}, 0),
    "--rest skip": (None, {"rest": "skip"}, 2),
    "--embeddings skip": (None, {"embeddings": "skip"}, 1),
    "--embeddings save": (None, {"embeddings": "save"}, 0),
    "--include": (None, {"include": ["q_proj"]}, 3),
    "--exclude": (None, {"exclude": ["q_proj", "norm"]}, 3),
    "rank 0": (None, {"rank": None, "threshold": 9.0}, 2),
    "all but one module": (None, {"include": ["k_proj"], "rest": "skip"}, 4),
    "a grown vocabulary left out": (grow, {"embeddings": "skip"}, 1),
    "a cut vocabulary left out": (shrink, {"embeddings": "skip"}, 1),
    "a new head left out": (add_head, {"rest": "skip"}, 3),
    "a new head saved": (add_head, {}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_extract_and_verify_count_all_that_changed(
    case: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    change, options, left_out = CASES[case]
    base, tuned = pair
    if change is not None:
        changed(tuned, change)
    report = lora_tools.extract(base, tuned, tmp_path / "a", **{"rank": 2, **options})
    missing = share_missing(base, tuned, tmp_path / "a", tmp_path)
    if case != "a new head saved":  # merge cannot store it
        assert 1 - report.totals["energy"] == pytest.approx(missing, rel=1e-4)
    assert report.totals["relative_error"] == pytest.approx((1 - report.totals["energy"]) ** 0.5)
    assert report.totals["left_out"] == left_out
    assert [f.action for f in report.plan].count("skipped") == left_out
    old, new = load_file(base), load_file(tuned)
    left = {f.tensor: far(old.get(f.tensor), new[f.tensor]) for f in report.plan}
    gone = {f.tensor: left[f.tensor] for f in report.plan if f.action == "skipped"}
    saved = sum(left[f.tensor] for f in report.plan if f.action == "saved whole")
    whole = sum(left.values())
    assert report.totals["left_out_energy"] == pytest.approx(sum(gone.values()) / whole, rel=1e-5)
    assert report.totals["saved_whole_energy"] == pytest.approx(saved / whole, rel=1e-5)
    assert report.totals["left_out_most"] == max(gone, key=lambda n: gone[n], default="")
    found = lora_tools.verify(tmp_path / "a", base=base, tuned=tuned)
    assert found.totals["left_out_most"] == report.totals["left_out_most"]
    for key in ("relative_error", "left_out", "left_out_energy"):
        assert found.totals[key] == pytest.approx(report.totals[key], rel=1e-3), key
    assert [f.action for f in found.plan].count("left out") == left_out


def test_a_gate_cannot_be_passed_by_looking_away(tmp_path: Path) -> None:
    """Two modules of rank 1 are held exactly, and 14 tensors that changed far more are left out."""
    norms = {f"model.layers.{i}.norm.weight": torch.zeros(8) for i in range(14)}
    ranks = {f"model.layers.{i}.q_proj.weight": torch.zeros(8, 8) for i in range(2)}
    base = save(tmp_path / "base", norms | ranks)
    moved = {n: v + 1 for n, v in (norms | ranks).items()}
    moved["model.layers.5.norm.weight"] += 1
    tuned = save(tmp_path / "tuned", moved)
    options: dict[str, Any] = {"rank": 1, "rest": "skip", "max_error": 0.5}
    with pytest.raises(QualityGateError) as caught:
        lora_tools.extract(base, tuned, tmp_path / "a", **options)
    totals = caught.value.report.totals
    share = (13 * 8 + 32) / (13 * 8 + 32 + 128)
    assert totals["energy"] == pytest.approx(1 - share)
    assert totals["left_out"] == 14
    assert totals["left_out_energy"] == pytest.approx(share)
    said = str(caught.value)
    assert "14 tensors with 51.52% of the energy, most of it in model.layers.5.norm.weight" in said
    assert not (tmp_path / "a").exists()
    del options["max_error"]
    lora_tools.extract(base, tuned, tmp_path / "a", **options)
    with pytest.raises(QualityGateError, match=r"14 tensors with 51\.52%"):
        lora_tools.verify(tmp_path / "a", base=base, tuned=tuned, max_error=0.5)


def test_the_line_says_so(pair: tuple[Path, Path], tmp_path: Path, capfd: Any) -> None:
    args = ["extract", *map(str, pair), "-o", str(tmp_path / "a"), "--rank", "2"]
    assert run([*args, "--include", "q_proj"]) == 0
    said = capfd.readouterr().err
    assert "of all that changed" in said
    assert "left out: 3 changed tensors, which hold " in said
    assert run([*args, "--force"]) == 0
    assert "left out:" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_and_left_out_outweighs_all(
    value: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """There is a way to leave it out, and none past a gate; saved whole it is an error."""
    base, tuned = pair
    changed(tuned, lambda tensors: tensors[NORM].__setitem__(3, value))
    with pytest.raises(NonFiniteError, match=f"{NORM}: cannot be saved whole"):
        lora_tools.extract(base, tuned, tmp_path / "a")
    report = lora_tools.extract(base, tuned, tmp_path / "a", exclude=["norm"])
    assert report.totals["relative_error"] == 1
    assert report.totals["energy"] == 0
    assert report.totals["left_out_most"] == NORM
    with pytest.raises(QualityGateError, match="total is 1"):
        lora_tools.extract(base, tuned, tmp_path / "b", exclude=["norm"], max_error=0.9)


def test_what_is_no_float_has_no_energy_and_is_named(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    plain = lora_tools.extract(base, tuned, tmp_path / "a", rank=2, rest="skip").totals
    name = "model.norm.num_batches_tracked"
    changed(base, lambda tensors: tensors.update({name: torch.tensor([3])}))
    changed(tuned, count)
    report = lora_tools.extract(base, tuned, tmp_path / "b", rank=2, rest="skip")
    assert report.totals["energy"] == plain["energy"]
    assert report.totals["left_out"] == plain["left_out"] + 1
    assert any("the figures do not cover" in note and name in note for note in report.notes)
    found = lora_tools.verify(tmp_path / "b", base=base, tuned=tuned)
    assert {f.tensor: f.action for f in found.plan}[name] == "left out"
    assert found.totals["left_out"] == report.totals["left_out"]
    seen = lora_tools.diff(base, tuned)
    assert all(f"because they are not floats: {name}" in "".join(r.notes) for r in (found, seen))
    kept = lora_tools.extract(base, tuned, tmp_path / "c", rank=2)
    assert not any("the figures do not cover" in note for note in kept.notes)
    found = lora_tools.verify(tmp_path / "c", base=base, tuned=tuned)
    assert {f.tensor: f.action for f in found.plan}[name] == "compared"


@pytest.mark.parametrize("rest", ["save", "skip", "error"])
def test_the_same_values_in_another_dtype_are_no_change(rest: Any, tmp_path: Path) -> None:
    ours = {k: v.bfloat16().float() for k, v in weights(0).items()}
    theirs = {k: v.bfloat16() for k, v in ours.items()}
    theirs[Q] = weights(1)[Q].bfloat16()
    base, tuned = save(tmp_path / "base", ours), save(tmp_path / "tuned", theirs)
    report = lora_tools.extract(base, tuned, tmp_path / "a", rest=rest)
    assert {f.tensor for f in report.plan if f.action != "unchanged"} == {Q}
    assert report.totals["left_out"] == 0


def test_verify_fails_an_adapter_that_changes_what_did_not(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing changed and the adapter changes something: not "energy 100 %"."""
    base, tuned = pair
    lora_tools.extract(base, tuned, tmp_path / "a", rank=2)
    found = lora_tools.verify(tmp_path / "a", base=base, tuned=base)
    assert found.totals["relative_error"] == math.inf
    with pytest.raises(QualityGateError):
        lora_tools.verify(tmp_path / "a", base=base, tuned=base, max_error=1)


def test_diff_counts_what_its_table_leaves_out(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    changed(tuned, grow)
    old, new = load_file(base), load_file(tuned)
    change = {n: far(old[n], new[n]) for n in new}
    for options in ({}, {"include": ["q_proj"]}, {"exclude": ["k_proj"]}):
        totals = lora_tools.diff(base, tuned, **options).totals
        whole = math.sqrt(sum(change.values()) / sum(far(t, None) for t in old.values()))
        assert totals["relative_change"] == pytest.approx(whole, rel=1e-5)
    assert totals["left_out"] == 1
    assert totals["left_out_most"] == K
    assert totals["left_out_energy"] == pytest.approx(change[K] / sum(change.values()), rel=1e-5)


def test_diff_of_a_base_of_zeros(tmp_path: Path, capfd: Any) -> None:
    """All of it is change; there is no share to tell, and no alpha either."""
    tuned = save(tmp_path / "tuned", weights(1))
    base = save(tmp_path / "base", {k: torch.zeros_like(v) for k, v in weights(1).items()})
    assert run(["diff", str(base), str(tuned)]) == 0
    said = capfd.readouterr().out
    assert "rel. change" in said.splitlines()[1]
    assert not any(word in said for word in ("alpha", "nan", "inf"))


def test_convert_counts_the_modules_that_it_drops(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    lora_tools.extract(base, tuned, tmp_path / "a", rank=4, exclude=["norm"])
    options: dict[str, Any] = {"to": "diffusers", "rank": 2, "drop": ["embedding", "saved"]}
    report = lora_tools.convert(tmp_path / "a", tmp_path / "d", **options)
    given, made = load_file(tmp_path / "a" / "adapter_model.safetensors"), report.totals
    product = {
        n: given[f"base_model.model.{n}.{b}"].double() @ given[f"base_model.model.{n}.{a}"].double()
        for n, a, b in (
            ("model.q_proj", "lora_A.weight", "lora_B.weight"),
            ("model.k_proj", "lora_A.weight", "lora_B.weight"),
            ("model.embed_tokens", "lora_embedding_A", "lora_embedding_B"),
        )
    }
    energy = {n: float(p.square().sum()) for n, p in product.items()}
    cut = [float(torch.linalg.svdvals(p)[2:].square().sum()) for p in product.values()][:2]
    lost = sum(cut) + energy["model.embed_tokens"]
    assert 1 - made["energy"] == pytest.approx(lost / sum(energy.values()), rel=1e-4)
    assert (made["left_out"], made["left_out_most"]) == (1, "model.embed_tokens")


def test_tensors_saved_whole_are_said_to_be_in_no_figure(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    given = tmp_path / "a"
    lora_tools.extract(*pair, given, rank=4)
    for report in (
        lora_tools.rescale(given, tmp_path / "r", rank=2),
        lora_tools.combine([given], tmp_path / "c", rank=2),
        lora_tools.convert(given, tmp_path / "p", to="peft", rank=2),
    ):
        assert any("the figures do not cover 2 tensors" in note for note in report.notes), (
            report.verb
        )
    plain = lora_tools.rescale(given, tmp_path / "s", alpha=3)
    assert not any("the figures do not cover" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("energy", "missing", "error"),
    [(4.0, 1.0, 0.5), (0.0, 0.0, 0.0), (0.0, 1.0, math.inf), (math.inf, math.inf, 1.0)],
)
def test_a_total_of_nothing_is_no_division_by_zero(
    energy: float, missing: float, error: float
) -> None:
    assert Total(energy, missing).relative_error == error


# ------------------------------------------------------------------------------ what a plan takes


def held(path: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(path).values())


def test_a_plan_says_what_it_reads_and_the_room_that_is_asked_for(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    options: dict[str, Any] = {"rank": 2, "embeddings": "skip", "rest": "skip"}
    adapter, four = tmp_path / "adapter", tmp_path / "four.safetensors"
    lora_tools.extract(base, tuned, adapter, **options)
    lora_tools.quantize(base, four, include=["."])
    merged = tmp_path / "merged.safetensors"
    lora_tools.merge(base, [adapter], merged, reversible=True)
    factors = held(adapter / "adapter_model.safetensors")
    calls: list[tuple[int, Callable[..., Any]]] = [
        (
            held(base) + held(tuned),
            lambda o, **k: lora_tools.extract(base, tuned, o, **options, **k),
        ),
        (held(base) + factors, lambda o, **k: lora_tools.merge(base, [adapter], o, **k)),
        (held(four) + factors, lambda o, **k: lora_tools.merge(four, [adapter], o, **k)),
        (held(base), lambda o, **k: lora_tools.quantize(base, o, include=["."], **k)),
        (held(four), lambda o, **k: lora_tools.dequantize(four, o, **k)),
        (
            held(four) + factors,
            lambda o, **k: lora_tools.merge(four, [adapter], o, requantize=True, **k),
        ),
        (held(merged) + factors, lambda o, **k: lora_tools.unmerge(merged, [adapter], o, **k)),
        (factors, lambda o, **k: lora_tools.rescale(adapter, o, scale=2, **k)),
        (2 * factors, lambda o, **k: lora_tools.combine([adapter, (adapter, 0.5)], o, **k)),
        (factors, lambda o, **k: lora_tools.convert(adapter, o, to="mlx", **k)),
    ]
    asked: list[int] = []
    monkeypatch.setattr("lora_tools.verbs.writing.check_space", lambda _, n, *held: asked.append(n))
    budgets: list[int] = []
    gate = threads._MemoryGate

    def admits(nbytes: int) -> threads._MemoryGate:
        budgets.append(nbytes)
        return gate(nbytes)

    monkeypatch.setattr(threads, "_MemoryGate", admits)
    for i, (nbytes, call) in enumerate(calls):
        out = tmp_path / (f"out{i}.safetensors" if 0 < i < 7 else f"out{i}")
        plan = call(out, dry_run=True)
        budgets.clear()
        done = call(out)
        assert plan.totals["input_bytes"] == nbytes
        assert plan.totals["disk_needed"] == asked[i]
        assert plan.totals["disk_free"] > 0
        besides = threads.PROGRAM + threads.default_jobs() * threads.THREAD
        assert [plan.totals["peak_memory"] - besides] == budgets[:1]
        assert not TimedTotals.__annotations__.keys() & done.totals.keys()


def test_a_plan_says_where_the_room_is_short(
    tmp_path: Path,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = str(pair[0])
    for free, said in ((10**9, "of which 1.0 GB are free"), (3, "of which only 3 bytes are free")):
        monkeypatch.setattr(
            "lora_tools.formats.output.shutil.disk_usage", lambda _, n=free: (1, 0, n)
        )
        assert run(["merge", base, "-o", str(tmp_path / "o"), "--dtype", "bf16", "-n"]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("needs: "))
        assert line.startswith("needs: 1.2 kB to read, ")
        assert f" of disk, {said}; " in line
        assert line.endswith(" MB of memory")
    assert run(["merge", base, "-o", str(tmp_path / "no" / "o"), "--dtype", "bf16", "-n"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split("; ")[0].endswith(" of disk")
