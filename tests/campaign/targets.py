"""Readers for coverage-guided fuzzing. Each is given bytes, which stand in the place of one file
(or one tensor) among whole ones, and reads all that there is to read.

It may refuse them by an error of the package; anything else is a fault, as is content other than
what another library reads of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

import lora_tools
from lora_tools.errors import LoraToolsError
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.sidecar import Sidecar
from lora_tools.sources.checkpoints import open_checkpoint
from tests import forms_gguf, iotools
from tests.campaign import readers
from tests.campaign.damage import joined, signed, split

CORPUS = Path(__file__).parent / "corpus"  # a folder for each
_ELEMENTS = 4096  # of a tensor whose listing a sidecar is asked for


@dataclasses.dataclass(frozen=True)
class Target:
    """
    Attributes:
        make: puts whole things into a folder.
        file: the one of them that the bytes replace.
        read: reads that folder.
        fits: what is made of the bytes before.
        whole: the bytes of the whole one, of what ``fits`` made.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], None]
    fits: Callable[[bytes, bytes], bytes] = lambda data, whole: data
    whole: Callable[[bytes], bytes] = lambda data: data


class Ground:
    """A target and its folder, which is there and empty."""

    def __init__(self, name: str, folder: Path) -> None:
        self._target, self._folder = TARGETS[name], folder
        self._target.make(folder)
        self._path = folder / self._target.file
        self._whole = self._path.read_bytes()
        self.whole = self._target.whole(self._whole)

    def meet(self, data: bytes) -> bool:
        """Whether they are read; False where they are refused. Raises whatever else comes."""
        self._path.write_bytes(self._target.fits(data, self._whole))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self._target.read(self._folder)
        except LoraToolsError:
            return False
        return True


def _safetensors(folder: Path) -> None:
    file = SafetensorsFile(folder / "x.safetensors")
    found = {name: bytes(file.raw(name)) for name in file.specs}
    for name in found:
        file.tensor(name)
    with contextlib.suppress(safetensors.SafetensorError):  # it takes less than we do, or more
        wanted = dict(safetensors.deserialize(file.path.read_bytes()))
        assert found == {name: bytes(entry["data"]) for name, entry in wanted.items()}
        assert {n: [*spec.shape] for n, spec in file.specs.items()} == {
            name: [*entry["shape"]] for name, entry in wanted.items()
        }


def _index(folder: Path) -> None:
    checkpoint, wanted = open_checkpoint(folder / "m"), readers.weights(folder / "m")
    found = {name: checkpoint.tensor(name) for name in checkpoint.specs}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _adapter_config(folder: Path) -> None:
    lora_tools.inspect(folder / "adapter")
    for where in ("base", "mlp"):  # of which the second has other modules
        with contextlib.suppress(LoraToolsError):
            lora_tools.merge(folder / where, [folder / "adapter"], folder / "out", dry_run=True)
    lora_tools.check(folder / "adapter", consumer="vllm")


def _sidecar(folder: Path) -> None:
    sidecar = Sidecar(folder / "x.sidecar")
    sidecar.headers(), sidecar.files()
    for name in list(sidecar.file.specs):
        if name.startswith("lengths/"):
            sidecar.listing(name.removeprefix("lengths/"), _ELEMENTS)


def _is_signed(data: bytes, _: bytes) -> bytes:
    """With a digest that is right, where there can be one: without it nothing else is read."""
    with contextlib.suppress(Exception):
        header, body = split(data)
        return joined(signed(header, body), body)
    return data


def _gguf(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "model.gguf")
    for name in checkpoint.specs:
        checkpoint.tensor(name)


def _nf4(folder: Path) -> None:
    checkpoint, stored = open_checkpoint(folder / "packed"), readers.weights(folder / "packed")
    for name in checkpoint.specs:
        found, wanted = checkpoint.tensor(name), None
        with contextlib.suppress(Exception):
            wanted = readers.decoded(stored, name)
        if wanted is not None:
            assert found.shape == wanted.shape
            assert torch.allclose(found.float(), wanted.float(), rtol=1e-2, equal_nan=True)


