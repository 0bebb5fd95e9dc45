"""What artifacts say of how they were made, and what is refused by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import lora_tools
from lora_tools.errors import MismatchError
from lora_tools.formats.adapters.peft import WEIGHTS
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.sources.adapters import open_adapter

from . import iotools, models


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two unlike bases, each with a fine-tune and its adapter: a of one, b and c of the other."""
    top = tmp_path_factory.mktemp("made")
    for name, seed in (("one", 0), ("two", 5)):
        model = models.make("llama", seed).bfloat16()
        models.save(model, top / name)
        models.perturb(model, 0.02, seed=1, only="proj.weight")
        models.save(model, top / f"{name}-tuned")
    for name, base, rank in (("a", "one", 3), ("b", "two", 2), ("c", "two", 3)):
        lora_tools.extract(top / base, top / f"{base}-tuned", top / name, rank=rank)
    return top


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as f:
        return f.metadata()


def digest(path: Path) -> str:
    return lora_tools.inspect(path).inputs[0].digest


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "onnxruntime"])
def test_a_converted_adapter_keeps_its_base(work: Path, tmp_path: Path, form: str) -> None:
    """The digest travels through every format that has room for it, and is heeded."""
    made = lora_tools.convert(work / "a", tmp_path / "x", to=form, base=work / "one")
    assert made.command == f"convert to={form!r}"
    found = open_adapter(tmp_path / "x", base=work / "one").file.metadata
    assert found["base_digest"] == digest(work / "one")
    assert found["tuned_digest"] == digest(work / "one-tuned")
    assert found["adapter_digests"] == made.inputs[0].digest == digest(work / "a")
    assert found["command"] == f"extract rank=3 | convert to={form!r}"
    assert found["loratools"] == made.version
    lora_tools.merge(work / "one", [tmp_path / "x"], tmp_path / "m")
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.merge(work / "two", [tmp_path / "x"], tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_nothing_is_said_of_place_or_time(work: Path, tmp_path: Path) -> None:
    """The same input, wherever it lies: the same bytes."""
    import shutil

    for name in ("here", "there"):
        folder = tmp_path / name
        for part in ("one", "a", "two", "b", "c"):
            shutil.copytree(work / part, folder / part)
        lora_tools.convert(folder / "a", folder / "x", to="kohya", base=folder / "one")
        lora_tools.combine([folder / "b", (folder / "c", 0.5)], folder / "y", base=folder / "two")
        lora_tools.rescale(folder / "a", folder / "z", scale=2)
        lora_tools.quantize(folder / "one", folder / "q", adapters=[folder / "a"])
        lora_tools.unmerge(folder / "one", [folder / "a"], folder / "u")
    for part in "xyzqu":
        here, there = tmp_path / "here" / part, tmp_path / "there" / part
        if here.is_file():
            assert here.read_bytes() == there.read_bytes()
        else:
            assert iotools.tree(here) == iotools.tree(there), part


def test_combined_adapters(work: Path, tmp_path: Path) -> None:
    made = lora_tools.combine([work / "b", (work / "c", 0.5)], tmp_path / "x", rank=4)
    found = metadata(tmp_path / "x" / WEIGHTS)
    assert found["command"] == made.command == "combine rank=4"
    assert found["base_digest"] == digest(work / "two")
    digests = [i.digest for i in made.inputs]
    assert found["adapter_digests"] == f"{digests[0]}=1 {digests[1]}=0.5"
    assert digests == [digest(work / "b"), digest(work / "c")]
    with pytest.raises(MismatchError, match=r"a was made for the base .* allow_other_base=True"):
        lora_tools.combine([work / "a", work / "c"], tmp_path / "y")
    assert not (tmp_path / "y").exists()
    lora_tools.combine([work / "a", work / "c"], tmp_path / "y", allow_other_base=True)
    assert "base_digest" not in metadata(tmp_path / "y" / WEIGHTS)


def test_what_was_not_merged_is_not_subtracted(work: Path, tmp_path: Path) -> None:
    lora_tools.merge(work / "two", [(work / "b", 0.5)], tmp_path / "m")
    report = lora_tools.unmerge(tmp_path / "m", [(work / "b", 0.5)], tmp_path / "u")
    assert metadata(tmp_path / "u" / "model.safetensors")["command"] == report.command == "unmerge"
    for given in (work / "c", (work / "b", 1)):
        wrong: list[Any] = [given]
        with pytest.raises(MismatchError, match="says that other adapters or weights were merged"):
            lora_tools.unmerge(tmp_path / "m", wrong, tmp_path / "v")
        lora_tools.unmerge(tmp_path / "m", wrong, tmp_path / "v", allow_other_base=True, force=True)


def test_four_bits_know_what_they_were_made_of(work: Path, tmp_path: Path) -> None:
    """An adapter of the plain base is at home on it in four bits; one of another base is not."""
    lora_tools.quantize(work / "one", tmp_path / "q")
    lora_tools.merge(tmp_path / "q", [work / "a"], tmp_path / "m")
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.merge(tmp_path / "q", [work / "b"], tmp_path / "n")
    with pytest.raises(MismatchError, match="made for another base"):
        lora_tools.merge(tmp_path / "q", [work / "b"], tmp_path / "n", requantize=True)
    assert not (tmp_path / "n").exists()
    lora_tools.merge(tmp_path / "q", [work / "b"], tmp_path / "n", allow_other_base=True)


def test_verify_tells_what_the_metadata_names(work: Path, tmp_path: Path) -> None:
    """Other bytes are found by their numbers; the note says what it is."""
    lora_tools.quantize(work / "two", tmp_path / "q", adapters=[work / "b"])
    with pytest.raises(lora_tools.QualityGateError) as caught:
        lora_tools.verify(tmp_path / "q", against=work / "one")
    notes = caught.value.report.notes
    assert f"its metadata names another checkpoint: {digest(work / 'two')}" in notes
    assert "its metadata says that 1 adapters were merged" in notes
