"""diffusers pipelines as a whole: all their models in one run. (diffusers itself opens what is
merged in test_diffusers_format.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import (
    AdapterError,
    CheckpointError,
    LoraToolsError,
    MismatchError,
    UsageError,
)
from lora_tools.sentences import recommendation

from . import iotools, models
from .diffusers_layouts import Tensors
from .test_counterparts import in_both, noise
from .test_extract_to import changed

FILE = "diffusion_pytorch_model"
LAYER = "encoder.layers.0"  # as transformers 5 saves CLIP's text model
TEXT = {
    f"{LAYER}.mlp.fc1.weight": (16, 8),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.layer_norm1.weight": (8,),
}
VAE = {"encoder.conv_in.weight": (8, 3, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
}


def parts() -> dict[str, Tensors]:
    return {
        "unet": in_both("sd1")[1],
        "text_encoder": {k: noise(shape, 70 + i) for i, (k, shape) in enumerate(TEXT.items())},
        "vae": {k: noise(shape, 80 + i) for i, (k, shape) in enumerate(VAE.items())},
    }


def save(folder: Path, tensors: dict[str, Tensors], variant: str = "") -> Path:
    """As diffusers does: the UNet in two files with an index."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    mark = f".{variant}" if variant else ""
    for part, held in tensors.items():
        (folder / part).mkdir(exist_ok=True)
        kind = {"dtype": "float32"} if part == "text_encoder" else {"_class_name": INDEX[part][1]}
        (folder / part / "config.json").write_text(json.dumps(kind))
        if part != "unet":
            stem = "model" if part == "text_encoder" else FILE
            save_file(held, folder / part / f"{stem}{mark}.safetensors", {"format": "pt"})
            continue
        names = [f"{FILE}{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        where = {name: names[i % 2] for i, name in enumerate(held)}
        for file in names:
            mine = {k: v for k, v in held.items() if where[k] == file}
            save_file(mine, folder / part / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / part / f"{FILE}.safetensors.index{mark}.json").write_text(json.dumps(index))
    return folder


def names(folder: Path) -> set[Path]:
    """All files in it but its card."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return files - {Path("README.md")}


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{k}": v
        for path in folder.rglob("*.safetensors")
        for k, v in load_file(path).items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and a copy of it whose UNet and text encoder were trained."""
    folder, base = tmp_path_factory.mktemp("pipelines"), parts()
    save(folder / "base", base)
    tuned = {k: v if k == "vae" else changed(v, vectors=False) for k, v in base.items()}
    save(folder / "tuned", tuned)
    for to in ("kohya", "diffusers", "comfyui"):
        lora_tools.extract(
            folder / "base", folder / "tuned", folder / f"{to}.safetensors", rank=2, to=to
        )
    return folder


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_extracted_and_merged(to: str, root: Path, tmp_path: Path) -> None:
    adapter = root / f"{to}.safetensors"
    lora_tools.merge(root / "base", [adapter], tmp_path / "m")
    assert names(tmp_path / "m") == names(root / "base")
    models.assert_same(held(tmp_path / "m"), held(root / "tuned"), 1e-5)
    index, given = (
        json.loads((folder / f"unet/{FILE}.safetensors.index.json").read_text())
        for folder in (tmp_path / "m", root / "base")
    )
    assert index["weight_map"] == given["weight_map"]
    assert lora_tools.verify(tmp_path / "m", base=root / "base", adapters=[adapter]).totals["same"]
    assert lora_tools.verify(adapter, base=root / "base", tuned=root / "tuned").totals["same"]
    report = lora_tools.diff(root / "base", tmp_path / "m")
    assert {s.module.partition(".")[0] for s in report.spectra} == {"unet", "text_encoder"}
    assert report.totals["models"] == ["text_encoder", "unet", "vae"]
    assert any(line.endswith("--to diffusers") for line in recommendation(report))


def test_the_wrong_base_is_found_out(root: Path, tmp_path: Path) -> None:
    lora_tools.merge(root / "base", [root / "kohya.safetensors"], tmp_path / "m")
    with pytest.raises(lora_tools.QualityGateError):
        lora_tools.verify(
            tmp_path / "m", base=root / "tuned", adapters=[root / "kohya.safetensors"]
        )
    lora_tools.unmerge(tmp_path / "m", [root / "kohya.safetensors"], tmp_path / "u")
    models.assert_same(held(tmp_path / "u"), held(root / "base"), 1e-5)


def test_names_of_the_other_layout(root: Path, tmp_path: Path) -> None:
    """The makers' names of a UNet, and a model that the pipeline lacks."""
    original = in_both("sd1")[0]
    name = next(k for k in original if k.endswith("to_q.weight")).removesuffix(".weight")
    rows, columns = original[f"{name}.weight"].shape
    key = f"lora_unet_{name.replace('.', '_')}"
    factors = {"lora_down.weight": noise((2, columns), 1), "lora_up.weight": noise((rows, 2), 2)}
    given = tmp_path / "l.safetensors"
    save_file({f"{key}.{part}": x for part, x in factors.items()}, given)
    report = lora_tools.merge(root / "base", [given], tmp_path / "m")
    merged = [fate.tensor for fate in report.plan if fate.action == "merge"]
    assert len(merged) == 1
    found, before = held(tmp_path / "m")[merged[0]], held(root / "base")[merged[0]]
    torch.testing.assert_close(
        found - before, factors["lora_up.weight"] @ factors["lora_down.weight"]
    )
    other = {k.replace("lora_unet_", "lora_te2_"): v for k, v in load_file(given).items()}
    save_file(other, given)
    with pytest.raises(AdapterError, match="is not a module of"):
        lora_tools.merge(root / "base", [given], tmp_path / "n")


def test_variants(root: Path, tmp_path: Path) -> None:
    """Read by --variant, where there are any; what is written loads without one."""
    half = {part: {k: v.half() for k, v in mine.items()} for part, mine in parts().items()}
    base = save(tmp_path / "base", {k: v for k, v in half.items() if k != "vae"}, "fp16")
    save(base, {"vae": half["vae"]})
    adapter = root / "diffusers.safetensors"
    with pytest.raises(CheckpointError, match="only files of the variant"):
        lora_tools.merge(base, [adapter], tmp_path / "m")
    with pytest.raises(CheckpointError, match="variant bf16; its variants: fp16"):
        lora_tools.merge(base, [adapter], tmp_path / "m", variant="bf16")
    save(base, parts())  # beside the others, and no longer alone
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        out = tmp_path / f"m-{variant}"
        report = lora_tools.merge(base, [adapter], out, variant=variant, allow_other_base=True)
        tensors = held(out)
        assert tensors["unet.conv_in.weight"].dtype == dtype
        assert tensors["vae.post_quant_conv.weight"].dtype == torch.float32
        assert any("not copied" in note for note in report.notes)
        assert names(out) == names(root / "base")
    part = tmp_path / "m-part"
    options: dict[str, Any] = {"allow_unmatched": True, "allow_other_base": True}
    lora_tools.merge(base / "text_encoder", [adapter], part, variant="fp16", **options)
    assert {x.dtype for x in load_file(part / "model.safetensors").values()} == {torch.float16}


def test_a_dtype_is_said_in_each_config(root: Path, tmp_path: Path) -> None:
    lora_tools.merge(root / "base", [], tmp_path / "m", dtype="bfloat16")
    assert {x.dtype for x in held(tmp_path / "m").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m/text_encoder/config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_for_one_model(root: Path, tmp_path: Path) -> None:
    base, out, adapter = root / "base", tmp_path / "o", root / "kohya.safetensors"
    one: list[tuple[Any, type[LoraToolsError], str]] = [
        (lambda: lora_tools.extract(base, root / "tuned", out), UsageError, "PEFT is for one"),
        (lambda: lora_tools.merge(base, [adapter], out, reversible=True), UsageError, "a sidecar"),
        (
            lambda: lora_tools.merge(base, [adapter], out, shard_size="1MB"),
            UsageError,
            "keep their files",
        ),
        (lambda: lora_tools.merge(base, [adapter], out, requantize=True), UsageError, "one model"),
        (lambda: lora_tools.quantize(base, out), CheckpointError, "one of its parts"),
        (lambda: lora_tools.dequantize(base, out), CheckpointError, "one of its parts"),
    ]
    for call, error, why in one:
        with pytest.raises(error, match=why):
            call()
    assert not out.exists()
    report = lora_tools.inspect(base)
    assert {t.tensor.partition(".")[0] for t in report.stored} == {"unet", "text_encoder", "vae"}


@pytest.mark.parametrize("name", ["../outside", "a/b", ".."])
def test_an_index_that_leads_away(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "base", parts())
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "UNet"]}))
    shutil.copytree(folder / "vae", tmp_path / "outside")
    with pytest.raises(CheckpointError, match="not the name of a folder"):
        lora_tools.inspect(folder)


