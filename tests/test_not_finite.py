"""An inf or a NaN beside the codes of a four-bit checkpoint is an error of every verb that reads
it, and names the tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import NonFiniteError
from lora_tools.formats.quantized import bitsandbytes
from lora_tools.sources.checkpoints import open_checkpoint
from tests.iotools import checkpoint, graph, moved, weights

Q = "model.layers.0.q_proj.weight"
PARTS = {"absmax": False, "quant_map": False, "nested_absmax": True, "nested_quant_map": True}


def changed(folder: Path, to: Path, name: str, change: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of a checkpoint in which one tensor is another."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors", metadata)
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``tuned``, plain; ``adapter`` of them; the base in four bits, ``nested`` and
    ``flat``."""
    folder = tmp_path_factory.mktemp("made")
    base = {name: tensor.half() for name, tensor in weights(layers=1).items()}
    checkpoint(folder / "base", base)
    checkpoint(folder / "tuned", moved(base))
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=1)
    graph(folder / "graph", folder / "base", base)
    lora_tools.quantize(folder / "base", folder / "nested", blocksize=32)
    lora_tools.quantize(folder / "base", folder / "flat", blocksize=32, double_quant=False)
    return folder


# Every verb that reads the numbers of a checkpoint, on (it, plain things, where to write).
VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "dequantize": lambda q, p, o: lora_tools.dequantize(q, o),
    "extract": lambda q, p, o: lora_tools.extract(q, p / "tuned", o, rank=1),
    "extract TUNED": lambda q, p, o: lora_tools.extract(p / "base", q, o, rank=1),
    "merge": lambda q, p, o: lora_tools.merge(q, [p / "adapter"], o, allow_other_base=True),
    "merge --dtype": lambda q, p, o: lora_tools.merge(q, [], o, dtype="float32"),
    "merge --requantize": lambda q, p, o: lora_tools.merge(
        q, [p / "adapter"], o, requantize=True, allow_other_base=True
    ),
    "export --nf4": lambda q, p, o: lora_tools.export(
        q, o, nf4=True, no_verify=True, graph=p / "graph", task="features"
    ),
    "diff": lambda q, p, o: lora_tools.diff(q, p / "tuned"),
    "verify --against": lambda q, p, o: lora_tools.verify(q, against=p / "base"),
    "verify --base": lambda q, p, o: lora_tools.verify(
        p / "tuned", base=q, adapters=[p / "adapter"]
    ),
    "verify --tuned": lambda q, p, o: lora_tools.verify(p / "adapter", base=p / "base", tuned=q),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("part", PARTS)
def test_no_verb_reads_it(part: str, verb: str, made: Path, tmp_path: Path) -> None:
    name = f"{Q}.{part}"
    value = math.nan if "nested" in part else math.inf

    def spoil(tensor: torch.Tensor) -> None:
        tensor[-1] = value

    path = changed(made / ("nested" if PARTS[part] else "flat"), tmp_path / "q", name, spoil)
    with pytest.raises(NonFiniteError) as caught:
        VERBS[verb](path, made, tmp_path / "out")
    assert str(caught.value).startswith(f"{name}: holds an inf or a NaN; download the file again")
    assert not (tmp_path / "out").exists()


def test_scales_too_large_for_the_dtype(made: Path, tmp_path: Path) -> None:
    """Each is finite; what they stand for is not, in half precision."""
    path = changed(made / "flat", tmp_path / "q", f"{Q}.absmax", lambda t: t.fill_(1e6))
    with pytest.raises(NonFiniteError, match=rf"{Q}: decodes to an inf .* in torch.float16"):
        lora_tools.dequantize(path, tmp_path / "out")


@pytest.mark.parametrize("storage", sorted(bitsandbytes.STORAGES))
def test_codes_may_look_like_anything(storage: str, made: Path, tmp_path: Path) -> None:
    """Bytes of codes that are a NaN, read as the dtype that holds them, are codes all the same."""
    plain = checkpoint(tmp_path / "plain", {Q: torch.full((16, 16), 1.0)})
    lora_tools.quantize(plain, tmp_path / "q", quant_storage=storage, blocksize=32)
    assert torch.equal(open_checkpoint(tmp_path / "q").tensor(Q), torch.ones(16, 16))
