"""The doors: which file of which sound thing is damaged, and the commands that then read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.campaign import readers
from tests.campaign.sound import ADAPTERS, READ, WRITTEN

Check = Callable[[Path, Path], None]  # of the folder with all inputs, and the output


@dataclasses.dataclass(frozen=True)
class Use:
    """A command, in the folder of all inputs. ``OUT`` stands for the output. After a success
    ``check`` reads that with other libraries, and raises where it is not what it should be."""

    line: str
    check: Check | None = None


@dataclasses.dataclass(frozen=True)
class Door:
    """``file`` is a pattern below the folder of all inputs; ``share``: how many inputs it is given,
    by the hundred, where a command takes long."""

    file: str
    uses: tuple[Use, ...]
    share: int = 100


def looks(*lines: str) -> tuple[Use, ...]:
    return tuple(Use(line) for line in lines)


def _adapter(name: str) -> tuple[Use, ...]:
    convert = f"convert {name} --to peft --base base -o OUT"
    if name.endswith(".pt"):  # of which the alpha is not kept, so that convert alone reads it
        said = "--allow-pickle"
        return (Use(f"inspect {name} {said}"), Use(f"{convert} {said} --alpha 2", readers.readable))
    return (
        Use(f"inspect {name}"),
        Use(f"merge base {name} -o OUT", readers.merged_of(name)),
        Use(f"check {name} --for vllm"),
        Use(convert, readers.readable),
    )


_ONTO_BASE = Use("merge base adapter -o OUT", readers.merged_base)
_BASE = (
    Use("inspect base"),
    _ONTO_BASE,
    Use("extract base tuned -o OUT --rank 2", readers.extracted),
    Use("diff base tuned"),
    Use("quantize base -o OUT", readers.readable),
)
_PEFT = (
    *_adapter("adapter"),
    Use("rescale adapter -o OUT --rank 1", readers.readable),
    Use("combine adapter extracted -o OUT", readers.readable),
    Use("convert adapter --to mlx --base base -o OUT", readers.readable),
    Use("convert adapter --to gguf --base base -o OUT", readers.gguf_readable),
    Use("quantize base --adapter adapter -o OUT", readers.readable),
)
_CACHE = Use(
    "extract base tuned -o OUT --rank 2 --spectrum-cache cache",
    readers.same_as("extracted", "extracted-again"),
)

_ANY = "--allow-pickle --allow-other-base"

DOORS: dict[str, Door] = {
    "config.json": Door("base/config.json", _BASE),
    "index": Door("base/model.safetensors.index.json", _BASE),
    "shard": Door("base/model-*.safetensors", _BASE),
    "one file": Door("tuned/model.safetensors", (
        Use("inspect tuned/model.safetensors"),
        Use("merge tuned/model.safetensors adapter -o OUT --allow-other-base", readers.readable),
        Use("extract base tuned -o OUT --rank 2", readers.extracted),
        Use("merge tuned adapter -o OUT --allow-other-base", readers.merged_tuned),
    )),
    "small files": Door("base/tokenizer*.json", (_ONTO_BASE,), share=50),
    "adapter's config": Door("adapter/adapter_config.json", _PEFT),
    "adapter": Door("adapter/adapter_model.safetensors", _PEFT),
    "sidecar": Door("merged/loratools-unmerge.sidecar", (
        Use("unmerge merged adapter -o OUT", readers.unmerged),
        Use("inspect merged"),
    )),
    "merged": Door("merged/model-*.safetensors", (
        Use("unmerge merged adapter -o OUT", readers.unmerged),
        Use("verify merged --base base --adapter adapter"),
    )),
    "cache": Door("cache", (Use("inspect cache"), _CACHE, _CACHE)),
    "statistics": Door("moments", (
        Use("inspect moments"),
        Use("extract base tuned -o OUT --rank 2 --activations moments", readers.readable),
        Use("quantize base -o OUT --activations moments", readers.readable),
    )),
    "GGUF model": Door("model.gguf", (
        Use("inspect model.gguf"),
        Use("dequantize model.gguf -o OUT", readers.of_gguf),
    )),
    "ONNX": Door("graph/model.onnx", (
        Use("inspect graph/model.onnx"),
        Use("export tuned --graph graph --task features --no-verify -o OUT", readers.exported),
    )),
    "exported": Door("exported/*.*", (
        Use("inspect exported"),
        Use("verify exported --against tuned --weights-only"),
    )),
    "graph's config": Door("graph/config.json", looks(
        "export tuned --graph graph --task features --no-verify -o OUT",
    ), share=30),
    "sharded pickles": Door("pickles/*.bin", (
        Use("inspect pickles --allow-pickle"),
        Use(f"merge pickles adapter -o OUT {_ANY}", readers.merged_pickles),
    )),
    "pickles' index": Door("pickles/*.index.json", (
        Use("inspect pickles --allow-pickle"),
        Use(f"merge pickles adapter -o OUT {_ANY}", readers.merged_pickles),
    )),
    "distributed checkpoint": Door("dcp/*", (
        Use("inspect dcp --allow-pickle"),
        Use(f"merge dcp adapter -o OUT {_ANY}", readers.merged_dcp),
    )),
    "distributed checkpoint's metadata": Door("dcp/.metadata", (
        Use("inspect dcp --allow-pickle"),
        Use(f"merge dcp adapter -o OUT {_ANY}", readers.merged_dcp),
    )),
    "text": Door("text.txt", (
        Use("collect-stats base text.txt -o OUT --length 20 --max-tokens 40", readers.readable),
    ), share=4),
    "model that runs": Door("base/*.json", (
        Use("collect-stats base text.txt -o OUT --length 20 --max-tokens 40", readers.readable),
    ), share=4),
}  # fmt: skip
for name in (*ADAPTERS, "loralib.pt"):
    file = name if "." in name else f"{name}/*"
    DOORS[name] = Door(file, _adapter(name))
for name in WRITTEN:
    check = readers.of_four_bits(name)
    for part in ("model*.safetensors", "config.json"):
        DOORS[f"{name}, {part}"] = Door(f"{name}/{part}", (
            Use(f"inspect {name}"),
            Use(f"dequantize {name} -o OUT", check),
            Use(f"merge {name} adapter -o OUT --requantize", readers.readable),
            Use(f"verify {name} --against base"),
        ), share=70)  # fmt: skip
for name in READ:
    for part in ("model.safetensors", "config.json"):
        DOORS[f"{name}, {part}"] = Door(f"{name}/{part}", (
            Use(f"inspect {name}"),
            Use(f"dequantize {name} -o OUT", readers.readable),
            Use(f"merge {name} adapter-plain -o OUT", readers.readable),
        ), share=50)  # fmt: skip
