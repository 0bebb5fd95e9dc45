"""The door to checkpoints: a folder, a bare file or a hub id, as plain numbers by their names."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats import hub
from lora_tools.formats.checkpoint import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    Checkpoint,
    is_plain_name,
    open_weights,
)
from lora_tools.formats.quantized.signs import FILES, Found, sign_of
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.sources.class_says import class_says
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.schemes import scheme_of


def open_checkpoint(
    source: str | Path, allow_pickle: bool = False, *, decoded: bool = True
) -> Checkpoint:
    """Open a folder, a bare file, or a hub id ``org/name[@revision]``.

    Args:
        decoded: see a quantized one as the plain one that it stands for: ``scheme`` says what was
            decoded, and ``stored`` is what lies there. Else it is opened as it is stored, to be
            looked at or to have its bytes passed on.

    Raises:
        UnsafeInput: the weights are pickles and ``allow_pickle`` is false, or an index names a
            file outside the folder.
        CheckpointError: anything else that keeps it from being read as a checkpoint; with
            ``decoded``, also numbers in a scheme that ``sources.schemes`` has no row for.
    """
    stored = _open(source, allow_pickle)
    stored.says = functools.partial(class_says, stored.config, stored.specs)
    if not decoded:
        return stored
    checkpoint, sign = as_plain(stored)
    if sign is not None:
        raise CheckpointError(
            f"{stored.path}: quantized as {sign.title} (by {sign.where}), which is not read here: "
            f"{sign.advice}"
        )
    return checkpoint


def as_plain(stored: Checkpoint) -> tuple[Checkpoint, Found | None]:
    """A checkpoint as plain numbers, as far as a row of ``SCHEMES`` tells; and the sign by which
    some of them are not even so."""
    found = scheme_of(stored)
    checkpoint = Dequantized(stored, *found) if found else stored
    checkpoint.says = functools.partial(class_says, checkpoint.config, checkpoint.specs)
    known = checkpoint.scheme.files if checkpoint.scheme is not None else ()
    files = [
        name
        for name in FILES
        if stored.is_folder and name not in known and (stored.path / name).is_file()
    ]
    return checkpoint, sign_of(checkpoint.specs, checkpoint.config, files)


def _open(source: str | Path, allow_pickle: bool) -> Checkpoint:
    path = Path(source)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on an overlong name
        if not hub.looks_like_hub_id(str(source)):
            raise CheckpointError(f"{source}: no such file or folder, nor an org/name of the hub")
        path = hub.fetch(str(source), allow_pickle)
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: neither a file nor a folder")
    _refuse_adapter(path)
    if path.is_file():
        checkpoint = Checkpoint(path, [open_weights(path, allow_pickle)], False, None)
    else:
        checkpoint = _open_folder(path, allow_pickle)
    _refuse_adapter(path, checkpoint.specs)
    return checkpoint


def _refuse_adapter(path: Path, names: Iterable[str] = ()) -> None:
    """Raises CheckpointError for an adapter, known by its names or by the first bytes of a file."""
    from lora_tools.formats.adapters.table import by_bytes, title_of

    form = by_bytes(path) if path.is_file() and not names else None
    _refuse_titled(path, form.title if form is not None else title_of(list(names)))


def _refuse_titled(path: Path, title: str) -> None:
    if title == "GGUF":
        raise CheckpointError(f"{path}: a GGUF file; a checkpoint in safetensors is wanted here")
    if title:
        raise CheckpointError(
            f"{path}: this is an adapter ({title}), not a checkpoint; merge it into its base "
            f"first: loratools merge BASE {path} -o OUT"
        )


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    for suffix in suffixes:
        indexes = sorted(folder.glob(f"*{suffix}{INDEX_SUFFIX}"))
        files = sorted(folder.glob(f"*{suffix}"))
        if len(indexes) > 1:
            raise CheckpointError(f"{folder}: several indexes: {_names(indexes)}; pass one file")
        if indexes:
            names = _read_index(indexes[0])
            checkpoint = Checkpoint(
                folder,
                [open_weights(folder / name, allow_pickle) for name in sorted(set(names.values()))],
                True,
                indexes[0].name,
            )
            _check_index(checkpoint, indexes[0], names)
            return checkpoint
        if (folder / f"model{suffix}") in files:
            files = [folder / f"model{suffix}"]
        if suffix in PICKLE_SUFFIXES:
            files = [f for f in files if f.stem not in ("training_args", "optimizer", "scheduler")]
        if len(files) > 1:
            raise CheckpointError(
                f"{folder}: several weight files and no index: {_names(files)}; pass one of them"
            )
        if files:
            if files[0].name.startswith("adapter_model"):
                from lora_tools.formats.adapters.table import FORMATS

                _refuse_titled(folder, FORMATS["peft"].title)
            return Checkpoint(folder, [open_weights(files[0], allow_pickle)], True, None)
    raise CheckpointError(f"{folder}: no .safetensors file in it; is the download complete?")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = strict_json(path.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not (names and isinstance(names, dict) and all(type(v) is str for v in names.values())):
        raise CheckpointError(f"{path}: not a shard index (no weight_map of names to files)")
    for file in set(names.values()):
        if not is_plain_name(file):
            raise UnsafeInput(f"{path}: names a file outside its folder: {file!r}")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path}: shard {file} is missing; is the download complete?")
    return dict(names)


def _check_index(checkpoint: Checkpoint, index: Path, names: dict[str, str]) -> None:
    for name, file in names.items():
        if name not in checkpoint.specs:
            raise CheckpointError(f"{index}: says tensor {name!r} is in {file}, which lacks it")
        actual = checkpoint._file(name).path.name
        if actual != file:
            raise CheckpointError(f"{index}: says tensor {name!r} is in {file}; it is in {actual}")
    extra = [name for name in checkpoint.specs if name not in names]
    if extra:
        where = checkpoint._file(extra[0]).path.name
        raise CheckpointError(f"{index}: tensor {extra[0]!r} is in {where} and not in the index")


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
