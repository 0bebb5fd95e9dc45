"""What an adapter format is: the row that each format's own file declares, as ``FORMAT``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.outline import Compute, Context, Outline
from lora_tools.formats.adapters.places import Place
from lora_tools.formats.adapters.writer import Writer
from lora_tools.formats.counterparts.table import Readers

# What an adapter can hold besides the factors of linear layers, and how a person calls it.
FEATURES = {
    "embedding": "factors of embeddings",
    "conv": "factors of convolutions",
    "experts": "factors of fused experts",
    "dora": "DoRA's magnitudes",
    "bias": "lora_bias",
    "saved": "tensors saved whole",
    "differences": "differences of norms and the like",
    "tokens": "trained tokens",
    # llama.cpp, MLX and torchtune have one module for it and the embedding.
    "head": "factors of an output head that is also the embedding",
}
_FILES = (".safetensors", ".onnx", ".json")  # pickles have an error of their own
READ, READ_AND_WRITTEN = "to read", "to read and write"  # when a base is needed


def refuse_file_name(out: str, is_folder: bool) -> None:
    """Raises UsageError for the name of a file where a folder is written."""
    if is_folder and Path(out).suffix in _FILES:
        raise UsageError(
            f"--out {out}: the output is a folder, and this is the name of a file; leave out "
            f"{Path(out).suffix}"
        )


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
        base: when the base checkpoint is needed: "", ``READ`` or ``READ_AND_WRITTEN``.
        library: whose format it is, and what reads it.
        input_dora: takes DoRA's magnitudes of inputs, too.
        mixes_dora: takes those of some modules alone.
        own_forms: holds MergedLinears (``--layout``) and convolutions as ``linalg.loralib`` has it.
        keeps_names: its writer writes names that were never resolved as they are.
        by_component: its keys say which part of a diffusion pipeline a module is of.
        names: of diffusion models, whose they are; called: by which function, which raises
            UnsupportedAdapter for a module that it has none for.
        tied_embedding: whether its reader takes factors of an embedding that is the output head,
            too.
        is_folder: whether it is a folder, else a file.
        as_file: writes such a folder's file by itself, where that is read, too.
        file_name: of the file of tensors in such a folder, where it is always the same; suffix: how
            files of its own end.
        reads_besides: what it reads besides LoRA, for the documentation.
        magic: the bytes that a file begins with, and at which place.
        marks: words of which at least half of a file's keys have one. (A model can have layers that
            are called as factors are, such as ``down``.)
        knows: whether a key of a safetensors file or pickle is one of its own; None where the bytes
            of the file tell.
        holds_adapter: whether a file of that ``magic`` is one; None where all are.
        open_file: opens a file that is neither safetensors nor a pickle.
        read: None for PEFT, which the others are read as.
    """

    name: str
    title: str
    keeps: frozenset[str]
    alpha: Literal["module", "one", "folded"]
    library: str
    writer: Callable[[Path, BaseNames | None, Compute], Writer]
    one_rank: bool = False
    dtype: str = ""
    base: str = ""
    input_dora: bool = False
    mixes_dora: bool = False
    own_forms: bool = False
    keeps_names: bool = False
    by_component: bool = False
    names: Readers = ""
    called: Callable[[Place], str] | None = None
    tied_embedding: bool = True
    is_folder: bool = False
    as_file: Callable[[Path, BaseNames | None, Compute], Writer] | None = None
    file_name: str = ""
    suffix: str = ".safetensors"
    reads_besides: str = ""
    magic: tuple[int, bytes] | None = None
    marks: tuple[str, ...] = ("lora",)
    knows: Callable[[str], bool] | None = None
    holds_adapter: Callable[[Path], bool] | None = None
    open_file: Callable[[Path], Any] | None = None
    read: Callable[[Path, Any, Context], Outline] | None = None

    def at(self, out: str) -> Format:
        """The format as it is written to a path: a folder, or by its suffix the file alone.

        Raises:
            UsageError: the name is a file's, and it is a folder always.
        """
        if self.as_file is None or not out.endswith(self.suffix):
            refuse_file_name(out, self.is_folder)
            return self
        return dataclasses.replace(self, is_folder=False, file_name="", writer=self.as_file)

    def marks_most(self, keys: Collection[str]) -> bool:
        """Whether at least half of the keys of a file, and any, have one of ``marks``."""
        marked = sum(any(mark in key for mark in self.marks) for key in keys)
        return bool(marked) and 2 * marked >= len(keys)
