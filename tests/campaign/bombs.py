"""Bombs: small files that stand for far more than any model has. Each takes the place of one file
among whole ones, and a command reads it: it must refuse it, or be done with it, in little memory
and time."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import resource
import select
import shutil
import signal
import struct
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zstandard

from tests.campaign.damage import joined, signed, split
from tests.campaign.doors import Use
from tests.campaign.fuzz import DONE, REFUSED, Bench

_SECONDS = 20  # of processor time
_WALL = 300
_MEMORY = 1_500_000_000  # bytes, resident
_GUARD = 6_000_000_000  # bytes that a process may ask for, so that the machine stands

Made = Callable[[Path], object]  # changes a file that is there

MERGE = "merge base adapter -o OUT"
STATISTICS = "collect-stats base text.txt -o OUT --length 20 --max-tokens 40"
UNMERGE = "unmerge merged adapter -o OUT"
PICKLES = "merge pickles adapter -o OUT --allow-pickle --allow-other-base"
DCP = PICKLES.replace("pickles", "dcp")
EXPORT = "export tuned --graph graph --task features --no-verify -o OUT"


@dataclasses.dataclass(frozen=True)
class Bomb:
    """``harmless``: it may also be done with it."""

    name: str
    file: str
    make: Made
    line: str
    harmless: bool = False


def written(data: bytes) -> Made:
    return lambda path: path.write_bytes(data)


def hole(size: int, head: bytes | None = None) -> Made:
    """A file that ends in zeros which take no room on the disk; ``head`` instead of what it was."""

    def make(path: Path) -> None:
        if head is not None:
            path.write_bytes(head)
        with path.open("ab") as file:
            file.truncate(size)

    return make


def entries(**new: Any) -> Made:
    """A config with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | new))


