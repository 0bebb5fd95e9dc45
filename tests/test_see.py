"""inspect, diff, their pictures, and verify with the faults it must find."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, QualityGateError, UsageError
from lora_tools.formats.adapters.peft import WEIGHTS

from . import forks, iotools, models

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned (of rank 3 on every linear layer, bfloat16), an adapter and what is merged."""
    folder = tmp_path_factory.mktemp("see")
    model = models.make("llama-tied").bfloat16()
    models.save(model, folder / "base")
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                A = torch.randn(3, parameter.shape[1], generator=noise)
                B = torch.randn(parameter.shape[0], 3, generator=noise)
                parameter += 0.02 * B @ A
    models.save(model, folder / "tuned")
    lora_tools.extract(
        folder / "base", folder / "tuned", folder / "adapter", rank=3, dtype="float32"
    )
    lora_tools.merge(folder / "base", [folder / "adapter"], folder / "merged")
    return folder


# -------------------------------------------------------------------------------------- inspect


def test_inspect_a_checkpoint(work):
    report = lora_tools.inspect(work / "base")
    stored = models.tensors(work / "base")
    assert [t.tensor for t in report.stored] == list(load_file(work / "base/model.safetensors"))
    assert report.totals["kind"] == "checkpoint"
    assert report.totals["architectures"] == ["LlamaForCausalLM"]
    assert report.totals["numbers"] == sum(t.numel() for t in stored.values())
    assert report.totals["dtypes"] == {"BF16": len(stored)}
    assert "lm_head.weight is tied to model.embed_tokens.weight, and not stored" in report.notes


def test_inspect_finds_what_is_odd(tmp_path):
    bad = torch.ones(4, 4)
    bad[1, 2], bad[3, 3] = math.nan, math.inf
    same = torch.randn(3, 5)
    odd = {"a.weight": bad, "b.weight": torch.zeros(2, 2), "c.weight": same, "d.weight": same + 0}
    notes = lora_tools.inspect(iotools.checkpoint(tmp_path / "c", odd)).notes
    assert "a.weight: 2 of 16 are inf or NaN" in notes
    assert "b.weight: all zero" in notes
    assert "d.weight: the same bytes as c.weight" in notes


def test_inspect_an_adapter(work):
    report = lora_tools.inspect(work / "adapter")
    factors = load_file(work / "adapter" / WEIGHTS)
    assert report.totals["kind"] == "adapter"
    assert report.totals["ranks"] == [3]
    assert report.totals["metadata"][WEIGHTS]["command"].startswith("extract rank=3")
    for s in report.spectra:
        A = factors[f"base_model.model.{s.module}.lora_A.weight"].double()
        B = factors[f"base_model.model.{s.module}.lora_B.weight"].double()
        S = torch.linalg.svdvals(B @ A)[:3]
        assert torch.allclose(torch.tensor(s.spectrum).double(), S, rtol=1e-5)
        assert s.stable_rank == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-5)
        assert s.energy["8"] == pytest.approx(1)
        assert s.scaling == 1


def test_inspect_other_things(work, tmp_path):
    lora_tools.merge(work / "base", [work / "adapter"], tmp_path / "m", reversible=True)
    sidecar = lora_tools.inspect(tmp_path / "m" / "loratools-unmerge.sidecar")
    assert sidecar.totals["kind"] == "sidecar of a reversible merge"
    lora_tools.extract(work / "base", work / "tuned", tmp_path / "a", spectrum_cache=tmp_path / "s")
    assert lora_tools.inspect(tmp_path / "s").totals["kind"] == "spectrum cache"
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ONNX"):
        lora_tools.inspect(tmp_path / "model.onnx")


# ----------------------------------------------------------------------------------------- diff


