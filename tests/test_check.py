"""``check``: what a program makes of an adapter, held to PEFT and diffusers themselves where they
are installed, and to their rules elsewhere; and the command that it names is run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import QualityGateError
from lora_tools.cli import run
from lora_tools.formats.adapters.consumers import CONSUMERS
from lora_tools.verifying.consumer import FINDINGS

from . import models
from .test_adapter_folders import adapter as plain_adapter
from .test_adapter_folders import shard
from .test_consumers import vllm_reads
from .test_diffusers_format import root as unet_root  # noqa: F401 - a fixture
from .test_diffusers_format import unet

LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": LINEAR,
    "patterns": {**LINEAR, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "even": {**LINEAR, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 4}},
    "rslora": {**LINEAR, "use_rslora": True},
    "dora": {**LINEAR, "use_dora": True},
    "bias": {**LINEAR, "target_modules": ["q_proj"], "lora_bias": True},
    "biases": {**LINEAR, "bias": "all"},
    "saved": {**LINEAR, "modules_to_save": ["lm_head"]},
    "norm": {**LINEAR, "modules_to_save": ["norm"]},
    "embedding": {**LINEAR, "target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {**LINEAR, "trainable_token_indices": [3, 7]},
}
CHANGED, REFUSED, NOT_READ = "changed", "refused", "not read"
# By program and adapter: the verdicts, and the command that is named. What is not here fits.
EXPECTED: dict[tuple[str, str], tuple[set[str], str]] = {
    ("vllm", "patterns"): ({CHANGED}, "rescale"),
    **{
        ("vllm", kind): ({REFUSED}, "merge")
        for kind in ("dora", "bias", "biases", "saved", "norm", "tokens")
    },
    ("sglang", "patterns"): ({CHANGED, NOT_READ}, "rescale"),
    ("sglang", "even"): ({NOT_READ}, "rescale"),
    ("sglang", "rslora"): ({CHANGED}, "rescale"),
    ("sglang", "embedding"): ({REFUSED}, "merge"),
    **{
        ("sglang", kind): ({NOT_READ}, "merge")
        for kind in ("dora", "bias", "biases", "saved", "norm", "tokens")
    },
    ("tensorrt-llm", "patterns"): ({CHANGED}, "rescale"),
    **{
        ("tensorrt-llm", kind): ({NOT_READ}, "merge")
        for kind in ("bias", "biases", "norm", "tokens", "embedding")
    },
    **{
        ("llama.cpp", kind): ({REFUSED}, "convert")
        for kind in ("plain", "patterns", "even", "rslora", "embedding")
    },
    **{
        ("llama.cpp", kind): ({REFUSED, NOT_READ}, "merge")
        for kind in ("dora", "bias", "biases", "saved", "norm", "tokens")
    },
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("check")
    models.save(models.make("llama"), folder / "base")
    for kind, config in ADAPTERS.items():
        models.train(folder / "base", folder / kind, config, save_embedding_layers=False)
    return folder


def checked(adapter: Path, consumer: Any, base: Path | None = None) -> dict[str, Any]:
    """The totals; those of an error must say what it says."""
    try:
        return dict(lora_tools.check(adapter, base=base, consumer=consumer).totals)
    except QualityGateError as error:
        report, text = error.report, str(error)
    assert report is not None
    assert report.totals["findings"]
    assert report.totals["next"] in text
    return dict(report.totals)


def verdicts(totals: dict[str, Any]) -> set[str]:
    return {finding["verdict"] for finding in totals["findings"]}


def carried_out(command: str, folder: Path) -> Path:
    """What a command makes that a person would type, its output moved into a folder."""
    words = shlex.split(command)
    assert words.pop(0) == "loratools"
    place = words.index("-o") + 1
    words[place] = str(folder / Path(words[place]).name)
    assert run([*words, "--quiet"]) == 0
    return Path(words[place])


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name != "diffusers"])
def test_every_kind_for_every_program(consumer: str, kind: str, desk: Path, tmp_path: Path) -> None:
    """What the command that is named makes is read, or is the model with the adapter in it."""
    found = checked(desk / kind, consumer, desk / "base")
    wanted, verb = EXPECTED.get((consumer, kind), (set(), ""))
    assert verdicts(found) == wanted
    assert found["fits"] == (not wanted)
    assert found["next"].split()[1:2] == ([verb] if verb else [])
    if not verb:
        return
    made = carried_out(found["next"], tmp_path)
    if verb == "merge":
        lora_tools.verify(made, base=desk / "base", adapters=[desk / kind])
        return
    assert checked(made, consumer, desk / "base")["fits"]
    if consumer == "vllm":
        vllm_reads(made)


def test_without_a_base_it_says_what_was_not_looked_up(desk: Path) -> None:
    found = checked(desk / "plain", "vllm")
    assert any("(give --base)" in text for text in found["not_checked"])
    named = checked(desk / "plain", "llama.cpp")["next"]
    base = json.loads((desk / "plain/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named.endswith(f"--to gguf --base {base}"), "the base that the config names"


# ------------------------------------------------------------------------------------------- PEFT


def reconfigured(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def renamed(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k.replace(old, new, 1): v for k, v in load_file(file).items()}, file)


# What is done to the adapter, and whether PEFT then reads all of it.
VARIANTS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "there is nothing to do": (lambda a: None, True),
    "other layers": (lambda a: renamed(a, "layers", "h"), False),
    "no model.": (lambda a: renamed(a, "model.model.model.", "model.model."), False),
    "no prefix of PEFT": (lambda a: renamed(a, "base_model.model.", ""), False),
    "an adapter's name": (lambda a: renamed(a, ".weight", ".default.weight"), False),
    "fewer targets": (lambda a: reconfigured(a, target_modules=["q_proj"]), False),
    "targets by a regex": (lambda a: reconfigured(a, target_modules=r".*\.(q|down)_proj"), True),
    "a regex of one layer": (
        lambda a: reconfigured(a, target_modules=r".*\.0\..*\.(q|down)_proj"),
        False,
    ),
    "all-linear": (lambda a: reconfigured(a, target_modules="all-linear"), True),
    "excluded": (lambda a: reconfigured(a, exclude_modules=["down_proj"]), False),
    "one layer": (lambda a: reconfigured(a, layers_to_transform=[1]), False),
    "both layers": (lambda a: reconfigured(a, layers_to_transform=[0, 1]), True),
}


def peft_reads(base: Path, folder: Path) -> bool:
    """Whether every key of the file is in PEFT's model once it is loaded."""
    try:
        model = models.attach(base, folder)
    except (ValueError, KeyError, RuntimeError):
        return False
    inside = models.quietly(lambda: peft.get_peft_model_state_dict(model))
    written = models.tensors(folder)
    return all(name in inside and torch.equal(inside[name], t) for name, t in written.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_what_is_said_to_be_read(variant: str, desk: Path, tmp_path: Path) -> None:
    change, reads = VARIANTS[variant]
    given = shutil.copytree(desk / "plain", tmp_path / "a")
    change(given)
    assert peft_reads(desk / "base", given) == reads
    found = checked(given, "peft", desk / "base")
    assert found["fits"] == reads
    if found["next"]:
        made = carried_out(found["next"], tmp_path)
        if " convert " in found["next"]:
            assert peft_reads(desk / "base", made)
            assert checked(made, "peft", desk / "base")["fits"]


@pytest.mark.parametrize("consumer", ["peft", "vllm", "llama.cpp"])
def test_another_base_is_refused_and_no_command_is_made_up(
    consumer: str, desk: Path, tmp_path: Path
) -> None:
    other = models.save(models.make("llama", width=16), tmp_path / "other")
    found = checked(desk / "plain", consumer, other)
    assert "other shapes than the base's" in " ".join(f["what"] for f in found["findings"])
    assert verdicts(found) & {REFUSED, NOT_READ}
    assert not found["next"]


def test_a_vocabulary_that_has_to_be_resized_first(desk: Path, tmp_path: Path) -> None:
    given = shutil.copytree(desk / "saved", tmp_path / "a")
    tensors = load_file(given / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.lm_head.weight"] = torch.cat([head, head[:3]])
    save_file(tensors, given / "adapter_model.safetensors")
    assert not peft_reads(desk / "base", given)
    [finding] = checked(given, "peft", desk / "base")["findings"]
    assert finding["verdict"] == REFUSED
    assert "must be resized" in finding["what"]


def test_shards_are_put_together(tmp_path: Path) -> None:
    cut = shard(plain_adapter(tmp_path / "cut"))
    for consumer in ("peft", "vllm"):
        found = checked(cut, consumer)
        assert verdicts(found) == {REFUSED}
        assert checked(carried_out(found["next"], tmp_path), consumer)["fits"]
    assert checked(cut, "sglang")["fits"]


# ------------------------------------------------------------------------------ names and servers


def headers(folder: Path, names: list[str], config: dict[str, Any]) -> Path:
    """A checkpoint of square weights."""
    folder.mkdir()
    save_file({f"{name}.weight": torch.zeros(8, 8) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def factors(folder: Path, names: list[str], r: int = 2) -> Path:
    folder.mkdir()
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(8, r)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


LAYERS = [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj")]


def test_a_layer_that_is_not_there_is_ignored_and_an_unknown_one_refused(tmp_path: Path) -> None:
    base = headers(tmp_path / "base", LAYERS, {"model_type": "no_such"})
    beyond = factors(tmp_path / "a", [*LAYERS, "model.layers.7.self_attn.q_proj"])
    [finding] = checked(beyond, "vllm", base)["findings"]
    assert finding["verdict"] == "ignored"
    assert finding["keys"]["count"] == 1
    assert "layers.7" in finding["keys"]["examples"][0]
    assert not finding["next"], "merge would not find it either"
    strange = factors(tmp_path / "b", [*LAYERS, "model.layers.0.self_attn.qkv"])
    assert verdicts(checked(strange, "vllm", base)) == {REFUSED}
    other = checked(strange, "sglang", base)["findings"]
    assert any("does not support" in finding["what"] for finding in other)


def test_a_prefix_that_a_merge_takes_and_a_server_does_not(tmp_path: Path) -> None:
    base = headers(tmp_path / "base", LAYERS, {})
    short = factors(tmp_path / "a", [name.removeprefix("model.") for name in LAYERS])
    found = checked(short, "vllm", base)
    assert verdicts(found) == {"ignored"}
    assert found["findings"][0]["keys"]["count"] == len(LAYERS)
    carried_out(found["next"], tmp_path)


def test_what_reads_pictures_is_passed_by(tmp_path: Path) -> None:
    names = ["model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.q_proj"]
    base = headers(tmp_path / "base", names, {"vision_config": {}})
    given = factors(tmp_path / "a", names)
    [finding] = checked(given, "vllm", base)["findings"]
    assert finding["verdict"] == "ignored"
    assert "visual" in finding["keys"]["examples"][0]
    assert finding["next"].startswith("loratools merge ")
    assert checked(given, "tensorrt-llm", base)["fits"]
    assert checked(factors(tmp_path / "b", names[:1]), "vllm", base)["fits"]


def test_experts_one_by_one(tmp_path: Path) -> None:
    names = [
        f"model.layers.0.mlp.experts.{i}.{p}" for i in (0, 1) for p in ("up_proj", "down_proj")
    ]
    base = headers(tmp_path / "base", names, {})
    assert checked(factors(tmp_path / "a", names), "vllm", base)["fits"]
    third = factors(tmp_path / "b", [*names, "model.layers.0.mlp.experts.2.up_proj"])
    assert verdicts(checked(third, "vllm", base)) == {"ignored"}


def test_a_rank_that_is_too_high_is_cut(tmp_path: Path) -> None:
    given = factors(tmp_path / "a", LAYERS, r=600)
    found = checked(given, "vllm")
    assert verdicts(found) == {REFUSED}
    assert "--rank 512" in found["next"]
    assert checked(carried_out(found["next"], tmp_path), "vllm")["fits"]
    report = lora_tools.check(factors(tmp_path / "b", LAYERS, r=12), consumer="vllm")
    assert "start vllm with --max-lora-rank 16 or more" in report.notes


def test_a_config_that_names_what_is_not_there_is_cleared(tmp_path: Path) -> None:
    """vLLM refuses by the config alone."""
    given = factors(tmp_path / "a", LAYERS)
    reconfigured(given, bias="lora_only", modules_to_save=["lm_head"])
    found = checked(given, "vllm")
    assert verdicts(found) == {REFUSED}
    assert checked(carried_out(found["next"], tmp_path), "vllm")["fits"]


def test_a_tied_head_in_llama_cpp(tmp_path: Path) -> None:
    base = models.save(models.make("llama-tied"), tmp_path / "base")
    config = {**LINEAR, "target_modules": ["q_proj", "embed_tokens"]}
    models.train(base, tmp_path / "a", config, save_embedding_layers=False)
    found = checked(tmp_path / "a", "llama.cpp", base)
    assert "output head that is also the embedding" in found["findings"][-1]["what"]
    assert found["next"].startswith("loratools merge ")


def test_ia3_is_peft_s_alone(desk: Path, tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = models.quietly(lambda: peft.get_peft_model(models.load(desk / "base"), config))
    models.quietly(lambda: model.save_pretrained(tmp_path / "ia3"))
    assert checked(tmp_path / "ia3", "peft", desk / "base")["fits"]
    found = checked(tmp_path / "ia3", "vllm", desk / "base")
    assert verdicts(found) == {REFUSED}
    assert found["next"].startswith("loratools merge ")


def test_other_parts_than_factors_are_looked_up_too(desk: Path, tmp_path: Path) -> None:
    tokens = shutil.copytree(desk / "tokens", tmp_path / "tokens")
    file = tokens / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("embed_tokens", "wte"): v for k, v in tensors.items()}, file)
    reconfigured(tokens, trainable_token_indices={"wte": [3, 7]})
    [finding] = checked(tokens, "peft", desk / "base")["findings"]
    assert finding["verdict"] == "ignored"
    head = shutil.copytree(desk / "saved", tmp_path / "head")
    renamed(head, "lm_head", "score")
    report = lora_tools.check(head, base=desk / "base", consumer="peft")
    assert any("not in the base: score.weight" in note for note in report.notes)


def test_a_pickle_is_named_with_the_leave_that_it_needs(tmp_path: Path) -> None:
    given = factors(tmp_path / "a", LAYERS, r=600)
    torch.save(load_file(given / "adapter_model.safetensors"), given / "adapter_model.bin")
    (given / "adapter_model.safetensors").unlink()
    with pytest.raises(lora_tools.UnsafeInput):
        lora_tools.check(given, consumer="vllm")
    with pytest.raises(QualityGateError, match=r"--rank 512 --allow-pickle`"):
        lora_tools.check(given, consumer="vllm", allow_pickle=True)


# -------------------------------------------------------------------------------------- diffusers


def test_diffusers_reads_what_convert_makes(unet_root: Path, tmp_path: Path) -> None:  # noqa: F811
    adapter, pipe = unet_root / "adapter", unet_root / "pipe"
    for base in (pipe, pipe / "unet"):
        found = checked(adapter, "diffusers", base)
        assert "ignored" in verdicts(found)
    made = carried_out(found["next"], tmp_path)
    assert checked(made, "diffusers", pipe)["fits"]
    model = unet()
    state = load_file(made / "pytorch_lora_weights.safetensors")
    models.quietly(lambda: model.load_lora_adapter(state, prefix="unet"))
    assert len(model.peft_config) == 1


def test_a_language_model_is_none_of_diffusers(desk: Path) -> None:
    found = checked(desk / "plain", "diffusers", desk / "base")
    assert any("this program loads pipelines" in f["what"] for f in found["findings"])
    assert " convert " not in found["next"]


# ------------------------------------------------------------------------------- the command line


def test_exit_codes_and_json(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(desk / "base"), "--for", "vllm"]
    assert run(["check", str(desk / "plain"), *words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["totals"]["fits"]
    assert run(["check", str(desk / "dora"), *words, "--json"]) == 3
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["totals"]["as_of"] == CONSUMERS["vllm"].version
    assert [i["role"] for i in report["inputs"]] == ["adapter", "base"]
    assert "refused: DoRA's magnitudes" in err
    assert "not checked: " in err
    assert report["totals"]["next"] in err


def test_only_headers_are_read_and_torch_is_not_imported(desk: Path) -> None:
    words = ["check", str(desk / "patterns"), "--base", str(desk / "base"), "--for", "vllm", "-q"]
    code = (
        f"import sys; from lora_tools.cli import run; print(run({words!r}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_every_row_says_what_it_is_of() -> None:
    for row in CONSUMERS.values():
        assert row.version
        assert (row.refuses | row.ignores) <= FINDINGS
        assert not row.refuses & row.ignores
