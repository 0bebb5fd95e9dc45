"""The spectrum cache, weighted extraction, a budget in bytes, and provenance, on files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError, UsageError
from lora_tools.formats import spectra
from lora_tools.formats.adapters.peft import CONFIG, WEIGHTS
from lora_tools.formats.digest import file_sha256, tensor_hash
from lora_tools.formats.safetensors_file import SafetensorsFile

from . import iotools, models


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a fine-tune with a change of every rank, in bfloat16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    model = models.make("llama").bfloat16()
    models.save(model, folder / "base")
    models.perturb(model, 0.02, seed=1)
    models.save(model, folder / "tuned")
    iotools.tokenizer(folder / "base", models.VOCAB)
    text = " ".join(f"w{i * i % 41}" for i in range(600))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def sound_cache(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spectrum cache, made once."""
    folder = tmp_path_factory.mktemp("sound")
    sides = pair / "base", pair / "tuned"
    lora_tools.extract(*sides, folder / "a", rank=4, spectrum_cache=folder / "spectra")
    return folder / "spectra"


@pytest.fixture
def kept(sound_cache: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copy(sound_cache, tmp_path / "spectra"))


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as f:
        return f.metadata()


# ------------------------------------------------------------------------------- spectrum cache


def test_a_cache_gives_what_a_fresh_decomposition_gives(pair, tmp_path):
    """Other ranks and other policies from one file; exact methods here, so the same bytes."""
    sides = pair / "base", pair / "tuned"
    kept = tmp_path / "spectra"
    lora_tools.extract(*sides, tmp_path / "first", rank=2, spectrum_cache=kept)
    before = file_sha256(kept)
    for name, options in {
        "rank": {"rank": 7},
        "energy": {"energy": 0.7},
        "noise": {"noise_floor": True},
        "budget": {"budget": "6000"},
        "ratio": {"ratio": 0.5, "max_rank": 9},
    }.items():
        fresh = lora_tools.extract(*sides, tmp_path / f"{name}-fresh", **options)
        again = lora_tools.extract(
            *sides, tmp_path / f"{name}-again", **options, spectrum_cache=kept
        )
        assert [m.rank for m in fresh.modules] == [m.rank for m in again.modules], name
        for one, other in zip(fresh.modules, again.modules, strict=True):
            assert one.relative_error == pytest.approx(other.relative_error, abs=1e-3)
    assert file_sha256(kept) == before, "nothing new was computed"


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_cache_of_another_pair_is_refused_and_left_alone(pair, kept, tmp_path, side):
    before = file_sha256(kept)
    model = models.load(pair / side)
    models.perturb(model, 0.02, seed=9, only="layers.1.mlp.up_proj")
    models.save(model, tmp_path / "other")
    sides = {"base": pair / "base", "tuned": pair / "tuned"} | {side: tmp_path / "other"}
    with pytest.raises(CheckpointError, match=r"spectra: model\.layers\.1\.mlp\.up_proj was decom"):
        lora_tools.extract(sides["base"], sides["tuned"], tmp_path / "b", spectrum_cache=kept)
    assert file_sha256(kept) == before
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_cache_is_refused(pair, kept, tmp_path, length):
    data = kept.read_bytes()[:length]
    kept.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{kept}: "):
        lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "b", spectrum_cache=kept)
    assert kept.read_bytes() == data
    assert not (tmp_path / "b").exists()


def _flip(tensors, modules):
    next(t for name, t in tensors.items() if name.startswith("right/")).view(torch.int32)[0, 3] ^= 1


def _vectors(tensors, modules):
    for name, right in tensors.items():
        if name.startswith("right/"):
            chance = torch.randn(right.shape[1], len(right), generator=torch.manual_seed(0))
            right.copy_(torch.linalg.qr(chance).Q.T)


def _facts(**factors):
    def change(tensors, modules):
        for entry in modules.values():
            entry["facts"] |= {name: entry["facts"][name] * f for name, f in factors.items()}

    return change


def _scaled(part, factor):
    def change(tensors, modules):
        for name, tensor in tensors.items():
            if name.startswith(part):
                tensor *= factor

    return change


DAMAGES = {
    "one bit of a vector": _flip,
    "vectors by chance": _vectors,
    "longer vectors": _scaled("right/", 1.5),
    "vectors of NaN": _scaled("right/", float("nan")),
    "larger values": _scaled("squared/", 100),
    "negative values": _scaled("squared/", -1),
    "values of NaN": _scaled("squared/", float("nan")),
    "a larger total": _facts(total=100),
    "a smaller total": _facts(total=0.01),
    "a larger weighted total": _facts(weighted=2),
    "a larger base": _facts(base=100),
}