def zeros(count: int, sized: bool) -> bytes:
    """So many, compressed, with or without word of how many there are."""
    if sized:
        return zstandard.ZstdCompressor(level=3).compress(bytes(count))
    stream = zstandard.ZstdCompressor(level=3, write_content_size=False).compressobj()
    parts = [stream.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return b"".join([*parts, stream.flush()])


def in_sidecar(*prefixes: str, sized: bool, count: int = 256 << 20) -> Made:
    """Entries of those kinds are so many zeros, and the digest is right."""

    def make(path: Path) -> None:
        header, body = split(path.read_bytes())
        data = zeros(count, sized)
        for prefix in prefixes:
            known = [name for name in header if name.startswith(prefix)]
            header.pop(name := known[0] if known else f"{prefix}x.json", None)
            header[f"old/{name}"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
            place = [len(body), len(body) + len(data)]
            header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": place}
            body += data
        path.write_bytes(joined(signed(_whole(header, body), body), body))

    return make


def _whole(header: dict[str, Any], body: bytes) -> dict[str, Any]:
    """With an entry for what the others leave out, as the format has no holes."""
    places = sorted(e["data_offsets"] for n, e in header.items() if n != "__metadata__")
    at, new = 0, dict(header)
    for begin, end in [*places, [len(body)] * 2]:
        if begin > at:
            size = begin - at
            new[f"x{at}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, begin]}
        at = max(at, end)
    return new


def deflated(path: Path) -> None:
    """A pickle whose storages unfold to gigabytes."""
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for i, name in enumerate(old.namelist()):
            with new.open(name, "w") as entry:
                entry.write(old.read(name))
                for _ in range(1600 if "/data/" in name and i == len(old.namelist()) // 2 else 0):
                    entry.write(bytes(1 << 20))


def in_zip(data: bytes) -> Made:
    """Another pickle in what torch saved."""

    def make(path: Path) -> None:
        old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, data if name.endswith("data.pkl") else old.read(name))

    return make


def repeated(path: Path) -> None:
    """One number, 10^14 times."""
    torch.save({"model.norm.weight": torch.zeros(1).expand(10**7, 10**7)}, path)


def shape(*sizes: int) -> Made:
    """The first tensor of a safetensors file has other sizes, and an extent that fits them."""

    def make(path: Path) -> None:
        header, body = split(path.read_bytes())
        first = next(name for name in header if name != "__metadata__")
        count = 4
        for size in sizes:
            count *= size
        entry = {"dtype": "F32", "shape": list(sizes), "data_offsets": [0, count]}
        path.write_bytes(joined({**header, first: entry}, body))

    return make


def named(name: str) -> Made:
    def make(path: Path) -> None:
        header, body = split(path.read_bytes())
        first = next(key for key in header if key != "__metadata__")
        path.write_bytes(joined({name if k == first else k: v for k, v in header.items()}, body))

    return make


def gguf(counts: tuple[int, int], *fields: bytes) -> Made:
    """A file of so many tensors and fields, as it says, and eight gigabytes of a hole."""
    return hole(8 << 30, b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(fields))


def field(kind: int, *values: int) -> bytes:
    """A field of lists of lists: each of a type and a count."""
    words = struct.pack("<I", kind) + b"".join(
        struct.pack("<IQ", *pair) for pair in zip(values[::2], values[1::2], strict=True)
    )
    return struct.pack("<Q", 1) + b"a" + words


BRACKETS = b"[" + b"[]," * 6_000_000 + b"[]]"
DEEP = b"[" * 10**6 + b"]" * 10**6
MEMO = b"\x80\x02]r\xff\xff\xff\x7f."
WIDE = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x."
WAYS = "(" * 12 + "x+" + ")+" * 12 + "y"
CONFIG, INDEX = "base/config.json", "base/model.safetensors.index.json"
ADAPTER, SIDECAR = "adapter/adapter_config.json", "merged/loratools-unmerge.sidecar"
PICKLE = "pickles/pytorch_model-00001-of-00002.bin"


def bombs() -> Iterator[Bomb]:
    """All of them."""
    for prefix in ("header/", "file/", "gaps/", "distances/", "excess/", "within/"):
        for sized in (True, False):
            said = f"{prefix} that unfolds, {'said' if sized else 'unsaid'}"
            yield Bomb(said, SIDECAR, in_sidecar(prefix, sized=sized), UNMERGE)
    many = [f"file/{i}" for i in range(40)]
    yield Bomb("files", SIDECAR, in_sidecar(*many, sized=True, count=20 << 20), UNMERGE)
    for file, line in ((CONFIG, MERGE), (INDEX, MERGE), (ADAPTER, MERGE)):
        yield Bomb("brackets", file, written(BRACKETS), line)
        yield Bomb("deep brackets", file, written(DEEP), line)
        yield Bomb("a hole", file, hole(8 << 30), line)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield Bomb("a hole", f"base/{name}", hole(8 << 30), STATISTICS)
    for key in ("num_hidden_layers", "num_labels", "num_attention_heads"):
        yield Bomb(key, CONFIG, entries(**{key: 10**9}), STATISTICS)
    yield Bomb("layers of a graph", "graph/config.json", entries(num_hidden_layers=10**9), EXPORT,
        harmless=True)  # fmt: skip
    for key in ("rank_pattern", "alpha_pattern"):
        yield Bomb(f"ways of {key}", ADAPTER, entries(**{key: {WAYS: 3}}), MERGE, harmless=True)
    yield Bomb("a long pattern", ADAPTER, entries(target_modules="(a|" * 90_000), MERGE)
    yield Bomb("many patterns", ADAPTER, entries(rank_pattern={f"a{i}": 2 for i in range(10**5)}),
        MERGE, harmless=True)  # fmt: skip
    yield Bomb("a rank", ADAPTER, entries(r=10**15), MERGE)
    for kind in (8, 6, 0):
        yield Bomb(f"a list of type {kind}", "model.gguf", gguf((0, 1), field(9, kind, 1 << 40)),
            "inspect model.gguf")  # fmt: skip
    yield Bomb("lists in lists", "model.gguf", gguf((0, 1), field(9, *[9, 1 << 20] * 50)),
        "inspect model.gguf")  # fmt: skip
    for counts in ((1 << 40, 0), (0, 1 << 40)):
        yield Bomb("counts", "model.gguf", gguf(counts), "inspect model.gguf")
    yield Bomb("a hole", "adapter.gguf", gguf((0, 1), field(8)), "merge base adapter.gguf -o OUT")
    yield Bomb("deflated", PICKLE, deflated, PICKLES)
    yield Bomb("a memo", PICKLE, in_zip(MEMO), PICKLES)
    yield Bomb("a string", PICKLE, in_zip(WIDE), PICKLES)
    yield Bomb("one number", PICKLE, repeated, PICKLES)
    yield Bomb("a memo", "dcp/.metadata", written(MEMO), DCP)
    yield Bomb("a string", "dcp/.metadata", written(WIDE), DCP)
    yield Bomb("a list of nothing", "dcp/.metadata", written(pickle.dumps([None] * 10**7)), DCP)
    for sizes in ((1 << 62, 2), (1 << 40,), (1,) * 10**5):
        yield Bomb("a shape", "base/model-00001-of-00003.safetensors", shape(*sizes), MERGE)
    yield Bomb("a name", "tuned/model.safetensors", named("a." * 10**6), "inspect tuned")
    yield Bomb("a header", "tuned/model.safetensors", written(b"\xff" * 8 + b"{}"), "inspect tuned")
    yield Bomb("a hole", "tuned/model.safetensors", hole(1 << 40), "inspect tuned")
    yield Bomb("a hole", "ort.onnx_adapter", hole(8 << 30), "merge base ort.onnx_adapter -o OUT")
    yield Bomb("a hole", "graph/model.onnx", hole(8 << 30), EXPORT)
    yield Bomb("a hole", "cache", hole(8 << 30), "inspect cache")
    yield Bomb("a hole", "moments", hole(8 << 30), "inspect moments")
    yield Bomb("a hole, which stays one", "base/tokenizer.json", hole(1 << 44), MERGE, True)


def meet(bomb: Bomb, sound: Path, here: Path) -> list[str]:
    """One of them, in a process of its own. Returns what was wrong, in words."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writing, json.dumps(_met(bomb, sound, here)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        ready, _, _ = select.select([said], [], [], _WALL)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        text = said.read()
    _, status = os.waitpid(pid, 0)
    left = sorted({path.name for path in (here / "made").iterdir()} - {"out"})
    shutil.rmtree(here)
    if not text:
        return [f"{bomb.name} in {bomb.file}: the process ended: {status}"]
    kinds, error, seconds, peak = json.loads(text)
    wrong = [f"left: {left}"] if left else []
    if kinds != [REFUSED] and not (bomb.harmless and kinds == [DONE]):
        wrong.append(f"{kinds}: {error}")
    if seconds > _SECONDS or peak > _MEMORY:
        wrong.append(f"{seconds:.1f} s, {peak / 1e6:.0f} MB")
    return [f"{bomb.name} in {bomb.file}: {what}" for what in wrong]


def _met(bomb: Bomb, sound: Path, here: Path) -> tuple[list[str], str, float, int]:
    """What came of one, what was said, the processor time in seconds, and the memory in bytes."""
    bench = Bench(sound, here)
    target = here / "in" / bomb.file
    assert target.is_file(), bomb.file
    bomb.make(target)
    _forget()
    resource.setrlimit(resource.RLIMIT_DATA, (_GUARD, _GUARD))
    begun = time.process_time()
    most = int(begun) + 2 * _SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    outcome = bench.run(Use(bomb.line))
    return outcome.kinds, outcome.said[:9000], time.process_time() - begun, _peak()


def _forget() -> None:
    """Begin to count memory at what is held now (Linux): the bomb's making is no matter."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
