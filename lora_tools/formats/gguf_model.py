"""A GGUF model as a checkpoint: its tensors by transformers' names, its config.json out of fields.

What a tensor holds is as it is stored; ``sources.schemes.gguf`` makes numbers of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, TensorNotFound
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_name
from lora_tools.formats.gguf_config import Fields, Unsure, config_of
from lora_tools.formats.gguf_file import PLAIN, GgufFile, is_decoded
from lora_tools.formats.gguf_names import ROPE, Model, model_of, plain_name
from lora_tools.formats.quantized.gguf import GgufWeight
from lora_tools.formats.shards import shards_named
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}")
BLOCKS_DTYPE = "BF16"  # of plain numbers out of blocks: what models are trained in


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one weight lies: a tensor of the file, or of a tensor of all experts one."""

    name: str
    expert: int | None = None


class GgufTensors:
    """The weights in one GGUF file, with the face of a ``TensorFile``.

    Attributes:
        weights: each as it is to be read.
    """

    header = b""

    def __init__(
        self, file: GgufFile, places: Mapping[str, Place], weights: Mapping[str, GgufWeight]
    ) -> None:
        self.file, self.path, self._places = file, file.path, places
        self.metadata: dict[str, str] = {}
        self.weights = weights
        self.specs = {name: weight.specs[""] for name, weight in weights.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored. Never write to it."""
        place = self._at(name)
        whole = self.file.tensor(place.name)
        return whole if place.expert is None else whole[place.expert]

    def raw(self, name: str) -> memoryview:
        """Its bytes."""
        begin, end = self._extent(name)
        return self.file.raw(self._at(name).name)[begin:end]

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of its bytes [start, stop) back."""
        begin, end = self._extent(name)
        end = end if stop is None else begin + stop
        self.file.release(self._at(name).name, begin + start, end)

    def _extent(self, name: str) -> tuple[int, int]:
        begin = (self._at(name).expert or 0) * self.specs[name].nbytes
        return begin, begin + self.specs[name].nbytes

    def _at(self, name: str) -> Place:
        try:
            return self._places[name]
        except KeyError:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}") from None