def test_diff_says_what_changed_and_how_low_its_rank_is(work):
    report = lora_tools.diff(work / "base", work / "tuned")
    old, new = models.tensors(work / "base"), models.tensors(work / "tuned")
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    fates = {f.tensor: f.action for f in report.plan}
    assert {n for n, action in fates.items() if action == "changed"} == changed
    assert fates["model.norm.weight"] == "unchanged"
    assert report.totals["changed"] == len(changed)
    order = [s.relative_change for s in report.spectra]
    assert order == sorted(order, reverse=True)
    for s in report.spectra:
        delta = new[f"{s.module}.weight"].double() - old[f"{s.module}.weight"].double()
        S = torch.linalg.svdvals(delta)
        assert s.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert s.stable_rank == pytest.approx(float(s.norm**2 / S[0] ** 2), rel=1e-4)
        assert s.energy["8"] == pytest.approx(float((S[:8] ** 2).sum() / (S**2).sum()), rel=1e-4)
        assert s.rank in (2, 3)  # three planted; two may hold 90 % of the energy
        if s.rank == 3:
            assert s.spectrum[2] > s.noise_floor > s.spectrum[3]
    total = math.sqrt(sum(s.norm**2 for s in report.spectra))
    whole = math.sqrt(sum(float(t.double().square().sum()) for n, t in old.items() if n in changed))
    assert report.totals["relative_change"] == pytest.approx(total / whole, rel=1e-4)


def test_diff_filters_sorts_and_names_what_is_on_one_side(work, tmp_path):
    only = lora_tools.diff(work / "base", work / "tuned", include=["q_proj"], sort="name")
    assert [s.module for s in only.spectra] == [Q, Q.replace(".0.", ".1.")]
    tensors = models.tensors(work / "tuned") | {"extra.weight": torch.ones(2, 2)}
    del tensors["model.norm.weight"]
    shutil.copytree(work / "tuned", tmp_path / "t")
    save_file(tensors, tmp_path / "t" / "model.safetensors", {"format": "pt"})
    fates = {f.tensor: f.action for f in lora_tools.diff(work / "base", tmp_path / "t").plan}
    assert fates["extra.weight"] == "only in tuned"
    assert fates["model.norm.weight"] == "only in base"


def test_diff_of_a_quantized_side_is_of_what_it_dequantizes_to(work, tmp_path):
    lora_tools.quantize(work / "base", tmp_path / "packed")
    lora_tools.dequantize(tmp_path / "packed", tmp_path / "plain", dtype="float32")
    report = lora_tools.diff(tmp_path / "packed", work / "tuned")
    assert any("its dequantized numbers are used" in note for note in report.notes)
    assert "only in base" not in {f.action for f in report.plan}
    old, new = models.tensors(tmp_path / "plain"), models.tensors(work / "tuned")
    assert len(report.spectra) >= 14
    for s in report.spectra:
        delta = new[f"{s.module}.weight"].double() - old[f"{s.module}.weight"].double()
        assert s.norm == pytest.approx(float(delta.norm()), rel=1e-2)  # dequantized in bfloat16
        assert s.noise_floor > 0
        assert s.rank is not None
    whole = lora_tools.inspect(tmp_path / "packed").inputs[0].digest
    assert report.inputs[0].digest == whole


def test_diff_of_two_dtypes(work, tmp_path):
    tensors = {k: v.float() for k, v in models.tensors(work / "tuned").items()}
    shutil.copytree(work / "tuned", tmp_path / "t")
    save_file(tensors, tmp_path / "t" / "model.safetensors", {"format": "pt"})
    one = lora_tools.diff(work / "base", work / "tuned")
    other = lora_tools.diff(work / "base", tmp_path / "t")
    assert [(s.module, s.norm) for s in one.spectra] == [(s.module, s.norm) for s in other.spectra]
    fates = {f.tensor: f.reason for f in other.plan}
    assert fates["model.norm.weight"] == "the same values"


def test_diff_of_experts_recommends_what_the_widest_needs(tmp_path):
    torch.manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    W = torch.randn(3, 80, 96)
    moved = W.clone()
    for i, r in enumerate((1, 4, 2)):
        moved[i] += torch.linalg.qr(torch.randn(80, r)).Q @ torch.linalg.qr(torch.randn(96, r)).Q.T
    base = iotools.checkpoint(tmp_path / "b", {name: W})
    report = lora_tools.diff(base, iotools.checkpoint(tmp_path / "t", {name: moved}))
    (s,) = report.spectra
    assert s.layout.startswith("experts")
    assert s.rank == 4
    assert s.energy["8"] == pytest.approx(1, abs=1e-4), "seven directions in all"
    assert math.isfinite(s.noise_floor)


