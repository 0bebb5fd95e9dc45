"""Names with what wrappers put into them: read without it, by every verb, in every format."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, CheckpointError

from . import iotools, models

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
Rename = Callable[[str], str]


def before(prefix: str) -> Rename:
    return lambda name: prefix + name


def inside(part: str, at: str = r"layers\.\d+\.") -> Rename:
    return lambda name: re.sub(f"({at})", rf"\1{part}", name)


# What trainers were seen to write, of an adapter and of a checkpoint.
BOTH: dict[str, Rename] = {
    "compiled": before("_orig_mod."),
    "compiled, DDP": before("module._orig_mod."),
    "DDP, compiled": before("_orig_mod.module."),
    "DDP twice": before("module.module."),
    "FSDP": lambda n: "_fsdp_wrapped_module." + inside("_fsdp_wrapped_module.")(n),
    "old FSDP": lambda n: "_fsdp_wrapped_module._fpw_module." + inside("_fpw_module.")(n),
    "checkpointing": inside("_checkpoint_wrapped_module."),
    "each layer compiled": inside("_orig_mod."),
    "FSDP and checkpointing": inside("_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "Fabric": before("_forward_module.module."),
}
OF_ADAPTERS: dict[str, Rename] = {
    **BOTH,
    "PEFT twice": before(PREFIX),
    "PEFT around DDP": inside("module.", re.escape(PREFIX)),
    "in a trainer's policy": before("policy."),
    "default": lambda n: n.replace(".weight", ".default.weight"),
    "named": lambda n: n.replace(".weight", ".my-adapter_2.weight"),
    "named, wrapped": lambda n: "module." + n.replace(".weight", ".actor.weight"),
    "compiled within": lambda n: n.replace(".lora_", "._orig_mod.lora_"),
}


def renamed(file: Path, name: Rename) -> Path:
    """The file, its tensors renamed."""
    save_file({name(k): v for k, v in load_file(file).items()}, file, {"format": "pt"})
    return file


def wrapped(source: Path, out: Path, name: Rename, file: str = "model.safetensors") -> Path:
    """A copy of a folder with the tensors renamed."""
    shutil.copytree(source, out)
    renamed(out / file, name)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrapped")
    weights = iotools.weights()
    iotools.checkpoint(folder / "base", weights)
    iotools.checkpoint(folder / "tuned", iotools.moved(weights))
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=2)
    lora_tools.merge(folder / "base", [folder / "adapter"], folder / "merged")
    return folder


def assert_as_merged(out: Path, root: Path) -> None:
    models.assert_same(models.tensors(out), models.tensors(root / "merged"), 0)


@pytest.mark.parametrize("form", OF_ADAPTERS)
def test_an_adapter(form: str, root: Path, tmp_path: Path) -> None:
    given = wrapped(root / "adapter", tmp_path / "a", OF_ADAPTERS[form], WEIGHTS)
    report = lora_tools.merge(root / "base", [given], tmp_path / "out")
    assert_as_merged(tmp_path / "out", root)
    said = [n for n in report.notes if "without the parts that wrappers added" in n]
    assert bool(said) == (form != "default")
    lora_tools.rescale(given, tmp_path / "rescaled", dtype="float32")
    assert load_file(tmp_path / "rescaled" / WEIGHTS).keys() == (
        load_file(root / "adapter" / WEIGHTS).keys()
    )


@pytest.mark.sweep(2)
@pytest.mark.parametrize("form", ["kohya", "lycoris", "diffusers", "mlx"])
@pytest.mark.parametrize("wrapper", ["compiled", "FSDP", "checkpointing"])
def test_of_other_formats(form: str, wrapper: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "there"
    lora_tools.convert(root / "adapter", out, to=form, base=root / "base", drop=["saved"])
    file = next(out.glob("*.safetensors")) if out.is_dir() else out
    rename = BOTH[wrapper]
    if form in ("kohya", "lycoris"):  # names with underscores for dots, after a first word
        rename = lambda n: re.sub("^(lora_[a-z]+_|lycoris_)", r"\1_orig_mod_", n)  # noqa: E731
    assert renamed(file, rename).is_file()
    lora_tools.convert(out, tmp_path / "back", to="peft", base=root / "base")
    assert_as_merged(merged_with(root, tmp_path / "back", tmp_path / "out"), root)


def merged_with(root: Path, adapter: Path, out: Path) -> Path:
    lora_tools.merge(root / "base", [adapter], out)
    return out


def test_a_name_on_what_is_saved_whole(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(root / "adapter", folder)
    tensors = {
        k.replace(".weight", ".mine.weight"): v for k, v in load_file(folder / WEIGHTS).items()
    }
    norm = "model.layers.1.norm"
    tensors[f"{PREFIX}{norm}.modules_to_save.mine.weight"] = torch.full((16,), 2.0)
    save_file(tensors, folder / WEIGHTS)
    out = models.tensors(merged_with(root, folder, tmp_path / "out"))
    assert out[f"{norm}.weight"].eq(2).all()


def test_several_adapters_are_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "adapter", tmp_path / "a")
    factors = load_file(tmp_path / "a" / WEIGHTS)
    both = {
        k.replace(".weight", f".{name}.weight"): v.clone()
        for name in ("actor", "critic")
        for k, v in factors.items()
    }
    save_file(both, tmp_path / "a" / WEIGHTS)
    with pytest.raises(
        AdapterError, match=r"several adapters \(actor, critic\).*selected_adapters"
    ):
        lora_tools.merge(root / "base", [tmp_path / "a"], tmp_path / "out")


def test_two_keys_that_become_one(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "adapter", tmp_path / "a")
    shutil.copytree(root / "base", tmp_path / "b")
    for file in (tmp_path / "a" / WEIGHTS, tmp_path / "b" / "model.safetensors"):
        tensors = load_file(file)
        name = min(tensors)
        save_file({**tensors, inside("_orig_mod.", "model.")(name): tensors[name].clone()}, file)
    with pytest.raises(AdapterError, match=r"are both .*; rename or remove one"):
        lora_tools.merge(root / "base", [tmp_path / "a"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"are both .*; rename or remove one"):
        lora_tools.merge(tmp_path / "b", [root / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("form", BOTH)
def test_a_tuned_side(form: str, root: Path, tmp_path: Path) -> None:
    tuned = wrapped(root / "tuned", tmp_path / "tuned", BOTH[form])
    report = lora_tools.extract(root / "base", tuned, tmp_path / "out", rank=2)
    assert (report.totals["modules"], report.totals["energy"]) == (4, pytest.approx(1))
    wanted = load_file(root / "adapter" / WEIGHTS)
    models.assert_same(load_file(tmp_path / "out" / WEIGHTS), wanted, 0)
    seen = lora_tools.diff(root / "base", tuned)
    assert (seen.totals["changed"], seen.totals["one_sided"]) == (4, 0)
    for said in (report, seen):
        assert any("without the parts that wrappers added" in note for note in said.notes)
    found = lora_tools.verify(root / "adapter", base=root / "base", tuned=tuned)
    assert found.totals["relative_error"] < 1e-5
    merged = wrapped(root / "merged", tmp_path / "merged", BOTH[form])
    assert lora_tools.verify(merged, base=root / "base", adapters=[root / "adapter"]).notes


@pytest.mark.parametrize("form", BOTH)
def test_a_base(form: str, root: Path, tmp_path: Path) -> None:
    base = wrapped(root / "base", tmp_path / "base", BOTH[form])
    report = lora_tools.merge(base, [root / "adapter"], tmp_path / "out", reversible=True)
    assert any("without the parts that wrappers added" in note for note in report.notes)
    assert_as_merged(tmp_path / "out", root)
    lora_tools.unmerge(tmp_path / "out", [root / "adapter"], tmp_path / "back")
    models.assert_same(models.tensors(tmp_path / "back"), models.tensors(root / "base"), 0)


def test_shards(root: Path, tmp_path: Path) -> None:
    weights = {BOTH["FSDP"](k): v for k, v in iotools.weights().items()}
    base = iotools.checkpoint(tmp_path / "base", weights, shards=2)
    lora_tools.merge(base, [root / "adapter"], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == iotools.weights().keys()
    assert_as_merged(tmp_path / "out", root)


def test_what_is_merged_loads(tmp_path: Path) -> None:
    plain = models.save(models.make("llama"), tmp_path / "plain")
    models.train(plain, tmp_path / "a", {"target_modules": ["q_proj"]})
    base = wrapped(plain, tmp_path / "base", BOTH["FSDP"])
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "out")
    found = models.outputs(models.load(tmp_path / "out"))
    wanted = models.outputs(models.attach(plain, tmp_path / "a"))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_module_of_the_model_s_own_stays(root: Path, tmp_path: Path) -> None:
    """Of a bare file nobody knows who loads it."""
    file = tmp_path / "base.safetensors"
    shutil.copy(root / "base" / "model.safetensors", file)
    renamed(file, before("module."))
    lora_tools.merge(file, [root / "adapter"], tmp_path / "out.safetensors", allow_other_base=True)
    names = load_file(tmp_path / "out.safetensors").keys()
    assert names == load_file(file).keys()


def test_a_model_saved_with_its_adapter(root: Path, tmp_path: Path) -> None:
    base = wrapped(
        root / "base", tmp_path / "b", lambda n: n.replace("q_proj.", "q_proj.base_layer.")
    )
    for work in (
        lambda: lora_tools.merge(base, [root / "adapter"], tmp_path / "out"),
        lambda: lora_tools.quantize(base, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="a model saved together with"):
            work()
