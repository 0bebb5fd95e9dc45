"""Metadata of trainers goes with an adapter, and says what is true of it; a file stays a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools

SAID = {
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_tag_frequency": '{"a": {"trigger": 10}}',
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.title": "x",
}
HASHES = {"sshs_model_hash": "a" * 64, "sshs_legacy_hash": "b" * 8, "modelspec.hash_sha256": "0x1"}


def metadata(path: Path) -> dict[str, str]:
    [file] = path.glob("*.safetensors") if path.is_dir() else [path]
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(0)
    tensors, base = {}, {}
    for name in ("a", "b"):
        base[f"mid_block.{name}.weight"] = torch.randn(8, 8, generator=noise)
        tensors[f"lora_unet_mid_block_{name}.lora_down.weight"] = torch.randn(4, 8, generator=noise)
        tensors[f"lora_unet_mid_block_{name}.lora_up.weight"] = torch.randn(8, 4, generator=noise)
        tensors[f"lora_unet_mid_block_{name}.alpha"] = torch.tensor(2.0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "k.safetensors", {"format": "pt", **SAID, **HASHES})
    return tmp_path


def test_kept_and_brought_up_to_date(desk: Path) -> None:
    given, base = desk / "k.safetensors", desk / "base.safetensors"
    half = lora_tools.rescale(given, desk / "half.safetensors", scale=0.5)
    small = lora_tools.rescale(given, desk / "small.safetensors", rank=2)
    lora_tools.convert(given, desk / "p", to="peft", base=base)
    back = lora_tools.convert(desk / "p", desk / "back.safetensors", to="kohya", base=base)
    wanted = {
        "half.safetensors": SAID | {"ss_network_alpha": "1"},
        "small.safetensors": SAID | {"ss_network_dim": "2", "ss_network_alpha": "2"},
        "p": SAID | {"ss_network_alpha": "2"},
        "back.safetensors": SAID | {"ss_network_alpha": "2"},
    }
    for name, said in wanted.items():
        found = metadata(desk / name)
        assert {key: found.get(key) for key in said} == said, name
        assert not HASHES.keys() & found.keys(), name
    for report in (half, small):
        assert any("sshs_model_hash" in note and "not copied" in note for note in report.notes)
    assert not any("sshs" in note for note in back.notes)
    assert not any("nothing shows to which part" in note for note in half.notes)  # names stay
    merged = lora_tools.merge(base, [given], desk / "m.safetensors")
    assert merged.plan
    assert not SAID.keys() & (metadata(desk / "m.safetensors") or {}).keys(), "it is the base's"


def test_several_ranks_are_said_so(desk: Path) -> None:
    """As sd-scripts' resize_lora.py says it."""
    tensors = load_file(desk / "k.safetensors")
    name = "lora_unet_mid_block_a"
    tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:2].clone()
    tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :2].clone()
    save_file(tensors, desk / "u.safetensors", {"format": "pt", **SAID})
    lora_tools.rescale(desk / "u.safetensors", desk / "o.safetensors", scale=2)
    assert metadata(desk / "o.safetensors")["ss_network_dim"] == "Dynamic"


def test_a_file_stays_a_file(desk: Path) -> None:
    base = desk / "base.safetensors"
    lora_tools.convert(desk / "k.safetensors", desk / "d.safetensors", to="diffusers", base=base)
    lora_tools.convert(desk / "k.safetensors", desk / "d", to="diffusers", base=base)
    assert (desk / "d.safetensors").is_file()
    assert (desk / "d/pytorch_lora_weights.safetensors").is_file()
    lora_tools.rescale(desk / "d.safetensors", desk / "e.safetensors", scale=2.0, base=base)
    assert (desk / "e.safetensors").is_file()
    here, there = load_file(desk / "d.safetensors"), load_file(desk / "e.safetensors")
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        torch.testing.assert_close(there[key], tensor * (2 if "lora_B" in key else 1))
