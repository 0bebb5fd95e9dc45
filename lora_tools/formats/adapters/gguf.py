"""llama.cpp's GGUF adapters, through the ``gguf`` package (0.17 or later), which knows the names.

``general.type`` is ``adapter``, ``adapter.type`` is ``lora``; one ``adapter.lora.alpha`` is divided
by each tensor's own rank; ``<tensor>.lora_a`` (r, in) and ``.lora_b`` (out, r), and for
``token_embd`` lora_a transposed, as llama.cpp's graph reads it. Llama's q and k rows are in
llama.cpp's interleaved order. The base's names and config are needed both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import AdapterError, CheckpointError, UnsupportedAdapter
from lora_tools.formats.adapters.architectures import architecture, heads, is_rotated, layers
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import READ_AND_WRITTEN, Format
from lora_tools.formats.adapters.outline import Compute, Context, Outline, group_parts, pair
from lora_tools.formats.adapters.writer import Factors, Writer
from lora_tools.formats.gguf_file import MADE, MAGIC, PLAIN, GgufFile, package
from lora_tools.formats.synced import sync_file

if TYPE_CHECKING:
    import torch

_PARTS = ("lora_a", "lora_b")
_EMBEDDING = "token_embd.weight"


def holds_adapter(path: Path) -> bool:
    """Whether it is no model. Raises CheckpointError where it is broken."""
    return GgufFile(path).fields.get("general.type") == "adapter"


def open_file(path: Path) -> GgufFile:
    """Open it. Raises UnsupportedAdapter where it is a model and no adapter."""
    package()
    file = GgufFile(path)
    if file.fields.get("general.type") != "adapter":
        raise UnsupportedAdapter(f"{path}: is a GGUF model, but an adapter is needed here")
    if file.fields.get("adapter.type") != "lora":
        raise UnsupportedAdapter(
            f"{path}: adapter.type is {file.fields.get('adapter.type')!r}; only lora can be read"
        )
    for name, stored in file.stored.items():
        if stored.kind not in PLAIN:
            raise CheckpointError(f"{path}: tensor {name!r} is quantized ({stored.kind})")
    return file


def _names(base: BaseNames, path: Path) -> dict[str, str]:
    """Every module of the base → GGUF's name of its tensor."""
    gguf = package()
    row = architecture(base, path, "GGUF")
    [arch] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == row.gguf]
    mapping = gguf.get_tensor_name_map(arch, layers(base))
    names = {module: mapping.get_name(module) for module in base.weights}
    return {module: f"{name}.weight" for module, name in names.items() if name}


def read(path: Path, file: GgufFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "GGUF")
    base = context.base_for(outline, "GGUF has its own names and order of rows")
    row = architecture(base, path, "GGUF") if base is not None else None
    arch = file.fields.get("general.architecture")
    if base is not None and row is not None and arch != row.gguf:
        raise outline.fail(f"made for a {arch} model, and {base.path} is {row.gguf}")
    alpha = file.fields.get("adapter.lora.alpha")
    if not isinstance(alpha, int | float):
        raise outline.fail("gives no adapter.lora.alpha")
    modules = {name: module for module, name in _names(base, path).items()} if base else {}
    for tensor, keys in group_parts(outline, _PARTS, _split).items():
        if base is not None and tensor not in modules:
            raise outline.fail(f"{tensor} is not a tensor of {base.path}; is this the right base?")
        module = modules.get(tensor, tensor.removesuffix(".weight"))
        a, b = pair(outline, module, keys, *_PARTS)
        if tensor == _EMBEDDING:
            outline.add_lora(module, outline.transposed(a), outline.same(b), alpha, embedding=True)
            continue
        B = outline.same(b)
        if base is not None and row is not None and is_rotated(row, module):
            B = outline.recipe(B, "interleaved_to_half", (heads(base.config, module),))
        outline.add_lora(module, outline.same(a), B, alpha)
    return outline


def _split(key: str) -> tuple[str, str] | None:
    tensor, _, part = key.rpartition(".")
    return (tensor, part) if tensor else None


class GgufWriter(Writer):
    """Writes one file; bfloat16 and float64 become float32, which llama.cpp computes in."""

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        gguf = package()
        if base is None:
            raise AdapterError("GGUF has its own names and order of rows: give --base CHECKPOINT")
        self._base, self._row = base, architecture(base, base.path, "GGUF")
        self._names: Mapping[str, str] = _names(base, base.path)
        self._writer = gguf.GGUFWriter(out, self._row.gguf, use_temp_file=True)
        self._alpha: float | None = None

    def add(self, factors: Factors) -> None:
        """Write one module's factors."""
        name = self._names.get(factors.module)
        if name is None:
            raise UnsupportedAdapter(
                f"{factors.module}: a {self._row.gguf} model in GGUF has no tensor for it"
            )
        A, B = factors.lora_A, factors.lora_B
        if name == _EMBEDDING:
            A = A.T
        if is_rotated(self._row, factors.module):
            count = heads(self._base.config, factors.module)
            B = self.compute("half_to_interleaved", [B], (count,))
        for part, tensor in zip(_PARTS, (A, B), strict=True):
            plain = tensor if tensor.element_size() == 2 and _is_half(tensor) else tensor.float()
            self._writer.add_tensor(f"{name}.{part}", plain.contiguous().numpy())
        self._alpha = factors.alpha

    def finish(self) -> None:
        """Write the file."""
        gguf = package()
        self._writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
        self._writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        self._writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(self._alpha or 0))
        for key, value in self.made.items():
            self._writer.add_string(MADE + key, value)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        sync_file(self.out)

    def close(self) -> None:
        """Close the file, whether finished or not."""
        self._writer.close()


def _is_half(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.dtype == torch.float16


FORMAT = Format(
    "gguf",
    "GGUF",
    frozenset({"embedding"}),
    "one",
    "gguf 0.17, llama.cpp",
    base=READ_AND_WRITTEN,
    tied_embedding=False,
    holds_adapter=holds_adapter,
    open_file=open_file,
    read=read,
    writer=GgufWriter,
    suffix=".gguf",
    magic=(0, MAGIC),
)
