"""Every door, fed with damaged files: what comes out is an error of the tree, never a traceback."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_tools
from lora_tools.errors import LoraToolsError

from . import iotools, models

# Values that stand where others are meant.
_VALUES = [
    b"null", b"-1", b"1.5", b"[]", b"{}", b'"x"', b"true", b"1e400", b"[1]", b"[null]",
    b'{"a": 1}', b"99999999999999999999", b"NaN",
]  # fmt: skip
_VALUE = re.compile(rb":\s*([0-9.]+|\"[^\"]*\"|true|false|null|\[[^\]]*\])")


def damaged(data: bytes, r: random.Random) -> bytes:
    """Bits flipped, bytes left out or put in, an end cut off, a value of another kind."""
    new = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(max(min(len(new), r.choice([64, 1024, len(data)])), 1))
        kind = r.randrange(6) if new else 2
        values = list(_VALUE.finditer(bytes(new[:20_000]))) if kind > 3 else []
        if values:
            value = r.choice(values)
            new[value.start(1) : value.end(1)] = r.choice(_VALUES)
        elif kind == 0:
            new[at] ^= 1 << r.randrange(8)
        elif kind == 1:
            del new[at : at + r.randrange(1, 9)]
        elif kind == 2:
            new[at:at] = r.choice(_VALUES)
        elif kind == 3:
            del new[at:]
        else:
            new[at : at + 8] = r.randbytes(8)
    return bytes(new)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files of every kind."""
    top = tmp_path_factory.mktemp("sound")
    model = models.make("llama").bfloat16()
    models.save(model, top / "base", max_shard_size="20KB")
    models.perturb(model, 0.02, seed=1)
    models.save(model, top / "tuned")
    iotools.tokenizer(top / "base", models.VOCAB)
    only = {"rank": 2, "rest": "skip", "include": ["_proj"]}
    lora_tools.extract(top / "base", top / "tuned", top / "adapter", **only)
    lora_tools.merge(top / "base", [top / "adapter"], top / "merged", reversible=True)
    lora_tools.quantize(top / "base", top / "packed")
    lora_tools.extract(top / "base", top / "tuned", top / "x", rank=2, spectrum_cache=top / "cache")
    for name, form in FORMS.items():
        lora_tools.convert(top / "adapter", top / name, to=form, base=top / "base")
    return top


FORMS = {
    "gguf": "gguf",
    "ort.onnx_adapter": "onnxruntime",
    "kohya.safetensors": "kohya",
    "lycoris.safetensors": "lycoris",
    "mlx": "mlx",
}
Use = Callable[[Path, Path, Path], object]  # of the damaged thing, the sound ones, a scratch folder


def _look(thing: Path, sound: Path, scratch: Path) -> object:
    return lora_tools.inspect(thing, jobs=1)


def _merge(thing: Path, sound: Path, scratch: Path) -> object:
    return lora_tools.merge(sound / "base", [thing], scratch / "out", jobs=1)


def _copy(thing: Path, sound: Path, scratch: Path) -> object:
    return lora_tools.dequantize(thing, scratch / "out", jobs=1)


def _onto(thing: Path, sound: Path, scratch: Path) -> object:
    return lora_tools.merge(thing, [sound / "adapter"], scratch / "out", jobs=1)


def _unmerge(thing: Path, sound: Path, scratch: Path) -> object:
    return lora_tools.unmerge(thing, [sound / "adapter"], scratch / "out", jobs=1)


def _cache(thing: Path, sound: Path, scratch: Path) -> object:
    sides = sound / "base", sound / "tuned"
    return lora_tools.extract(*sides, scratch / "out", rank=2, spectrum_cache=thing, jobs=1)


# By door: the thing, the files in it of which one is damaged, and what reads it.
DOORS: dict[str, tuple[str, str, tuple[Use, ...]]] = {
    "config": ("base", "config.json", (_look, _onto)),
    "index": ("base", "model.safetensors.index.json", (_look, _onto)),
    "shard": ("base", "model*.safetensors", (_look, _onto)),
    "four bits": ("packed", "model*.safetensors", (_look, _copy)),
    "quantization": ("packed", "config.json", (_look, _copy)),
    "adapter's config": ("adapter", "adapter_config.json", (_look, _merge)),
    "adapter": ("adapter", "adapter_model.safetensors", (_look, _merge)),
    "sidecar": ("merged", "loratools-unmerge.sidecar", (_unmerge,)),
    "cache": ("cache", "", (_look, _cache)),
    "mlx": ("mlx", "adapter_config.json", (_look, _merge)),
    "gguf": ("gguf", "", (_look, _merge)),
    "kohya": ("kohya.safetensors", "", (_look, _merge)),
    "lycoris": ("lycoris.safetensors", "", (_look, _merge)),
    "onnxruntime": ("ort.onnx_adapter", "", (_look, _merge)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS)
def test_what_is_damaged_is_read_or_refused(door, sound, tmp_path, full):
    """Nothing is left beside the output either."""
    name, file, uses = DOORS[door]
    r = random.Random(door)
    for number in range(2000 if full else 40):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        thing = scratch / "in" / name
        thing.parent.mkdir()
        (shutil.copytree if (sound / name).is_dir() else shutil.copy)(sound / name, thing)
        target = r.choice(sorted(thing.glob(file))) if file else thing
        damage = damaged(target.read_bytes(), r)
        target.write_bytes(damage)
        use = uses[number % len(uses)]
        try:
            use(thing, sound, scratch)
        except LoraToolsError:
            pass
        except Exception as error:
            raise AssertionError(f"{door} {number}: {json.dumps(damage[:400].hex())}") from error
        assert {path.name for path in scratch.iterdir()} <= {"in", "out"}
        shutil.rmtree(scratch)