def damage(kept, change, forged=False):
    """Change what a cache holds, under the digest that it had, or one that fits."""
    tensors, said = load_file(kept), metadata(kept)
    modules = json.loads(said["modules"])
    change(tensors, modules)
    said["modules"] = json.dumps(modules, sort_keys=True)
    save_file(tensors, kept, said)
    if forged:
        file = SafetensorsFile(kept)
        hashes = {name: tensor_hash(file.raw(name)) for name in file.specs}
        said["digest"] = spectra._digest(file.specs.values(), hashes, said["modules"])
        save_file(tensors, kept, said)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("policy", [{"rank": 4}, {"energy": 0.5}, {"budget": "6000"}], ids=str)
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_cache_is_refused(pair, kept, tmp_path, what, policy):
    sides = pair / "base", pair / "tuned"
    damage(kept, DAMAGES[what])
    before = kept.read_bytes()
    with pytest.raises(CheckpointError, match=f"^{kept}: the spectrum cache is damaged"):
        lora_tools.extract(*sides, tmp_path / "b", **policy, spectrum_cache=kept)
    assert kept.read_bytes() == before
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("policy", [{"rank": 4}, {"energy": 0.5}, {"budget": "6000"}], ids=str)
@pytest.mark.parametrize("facts", [{"total": 100}, {"total": 0.01}, {"base": 100}], ids=str)
def test_a_cache_that_lies_of_the_weights_is_refused(pair, kept, tmp_path, facts, policy):
    """Its digest fits: somebody meant it."""
    sides = pair / "base", pair / "tuned"
    damage(kept, _facts(**facts), forged=True)
    with pytest.raises(CheckpointError, match=rf"^{kept}: \S+ is there with"):
        lora_tools.extract(*sides, tmp_path / "b", **policy, spectrum_cache=kept)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("what", ["one bit of a vector", "vectors by chance", "longer vectors"])
def test_figures_are_those_of_what_was_written_whatever_was_kept(pair, kept, tmp_path, what):
    sides = pair / "base", pair / "tuned"
    damage(kept, DAMAGES[what], forged=True)
    said = lora_tools.extract(*sides, tmp_path / "b", rank=4, spectrum_cache=kept).totals
    found = lora_tools.verify(tmp_path / "b", base=sides[0], tuned=sides[1]).totals
    assert said["relative_error"] == pytest.approx(found["relative_error"], rel=1e-4)
    assert 0 <= said["energy"] <= 1


def test_a_cache_of_other_options_is_made_anew(pair, kept, tmp_path):
    before = file_sha256(kept)
    lora_tools.extract(
        pair / "base", pair / "tuned", tmp_path / "b", rank=4, seed=3, spectrum_cache=kept
    )
    assert file_sha256(kept) != before


def test_a_file_that_is_no_cache_is_left_alone(pair, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "mine.safetensors")
    before = file_sha256(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: not a spectrum cache"):
        lora_tools.extract(
            pair / "base",
            pair / "tuned",
            tmp_path / "a",
            rank=4,
            spectrum_cache=tmp_path / "mine.safetensors",
        )
    assert file_sha256(tmp_path / "mine.safetensors") == before
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("size", ["30kB", "60kB"])
def test_a_budget_in_bytes_bounds_the_file(pair, tmp_path, size):
    report = lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "a", budget=size)
    most = int(size.removesuffix("kB")) * 1000
    assert 0.7 * most < (tmp_path / "a" / WEIGHTS).stat().st_size <= most
    ranks = {m.rank for m in report.modules}
    assert len(ranks) > 1
    models.attach_strictly(models.load(pair / "base"), tmp_path / "a")


def test_a_budget_wins_over_a_uniform_rank_of_its_size(pair, tmp_path):
    sides = pair / "base", pair / "tuned"
    same = lora_tools.extract(*sides, tmp_path / "u", rank=6, dtype="float32")
    shared = lora_tools.extract(
        *sides, tmp_path / "b", budget=str(same.totals["parameters"]), dtype="float32"
    )
    assert shared.totals["parameters"] <= same.totals["parameters"]
    assert shared.totals["relative_error"] < same.totals["relative_error"]


