"""The table of adapter formats: every format's own row, and which of them a file is of."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_tools.errors import AdapterError, UsageError
from lora_tools.formats.adapters import (
    comfyui,
    diffusers,
    gguf,
    kohya,
    loralib,
    lycoris,
    mlx,
    onnxruntime,
    peft,
    peft_format,
    torchtune,
)
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.lfs import HEAD, refuse_pointer
from lora_tools.formats.regular_files import open_file
from lora_tools.watch import places

# Where two know as many keys of a file, the first is meant: LyCORIS knows all that kohya does.
_MODULES = (
    *(peft_format, kohya, lycoris, diffusers, comfyui),
    *(torchtune, mlx, loralib, gguf, onnxruntime),
)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _MODULES}


def format_named(name: str, option: str) -> Format:
    """A row of the table. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"{option} {name!r}: one of {', '.join(FORMATS)} is needed")
    return FORMATS[name]


def by_bytes(path: Path) -> Format | None:
    """The format that a file's first bytes give away."""
    with open_file(path) as file:
        head = file.read(HEAD)
    refuse_pointer(path, head)
    for form in FORMATS.values():
        if form.magic is not None and head[form.magic[0] :].startswith(form.magic[1]):
            return form
    return None


def title_of(keys: Collection[str]) -> str:
    """What a file of tensors is called whose keys are an adapter's; "" of any other, such as one of
    a model saved with its adapters in it."""
    text = "\n".join(keys)  # of 200,000 names that have no mark, each form looks through it once
    likely = (form for form in FORMATS.values() if any(mark in text for mark in form.marks))
    forms = [form for form in likely if form.marks_most(keys)]
    if keys and all(key.startswith(peft.PREFIX) for key in keys):
        own = not any(".base_layer.weight" in key for key in keys)
        return next((form.title for form in forms if form.name == "peft" and own), "")
    return next((form.title for form in forms if form.knows and all(map(form.knows, keys))), "")


def by_keys(path: Path, keys: Collection[str]) -> Format:
    """The format whose names a file of tensors has. Raises AdapterError."""
    if keys and all(key.startswith(peft.PREFIX) for key in keys):
        missing = f"{path}: PEFT's tensors without {peft.CONFIG}, which has their rank and alpha"
        if path in places.files():
            raise AdapterError(f"{missing}; give the path of the folder that save_pretrained wrote")
        raise AdapterError(
            f"{missing}; put that file beside it (an adapter of a diffusion model whose alpha is "
            "its rank does not need it: "
            f"loratools convert {path} -o OUT --from diffusers --to diffusers --base BASE)"
        )
    known = {
        form.name: sum(map(form.knows, keys)) for form in FORMATS.values() if form.knows is not None
    }
    best = max(known, key=lambda name: known[name])
    if 2 * known[best] > len(keys):  # a key that is none of its own is refused by name later
        return FORMATS[best]
    raise AdapterError(
        f"{path}: has no {peft.CONFIG}, and its tensors do not have the names of an adapter "
        f"({', '.join(f.title for f in FORMATS.values())}); is it an adapter? If so, give its "
        "format with `loratools convert --from`"
    )