class GgufCheckpoint(Checkpoint):
    """A GGUF model; what is made of it is a folder."""

    def __init__(self, path: Path, files: Sequence[GgufTensors], model: Model) -> None:
        super().__init__(path, files, True, None)
        ends = [f"-{i:05}-of-{len(files):05}" * bool(files[1:]) for i in range(1, 1 + len(files))]
        self.file_names = tuple(f"model{end}.safetensors" for end in ends)
        lead = (
            f"{path}: a GGUF model. Its tokenizer is not copied: add the tokenizer files of the "
            "original model to the output"
        )
        try:
            self.config = _config(files, model)
            text = json.dumps(self.config, indent=2) + "\n"
            self.made_files = {"config.json": text.encode()}
        except Unsure as unsure:
            lead += (
                f", and its config.json, which cannot be made from the GGUF for certain ({unsure})"
            )
        self.notes = (lead,)

    def companions(self) -> tuple[list[Path], list[Path]]:
        """None: all that it says is in the file."""
        return [], []


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF model: one file, or all files of one that is split.

    Raises:
        CheckpointError: it is no model, of an unknown architecture, or broken.
    """
    files = _files(path)
    first = files[0]
    kind = first.fields.get("general.type", "model")
    if kind == "adapter":
        raise CheckpointError(
            f"{path}: this is an adapter (GGUF), not a checkpoint; merge it into its base first: "
            f"loratools merge BASE {path} -o OUT"
        )
    if kind != "model":
        raise CheckpointError(
            f"{path}: a GGUF file of the type {kind!r}, but a model is needed here"
        )
    fields = Fields(first.fields)
    experts = fields.get("expert_count", 0)
    try:
        model = model_of(fields.architecture, bool(experts))
        found = [GgufTensors(file, *_weights(file, model, fields)) for file in files]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return GgufCheckpoint(path, found, model)


def _files(path: Path) -> list[GgufFile]:
    """The file, or all of a split one; the first has the fields of the model."""
    given = GgufFile(path)
    count = given.fields.get("split.count", 0)
    named = _SPLIT.fullmatch(path.stem)
    if not count or count == 1:
        return [given]
    shards = shards_named(path.parent, named[1], path.suffix) if named else None
    if shards is None or len(shards[1]) != count:
        raise CheckpointError(
            f"{path}: one of {count:05} files of a GGUF model, but the others "
            f"(NAME-00001-of-{count:05}.gguf) are not beside it; put all of them into one folder"
        )
    files = [GgufFile(shard) for shard in shards[1]]
    total, there = files[0].fields.get("split.tensors.count"), sum(len(f.specs) for f in files)
    if total not in (None, there):
        raise CheckpointError(
            f"{path}: its {count} files have {there} tensors, but should have {total}"
        )
    return files


def _weights(
    file: GgufFile, model: Model, fields: Fields
) -> tuple[dict[str, Place], dict[str, GgufWeight]]:
    """Where each weight lies, and how it is read, by transformers' names."""
    places: dict[str, Place] = {}
    weights: dict[str, GgufWeight] = {}
    for own, stored in file.stored.items():
        if own in ROPE:
            continue
        named = plain_name(model, own)
        shape, spec = stored.shape, file.specs[own]
        parts: list[tuple[str, Place]] = [(named, Place(own))]
        if "{}" in named:
            _expect(own, shape, 3)
            parts = [(named.replace("{}", str(i)), Place(own, i)) for i in range(shape[0])]
            shape, spec = shape[1:], dataclasses.replace(spec, shape=spec.shape[1:])
        elif named.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)  # llama.cpp leaves dimensions of 1 out
        is_matrix = named.endswith(".weight") and not named.endswith("norm.weight")
        _expect(own, shape, 2 if is_matrix else 1)
        if stored.kind not in PLAIN and not (is_matrix and is_decoded(stored.kind)):
            raise CheckpointError(
                f"{own}: is stored as {stored.kind}, which cannot be read for such a tensor; run "
                "pip install -U gguf, or give the original checkpoint in safetensors"
            )
        heads = _heads(own, shape, named, model, fields)
        offset = model.norm_offset if named.endswith("norm.weight") else 0.0
        dtype = stored.kind if stored.kind in PLAIN else BLOCKS_DTYPE
        for name, place in parts:
            places[name] = place
            plain = TensorSpec(name, dtype, shape)
            specs = {"": dataclasses.replace(spec, name=name)}
            weights[name] = GgufWeight(plain, specs, stored.kind, heads, offset)
    return places, weights


def _expect(name: str, shape: tuple[int, ...], dims: int) -> None:
    if len(shape) != dims:
        raise CheckpointError(f"{name}: is {list(shape)}, but must have {dims} dimensions")


def _heads(own: str, shape: tuple[int, ...], named: str, model: Model, fields: Fields) -> int:
    """Rotary heads whose rows are interleaved; 0 where they are not."""
    if not model.interleaved or not re.search(r"\.[qk]_proj\.\w+$", named):
        return 0
    try:
        heads = fields.number("attention.head_count")
        if ".k_proj." in named:
            heads = fields.number("attention.head_count_kv", heads)
    except Unsure as unsure:
        raise CheckpointError(f"{own}: the order of its rows is not known: {unsure}") from None
    if type(heads) is not int or heads < 1 or shape[0] % (2 * heads):
        raise CheckpointError(
            f"{own}: its {shape[0]} rows cannot be divided into {heads} heads of pairs "
            f"({fields.architecture}.attention.head_count)"
        )
    return heads


def _config(files: Sequence[GgufTensors], model: Model) -> dict[str, Any]:
    specs = {name: w.plain for file in files for name, w in file.weights.items()}
    largest = max(specs.values(), key=lambda spec: spec.numel, default=None)
    dtype = torch_name(largest.dtype) if largest is not None else "bfloat16"
    rope = dict(_rope(files))
    return config_of(Fields(files[0].file.fields), model, specs, rope, dtype)


def _rope(files: Sequence[GgufTensors]) -> Iterator[tuple[str, Sequence[float]]]:
    """Numbers that positions are scaled by."""
    for file in files:
        for name in file.file.stored.keys() & set(ROPE):
            stored = file.file.stored[name]
            if stored.kind != "F32":
                raise Unsure(f"{name} is in {stored.kind}")
            data = bytes(file.file.raw(name))
            yield name, struct.unpack(f"<{len(data) // 4}f", data)
