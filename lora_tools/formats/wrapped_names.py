"""Names without what wrappers put into them.

FSDP, activation checkpointing, ``torch.compile``, DDP, DeepSpeed and Fabric put a module around
another, and PEFT puts an adapter's name behind each factor. Saved while they are on, tensors carry
their parts in their names, anywhere, and no loader looks for them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import AdapterError
from lora_tools.formats.sharded import empty_weights
from lora_tools.formats.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

PEFT_PREFIX = "base_model.model."
# Words that no model calls a module of its own, so that they go wherever they stand; in names whose
# dots are underscores (kohya's), too.
_PARTS = re.compile(
    r"(?<![^._])(?:_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_orig_mod"
    r"|_forward_module)[._]"
)
# A model may have a module of its own that is called so: only where all names begin with it.
_OUTER = ("module.", PEFT_PREFIX)
_NAMED = re.compile(
    r"(.+\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l))"
    r"\.(?!(?:weight|bias)$)([^.]+)(\.weight|\.bias)?"
)


# Textual inversions that trainers put into a LoRA's file: vectors for new tokens.
BUNDLED = "bundle_emb."


class TwoNamesError(Exception):
    """Two tensors have one name once the wrappers' parts are out."""


def without_wrappers(names: Iterable[str], outer: bool) -> dict[str, str]:
    """Each name → the one without wrappers' parts.

    Args:
        outer: whether what comes before all names goes as well (DDP's ``module.``, PEFT's prefix).

    Raises:
        TwoNamesError.
    """
    plain = {name: _PARTS.sub("", name) for name in names}
    return _one_to_one(_without_outer(plain) if outer else plain)


def of_adapter(keys: Collection[str]) -> tuple[dict[str, str], Sequence[str]]:
    """Each key of an adapter's file → the one without wrappers' parts and names of adapters; and
    those names. PEFT's own prefix stays, once. Of several adapters the keys are as they were.
    """
    plain = {key: _PARTS.sub("", key) for key in keys}
    leads = {name.rpartition(PEFT_PREFIX)[:2] for name in plain.values()}
    lead = "".join(leads.pop()) if len(leads) == 1 else ""
    plain = _without_outer({own: name.removeprefix(lead) for own, name in plain.items()})
    adapters = {match[2] for name in plain.values() if (match := _NAMED.fullmatch(name))}
    if len(adapters) > 1:
        return {key: key for key in keys}, sorted(adapters)
    for adapter in adapters:
        called = re.escape(adapter)
        held = re.compile(rf"(\.(?:modules_to_save|trainable_tokens_delta))\.{called}(?=\.|$)")
        plain = {own: held.sub(r"\1", _NAMED.sub(r"\1\3", name)) for own, name in plain.items()}
    prefix = PEFT_PREFIX if lead else ""
    return {own: prefix + name for own, name in plain.items()}, sorted(adapters)


def _without_outer(plain: dict[str, str]) -> dict[str, str]:
    for prefix in _OUTER * bool(plain):
        if all(name.startswith(prefix) for name in plain.values()):
            shorter = {own: name.removeprefix(prefix) for own, name in plain.items()}
            return _without_outer(shorter)
    return plain


def _one_to_one(plain: dict[str, str]) -> dict[str, str]:
    first: dict[str, str] = {}
    for own, name in plain.items():
        if first.setdefault(name, own) != own:
            raise TwoNamesError(
                f"{own!r} and {first[name]!r} are both {name} without the parts that wrappers "
                "(FSDP, compile, …) add to names; rename or remove one of them"
            )
    return plain


def of_wrapped_layers(names: Collection[str], always: bool) -> list[str]:
    """Tensors of layers that PEFT put an adapter on, in a model saved with it.

    Args:
        always: whether ``base_layer`` is no other's name, even without a factor beside it.
    """
    named = {match[1].rpartition(".")[0] for name in names if (match := _NAMED.fullmatch(name))}
    found = []
    for name in names:
        stem, is_base, _ = name.rpartition(".base_layer.")
        # PEFT before 0.5 put the factors beside the weight itself
        if (is_base and (always or stem in named)) or name.rpartition(".weight")[0] in named:
            found.append(name)
    return found


def saved_whole(path: Path, layers: Sequence[str]) -> str:
    """What to say of a model that was saved with its adapter in it, by such tensors' names."""
    return (
        f"{path}: a model saved together with its adapter ({layers[0]}), which transformers does "
        "not load; save it merged (model.merge_and_unload()), or save the adapter alone "
        "(model.save_pretrained(OUT))"
    )


def adapter_file(path: Path, file: TensorFile) -> tuple[TensorFile, tuple[str, ...]]:
    """An adapter's file by plain names, and what to say of them.

    Raises:
        AdapterError: two keys become one, the file holds several adapters, or factors are empty.
    """
    empty = [spec.name for spec in file.specs.values() if spec.is_float and spec.shape == (0,)]
    if empty:
        raise AdapterError(f"{path}: {empty_weights(empty)}")
    try:
        plain, adapters = of_adapter(file.specs)
        _one_to_one(plain)
    except TwoNamesError as error:
        raise AdapterError(f"{path}: {error}") from None
    if len(adapters) > 1:
        raise AdapterError(
            f"{path}: holds several adapters ({', '.join(adapters[:8])}); save each one alone: "
            f"model.save_pretrained(OUT, selected_adapters=[{adapters[0]!r}])"
        )
    said = [said] if (said := note(plain)) else []
    bundled = [key for key in file.specs if key.startswith(BUNDLED)]
    if bundled:
        names = ", ".join(dict.fromkeys(key.split(".")[1] for key in bundled))
        said.append(
            f"left out: {len(bundled)} tensors of textual inversions in the file ({names}), which "
            "change no weight; load them from the original file"
        )
    kept = {own: name for own, name in plain.items() if own not in bundled}
    return (Renamed(file, kept), tuple(said)) if said else (file, ())


def note(plain: Mapping[str, str]) -> str:
    """A sentence on what was renamed; "" where nothing was. That an adapter is called ``default``
    needs none."""
    changed = [
        (own, name) for own, name in plain.items() if own.replace(".default", "") != name != own
    ]
    if not changed:
        return ""
    own, name = changed[0]
    return (
        f"{len(changed)} names are read without the parts that wrappers added, such as {name} for "
        f"{own}"
    )


class Renamed:
    """A ``TensorFile`` whose tensors go by other names.

    Attributes:
        file: what they are in; own: each name → the file's own. What has no name is left out.
    """

    header = b""

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self.own = {names[own]: own for own in file.specs if own in names}
        self.specs = {
            name: dataclasses.replace(file.specs[own], name=name) for name, own in self.own.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it."""
        return self.file.tensor(self.own.get(name, name))

    def raw(self, name: str) -> memoryview:
        """Its bytes in row-major order."""
        return self.file.raw(self.own.get(name, name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of its bytes [start, stop) back."""
        self.file.release(self.own.get(name, name), start, stop)