@pytest.mark.parametrize("half", [torch.bfloat16, None])
def test_diff_figures_are_bounds_of_the_true_ones(half, tmp_path, monkeypatch):
    """Large enough to be iterated for, with and without products in half precision."""
    torch.manual_seed(0)
    monkeypatch.setattr("lora_tools.engine.threads.half_products", lambda device: half)
    k = torch.arange(1, 601).float() ** -0.6
    W = 0.02 * torch.randn(640, 600)
    D = torch.linalg.qr(torch.randn(640, 600)).Q * k @ torch.linalg.qr(torch.randn(600, 600)).Q
    sides = {"b": W.bfloat16(), "t": (W + 0.01 * D).bfloat16()}
    name = "model.layers.0.mlp.up_proj.weight"
    paths = [iotools.checkpoint(tmp_path / side, {name: sides[side]}) for side in "bt"]
    (s,) = lora_tools.diff(*paths).spectra
    S = torch.linalg.svdvals(sides["t"].double() - sides["b"].double()).square()
    assert s.norm**2 == pytest.approx(float(S.sum()), rel=1e-5)
    assert 0 < s.gain_bound < 2e-3
    for r, share in s.energy.items():
        true = float(S[: int(r)].sum() / S.sum())
        assert share - 1e-6 <= true <= share + s.gain_bound
    assert s.stable_rank == pytest.approx(float(S.sum() / S[0]), rel=1e-4)
    found = torch.tensor(s.spectrum).double().square()
    assert bool((found <= S[:64] * (1 + 1e-5)).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_pictures(work, tmp_path, suffix):
    for i in (1, 2):
        lora_tools.diff(work / "base", work / "tuned", plot=tmp_path / f"{i}.{suffix}")
    first, again = ((tmp_path / f"{i}.{suffix}").read_bytes() for i in (1, 2))
    assert first == again, "the same bytes each time"
    if suffix == "png":
        from PIL import Image

        image = Image.open(tmp_path / "1.png")
        assert min(image.size) > 800
        assert len(set(image.convert("RGB").resize((200, 200)).getdata())) > 50, "not blank"
    else:
        text = first.decode()
        assert suffix == "html" or "<svg" in text
        for words in ("self_attn.q_proj", "uniform", "budget", "energy", "relative change, %"):
            assert words in text, words
    lora_tools.inspect(work / "adapter", plot=tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 10_000


@pytest.mark.parametrize("without", [".lora_B", "q_proj.lora_B"])
def test_pictures_of_what_has_no_effect(without, work, tmp_path):
    """Of an adapter as it is before its training, of one with such a module, of two that are the
    same."""
    shutil.copytree(work / "adapter", tmp_path / "a")
    factors = load_file(tmp_path / "a" / WEIGHTS)
    still = {k: t * (without not in k) for k, t in factors.items()}
    save_file(still, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    picture = tmp_path / "a.svg"
    report = lora_tools.inspect(tmp_path / "a", plot=picture)
    some = any(t.any() for k, t in still.items() if "lora_B" in k)
    assert picture.exists() == some
    assert any("nothing to draw" in note for note in report.notes) != some
    same = lora_tools.diff(work / "base", work / "base", plot=picture)
    assert any("nothing to draw" in note for note in same.notes)


def test_pictures_are_refused_before_the_work(work, tmp_path, monkeypatch):
    for name, says in (("x.gif", "must end in"), ("no/x.png", "folder does not exist")):
        with pytest.raises(UsageError, match=says):
            lora_tools.diff(work / "base", work / "tuned", plot=tmp_path / name)
    with pytest.raises(UsageError, match="not an adapter with factors"):
        lora_tools.inspect(work / "base", plot=tmp_path / "x.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, library in (("x.png", "matplotlib"), ("x.svg", "matplotlib"), ("x.html", "plotly")):
        with pytest.raises(UsageError, match=rf"needs {library}; pip install 'loratools\[plot\]'"):
            lora_tools.diff(work / "base", work / "tuned", plot=tmp_path / name)


def test_no_library_of_pictures_is_imported_unless_drawn_with(work):
    code = (
        "import sys\nassert 'matplotlib' not in sys.modules\nfrom lora_tools.cli import run\n"
        f"assert run(['diff', {str(work / 'base')!r}, {str(work / 'tuned')!r}, '-q']) == 0\n"
        "assert not {'matplotlib', 'plotly'} & set(sys.modules)"
    )
    done = forks.run(code=code)
    assert done.returncode == 0, done.stderr


def test_the_command_line_shows_them(work, capfd):
    assert run(["diff", str(work / "base"), str(work / "tuned")]) == 0
    said = capfd.readouterr().out
    for words in (Q, "noise floor", "stable rank", "tensors changed"):
        assert words in said
    assert run(["inspect", str(work / "adapter"), "-v"]) == 0
    said = capfd.readouterr().out
    assert "adapter: " in said
    assert "lora_A.weight" in said
    assert run(["inspect", str(work / "base"), "--json", "-q"]) == 0
    assert json.loads(capfd.readouterr().out)["totals"]["kind"] == "checkpoint"


# --------------------------------------------------------------------------------------- verify


def check(merged: Path, work: Path, *adapters: object, base: str = "base") -> lora_tools.Report:
    return lora_tools.verify(merged, base=work / base, adapters=adapters or [work / "adapter"])


def refused(merged: Path, work: Path, *adapters: object, base: str = "base") -> str:
    with pytest.raises(QualityGateError) as caught:
        check(merged, work, *adapters, base=base)
    assert caught.value.report is not None
    assert not caught.value.report.totals["same"]
    return str(caught.value)


def test_our_own_merge_is_base_plus_adapter(work):
    report = check(work / "merged", work)
    assert report.totals["bit_for_bit_once"] == report.totals["tensors_acted_on"] == 14
    assert "bit for bit, rounded once" in report.totals["verdict"]


@pytest.mark.parametrize("safe", [False, True])
def test_which_of_pefts_roundings(work, tmp_path, safe):
    """PEFT adds a float32 delta in place; with safe_merge it rounds the delta first."""
    model = models.attach(work / "base", work / "adapter")
    merged = models.quietly(lambda: model.merge_and_unload(safe_merge=safe))
    models.save(merged, tmp_path / "m")
    report = check(tmp_path / "m", work)
    assert peft.__version__
    shares = report.totals["share_once"], report.totals["share_twice"]
    assert max(shares) > 0.9999
    assert (shares[1] > shares[0]) == safe
    assert min(shares) < 0.999, "the two differ, or this shows nothing"


def spoilt(work: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(work / "merged", to)
    tensors = models.tensors(to)
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_faults_of_scale(work, tmp_path):
    for weight, says in ((2, "twice"), (0.5, "at 0.5 times"), (-1, "with the wrong sign")):
        out = tmp_path / f"m{weight}"
        lora_tools.merge(work / "base", [(work / "adapter", weight)], out)
        said = refused(out, work)
        assert "the adapter is applied " + says in said or "at 0.5" in said, said
        assert check(out, work, (work / "adapter", weight)).totals["same"]
    said = refused(work / "base", work)
    assert "the same as in the base, without the adapter" in said


def test_an_adapter_applied_twice_in_two_steps(work, tmp_path):
    lora_tools.merge(work / "merged", [work / "adapter"], tmp_path / "m", allow_other_base=True)
    assert "the adapter is applied twice" in refused(tmp_path / "m", work)


def test_another_base_and_another_adapter(work, tmp_path):
    other = models.make("llama-tied", seed=5).bfloat16()
    models.save(other, tmp_path / "other")
    assert "another base" in refused(work / "merged", tmp_path, work / "adapter", base="other")
    lora_tools.rescale(work / "adapter", tmp_path / "a", rank=1)
    assert "another base, or another adapter" in refused(work / "merged", work, tmp_path / "a")


def test_a_tensor_left_out_or_changed_or_missing(work, tmp_path):
    base = models.tensors(work / "base")
    name = f"{Q}.weight"
    left = spoilt(work, tmp_path / "l", lambda t: t.update({name: base[name]}))
    said = refused(left, work)
    assert name in said
    assert "the same as in the base, without the adapter" in said
    norm = "model.norm.weight"
    said = refused(spoilt(work, tmp_path / "n", lambda t: t.update({norm: t[norm] * 1.01})), work)
    assert f"{norm}: no adapter acts on it" in said
    assert f"{norm}: it is in the base" in refused(
        spoilt(work, tmp_path / "x", lambda t: t.pop(norm)), work
    )
    assert "extra" in refused(spoilt(work, tmp_path / "e", lambda t: t.update(e=t[norm] + 0)), work)

    def one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 4] += 0.01

    said = refused(spoilt(work, tmp_path / "o", one), work)
    assert f"worst is {name}" in said
    assert "1 of 1,024 elements" in said


def test_tied_tensors_gone_astray(work, tmp_path):
    def part(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.1

    said = refused(spoilt(work, tmp_path / "t", part), work)
    assert "lm_head.weight" in said


def test_an_adapter_against_its_pair(work):
    """By another route than extract, and to its figures."""
    made = lora_tools.extract(work / "base", work / "tuned", work / "again", rank=2, force=True)
    report = lora_tools.verify(work / "again", base=work / "base", tuned=work / "tuned")
    found = {m.module: m for m in report.modules}
    assert len(found) == len(made.modules)
    for m in made.modules:
        assert found[m.module].relative_error == pytest.approx(m.relative_error, rel=1e-3)
    assert report.totals["relative_error"] == pytest.approx(made.totals["relative_error"], rel=1e-3)
    worst = max(made.modules, key=lambda m: m.relative_error)
    with pytest.raises(QualityGateError, match=worst.module):
        lora_tools.verify(work / "again", base=work / "base", tuned=work / "tuned", max_error=0.01)


def test_what_an_adapter_leaves_out_counts(work, tmp_path):
    lora_tools.extract(work / "base", work / "tuned", tmp_path / "a", include=["q_proj"])
    report = lora_tools.verify(tmp_path / "a", base=work / "base", tuned=work / "tuned")
    totals = report.totals
    assert totals["relative_error_acted_on"] < 0.1 < totals["relative_error"]
    assert totals["relative_error_of_all"] == totals["relative_error"]
    assert "left out" in {f.action for f in report.plan}


def test_exit_codes(work, capfd):
    base, adapter, merged = (str(work / n) for n in ("base", "adapter", "merged"))
    assert run(["verify", merged, "--base", base, "--adapter", adapter, "-q"]) == 0
    assert run(["verify", merged, "--base", base, "--adapter", f"{adapter}=2", "--json"]) == 3
    printed, said = capfd.readouterr()
    assert json.loads(printed)["totals"]["same"] is False
    assert "Error: not base + adapter" in said
    assert run(["verify", merged, "--base", base, "--tuned", base]) == 1  # no adapter
    for wrong in (
        ["--base", base],
        ["--adapter", adapter],
        ["--base", base, "--adapter", adapter, "--max-error", "1"],
    ):
        assert run(["verify", merged, *wrong]) == 2


def test_no_number_is_within_rounding(work, tmp_path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"][1, 1] = math.nan

    said = refused(spoilt(work, tmp_path / "m", spoil), work)
    assert f"worst is {Q}.weight" in said


def test_equal_statistics_and_masks_are_no_news(tmp_path: Path) -> None:
    """Only matrices that are alike are worth a word."""
    alike = {"bn.running_mean": torch.ones(4), "bn.running_var": torch.ones(1, 4, 1, 1)}
    alike["attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    tensors = {f"{i}.{name}": t.clone() for i in (0, 1) for name, t in alike.items()}
    matrix = torch.randn(4, 4)
    tensors |= {"0.attn.q.weight": matrix, "1.attn.q.weight": matrix.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    notes = lora_tools.inspect(tmp_path / "model.safetensors").notes
    assert [note for note in notes if "the same bytes" in note] == [
        "1.attn.q.weight: the same bytes as 0.attn.q.weight"
    ]


def test_one_is_not_many(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, by in (("base", 0.0), ("tuned", 1.0)):
        save_file({"a.q.weight": torch.eye(4) + by}, tmp_path / f"{name}.safetensors")
    sides = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    assert run(["diff", *sides]) == 0
    assert run(["extract", *sides, "-o", str(tmp_path / "a"), "--rank", "1"]) == 0
    assert run(["inspect", sides[0]]) == 0
    said = "".join(capfd.readouterr())
    assert "1 tensor changed" in said
    assert "1 module, rank 1" in said
    assert ": 1 tensor (" in said
