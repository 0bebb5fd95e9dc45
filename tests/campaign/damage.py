"""Damage: a file's bytes with something wrong in them, by the seed.

Half of it knows the format, and so comes past the first check: a header of safetensors, a JSON
file, a protobuf, a zip are taken apart, one thing in them is changed, and they are put together
again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_tools.formats import digest as hashing
from lora_tools.records import TensorSpec

# Values that stand where others are meant.
VALUES: list[Any] = [
    None, -1, 0, 1, 1.5, [], {}, "", "x", True, False, [1], [None], [-1], {"a": 1}, [[[]]], 1 << 31,
    1 << 63, 1 << 64, 10**30, 10**400, 1e308, float("inf"), float("nan"), "\x00", "\u202e",
    "\ud800", "é" * 300, "../../etc/passwd", "/dev/zero", "a\nb\x1b[31m", "(a+)+$", "[", "nan",
    "1e9", "None", "$x^{2$", "__class__", "bfloat16", "torch.float32", ["q_proj", 3],
    {"q_proj": {}}, "x" * 9_000,
]  # fmt: skip
_WRITTEN = [json.dumps(value).encode() for value in VALUES if value != 10**400]
_VALUE = re.compile(rb":\s*([0-9.]+|\"[^\"]*\"|true|false|null|\[[^\]]*\])")
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", ""]
# Numbers in their bytes that no tensor should hold, or that mean something else as another type.
_BYTES = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x00\x00\x80\x7f" * 2,
    b"\x00\x00\xc0\x7f" * 2,
    b"\x80\x7f" * 4,
]


def damaged(data: bytes, r: random.Random, suffix: str = "") -> bytes:
    """The data with one or a few things changed, by its kind (a file's suffix) or anyhow."""
    kind = next((known for end, known in _KINDS.items() if suffix.endswith(end)), None)
    if kind is not None and r.random() < 0.6:
        with contextlib.suppress(Exception):  # nothing of that kind is in it
            return kind(data, r)
    return any_bytes(data, r)


def any_bytes(data: bytes, r: random.Random) -> bytes:
    """Bits flipped, bytes left out or put in, an end cut off, a value of another kind."""
    new = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(max(min(len(new), r.choice([64, 1024, len(data)])), 1))
        kind = r.randrange(7) if new else 2
        values = list(_VALUE.finditer(bytes(new[:20_000]))) if kind > 4 else []
        if values:
            value = r.choice(values)
            new[value.start(1) : value.end(1)] = r.choice(_WRITTEN)
        elif kind == 0:
            new[at] ^= 1 << r.randrange(8)
        elif kind == 1:
            del new[at : at + r.randrange(1, 9)]
        elif kind == 2:
            new[at:at] = r.choice(_WRITTEN)
        elif kind == 3:
            del new[at:]
        elif kind == 4:
            new[at : at + 8] = r.choice([r.randbytes(8), struct.pack("<Q", r.choice(_SIZES))])
        else:
            new[at : at + 8] = r.choice(_BYTES)
    return bytes(new)


_SIZES = [0, 1, 2, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


# ------------------------------------------------------------------------------------------- JSON


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def change(tree: Any, r: random.Random, values: list[Any] = VALUES) -> None:
    """Replace a value, leave one out, give it another name, put one in, or swap two: in place."""
    places = list(_places(tree))
    if not places:
        raise ValueError("nothing to change")
    holder, key = r.choice(places)
    kind = r.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[r.choice(["x", "", key + "x", key[:-1], key.upper(), "\u0130" + key])] = holder.pop(
            key
        )
    elif kind == 2:
        other, place = r.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            holder[key], other[place] = other[place], holder[key]
    elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = r.choice(
            [holder[key] + 1, holder[key] - 1, -holder[key], float(holder[key]), str(holder[key])]
        )
    else:
        holder[key] = r.choice(values)


def _json(data: bytes, r: random.Random) -> bytes:
    tree = json.loads(data)
    for _ in range(r.choice([1, 1, 1, 3])):
        change(tree, r)
    text = json.dumps(tree, ensure_ascii=r.random() < 0.5)
    if r.random() < 0.1:  # a key twice
        text = re.sub(r'("[^"]+"): ', r"\1: 3, \1: ", text, count=1)
    return text.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------ safetensors


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _safetensors(data: bytes, r: random.Random) -> bytes:
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    kind = r.randrange(8)
    if kind == 0:
        change(header, r)
    elif kind == 1:
        header[r.choice(names)]["dtype"] = r.choice(DTYPES)
    elif kind == 2:
        entry = header[r.choice(names)]
        entry["shape"] = r.choice(
            [
                [],
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [1, *entry["shape"]],
                [0],
                entry["shape"] * 2,
            ]
        )
    elif kind == 3:
        del header[r.choice(names)]
    elif kind == 4:
        name = r.choice(names)
        header[
            r.choice(
                [
                    name + "x",
                    name.upper(),
                    name.replace(".", "_"),
                    "x",
                    name * 50,
                    "a\x1b[0m",
                    "$\\frac{$",
                ]
            )
        ] = header.pop(name)
    elif kind == 5 and header.get("__metadata__"):
        change(header["__metadata__"], r)
    else:  # numbers; the digest, where there is one, is right again half of the time
        place = r.randrange(max(len(body) - 8, 1))
        what = r.choice([*_BYTES, r.randbytes(1), r.randbytes(4)])
        body = body[:place] + what + body[place + len(what) :]
    return joined(signed(header, body) if r.random() < 0.5 else header, body)


def signed(header: dict[str, Any], body: bytes) -> dict[str, Any]:
    """The header with the digest that it has, if any, made right."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or "digest" not in metadata:
        return header
    specs = {
        name: TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    hashes = {
        name: hashing.tensor_hash(memoryview(body)[slice(*header[name]["data_offsets"])])
        for name in specs
    }
    return {
        **header,
        "__metadata__": {**metadata, "digest": hashing.digest(specs.values(), hashes)},
    }


# ------------------------------------------------------------------------------- GGUF, ONNX, zips


def _gguf(data: bytes, r: random.Random) -> bytes:
    """Lengths, counts and types are whole words: others in the first kilobytes."""
    new = bytearray(data)
    for _ in range(r.choice([1, 1, 2])):
        at = r.randrange(min(len(new) - 8, r.choice([40, 400, 4000])))
        if r.random() < 0.5:
            struct.pack_into("<Q", new, at, r.choice(_SIZES))
        else:
            struct.pack_into("<I", new, at, r.choice([*range(14), 40, 99, 1 << 31]))
    return bytes(new)


def _onnx(data: bytes, r: random.Random) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    graph = model.graph
    kind = r.randrange(8)
    node, tensor = r.choice(graph.node), r.choice(graph.initializer)
    word = str(r.choice([v for v in VALUES if isinstance(v, str) and v.isprintable()]))
    if kind == 0:
        node.op_type = word
    elif kind == 1:
        node.input[0] = word
    elif kind == 2:
        tensor.name = word
    elif kind == 3:
        tensor.data_type = r.choice([0, 2, 10, 16, 99])
    elif kind == 4:
        tensor.dims[:] = r.choice([[], [-1], [1 << 40], [0], list(tensor.dims)[::-1]])
    elif kind == 5:
        del model.opset_import[:]
    elif kind == 6:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            given = tensor.external_data.add()
            given.key, given.value = (
                key,
                str(r.choice([word, "base/config.json", "-1", 1 << 63, "0"])),
            )
    else:
        model.ir_version = r.choice([-1, 0, 1 << 40])
    return bytes(model.SerializeToString())


def _zip(data: bytes, r: random.Random) -> bytes:
    """One of its entries is changed, left out, or there twice; or compressed."""
    old, new = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = old.namelist()
    target, kind = (
        r.choice([*names, *[n for n in names if n.endswith(".pkl")] * len(names)]),
        r.randrange(5),
    )
    how = zipfile.ZIP_DEFLATED if kind == 3 else zipfile.ZIP_STORED
    with zipfile.ZipFile(new, "w", how) as made:
        for name in names:
            content = old.read(name)
            if name == target and kind < 3:
                content = any_bytes(content, r)
            if name != target or kind != 4:
                made.writestr(zipfile.ZipInfo(name), content, how)
    return new.getvalue()


_KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".sidecar": _safetensors,
    "cache": _safetensors,
    "moments": _safetensors,
    ".gguf": _gguf,
    ".onnx": _onnx,
    ".bin": _zip,
    ".pt": _zip,
}  # fmt: skip


# --------------------------------------------------------------------- what is no file any more


def irregular(path: Path, r: random.Random) -> None:
    """Something else in the place of a file."""
    data = path.read_bytes()
    path.unlink()
    kind = r.randrange(9)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6:
        with path.open("wb") as file:
            file.write(data)
            file.truncate(1 << 32)
    elif kind == 7:
        with socket.socket(socket.AF_UNIX) as end, contextlib.suppress(OSError):
            end.bind(str(path))
