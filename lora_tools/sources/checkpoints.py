"""The door to checkpoints: a folder, a bare file or a hub id, as plain numbers by their names."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from lora_tools.errors import CheckpointError
from lora_tools.formats import hub, variants
from lora_tools.formats.checkpoint import PICKLE_SUFFIXES, Checkpoint, open_weights
from lora_tools.formats.diffusion_pipeline import DiffusionPipeline, folders_of, is_pipeline
from lora_tools.formats.folders import meant
from lora_tools.formats.gguf_file import is_gguf
from lora_tools.formats.gguf_model import open_gguf
from lora_tools.formats.pipelines import Pipeline, weight_files
from lora_tools.formats.quantized.signs import FILES, Found, sign_of
from lora_tools.formats.regular_files import is_there, refuse_dangling
from lora_tools.formats.sharded import (
    empty_weights,
    home_of,
    open_parts,
    refuse_folder,
    refuse_slices,
    refuse_steps,
    title_of,
)
from lora_tools.formats.shards import check_index, read_index
from lora_tools.formats.wrapped_names import (
    Renamed,
    TwoNamesError,
    note,
    of_adapter,
    of_wrapped_layers,
    saved_whole,
    without_wrappers,
)
from lora_tools.records import counted
from lora_tools.sources.class_says import class_says
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.schemes import scheme_of


def open_checkpoint(
    source: str | Path, allow_pickle: bool = False, *, decoded: bool = True, pipelines: bool = False
) -> Checkpoint:
    """Open a folder, a bare file, or a hub id, such as ``org/name[@revision]`` (``formats.hub``).

    Args:
        pipelines: all models of a diffusers pipeline's folder as one; else it is refused.
        decoded: see a quantized one as the plain one that it stands for: ``scheme`` says what was
            decoded, and ``stored`` is what lies there. Else it is opened as it is stored, to be
            looked at or to have its bytes passed on.

    Raises:
        UnsafeInput: the weights are pickles and ``allow_pickle`` is false, or an index names a
            file outside the folder.
        CheckpointError: anything else that keeps it from being read as a checkpoint; with
            ``decoded``, also numbers in a scheme that ``sources.schemes`` has no row for.
    """
    path = _found(source, allow_pickle)
    if is_pipeline(path):
        return _open_pipeline(path, allow_pickle, decoded, pipelines)
    stored = _open(path, allow_pickle)
    stored.says = functools.partial(class_says, stored.config, stored.specs)
    if not decoded:
        return stored
    stored = by_plain_names(stored)
    checkpoint, sign = as_plain(stored)
    if sign is not None:
        beside = checkpoint.scheme
        where = f"beside weights in {beside.title}" if beside is not None else "here"
        raise CheckpointError(
            f"{stored.path}: quantized as {sign.title} (by {sign.where}), which cannot be read "
            f"{where}; {sign.advice}"
        )
    return checkpoint


def _open_pipeline(
    folder: Path, allow_pickle: bool, decoded: bool, wanted: bool
) -> DiffusionPipeline:
    """The models of a diffusers pipeline. Raises CheckpointError where no pipeline is wanted."""
    names = folders_of(folder)
    if not wanted:
        raise CheckpointError(
            f"{folder}: is a diffusers pipeline, but one model is needed here; give the folder of "
            f"one of its parts ({', '.join(names)}): {folder / names[0]}"
        )
    parts = {}
    variant = variants.wanted()
    held = {name: variants.there(path.name for path in (folder / name).iterdir()) for name in names}
    if variant is not None and not any(variant in each for each in held.values()):
        raise CheckpointError(
            f"{folder}: none of its parts has files of the variant {variant}; its variants: "
            f"{', '.join(sorted({v for each in held.values() for v in each})) or 'none'}"
        )
    for name in names:
        known = variant if variant is not None and variant in held[name] else None
        with variants.using(known):
            parts[name] = open_checkpoint(folder / name, allow_pickle, decoded=decoded)
    return DiffusionPipeline(folder, parts)


def from_file(checkpoint: Checkpoint) -> str:
    """What to do where a folder is needed, and this is a file that one can be made of; or ""."""
    if not checkpoint.is_folder or checkpoint.path.is_dir():
        return ""
    return f"; make one: loratools dequantize {checkpoint.path} -o FOLDER"


def by_plain_names(stored: Checkpoint) -> Checkpoint:
    """A checkpoint without what wrappers put into its names; itself where there is none of it.

    What comes before all names goes only where transformers is to load the folder, which looks for
    none of it: a bare file may be for a model that has it.

    Raises:
        CheckpointError: two tensors become one; or the model was saved with its adapter in it,
            which transformers would pass by, or with empty weights.
    """
    is_loaded = bool(stored.config.get("model_type"))
    _refuse_unloadable(stored, is_loaded)
    try:
        names = without_wrappers(stored.specs, outer=is_loaded)
    except TwoNamesError as error:
        raise CheckpointError(f"{stored.path}: {error}") from None
    said = note(names)
    if not said:
        return stored
    files = [Renamed(file, names) for file in stored.files]
    plain = Checkpoint(stored.path, files, stored.is_folder, stored.index_name)
    plain.pipeline = stored.pipeline
    plain.part_files = stored.part_files
    plain.notes = (*stored.notes, f"{stored.path}: {said}")
    return plain


def _refuse_unloadable(stored: Checkpoint, is_loaded: bool) -> None:
    """Raises CheckpointError for weights that are not what their names say.

    Args:
        is_loaded: whether transformers is to load them. A bare file may be for a model that has a
            module called ``base_layer``, or an empty tensor, of its own.
    """
    layers = of_wrapped_layers(stored.specs, always=is_loaded)
    if layers:
        raise CheckpointError(saved_whole(stored.path, layers))
    empty = [
        spec.name
        for spec in stored.specs.values()
        if spec.is_float and spec.shape == (0,) and (is_loaded or spec.name.endswith("weight"))
    ]
    if empty:
        raise CheckpointError(f"{stored.path}: {empty_weights(empty)}")


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
        if stored.is_folder and name not in known and is_there(stored.path / name)
    ]
    return checkpoint, sign_of(checkpoint.specs, checkpoint.config, files)


def _found(source: str | Path, allow_pickle: bool) -> Path:
    """The file or folder that is meant. Raises CheckpointError."""
    path = hub.here(source, allow_pickle, by_headers=True)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on an overlong name
        refuse_dangling(path)
        raise CheckpointError(f"{source}: no such file or folder, and not a hub id (org/name)")
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: neither a file nor a folder")
    return meant(path, CheckpointError)


def _open(path: Path, allow_pickle: bool) -> Checkpoint:
    if path.is_file() and is_gguf(path):
        return open_gguf(path)
    _refuse_adapter(path)
    if path.is_file():
        checkpoint = Checkpoint(path, [open_weights(path, allow_pickle)], False, None)
    else:
        checkpoint = _open_modules(path, allow_pickle)
    for file in checkpoint.files:
        refuse_slices(file)
    _refuse_adapter(checkpoint.path, checkpoint.specs)
    return checkpoint


def _open_modules(folder: Path, allow_pickle: bool) -> Checkpoint:
    """A folder, or the first module of one of sentence-transformers: it is what adapters act on."""
    pipeline = Pipeline.at(folder)
    if pipeline is None:
        return _open_folder(folder, allow_pickle)
    main = pipeline.main
    if pipeline.is_deeper and not weight_files(main.folder):
        raise CheckpointError(
            f"{folder}: a sentence-transformers folder whose first module, {main.path} "
            f"({main.kind}), has no weights itself; give the folder of one of its transformers"
        )
    checkpoint = _open_folder(main.folder, allow_pickle)
    checkpoint.pipeline = pipeline
    return checkpoint


def _refuse_adapter(path: Path, names: Iterable[str] = ()) -> None:
    """Raises CheckpointError for an adapter, known by its names or by the first bytes of a file."""
    from lora_tools.formats.adapters.table import by_bytes, title_of

    form = by_bytes(path) if path.is_file() and not names else None
    keys = of_adapter(list(names))[0].values()
    _refuse_titled(path, form.title if form is not None else title_of(list(keys)))


def _refuse_titled(path: Path, title: str) -> None:
    if title:
        raise CheckpointError(
            f"{path}: this is an adapter ({title}), not a checkpoint; merge it into its base "
            f"first: loratools merge BASE {path} -o OUT"
        )


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    refuse_folder(folder)
    found = _open_files(folder, (".safetensors",), allow_pickle)
    if found is None:
        found = _open_parts(folder, allow_pickle)
    if found is None:
        found = _open_files(folder, PICKLE_SUFFIXES, allow_pickle)
    if found is None:
        refuse_steps(folder)
        models = sorted(folder.glob("*.gguf"))
        if models:
            raise CheckpointError(f"{folder}: has GGUF files: {_names(models)}; give one of them")
        raise CheckpointError(f"{folder}: has no .safetensors file; is the download complete?")
    return found


def _open_parts(folder: Path, allow_pickle: bool) -> Checkpoint | None:
    """A model in parts, as distributed training leaves it. None where there is none."""
    file = open_parts(folder, allow_pickle)
    if file is None:
        return None
    checkpoint = Checkpoint(home_of(folder), [file], True, None)
    checkpoint.part_files = file.part_files
    said = f"read of {title_of(file)}, in {counted(len(file.part_files), 'file')}"
    checkpoint.notes = tuple(f"{folder}: {note}" for note in (said, *file.notes))
    return checkpoint


def _open_files(folder: Path, suffixes: Iterable[str], allow_pickle: bool) -> Checkpoint | None:
    """A folder's one file of weights, or those that its index names. None where there is none."""
    for suffix in suffixes:
        found = _of_variant(folder, suffix)
        indexes = [path for path in found if path.suffix == ".json"]
        files = [path for path in found if path.suffix != ".json"]
        if len(indexes) > 1:
            raise CheckpointError(
                f"{folder}: has several indexes: {_names(indexes)}; give one file"
            )
        if indexes:
            names = read_index(indexes[0])
            checkpoint = Checkpoint(
                folder,
                [open_weights(folder / name, allow_pickle) for name in sorted(set(names.values()))],
                True,
                indexes[0].name,
            )
            check_index(checkpoint.home, indexes[0], names)
            return checkpoint
        usual = [folder / f"{stem}{suffix}" for stem in ("model", "diffusion_pytorch_model")]
        files = [path for path in usual if path in files][:1] or files
        if suffix in PICKLE_SUFFIXES:
            files = [f for f in files if f.stem not in ("training_args", "optimizer", "scheduler")]
        if files and all(file.name.startswith("adapter_model") for file in files):
            from lora_tools.formats.adapters.table import FORMATS

            _refuse_titled(folder, FORMATS["peft"].title)
        if len(files) > 1:
            raise CheckpointError(
                f"{folder}: has several weight files and no index: {_names(files)}; give one of "
                "them"
            )
        if files:
            return Checkpoint(folder, [open_weights(files[0], allow_pickle)], True, None)
    return None


def _of_variant(folder: Path, suffix: str) -> list[Path]:
    """Weight files and indexes of the variant that is wanted. Raises CheckpointError."""
    paths = sorted((*folder.glob(f"*{suffix}"), *folder.glob(f"*{suffix}.index*.json")))
    names = [path.name for path in paths]
    found, wanted = variants.chosen(names), variants.wanted()
    others = variants.there(names)
    if names and not found:
        raise CheckpointError(
            f"{folder}: has only files of the variant {' or '.join(others)}; read them with "
            f"--variant {others[0]}"
        )
    if wanted is not None and names and wanted not in others:
        raise CheckpointError(
            f"{folder}: no files of the variant {wanted}; its variants: "
            f"{', '.join(others) or 'none'}"
        )
    return [path for path in paths if path.name in found]


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