@pytest.fixture(scope="module")
def uneven(pair, tmp_path_factory) -> Path:
    """An adapter of rank 8 whose modules differ in strength, with tensors saved whole."""
    folder = tmp_path_factory.mktemp("uneven") / "adapter"
    lora_tools.extract(pair / "base", pair / "tuned", folder, rank=8, dtype="float32")
    factors = load_file(folder / WEIGHTS)
    for i, name in enumerate(sorted(factors)):
        if "lora_B" in name:
            factors[name] *= 1 + i % 5
    save_file(factors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_rescale_by_a_budget_wins_over_a_uniform_rank_of_its_size(uneven, tmp_path, rank):
    same = lora_tools.rescale(uneven, tmp_path / "u", rank=rank)
    factors = load_file(tmp_path / "u" / WEIGHTS)
    numbers = sum(t.numel() for name, t in factors.items() if "lora_" in name)
    shared = lora_tools.rescale(uneven, tmp_path / "b", budget=str(numbers))
    made = load_file(tmp_path / "b" / WEIGHTS)
    assert sum(t.numel() for name, t in made.items() if "lora_" in name) <= numbers
    assert shared.totals["relative_error"] < same.totals["relative_error"]
    assert shared.totals["rank_min"] >= 1
    assert len({m.rank for m in shared.modules}) > 1
    capped = lora_tools.rescale(uneven, tmp_path / "c", budget=str(numbers), max_rank=rank)
    assert capped.totals["rank_max"] == rank


def test_rescale_by_a_budget_in_bytes_bounds_the_file(uneven, pair, tmp_path):
    most = (uneven / WEIGHTS).stat().st_size * 3 // 4
    for name, options in (("same", {}), ("half", {"dtype": "bfloat16"})):
        report = lora_tools.rescale(uneven, tmp_path / name, budget=f"{most}B", **options)
        assert 0.5 * most < (tmp_path / name / WEIGHTS).stat().st_size <= most
        assert report.command.startswith(f"rescale budget='{most}B'")
        models.attach_strictly(models.load(pair / "base"), tmp_path / name)
    whole = lora_tools.rescale(uneven, tmp_path / "whole", budget="1GB")
    assert {m.rank for m in whole.modules} == {8}
    for options, says in (
        ({"budget": "100"}, "rank 1 for each of 16 modules already needs more"),
        ({"budget": "1kB"}, "tensors saved whole"),
        ({"budget": "1M", "consumer": "vllm"}, "budget gives each module its own rank"),
        ({"budget": "1M", "energy": 0.5}, "exclude each other"),
    ):
        with pytest.raises(UsageError, match=says):
            lora_tools.rescale(uneven, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_noise_is_not_judged_where_activations_weigh_it(pair, tmp_path):
    for policy in ("noise_floor", "gavish_donoho"):
        with pytest.raises(UsageError, match="need it unweighted"):
            lora_tools.extract(
                pair / "base",
                pair / "tuned",
                tmp_path / "a",
                activations=tmp_path / "s",
                **{policy: True},
            )


def test_a_module_of_rank_zero_is_named_and_left_out(pair, tmp_path):
    report = lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "a", threshold=0.25)
    none = [m.module for m in report.modules if m.rank == 0]
    assert none
    fates = {f.tensor: f for f in report.plan}
    for module in none:
        assert fates[f"{module}.weight"].action == "skipped"
        assert fates[f"{module}.weight"].reason == "--threshold gives it rank 0"
    keys = load_file(tmp_path / "a" / WEIGHTS)
    assert not [k for k in keys for module in none if f".{module}.lora_" in k]
    assert report.totals["rank_min"] == 0


def test_a_budget_that_cannot_be(pair, tmp_path):
    for options, says in (
        ({"budget": "1kB"}, "tensors saved whole"),
        ({"budget": "1M", "consumer": "vllm"}, "budget gives each module its own rank"),
        ({"budget": "1M", "rank": 3}, "exclude each other"),
    ):
        with pytest.raises(UsageError, match=says):
            lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "a", **options)


# ---------------------------------------------------------------------------------- activations


@pytest.fixture(scope="module", params=["full", "diagonal"])
def stats(request, pair, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stats") / f"{request.param}.safetensors"
    report = lora_tools.collect_stats(
        pair / "base", pair / "text.txt", path, kind=request.param, length=20, jobs=1
    )
    assert report.totals["tokens"] == 600
    return path


@pytest.mark.parametrize("scheme", ["nf4", "int8", "mxfp4"])
def test_of_stored_codes_the_numbers_are_run(scheme, pair, tmp_path):
    """Whatever the format, and whether transformers could load it here."""
    lora_tools.quantize(pair / "base", tmp_path / "q", scheme=scheme)
    lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    given = pair / "text.txt"
    report = lora_tools.collect_stats(tmp_path / "q", given, tmp_path / "a", length=20, jobs=1)
    lora_tools.collect_stats(tmp_path / "p", given, tmp_path / "b", length=20, jobs=1)
    found, wanted = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any("its dequantized numbers are used" in note for note in report.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "p", "q"]


def test_statistics_are_those_of_the_inputs(stats, pair):
    """Against hooks of our own, and the tokens counted."""
    model = models.load(pair / "base", dtype=torch.float32)
    seen = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()[0]))
    tokens = [i * i % 41 for i in range(600)]
    with torch.no_grad():
        for start in range(0, 600, 20):
            model(input_ids=torch.tensor([tokens[start : start + 20]]))
    x = torch.cat(seen).double()
    found = load_file(stats)
    wanted = x.T @ x / 600
    name = "model.layers.0.mlp.down_proj"
    if found[name].dim() == 1:
        wanted = wanted.diagonal()
    assert torch.allclose(found[name].double(), wanted, rtol=1e-3, atol=1e-6)
    counts = torch.bincount(torch.tensor(tokens), minlength=models.VOCAB) + 1
    assert torch.allclose(found["model.embed_tokens"], counts / (600 + models.VOCAB))