_STATE = "quant_state"


def _in_state(data: bytes, whole: bytes) -> bytes:
    """As the state of the first weight in four bits."""
    header, body = split(whole)
    name = next(name for name in sorted(header) if _STATE in name)
    begin, end = header[name]["data_offsets"]
    by = len(data) - (end - begin)
    for other, entry in header.items():
        if other != "__metadata__" and entry["data_offsets"][0] >= end and other != name:
            entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
    header[name] |= {"shape": [len(data)], "data_offsets": [begin, begin + len(data)]}
    return joined(header, body[:begin] + data + body[end:])


def _state_of(whole: bytes) -> bytes:
    header, body = split(whole)
    name = next(name for name in sorted(header) if _STATE in name)
    return body[slice(*header[name]["data_offsets"])]


# ------------------------------------------------------------------------------ whole things


def _small(layers: int = 1) -> dict[str, torch.Tensor]:
    return {name: x.bfloat16() for name, x in iotools.weights(width=8, layers=layers).items()}


def _one_file(folder: Path) -> None:
    tensors = dict(list(_small().items())[:3])
    iotools.checkpoint(folder / "m", tensors)
    (folder / "m/model.safetensors").rename(folder / "x.safetensors")


def _shards(folder: Path) -> None:
    made = iotools.checkpoint(folder / "m", _small(), shards=2)
    files = sorted(made.glob("*.safetensors"))
    iotools.write_index(made, {n: file.name for file in files for n in SafetensorsFile(file).specs})


def _with_adapter(folder: Path) -> None:
    tensors = _small()
    shapes = iotools.linear_shapes(tensors)
    for name, wanted in (("base", ""), ("mlp", "mlp")):
        kept = {n: x for n, x in tensors.items() if wanted in n or "_proj" not in n}
        iotools.checkpoint(folder / name, kept)
    iotools.adapter(
        folder / "adapter", shapes, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 8},
        use_rslora=True, exclude_modules=None, layers_to_transform=None,
    )  # fmt: skip


def _merged(folder: Path) -> None:
    tensors = dict(list(_small().items())[:3])
    iotools.checkpoint(folder / "base", tensors)
    iotools.adapter(folder / "adapter", iotools.linear_shapes(tensors))
    lora_tools.merge(folder / "base", [folder / "adapter"], folder / "m", reversible=True)
    (folder / "m/loratools-unmerge.sidecar").rename(folder / "x.sidecar")


def _model(folder: Path) -> None:
    config = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {"embed_tokens": (2, 32), "layers.0.self_attn.q_proj": (32, 32), "norm": (32,)}
    tensors = {f"model.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    made = forms_gguf.gguf_tensors("llama", tensors, config)
    fields = forms_gguf.fields_of(config)
    forms_gguf.write(folder / "model.gguf", "llama", fields, made, "Q4_0")


def _packed(folder: Path) -> None:
    tensors = iotools.weights(width=64, layers=1)
    kept = {n: x for n, x in tensors.items() if "_proj" not in n or "q_proj" in n}
    iotools.checkpoint(folder / "base", kept)
    lora_tools.quantize(folder / "base", folder / "packed")


TARGETS = {
    "safetensors": Target(_one_file, "x.safetensors", _safetensors),
    "index": Target(_shards, "m/model.safetensors.index.json", _index),
    "adapter-config": Target(_with_adapter, "adapter/adapter_config.json", _adapter_config),
    "sidecar": Target(_merged, "x.sidecar", _sidecar, _is_signed),
    "gguf": Target(_model, "model.gguf", _gguf),
    "nf4-state": Target(_packed, "packed/model.safetensors", _nf4, _in_state, _state_of),
}
