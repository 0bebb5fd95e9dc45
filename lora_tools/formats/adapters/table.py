"""The table of adapter formats: how each is recognised, what it keeps, who reads and writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

from lora_tools.errors import AdapterError, UsageError
from lora_tools.formats.adapters import (
    diffusers,
    gguf,
    kohya,
    loralib,
    lycoris,
    mlx,
    onnxruntime,
    peft,
    torchtune,
)
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.outline import Compute, Context, Outline
from lora_tools.formats.adapters.writer import Writer

# What an adapter can hold besides the factors of linear layers, and how a person calls it.
FEATURES = {
    "embedding": "factors of embeddings",
    "conv": "factors of convolutions",
    "experts": "factors of fused experts",
    "dora": "DoRA's magnitudes",
    "bias": "lora_bias",
    "saved": "tensors saved whole",
    "tokens": "trained tokens",
    "head": "factors of an output head that is the embedding",
}


@dataclasses.dataclass(frozen=True)
class Format:
    """One adapter format.

    Attributes:
        name: what ``--from`` and ``--to`` call it; title: what people call it.
        keeps: which of ``FEATURES`` it has a place for.
        alpha: "module" (each its own), "one" (of the whole file, divided by each module's rank) or
            "folded" (none: the scale goes into lora_B).
        one_rank: all modules have the same rank; smaller ones are padded with zeros.
        dtype: of the factors where none is asked for; "": each keeps its own.
        base: when the base checkpoint is needed: "", "to read" or "to read and write".
        library: whose format it is, and what reads it.
        own_forms: holds MergedLinears (``--layout``) and convolutions as ``linalg.loralib`` has it.
        keeps_names: its writer writes names that were never resolved as they are.
        tied_embedding: whether its reader takes factors of an embedding that is the output head,
            too.
        is_folder: whether it is a folder, else a file.
        knows: whether a key of a safetensors file or pickle is one of its own; None where the bytes
            of the file tell.
        read, writer: None for PEFT, which the others are read as and written from.
    """

    name: str
    title: str
    keeps: frozenset[str]
    alpha: Literal["module", "one", "folded"]
    library: str
    one_rank: bool = False
    dtype: str = ""
    base: str = ""
    own_forms: bool = False
    keeps_names: bool = False
    tied_embedding: bool = True
    is_folder: bool = False
    reads_besides: str = ""
    knows: Callable[[str], bool] | None = None
    open_file: Callable[[Path], Any] | None = None
    read: Callable[[Path, Any, Context], Outline] | None = None
    writer: Callable[[Path, BaseNames | None, Compute], Writer] | None = None


def _keeps(*features: str) -> frozenset[str]:
    """Those, and a tied head's factors: llama.cpp, MLX and torchtune have one module for it and the
    embedding."""
    return frozenset({*features, "head"})


_READ, _BOTH = "to read", "to read and write"

# Where two know as many keys of a file, the first is meant: LyCORIS knows all that kohya does.
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "peft",
            "PEFT",
            frozenset(FEATURES),
            "module",
            "peft 0.21",
            is_folder=True,
            reads_besides="IA³ (merge only)",
        ),
        Format(
            "kohya",
            "kohya (sd-scripts)",
            _keeps("conv", "dora"),
            "module",
            "sd-scripts",
            base=_READ,
            keeps_names=True,
            knows=kohya.knows,
            read=kohya.read,
            writer=kohya.KohyaWriter,
        ),
        Format(
            "lycoris",
            "LyCORIS",
            _keeps("conv", "dora"),
            "module",
            "lycoris-lora 4.1",
            base=_READ,
            reads_besides="LoHa, LoKr, whole differences, CP-decomposed LoCon",
            knows=lycoris.knows,
            read=lycoris.read,
            writer=lycoris.LycorisWriter,
        ),
        Format(
            "diffusers",
            "diffusers",
            _keeps("conv", "dora", "bias"),
            "folded",
            "diffusers 0.42",
            is_folder=True,
            reads_besides="its older key names",
            knows=diffusers.knows,
            read=diffusers.read,
            writer=diffusers.DiffusersWriter,
        ),
        Format(
            "torchtune",
            "torchtune",
            frozenset({"dora"}),
            "one",
            "torchtune 0.6",
            one_rank=True,
            base=_BOTH,
            knows=torchtune.knows,
            read=torchtune.read,
            writer=torchtune.TorchtuneWriter,
        ),
        Format(
            "mlx",
            "MLX",
            frozenset({"embedding", "dora"}),
            "one",
            "mlx-lm 0.32",
            one_rank=True,
            is_folder=True,
            knows=mlx.knows,
            read=mlx.read,
            writer=mlx.MlxWriter,
        ),
        Format(
            "loralib",
            "loralib",
            _keeps("embedding", "conv"),
            "module",
            "loralib 0.1.2",
            reads_besides="MergedLinear",
            own_forms=True,
            knows=loralib.knows,
            read=loralib.read,
            writer=loralib.LoralibWriter,
        ),
        Format(
            "gguf",
            "GGUF",
            frozenset({"embedding"}),
            "one",
            "gguf 0.17, llama.cpp",
            base=_BOTH,
            tied_embedding=False,
            open_file=gguf.open_file,
            read=gguf.read,
            writer=gguf.GgufWriter,
        ),
        Format(
            "onnxruntime",
            "ONNX Runtime",
            _keeps("embedding", "saved"),
            "folded",
            "onnxruntime 1.20",
            dtype="F32",
            open_file=onnxruntime.OrtFile,
            read=onnxruntime.read,
            writer=onnxruntime.OrtWriter,
        ),
    )
}


def format_named(name: str, option: str) -> Format:
    """A row of the table. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"{option} {name!r}: one of {', '.join(FORMATS)} is needed")
    return FORMATS[name]


def by_bytes(path: Path) -> Format | None:
    """The format that a file's first bytes give away."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] == gguf.MAGIC:
        return FORMATS["gguf"]
    return FORMATS["onnxruntime"] if head[4:] == onnxruntime.MAGIC else None


def title_of(keys: Collection[str]) -> str:
    """What a file of tensors is called whose keys are an adapter's; "" of any other, such as one of
    a model saved with its adapters in it."""
    named = sum("lora" in key or "lycoris" in key or "ia3_l" in key for key in keys)
    if not named or 2 * named < len(keys):
        return ""
    if all(key.startswith(peft.PREFIX) for key in keys):
        return "" if any(".base_layer.weight" in key for key in keys) else FORMATS["peft"].title
    return next((f.title for f in FORMATS.values() if f.knows and all(map(f.knows, keys))), "")


def by_keys(path: Path, keys: Collection[str]) -> Format:
    """The format whose names a file of tensors has. Raises AdapterError."""
    if keys and all(key.startswith(peft.PREFIX) for key in keys):
        raise AdapterError(
            f"{path}: PEFT's tensors without their {peft.CONFIG}; put that file beside it"
        )
    known = {
        form.name: sum(map(form.knows, keys)) for form in FORMATS.values() if form.knows is not None
    }
    best = max(known, key=lambda name: known[name])
    if 2 * known[best] > len(keys):  # a key that is none of its own is refused by name later
        return FORMATS[best]
    raise AdapterError(
        f"{path}: no {peft.CONFIG} there, and its tensors are not named as an adapter's "
        f"({', '.join(f.title for f in FORMATS.values())}); is it an adapter? --from of "
        "`loratools convert` says which"
    )