def test_weighted_extraction_is_better_where_it_is_weighed(stats, pair, tmp_path):
    """The output's error on those inputs, computed from the deltas themselves."""
    options = {"rank": 6, "dtype": "float32", "include": ["_proj", "embed"], "rest": "skip"}
    sides = pair / "base", pair / "tuned"
    plain = lora_tools.extract(*sides, tmp_path / "p", **options)
    weighed = lora_tools.extract(*sides, tmp_path / "w", **options, activations=stats)
    R = load_file(stats)
    base, tuned = (models.tensors(side) for side in sides)

    def errors(adapter: Path) -> dict[str, float]:
        factors, result = load_file(adapter / WEIGHTS), {}
        for m in weighed.modules:
            key = f"base_model.model.{m.module}"
            delta = tuned[f"{m.module}.weight"].double() - base[f"{m.module}.weight"].double()
            if m.layout == "embedding":
                A, B = factors[f"{key}.lora_embedding_A"], factors[f"{key}.lora_embedding_B"]
                rest, delta = delta.T - B.double() @ A.double(), delta.T
            else:
                A, B = factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"]
                rest = delta - B.double() @ A.double()
            moment = R[m.module].double()
            moment = moment if moment.dim() == 2 else moment.diag()
            whole = torch.trace(delta @ moment @ delta.T)
            result[m.module] = math.sqrt(torch.trace(rest @ moment @ rest.T) / whole)
        return result

    before, after = errors(tmp_path / "p"), errors(tmp_path / "w")
    assert len(after) > 10
    for m, same in zip(weighed.modules, plain.modules, strict=True):
        assert m.weighted_error == pytest.approx(after[m.module], rel=2e-2), m.module
        assert after[m.module] <= before[m.module] * (1 + 1e-6), m.module
        assert m.relative_error >= same.relative_error * (1 - 1e-6), "nothing is free"
        assert math.isnan(same.weighted_error)
    assert sum(after.values()) < 0.97 * sum(before.values())


def test_full_statistics_are_exact():
    """QERA's theorem: nothing of that rank is nearer on those inputs."""
    from lora_tools.linalg.weighting import Weighting

    torch.manual_seed(0)
    D, X = torch.randn(20, 12).double(), torch.randn(12, 200).double()
    X[0] *= 9
    R = X @ X.T / 200
    w = Weighting(R)
    U, S, Vh = torch.linalg.svd(w.apply(D), full_matrices=False)
    best = (U[:, :3] * S[:3]) @ w.undo(Vh[:3])
    error = float((D @ X - best @ X).square().sum() / 200)
    assert error == pytest.approx(float((S[3:] ** 2).sum()), rel=1e-9)
    assert torch.allclose(w.apply(w.undo(D)), D)
    assert torch.allclose(w.moment(D), D @ R)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: save_file({"a": torch.zeros(3)}, p), "does not hold activation statistics"),
        (
            lambda p: save_file({"zz": torch.ones(3)}, p, {"loratools_activations": "1"}),
            "none of the modules",
        ),
        (
            lambda p: save_file(
                {"model.layers.0.self_attn.q_proj": torch.ones(5)},
                p,
                {"loratools_activations": "1"},
            ),
            "has 5 inputs",
        ),
        (
            lambda p: save_file(
                {"model.layers.0.self_attn.q_proj": torch.ones(2, 3)},
                p,
                {"loratools_activations": "1"},
            ),
            "not a second moment",
        ),
    ],
)
def test_statistics_that_do_not_fit(pair, tmp_path, spoil, says):
    spoil(tmp_path / "s")
    with pytest.raises((CheckpointError, MismatchError), match=says):
        lora_tools.extract(
            pair / "base", pair / "tuned", tmp_path / "a", activations=tmp_path / "s"
        )
    assert not (tmp_path / "a").exists()


