"""Laws of every stored number format: what a verb makes of it is what it makes of the numbers that
it stands for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_tools
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from tests import forms_compressed, forms_fp8, forms_groups
from tests.iotools import adapter, checkpoint, linear_shapes, weights

Tensors = dict[str, torch.Tensor]
FORMS = {**forms_groups.FORMS, **forms_fp8.FORMS, **forms_compressed.FORMS}
UP = "model.layers.0.up_proj.weight"


@pytest.fixture(scope="module", params=FORMS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint as it is stored, in two files, and the plain one that it stands for."""
    folder = tmp_path_factory.mktemp("form")
    given = {n: t.bfloat16() for n, t in weights(layers=2).items()}
    stored, config, plain = FORMS[request.param](given)
    for name, tensors in (("stored", stored), ("plain", plain)):
        checkpoint(folder / name, {n: t.contiguous() for n, t in tensors.items()}, shards=2)
        entries = config if name == "stored" else {}
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", **entries}))
    return folder / "stored", folder / "plain"


def numbers(folder: Path) -> Tensors:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_dequantize_is_what_it_stands_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stored, plain = pair
    lora_tools.dequantize(stored, tmp_path / "out")
    wanted, made = numbers(plain), numbers(tmp_path / "out")
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].dtype == tensor.dtype, name
        assert torch.equal(made[name], tensor), name
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said.keys().isdisjoint({"quantization_config", "quantization", "compression_config"})
    assert open_checkpoint(tmp_path / "out").scheme is None


def test_rows_alone_and_in_another_process(pair: tuple[Path, Path]) -> None:
    """Some rows are those of the whole, whatever they are, and a pickled copy has them too."""
    view = open_checkpoint(pair[0])
    assert isinstance(view, Dequantized)
    again = pickle.loads(pickle.dumps(view))
    for name, weight in view.quantized.items():
        whole = view.tensor(name)
        assert whole.dtype == torch.float32
        assert torch.equal(again.tensor(name), whole)
        shape = weight.plain.numel // whole.shape[-1], whole.shape[-1]
        for start, stop in ((0, 1), (3, 7), (shape[0] - 1, shape[0]), (5, 5)):
            rows = view.rows(name, shape, start, stop)
            assert torch.equal(rows, whole.reshape(shape)[start:stop]), name
        noise = view.quantization_noise(name)
        assert 0 <= noise < float(whole.double().square().sum())


@pytest.mark.sweep(2)
def test_a_merge_rounds_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Decoded in float32, added to, and rounded; ``verify`` agrees, and NF4 of it is that of it."""
    stored, plain = pair
    adapter(tmp_path / "adapter", linear_shapes(numbers(plain)))
    lora_tools.merge(stored, [tmp_path / "adapter"], tmp_path / "merged")
    lora_tools.merge(plain, [tmp_path / "adapter"], tmp_path / "wanted")
    made, wanted = numbers(tmp_path / "merged"), numbers(tmp_path / "wanted")
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():  # what is plain is rounded before, too
        eps = 2 * torch.finfo(tensor.dtype).eps
        scale = max(float(tensor.abs().max()), 1e-6)
        torch.testing.assert_close(made[name], tensor, rtol=eps, atol=eps * scale)
    report = lora_tools.verify(tmp_path / "merged", base=stored, adapters=[tmp_path / "adapter"])
    assert report.totals["same"]


@pytest.mark.sweep(2)
def test_four_bits_of_it_are_those_of_its_numbers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, name in zip(pair, ("one", "two"), strict=True):
        lora_tools.quantize(folder, tmp_path / name)
    made, wanted = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


@pytest.mark.sweep(2)
def test_what_was_planted_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of rank two, from either side of a plain copy; without it, no change but of rounding."""
    stored, plain = pair
    planted = numbers(plain)
    noise = torch.Generator().manual_seed(0)
    size = planted[UP].float().std()
    left, right = torch.randn(32, 2, generator=noise), torch.randn(2, 16, generator=noise)
    wide = {n: t.float() for n, t in planted.items()}
    checkpoint(tmp_path / "tuned", wide | {UP: wide[UP] + size * left @ right})
    same = lora_tools.diff(stored, plain)
    assert same.totals["relative_change"] < 0.005
    for base, tuned in ((stored, tmp_path / "tuned"), (tmp_path / "tuned", stored)):
        done = lora_tools.extract(base, tuned, tmp_path / f"to {tuned.name}", rank=2, rest="skip")
        [module] = [m for m in done.modules if m.module == UP.removesuffix(".weight")]
        assert module.energy > 0.9999
        assert any("its dequantized numbers are used" in note for note in done.notes)


def test_inspect_names_it(pair: tuple[Path, Path]) -> None:
    report = lora_tools.inspect(pair[0])
    view = open_checkpoint(pair[0])
    assert view.scheme is not None
    assert report.totals["kind"] == f"checkpoint in {view.scheme.title}"
    quantized = report.totals["quantized"]
    assert quantized["weights"] == len(view.quantized)  # type: ignore[attr-defined]
    assert 1 < quantized["bits_per_parameter"] < 33
