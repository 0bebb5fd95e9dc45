"""ONNX Runtime's adapter file (1.20 or later), written and read by ``onnxruntime.AdapterFormat``.

Parameters ``<module>.lora_A.weight`` (in, r) and ``<module>.lora_B.weight`` (r, out) with the scale
folded into lora_B, so that a graph adds (x A) B; of an embedding ``<module>.lora_embedding_A``
(vocabulary, r) and ``<module>.lora_embedding_B`` (r, out); of a tensor saved whole
``<module>.modules_to_save.weight`` as it is. These are PEFT's names, as Olive's convert-adapters
writes them; ONNX Runtime itself only wants a parameter to be named as the graph's input is. float32
or float16; the file keeps nothing else.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import AdapterError, CheckpointError, TensorNotFound, first_line, need
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Compute, Context, Outline, group_parts, pair
from lora_tools.formats.adapters.writer import Factors, Writer
from lora_tools.formats.alignment import align
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.safetensors_writer import reserve
from lora_tools.formats.synced import held_bytes, sync_file
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

MAGIC = b"TORT"  # the flatbuffer's file identifier, at byte 4
_PARTS = ("lora_A", "lora_B")
_EMBEDDING_PARTS = ("lora_embedding_A", "lora_embedding_B")
_SAVED = ".modules_to_save."
_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64"}


def _package() -> Any:
    need("an .onnx_adapter file", "onnxruntime", "onnxruntime")
    import onnxruntime

    return onnxruntime


class OrtFile(Reopened):
    """The parameters of an adapter file, with the face of a ``TensorFile``."""

    def __init__(self, path: Path) -> None:
        package = _package()
        self.path, self.header = path, b""
        self.metadata: dict[str, str] = {}
        try:
            self.stamp = Stamp.of(path)
            if held_bytes(path) < self.stamp.nbytes // 2:  # which onnxruntime would read whole
                raise ValueError(
                    f"more than half of its {self.stamp.nbytes:,} bytes are a hole in the file"
                )
            self._adapter = package.AdapterFormat.read_adapter(str(path))
            self._values = dict(self._adapter.get_parameters())
            arrays = {name: value.numpy() for name, value in self._values.items()}
        except Exception as error:  # whatever onnxruntime raises on a malformed file
            raise CheckpointError(
                f"{path}: not an ONNX Runtime adapter ({first_line(error)})"
            ) from None
        self.specs: dict[str, TensorSpec] = {}
        for name, array in sorted(arrays.items()):
            dtype = _DTYPES.get(array.dtype.name)
            if dtype is None:
                raise CheckpointError(f"{path}: parameter {name!r} is {array.dtype}, not a float")
            self.specs[name] = TensorSpec(name, dtype, tuple(array.shape))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, copied out of the file."""
        import torch

        if name not in self.specs:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}")
        return torch.from_numpy(self._values[name].numpy().copy())

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        return as_bytes(self.tensor(name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing to give back: onnxruntime owns the memory."""


def factor_names(module: str, embedding: bool = False) -> tuple[str, str]:
    """What a module's two parameters, and a graph's two inputs, are called."""
    if embedding:
        return f"{module}.{_EMBEDDING_PARTS[0]}", f"{module}.{_EMBEDDING_PARTS[1]}"
    return f"{module}.{_PARTS[0]}.weight", f"{module}.{_PARTS[1]}.weight"


def saved_name(tensor: str) -> str:
    """What the parameter, and the input, of a tensor saved whole is called."""
    module, _, parameter = tensor.rpartition(".")
    return f"{module}{_SAVED}{parameter}"


def split(key: str) -> tuple[str, str] | None:
    """``a.b.lora_A`` → (``a.b``, ``lora_A``); ``.weight`` may follow."""
    module, _, part = key.removesuffix(".weight").rpartition(".")
    return (module, part) if module else None


def read(path: Path, file: OrtFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "ONNX Runtime")
    saved = [key for key in file.specs if _SAVED in key]
    for key in saved:
        outline.add_saved(key.replace(_SAVED, "."), key)
    for module, keys in group_parts(outline, (*_PARTS, *_EMBEDDING_PARTS), split, saved).items():
        embedding = not keys.keys().isdisjoint(_EMBEDDING_PARTS)
        a, b = pair(outline, module, keys, *(_EMBEDDING_PARTS if embedding else _PARTS))
        outline.add_lora(
            module, outline.transposed(a), outline.transposed(b), None, embedding=embedding
        )
    return outline


class OrtWriter(Writer):
    """Collects the parameters and writes one file; bfloat16 and float64 become float32."""

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._package = _package()
        self._arrays: dict[str, tuple[bool, list[Any]]] = {}
        self._saved: dict[str, Any] = {}

    def add(self, factors: Factors) -> None:
        """Take one module's factors."""
        arrays = [_array(tensor) for tensor in (factors.lora_A.T, factors.lora_B.T)]
        self._arrays[factors.module] = factors.form == "embedding", arrays

    def add_saved(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor saved whole."""
        self._saved[name] = _array(tensor)

    def finish(self) -> None:
        """Write the file, modules named as the base names them where one is given.

        Raises:
            AdapterError: the base has no such module.
        """
        modules = {name: name.rpartition(".")[0] for name in self._saved}
        names = self._names({*self._arrays, *modules.values()})
        values: dict[str, Any] = {}
        for module, (embedding, arrays) in self._arrays.items():
            values |= zip(factor_names(names[module], embedding), arrays, strict=True)
        for name, array in self._saved.items():
            module = modules[name]
            values[saved_name(names[module] + name.removeprefix(module))] = array
        adapter = self._package.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        adapter.set_parameters(
            {
                name: self._package.OrtValue.ortvalue_from_numpy(array)
                for name, array in sorted(values.items())
            }
        )
        _has_room(self.out, sum(array.nbytes for array in values.values()))
        try:
            adapter.export_adapter(str(self.out))
        except RuntimeError as error:  # of pybind: what the system said is not in it
            said = str(error).splitlines()[0].rpartition(") ")[2]
            raise OSError(errno.EIO, f"onnxruntime cannot write it ({said})", self.out) from None
        sync_file(self.out)

    def _names(self, modules: Collection[str]) -> dict[str, str]:
        """The adapter's modules → what the graph of the base calls them."""
        if self.base is None:
            return {module: module for module in modules}
        names, _ = align(sorted(modules), list(self.base.weights))
        for module, name in names.items():
            if name not in self.base.weights:
                raise AdapterError(
                    f"{module} is not a module of {self.base.path}; is this the right base?"
                )
        return names

    def close(self) -> None:
        """Nothing is open."""


def _has_room(path: Path, nbytes: int) -> None:
    """Raises OSError where so much cannot be written: onnxruntime does not tell why it fails."""
    with path.open("wb") as file:
        reserve(file.fileno(), nbytes, path)


def _array(tensor: torch.Tensor) -> Any:
    """As numpy knows it: bfloat16 and float64 become float32."""
    import torch

    plain = tensor if tensor.dtype == torch.float16 else tensor.float()
    return plain.contiguous().numpy()


FORMAT = Format(
    "onnxruntime",
    "ONNX Runtime",
    frozenset({"embedding", "saved", "head"}),
    "folded",
    "onnxruntime 1.20",
    dtype="F32",
    open_file=OrtFile,
    read=read,
    writer=OrtWriter,
    suffix=".onnx_adapter",
    magic=(4, MAGIC),
)