def test_collect_stats_refuses(pair, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    out = tmp_path / "s"
    for text, says in (
        ("short.txt", "has 2 tokens"),
        ("bytes.txt", "not UTF-8"),
        ("none.txt", "No such file"),
    ):
        with pytest.raises(UsageError, match=says):
            lora_tools.collect_stats(pair / "base", tmp_path / text, out)
    with pytest.raises(CheckpointError, match="put the files of the model's tokenizer"):
        lora_tools.collect_stats(pair / "tuned", pair / "text.txt", out)
    plan = lora_tools.collect_stats(pair / "base", pair / "text.txt", out, dry_run=True)
    assert {f.action for f in plan.plan} == {"measure"}
    assert not out.exists()


def test_a_model_that_is_loaded_and_does_not_run(pair, tmp_path):
    model = shutil.copytree(pair / "base", tmp_path / "base")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": -1}))
    with pytest.raises(CheckpointError, match="base: transformers loads it"):
        lora_tools.collect_stats(model, pair / "text.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- provenance


def test_every_artifact_says_how_it_was_made(pair, tmp_path):
    base, tuned = pair / "base", pair / "tuned"
    made = lora_tools.extract(base, tuned, tmp_path / "a", rank=3, rest="skip")
    found = metadata(tmp_path / "a" / WEIGHTS)
    assert found["command"] == made.command == "extract rank=3 rest='skip'"
    assert [found["base_digest"], found["tuned_digest"]] == [i.digest for i in made.inputs]
    lora_tools.rescale(tmp_path / "a", tmp_path / "r", scale=0.5)
    again = metadata(tmp_path / "r" / WEIGHTS)
    assert again["command"] == "extract rank=3 rest='skip' | rescale scale=0.5"
    assert again["base_digest"] == found["base_digest"]
    merged = lora_tools.merge(base, [(tmp_path / "a", 0.5)], tmp_path / "m")
    found = metadata(tmp_path / "m" / "model.safetensors")
    assert found["format"] == "pt"
    assert found["base_digest"] == merged.inputs[0].digest
    assert found["adapter_digests"] == merged.inputs[1].digest + "=0.5"
    assert found["command"] == "merge"
    assert merged.version == found["loratools"]
    models.load(tmp_path / "m")
    lora_tools.merge(tmp_path / "m", [tmp_path / "a"], tmp_path / "n", allow_other_base=True)
    assert metadata(tmp_path / "n" / "model.safetensors")["base_digest"] != found["base_digest"]


def test_four_bits_say_how_they_were_made(pair, tmp_path):
    lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "a", rank=3)
    given = [(tmp_path / "a", 0.5)]
    made = lora_tools.quantize(pair / "base", tmp_path / "q", adapters=given, blocksize=32)
    found = metadata(tmp_path / "q" / "model.safetensors")
    assert found["command"] == made.command == "quantize blocksize=32"
    assert found["base_digest"] == made.inputs[0].digest
    assert found["adapter_digests"] == made.inputs[1].digest + "=0.5"
    plain = lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    found = metadata(tmp_path / "p" / "model.safetensors")
    assert found["command"] == "dequantize"
    assert found["base_digest"] == plain.inputs[0].digest
    assert "adapter_digests" not in found
    # One checkpoint has one digest, whichever verb reads it.
    merged = lora_tools.merge(tmp_path / "q", given, tmp_path / "m")
    again = lora_tools.merge(tmp_path / "q", given, tmp_path / "r", requantize=True)
    assert {merged.inputs[0].digest, again.inputs[0].digest} == {plain.inputs[0].digest}
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.quantize(pair / "tuned", tmp_path / "t", adapters=given)
    assert not (tmp_path / "t").exists()
    lora_tools.quantize(pair / "tuned", tmp_path / "t", adapters=given, allow_other_base=True)


def test_an_adapter_for_another_base_is_refused(pair, tmp_path):
    lora_tools.extract(pair / "base", pair / "tuned", tmp_path / "a", rank=3)
    with pytest.raises(MismatchError, match=r"was made for another base.*allow_other_base=True"):
        lora_tools.merge(pair / "tuned", [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    lora_tools.merge(pair / "tuned", [tmp_path / "a"], tmp_path / "m", allow_other_base=True)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS)  # says nothing now
    assert config["r"] == 3
    lora_tools.merge(pair / "tuned", [tmp_path / "a"], tmp_path / "n")
    assert iotools.tree(tmp_path / "m").keys() == iotools.tree(tmp_path / "n").keys()
