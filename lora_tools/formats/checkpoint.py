"""A checkpoint: a Hugging Face folder (one file, or shards and an index), or a bare file.

Opening one reads headers only. Small files (config, tokenizer, …) are listed so that they can
travel along with what is made of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats import digest as hashing
from lora_tools.formats import model_card
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.gguf_file import MAGIC
from lora_tools.formats.json_file import check_config, read_object
from lora_tools.formats.lfs import HEAD, refuse_pointer
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.quantized.packed import StoredFormat
from lora_tools.formats.regular_files import is_there, open_file, refuse_outside
from lora_tools.formats.reopen import SmallFile
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.sharded import refuse_part
from lora_tools.formats.shards import INDEX_SUFFIX, Shards
from lora_tools.formats.stand_ins import stand_ins
from lora_tools.formats.tensor_file import WEIGHT_SUFFIXES, TensorFile
from lora_tools.formats.variants import plain
from lora_tools.formats.weights import Says, Weights, ties_embeddings
from lora_tools.jobs import Lying

if TYPE_CHECKING:
    import torch

# (start, stop) → rows of a tensor
Decoder = Callable[[int, int], "torch.Tensor"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TORCH = (b"PK\x03\x04", b"\x80\x02")  # torch.save since 1.6, and before


class Checkpoint(Shards):
    """Named tensors over one or more files.

    Attributes:
        says: what the model's class says of the tensors, or how to ask it.
        replaced_files: small files that travel in place of those of these names.
        made_files: small files that lie nowhere, and belong to what is made of it.
        file_names: of the weight files of a copy, where they are not called as these are.
        path: the folder or file, as resolved.
        is_folder: whether it is a folder (then ``companions`` travel with the weights), or what is
            made of it is one.
        files: the weight files, in the order of their names.
        specs: every tensor's name, dtype and shape, in file order.
        home: the file that each of them is in.
        config: ``config.json``, or an empty dict.
        index_name: name of the shard index, or None.
        notes: what to say of how it is read.
        part_files: files that its weight files are put together of.
        pipeline: the sentence-transformers folder that it is the first module of, or None.
        outside: names of tensors of that folder's other modules, where they are here as well.
        models: of a diffusers pipeline, by the names of their folders, which stand before those of
            their tensors. prefixes: of each weight file.
    """

    says: Says = None
    replaced_files: Mapping[str, Path] = {}
    made_files: Mapping[str, bytes] = {}
    file_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    part_files: Collection[Path] = ()
    pipeline: Pipeline | None = None
    outside: Collection[str] = frozenset()
    models: Mapping[str, Checkpoint] = {}
    prefixes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, files: Iterable[TensorFile], is_folder: bool, index_name: str | None
    ) -> None:
        super().__init__(path, files)
        self.is_folder, self.index_name = is_folder, index_name
        self.config = self._read_config()

    def __fspath__(self) -> str:
        return str(self.path)

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        self._config_file = SmallFile.of(path)
        if not (self.is_folder and is_there(path)):
            return {}
        said = read_object(path)
        check_config(path, said)
        return said

    @property
    def scheme(self) -> StoredFormat | None:
        """The number format that weights were decoded from, or None where they are as stored."""
        return None

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint as it lies there: itself where nothing was decoded."""
        return self

    @functools.cached_property
    def weights(self) -> Weights:
        """What each tensor is to its model, by name."""
        return Weights(self.specs, self.config, self.says)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def ties_embeddings(self) -> bool:
        """Whether the config says that the output head is the input embedding."""
        return ties_embeddings(self.config)

    def lies(self, name: str) -> tuple[Lying, ...]:
        """What is read for a tensor, and where that lies."""
        spec = self.specs[name]
        return (Lying(str(self.home[name].path), name, spec.nbytes),)

    def decoded_bytes(self, name: str) -> int:
        """Memory that ``tensor`` takes for numbers that are not stored as such; 0 where mapped."""
        return 0

    def quantization_noise(self, name: str) -> float:
        """E‖E‖²_F, the square of what rounding to codes is expected to have cost, where a scheme
        decodes them: NaN where it does not tell. 0 for numbers that are stored as such."""
        return 0.0

    def noise_unknown(self) -> list[str]:
        """The weights of which ``quantization_noise`` is not known."""
        return []

    def rounded(self, name: str) -> torch.Tensor:
        """The tensor in the dtype that its spec names, where ``tensor`` may be wider: to be written
        as it is. Never write to it."""
        tensor, dtype = self.tensor(name), torch_dtype(self.specs[name].dtype)
        if tensor.dtype == dtype or not tensor.numel():
            return tensor.to(dtype)
        import torch

        return torch.frombuffer(bytearray(self.raw(name)), dtype=dtype).reshape(tensor.shape)

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor seen as that matrix (rows, cols). Never write to it."""
        return self.tensor(name).reshape(matrix)[start:stop]

    def decoder(self, name: str, matrix: tuple[int, int]) -> Decoder | None:
        """Gives rows [start, stop) of a tensor that has to be decoded, in float32, time and again;
        None where it lies as it is, or is no such matrix as it is stored."""
        return None

    def hash(self, name: str) -> str:
        """Hash of the tensor's bytes."""
        return hashing.tensor_hash(self.raw(name))

    def stored_hash(self, name: str) -> str:
        """``hash``, where the digest needs it: nothing of a tensor that has to be decoded, of which
        the digest is that of what is stored."""
        return "" if self.decoded_bytes(name) else self.hash(name)

    def of_stored(self, known: Mapping[str, str]) -> Mapping[str, str]:
        """Hashes of its tensors as far as they are those of stored ones, by the names of these."""
        return known

    def digest(self, known: Mapping[str, str]) -> str:
        """Content digest of all tensors; those whose hash is not ``known`` are read."""
        hashes = dict(known)
        for name in self.specs.keys() - known.keys():
            hashes[name] = self.hash(name)
            self.release(name)
        return hashing.digest(self.specs.values(), hashes)

    def companions(self) -> tuple[list[Path], list[Path]]:
        """Files that travel with the weights, and weight-like files left behind; both relative.

        Folders named in a sentence-transformers ``modules.json`` travel whole: they are part of
        the model. Hidden files never travel, nor do a folder that holds a PEFT adapter and a model
        card that this tool wrote.

        Raises:
            UnsafeInput: one that travels is a link that leads out of the folder.
            CheckpointError: one is a link to nothing, a pipe or a device.
        """
        if not self.is_folder:
            return [], []
        own = {*self.part_files, *(file.path for file in self.files)}
        in_root = self.pipeline is not None and self.pipeline.root == self.path
        whole = self.pipeline.folders if self.pipeline is not None and in_root else set()
        adapters = {path.parent for path in self.path.glob("*/adapter_config.json")}
        travel, left = [], []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if (
                path.is_dir()
                or path in own
                or path.name == self.index_name
                or any(part.startswith(".") for part in relative.parts)
            ):
                continue
            is_index = plain(path.name).endswith(INDEX_SUFFIX)
            weights = path.suffix in WEIGHT_SUFFIXES or is_index
            weights = weights or path.parent in adapters
            if weights and relative.parts[0] not in whole:
                left.append(relative)
            elif is_there(path):
                refuse_outside(path, self.pipeline.root if self.pipeline else self.path)
                if not model_card.is_ours(path):
                    travel.append(relative)
        return travel, left

    def copied(self) -> tuple[Path, ...]:
        """Files that travel, where they lie. Raises what ``companions`` does."""
        return tuple(self.path / path for path in self.companions()[0])


