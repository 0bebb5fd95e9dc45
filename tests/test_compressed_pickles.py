"""A ``.bin`` that was zipped anew with compression, as ``zip`` and 7z do."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

import lora_tools
from lora_tools.errors import CheckpointError
from lora_tools.formats import pickle_file
from lora_tools.formats.pickle_file import PickleFile

from . import iotools

METHODS = {"deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def zipped(path: Path, method: int, only: str = "") -> Path:
    """A file of torch.save's with all of it compressed, or only what is called so."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data, method if only in name else zipfile.ZIP_STORED)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = iotools.checkpoint(tmp_path / "model", iotools.weights(layers=1))
    (folder / "model.safetensors").unlink()
    torch.save(iotools.weights(layers=1), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("only", ["", "data.pkl", "/data/0", "byteorder"])
def test_deflated_weights_are_read_as_torch_reads_them(model: Path, only: str) -> None:
    path = zipped(model / "pytorch_model.bin", zipfile.ZIP_DEFLATED, only)
    wanted = iotools.weights(layers=1)
    file = PickleFile(path)
    assert all(torch.equal(file.tensor(name), wanted[name]) for name in wanted)


def test_a_merge_of_them_is_that_of_plain_ones(model: Path, tmp_path: Path) -> None:
    shapes = iotools.linear_shapes(iotools.weights(layers=1))
    iotools.adapter(tmp_path / "a", shapes)
    lora_tools.merge(model, [tmp_path / "a"], tmp_path / "plain", allow_pickle=True)
    zipped(model / "pytorch_model.bin", zipfile.ZIP_DEFLATED)
    lora_tools.merge(model, [tmp_path / "a"], tmp_path / "out", allow_pickle=True)
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("plain", "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["bzip2", "lzma"])
def test_what_torch_does_not_unfold_is_refused(model: Path, method: str) -> None:
    path = zipped(model / "pytorch_model.bin", METHODS[method])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read"):
        PickleFile(path)


def test_a_bomb_is_refused_before_it_unfolds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, model / "pytorch_model.bin")
    path = zipped(model / "pytorch_model.bin", zipfile.ZIP_DEFLATED)
    assert PickleFile(path).specs["w"].nbytes == 4 << 20
    monkeypatch.setattr(pickle_file, "_UNFOLDED", 1 << 20)
    with pytest.raises(CheckpointError, match=r"to 4,\d+,\d+.*without compression"):
        PickleFile(path)


def test_what_transformers_would_load_wrongly_is_refused(model: Path, tmp_path: Path) -> None:
    zipped(model / "pytorch_model.bin", zipfile.ZIP_DEFLATED)
    (tmp_path / "t").write_text("w1 w2")
    with pytest.raises(CheckpointError, match=r"does not load.*loratools dequantize"):
        lora_tools.collect_stats(model, tmp_path / "t", tmp_path / "out", allow_pickle=True)
    with pytest.raises(CheckpointError, match="does not load that correctly"):
        lora_tools.export(model, tmp_path / "out", task="features", allow_pickle=True)
    lora_tools.dequantize(model, tmp_path / "safe", allow_pickle=True)
    assert (tmp_path / "safe" / "model.safetensors").is_file()
