"""The door that every verb takes to an adapter: recognises its format, and opens it as PEFT's.

Readers in ``formats`` say what each factor is made of; ``linalg.recipes`` makes it. This is where
the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.formats import hub
from lora_tools.formats.adapters import block_diagonal, peft, peft_folder
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.not_lora import refuse_by_config, refuse_by_keys
from lora_tools.formats.adapters.outline import Context, Foreign, Outline
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.adapters.table import FORMATS, by_bytes, by_keys, format_named, title_of
from lora_tools.formats.checkpoint import PICKLE_SUFFIXES, Checkpoint, is_pickle, open_weights
from lora_tools.formats.folders import meant, named_adapters
from lora_tools.formats.rank_files import is_rank_file
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.formats.wrapped_names import (
    BUNDLED,
    adapter_file,
    of_adapter,
    of_wrapped_layers,
    saved_whole,
)
from lora_tools.linalg.scaling import scaling
from lora_tools.sources.base_names import base_names

_NAMES = tuple(form.file_name for form in FORMATS.values() if form.file_name)
_SUFFIXES = (*{form.suffix for form in FORMATS.values()}, *PICKLE_SUFFIXES)


def open_adapter(
    source: str | Path,
    allow_pickle: bool = False,
    *,
    base: BaseNames | Checkpoint | str | Path | None = None,
    source_format: str | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    as_stored: bool = False,
    guess: bool = False,
    allow_unmatched: bool | None = None,
) -> Adapter:
    """Open an adapter folder, file or hub id of any format that is read.

    Args:
        base: the model it was trained on: a checkpoint, or a diffusers pipeline. Some formats do
            not say enough without it; none is read but its headers.
        source_format: a row of ``FORMATS``; by default the content tells.
        alpha, enable_lora: what formats leave to their user's code (loralib, torchtune).
        as_stored: where no base is at hand that a format needs, keep the names and the order of
            rows of the file; ``unresolved`` then says why.
        guess: what the file does not say, too, to look at it only.
        allow_unmatched: let names that are none of the base's stay, for a plan to leave out; None
            where that cannot be asked for.

    Raises:
        AdapterError, UnsupportedAdapter, UnsafeInput, CheckpointError (a truncated file),
        UsageError (no such format).
    """
    form = format_named(source_format, "--from") if source_format else None
    path = meant(hub.here(source, allow_pickle), AdapterError)
    if (
        path.is_file()
        and is_there(path.parent / peft.CONFIG, AdapterError)
        and _is_named_as_one(path)
    ):
        path = path.parent
    config = path / peft.CONFIG
    if form is FORMATS["peft"] or (form is None and _is_peft(source, config)):
        adapter = peft_folder.open_peft(source, path, allow_pickle, _seen_whole)
        adapter.notes = (*adapter.notes, *_beside(path))
        return adapter
    file_path = _weights(source, path)
    form = form or by_bytes(file_path)
    said: tuple[str, ...] = ()
    if form is not None and form.open_file is not None:
        file = form.open_file(file_path)
    else:
        stored = open_weights(file_path, allow_pickle)
        if layers := of_wrapped_layers(stored.specs, always=False):
            raise AdapterError(saved_whole(path, layers))
        file, said = adapter_file(path, stored)
        refuse_by_keys(path, file.specs)
        form = form or by_keys(path, file.specs)
    names = base_names(base, allow_pickle) if base is not None else None
    context = Context(names, alpha, tuple(enable_lora), as_stored, guess, allow_unmatched)
    adapter = _opened(path, file, form, context)
    adapter.notes = (*said, *adapter.notes)
    return adapter


def _seen_whole(
    path: Path, file: TensorFile, config: dict[str, Any]
) -> tuple[TensorFile, dict[str, Any]]:
    from lora_tools.linalg import recipes

    return block_diagonal.seen_whole(path, file, config, recipes.compute)


def _beside(folder: Path) -> tuple[str, ...]:
    """What is said of adapters in folders of the one that was opened: PEFT puts all but the
    ``default`` one there."""
    names = named_adapters(folder)
    if not names:
        return ()
    return (
        f"its folder has other adapters, which are not read: {', '.join(names)}; to use one, give "
        f"{folder / names[0]}",
    )


def _opened(path: Path, file: Any, form: Format, context: Context) -> Adapter:
    from lora_tools.linalg import recipes

    assert form.read is not None
    if not file.specs:
        raise AdapterError(f"{path}: holds no tensors")
    outline = form.read(path, file, context)
    adapter = Foreign(path, outline, _alphas(outline), recipes.compute)
    adapter.format = form.name
    return adapter


def is_adapter(source: str | Path, allow_pickle: bool = False) -> bool:
    """Whether a file or folder is an adapter, by its config, its first bytes or all its names.

    Raises:
        AdapterError: a folder that holds several folders with weights.
    """
    path = meant(Path(source), AdapterError)
    if path.is_dir():
        if is_there(path / peft.CONFIG, AdapterError):
            return True
        weights = [p for p in path.iterdir() if p.suffix in _SUFFIXES]
        if len(weights) != 1:
            return False
        [path] = weights
    if not path.is_file():
        return False
    if is_there(path.parent / peft.CONFIG, AdapterError) and _is_named_as_one(path):
        return True
    form = by_bytes(path)
    if form is not None:
        return form.holds_adapter is None or form.holds_adapter(path)
    if is_pickle(path) and (not allow_pickle or is_rank_file(path)):
        return False
    names = of_adapter(open_weights(path, allow_pickle).specs)[0].values()
    return bool(title_of([name for name in names if not name.startswith(BUNDLED)]))


def _alphas(outline: Outline) -> Mapping[str, float]:
    """lora_alpha at the rank of the factors as they are read."""
    alphas = {}
    for module, (alpha, of_rank, rslora) in outline.strengths.items():
        rank = outline.ranks[module]
        if of_rank != rank or rslora:
            alpha = scaling(alpha * rank, of_rank, rslora)  # exact where the quotient is
        alphas[module] = alpha
    return alphas


def _is_named_as_one(path: Path) -> bool:
    """Whether a file beside an adapter_config.json is that config's weights."""
    return path.name in (peft.CONFIG, *_NAMES) or path.name.startswith(peft.STEM)