class View(Checkpoint):
    """``source`` seen as something else: what a view does not say itself, the source says.

    Nothing is read for it, not even config.json again.
    """

    def __init__(self, source: Checkpoint, files: Iterable[TensorFile]) -> None:
        Shards.__init__(self, source.path, files)
        self.source = source
        self.is_folder, self.index_name = source.is_folder, source.index_name
        self.config, self.notes, self.says = source.config, source.notes, source.says
        self.pipeline, self.outside = source.pipeline, source.outside
        self.replaced_files, self.made_files = source.replaced_files, source.made_files
        self.file_names = source.file_names
        self.part_files = source.part_files

    @property
    def scheme(self) -> StoredFormat | None:
        """The source's."""
        return self.source.scheme

    def lies(self, name: str) -> tuple[Lying, ...]:
        """The source's."""
        return self.source.lies(name)

    def noise_unknown(self) -> list[str]:
        """The source's."""
        return self.source.noise_unknown()

    @property
    def stored(self) -> Checkpoint:
        """The source as it lies there."""
        return self.source.stored


def with_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that also gives ``rope_theta`` at the top: readers before transformers 5 look
    for it there, and take 10000 where it is not."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        return {**config, "rope_theta": config.get("rope_theta", rope["rope_theta"])}
    return dict(config)


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch's, by its first bytes; where they tell nothing, by its name.
    Raises what ``_first_bytes`` does."""
    head = _first_bytes(path)
    return not _is_safetensors(path, head) and (
        path.suffix in PICKLE_SUFFIXES or head.startswith(_TORCH)
    )


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whatever its name."""
    return head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= path.stat().st_size


def _first_bytes(path: Path) -> bytes:
    """Of a file of tensors that no format of its own has claimed. Raises CheckpointError for one
    that cannot be read, is a pointer to another, or is named as GGUF and is nothing that is read.
    """
    with open_file(path) as file:
        head = file.read(HEAD)
    refuse_pointer(path, head)
    if path.suffix == ".gguf" and not (head.startswith(_TORCH) or _is_safetensors(path, head)):
        raise CheckpointError(
            f"{path}: not a GGUF file: its first bytes are {head[:4]!r}, not {MAGIC!r}; is "
            "the download complete?"
        )
    return head


def open_weights(path: Path, allow_pickle: bool) -> TensorFile:
    """One file of tensors, safetensors or a pickle. Raises UnsafeInput, CheckpointError."""
    refuse_part(path)
    made = stand_ins()
    stand_in = made.open(path) if made is not None else None
    if stand_in is not None:
        return stand_in
    if not is_pickle(path):
        return SafetensorsFile(path)
    if not allow_pickle:
        raise UnsafeInput(
            f"{path}: a pickle, which can hold code. Convert it to safetensors, or pass "
            "--allow-pickle to read it with weights_only=True"
        )
    from lora_tools.formats.pickle_file import PickleFile

    return PickleFile(path)