def test_a_model_in_codes_becomes_plain(root: Path, tmp_path: Path) -> None:
    """A text encoder in four bits: what its config said of that goes."""
    llama = iotools.checkpoint(tmp_path / "l", iotools.weights(width=64))
    base = shutil.copytree(root / "base", tmp_path / "base")
    shutil.rmtree(base / "text_encoder")
    lora_tools.quantize(llama, base / "text_encoder")
    A, B, name = noise((2, 64), 1), noise((64, 2), 2), "text_encoder.model.layers.0.q_proj"
    given = tmp_path / "l.safetensors"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, given)
    lora_tools.merge(base, [given], tmp_path / "m")
    assert "quantization_config" not in json.loads(
        (tmp_path / "m/text_encoder/config.json").read_text()
    )
    lora_tools.dequantize(base / "text_encoder", tmp_path / "plain")
    plain = models.tensors(tmp_path / "plain")["model.layers.0.q_proj.weight"]
    found = held(tmp_path / "m")[f"{name}.weight"]
    torch.testing.assert_close(found.float(), plain.float() + B @ A, rtol=1e-2, atol=1e-2)
    assert lora_tools.verify(tmp_path / "m", base=base, adapters=[given]).totals["same"]


def test_two_text_encoders(tmp_path: Path) -> None:
    """An adapter of one of them: its config says of which; where it does not, nothing is chosen."""
    two = {part: parts()["text_encoder"] for part in ("text_encoder", "text_encoder_2")}
    (tmp_path / "base").mkdir()
    for part, held_there in two.items():
        iotools.checkpoint(tmp_path / "base" / part, held_there)
    said = {part: ["transformers", "CLIPTextModel"] for part in two}
    (tmp_path / "base/model_index.json").write_text(json.dumps(said))
    for part in two:
        trained_on = f"somewhere/{part}/"
        given = iotools.adapter(
            tmp_path / part, {f"{LAYER}.mlp.fc1": (16, 8)}, base_model_name_or_path=trained_on
        )
        lora_tools.merge(tmp_path / "base", [given], tmp_path / f"m_{part}")
        report = lora_tools.diff(tmp_path / "base", tmp_path / f"m_{part}")
        assert [s.module for s in report.spectra] == [f"{part}.{LAYER}.mlp.fc1"]
        for to, begins in (
            ("kohya", f"lora_te{1 + [*two].index(part)}_"),
            ("diffusers", f"{part}."),
        ):
            out = tmp_path / f"{part}_{to}.safetensors"
            lora_tools.convert(given, out, to=to, base=tmp_path / "base")
            assert {name.startswith(begins) for name in load_file(out)} == {True}
    given = iotools.adapter(tmp_path / "any", {f"{LAYER}.mlp.fc1": (16, 8)})
    with pytest.raises(MismatchError, match="folder of the"):
        lora_tools.merge(tmp_path / "base", [given], tmp_path / "m")
    with pytest.raises(MismatchError, match="folder of the"):
        lora_tools.convert(given, tmp_path / "k", to="kohya", base=tmp_path / "base")