def _is_peft(source: str | Path, config_path: Path) -> bool:
    """Whether the config there is PEFT's. Raises AdapterError for one that is none."""
    if not is_there(config_path, AdapterError):
        return False
    config = peft_folder.read_config(config_path)
    refuse_by_config(config_path.parent, config)
    return not ("fine_tune_type" in config or "lora_parameters" in config)


def _is_file(path: Path) -> bool:
    return not path.is_dir() and is_there(path, AdapterError)


def _weights(source: str | Path, path: Path) -> Path:
    """The one file of tensors at a path."""
    if path.is_file():
        return path
    if not path.is_dir():
        before, equals, weight = str(source).rpartition("=")
        hint = "there is no such file or folder"
        if equals and Path(before).exists():
            hint = (
                f"{before} is there, but a weight is not allowed here; make an adapter of another "
                f"strength first: loratools rescale {before} -o OUT --scale {weight}"
            )
        raise AdapterError(f"{source}: no such adapter; {hint}")
    named = [path / name for name in _NAMES if is_there(path / name, AdapterError)]
    found = named or [p for p in sorted(path.iterdir()) if p.suffix in _SUFFIXES and _is_file(p)]
    safe = [p for p in found if p.suffix not in PICKLE_SUFFIXES] or found
    if not safe:
        raise AdapterError(
            f"{source}: has no {peft.CONFIG} and no file of tensors; is it an adapter folder?"
        )
    if len(safe) > 1:
        raise AdapterError(
            f"{source}: has no {peft.CONFIG} and several files "
            f"({', '.join(p.name for p in safe[:5])}); give one of them"
        )
    return safe[0]
