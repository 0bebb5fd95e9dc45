"""One safetensors file: equal to what the safetensors package reads and writes, and every lie of a
header refused by name."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_tools.errors import CheckpointError, OutputError, TensorNotFound
from lora_tools.formats import spool as spool_module
from lora_tools.formats.dtypes import dtype_name, torch_dtype
from lora_tools.formats.safetensors_file import SafetensorsFile, parse_header
from lora_tools.formats.safetensors_writer import SafetensorsWriter, encode_header
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import DTYPE_BITS, TensorSpec

from .iotools import container, entry

# Every dtype that both this torch and the safetensors package have.
DTYPES = sorted(
    name
    for name in DTYPE_BITS
    if name in safetensors.torch._TYPES and safetensors.torch._TYPES[name] is not None
)
SHAPES = [(), (1,), (3, 5), (2, 3, 4), (0, 4), (7,)]


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of arbitrary bits (for BOOL, of zeros and ones)."""
    spec = TensorSpec("", dtype, shape)
    high = 2 if dtype == "BOOL" else 256
    noise = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, high, (spec.nbytes,), dtype=torch.uint8, generator=noise)
    return bits.view(torch_dtype(dtype)).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a)) == bytes(as_bytes(b))


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    with SafetensorsWriter(path, [spec_of(*item) for item in tensors.items()], metadata) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, as_bytes(tensor))


EVERYTHING = {
    f"{dtype}.{i}": sample(dtype, shape, i) for dtype in DTYPES for i, shape in enumerate(SHAPES)
}


def test_the_table_of_dtypes_has_all_that_the_package_and_torch_share():
    theirs = {k for k, v in safetensors.torch._TYPES.items() if isinstance(v, torch.dtype)}
    assert theirs <= set(DTYPE_BITS)
    assert len(DTYPES) >= 15
    for name in DTYPES:
        assert torch_dtype(name) == safetensors.torch._TYPES[name]
        assert dtype_name(torch_dtype(name)) == name
        assert torch_dtype(name).itemsize * 8 == DTYPE_BITS[name]


def test_reads_what_the_package_wrote(tmp_path):
    save_file(EVERYTHING, tmp_path / "theirs.safetensors", {"format": "pt", "ü": "日本"})
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert file.metadata == {"format": "pt", "ü": "日本"}
    assert file.specs == {name: spec_of(name, EVERYTHING[name]) for name in file.specs}
    assert file.specs.keys() == EVERYTHING.keys()
    for name, tensor in EVERYTHING.items():
        assert same_bits(file.tensor(name), tensor), name
        assert bytes(file.raw(name)) == bytes(as_bytes(tensor)), name


def test_the_package_reads_what_the_writer_wrote(tmp_path):
    write(tmp_path / "ours.safetensors", EVERYTHING, {"b": "2", "a": "ü"})
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == EVERYTHING.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in EVERYTHING.items())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"b": "2", "a": "ü"}


def test_the_bytes_written_are_those_stated(tmp_path):
    specs = [TensorSpec("b", "U8", (3,)), TensorSpec("a", "F32", (1, 2))]
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, specs, {"k": "v"}) as writer:
        writer.write("a", memoryview(b"AAAAaaaa"))
        writer.write("b", memoryview(b"bc"), 1)
        writer.write("b", memoryview(b"B"))
    header = (
        b'{"__metadata__":{"k":"v"},"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[3,11]}}'
    )
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(header)) + header + b"BbcAAAAaaaa"
    assert writer.size == path.stat().st_size
    assert list(SafetensorsFile(path).specs) == ["b", "a"]


def test_a_header_given_is_written_as_it_is(tmp_path):
    body = b' {"b":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}}   '.strip() + b"  "
    specs, _, _ = parse_header(body, None)
    with SafetensorsWriter(tmp_path / "x", specs.values(), None, body) as writer:
        writer.write("b", memoryview(b"!"))
    assert (tmp_path / "x").read_bytes() == struct.pack("<Q", len(body)) + body + b"!"
    assert SafetensorsFile(tmp_path / "x").header == body


def test_a_tensor_at_an_odd_offset_is_read(tmp_path):
    values = torch.arange(5, dtype=torch.float64)
    write(tmp_path / "x", {"odd": torch.zeros(3, dtype=torch.uint8), "f": values})
    assert torch.equal(SafetensorsFile(tmp_path / "x").tensor("f") * 2, values * 2)


def test_pages_given_back_can_be_read_again(tmp_path):
    big = torch.arange(100_000, dtype=torch.int32)
    write(tmp_path / "x", {"big": big, "small": torch.ones(2)})
    file = SafetensorsFile(tmp_path / "x")
    tensor = file.tensor("big")
    file.release("big")
    file.release("big", 8000, 90_000)
    file.release("small")
    assert torch.equal(tensor, big)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path / "x", {"a": torch.ones(2)})
    file = SafetensorsFile(tmp_path / "x")
    for ask in (file.tensor, file.raw, file.release):
        with pytest.raises(TensorNotFound, match=r"x: no tensor 'b'"):
            ask("b")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        sample,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 99),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=3))
def test_round_trip(tensors, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write(path, tensors, metadata)
        file = SafetensorsFile(path)
        assert file.metadata == metadata
        assert file.specs.keys() == tensors.keys()
        assert all(same_bits(file.tensor(name), tensor) for name, tensor in tensors.items())
        theirs = load_file(path)
        assert theirs.keys() == tensors.keys()
        assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.randoms(use_true_random=False))
def test_a_spool_writes_the_same_whatever_the_order(tensors, shuffler):
    items = list(tensors.items())
    contents = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2):
            spool = SafetensorsSpool(Path(folder))
            for name, tensor in items:
                spool.add(spec_of(name, tensor), as_bytes(tensor))
            assert [spec.name for spec in spool.specs] == sorted(tensors)
            spool.finish(Path(folder) / str(i), {"k": "v"})
            contents.append((Path(folder) / str(i)).read_bytes())
            shuffler.shuffle(items)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["0", "1"]
        assert contents[0] == contents[1]
        found = load_file(Path(folder) / "0")
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_a_spool_copies_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "_STEP", 1000)
    tensor = sample("U8", (2500,))
    spool = SafetensorsSpool(tmp_path)
    spool.add(spec_of("x", tensor), as_bytes(tensor))
    spool.finish(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out")["x"], tensor)


def test_a_spool_dropped_leaves_nothing(tmp_path):
    spool = SafetensorsSpool(tmp_path)
    spool.add(TensorSpec("a", "U8", (1,)), memoryview(b"a"))
    spool.close()
    spool.close()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- hostile

GOOD = container(
    {"a": entry("F32", (2,), (0, 8)), "b": entry("U8", (4,), (8, 12))}, b"12345678abcd"
)
_DEEP = b"[" * 100_000

# What is wrong → (the file, what the error says beside the path).
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not safetensors"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "not safetensors"),
    "no header": (b"\0" * 8, "the header has 0 bytes"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "1000 bytes, but the file"),
    "100 MB header in a small file": (struct.pack("<Q", 100_000_000) + b"{}", "100000000 bytes"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "truncated or not safetensors"),
    "a text file": (b"hello, I am a text file, and not a short one", "not safetensors"),
    "not JSON": (container(b"{oops}"), "not JSON"),
    "not UTF-8": (container(b'{"\xff":1}'), "not JSON"),
    "UTF-16": (container('{"a":1}'.encode("utf-16")), "not JSON"),
    "half a surrogate pair": (
        container(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        r"\ud800",
    ),
    "half a surrogate pair in metadata": (
        container(b'{"__metadata__":{"a":"\\udfff"}}'),
        r"\udfff",
    ),
    "deeply nested": (container(b'{"a":' + _DEEP), "not JSON"),
    "an endless number": (container(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (container([]), "not a JSON object"),
    "a number": (container(b"1"), "not a JSON object"),
    "a name twice": (container(b'{"a":1,"a":2}'), "'a' twice"),
    "a field twice": (container(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' twice"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (container({"__metadata__": ["a"]}), "__metadata__"),
    "metadata an empty list": (container({"__metadata__": []}), "__metadata__"),
    "metadata false": (container({"__metadata__": False}), "__metadata__"),
    "too little data": (container({"a": entry()}, b"1234567"), "says 8 bytes of data"),
    "too much data": (container({"a": entry()}, b"123456789"), "holds 9"),
    "only data": (container({}, b"1"), "says 0 bytes of data"),
}
# What is wrong with the entry of tensor 'it' → (the header, what the error says).
_HOLE = {"a": entry("U8", (4,), (0, 4)), "it": entry("U8", (2,), (6, 8))}
_OVERLAP = {"a": entry("U8", (4,), (0, 4)), "it": entry("U8", (6,), (2, 8))}
ENTRIES = {
    "no dtype": ({"it": {"shape": [2], "data_offsets": [0, 8]}}, "malformed"),
    "no shape": ({"it": {"dtype": "F32", "data_offsets": [0, 8]}}, "malformed"),
    "no offsets": ({"it": {"dtype": "F32", "shape": [2]}}, "malformed"),
    "not an object": ({"it": 5}, "malformed"),
    "null": ({"it": None}, "malformed"),
    "text": ({"it": "F32"}, "malformed"),
    "shape a number": ({"it": entry() | {"shape": 2}}, "malformed"),
    "shape a text": ({"it": entry() | {"shape": ""}}, "malformed"),
    "shape an object": ({"it": entry("U8", (), (0, 1)) | {"shape": {}}}, "malformed"),
    "one offset": ({"it": entry() | {"data_offsets": [8]}}, "malformed"),
    "three offsets": ({"it": entry() | {"data_offsets": [0, 4, 8]}}, "malformed"),
    "offsets a number": ({"it": entry() | {"data_offsets": 8}}, "malformed"),
    "negative dimensions": ({"it": entry("F32", (-1, -2))}, "malformed"),
    "negative offset": ({"it": entry("F32", (2,), (-8, 0))}, "malformed"),
    "float dimension": ({"it": entry("F32", (2.0,))}, "malformed"),
    "bool dimension": ({"it": entry("F64", (True,))}, "malformed"),
    "bool offset": ({"it": entry("U8", (1,), (False, True))}, "malformed"),
    "NaN": ({"it": entry("F32", (float("nan"),))}, "malformed"),
    "text dimension": ({"it": entry("F32", ("2",))}, "malformed"),
    "dtype a number": ({"it": entry(32)}, "malformed"),
    "dtype a list": ({"it": entry(["F32"])}, "malformed"),
    "offsets swapped": ({"it": entry("F32", (2,), (8, 0))}, "malformed"),
    "unknown dtype": ({"it": entry("F33")}, "unknown dtype 'F33'"),
    "dtype of torch": ({"it": entry("float32")}, "unknown dtype"),
    "more than its extent": ({"it": entry("F32", (3,))}, "needs 12 bytes"),
    "less than its extent": ({"it": entry("F32", (1,))}, "the header says 8"),
    "dimensions that overflow": ({"it": entry("F32", (2**31, 2**31, 2**31))}, "malformed"),
    "dimensions that wrap to 8 bytes": ({"it": entry("U8", (2**61 + 1, 8))}, "malformed"),
    "nothing, times far too much": ({"it": entry("U8", (0, 2**62, 2**62), (0, 0))}, "malformed"),
    "a thousand dimensions": ({"it": entry("U8", (1,) * 1000, (0, 1))}, "malformed"),
    "beyond 64 bits": ({"it": entry("U8", (0, 2**64), (0, 0))}, "malformed"),
    "a hole in front": ({"it": entry("F32", (2,), (4, 12))}, "hole"),
    "a hole between": (_HOLE, "hole"),
    "an overlap": (_OVERLAP, "overlaps"),
    "two at one place": ({"a": entry(), "it": entry()}, "overlaps"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lying_file_is_refused(what, tmp_path):
    data, says = LIES[what]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("what", ENTRIES)
def test_a_lying_entry_is_refused(what, tmp_path):
    header, says = ENTRIES[what]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(container(header, b"12345678"))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert "tensor 'it'" in message
    assert says in message
    assert len(message) < 600


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD)
    assert list(SafetensorsFile(path).specs) == ["a", "b"]
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(path)


def test_flipped_bytes_are_read_or_refused(tmp_path):
    path = tmp_path / "noisy.safetensors"
    noise = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(GOOD)
        data[noise.randrange(len(GOOD) - 12)] = noise.randrange(256)
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            refused += 1
        else:
            assert sum(len(file.raw(name)) for name in file.specs) == 12
    assert 200 < refused < 400


def test_a_hundred_megabytes_that_are_there_are_still_refused(tmp_path):
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match="header has 100000001 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None], ids=["folder", "absent"])
def test_what_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_dtype_that_torch_lacks_can_be_copied_and_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(container({"a": entry("F4", (4,), (0, 2))}, b"ab"))
    file = SafetensorsFile(path)
    assert bytes(file.raw("a")) == b"ab"
    with pytest.raises(CheckpointError, match="'F4'"):
        file.tensor("a")


# ----------------------------------------------------------------------------------------- writer


def test_a_tensor_not_written_whole_is_an_error(tmp_path):
    specs = [TensorSpec("a", "U8", (2,)), TensorSpec("b", "U8", (2,)), TensorSpec("c", "U8", (0,))]
    for i, (given_a, given_b, missing) in enumerate(
        [(b"aa", b"b", "'b'"), (b"a", b"bb", "'a'"), (b"", b"bb", "'a'"), (b"aa", b"bb", None)]
    ):
        writer = SafetensorsWriter(tmp_path / str(i), specs)
        writer.write("a", memoryview(given_a))
        writer.write("b", memoryview(given_b))
        if missing is None:
            writer.close()
        else:
            with pytest.raises(OutputError, match=missing):
                writer.close()


def test_an_exception_is_not_hidden_by_what_was_not_written(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (2,))]),
    ):
        raise ZeroDivisionError


def test_no_file_descriptor_is_left_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    spec = TensorSpec("a", "U8", (2,))
    for i in range(3):
        with SafetensorsWriter(tmp_path / f"good{i}", [spec]) as writer:
            writer.write("a", memoryview(b"ab"))
        with pytest.raises(OutputError), SafetensorsWriter(tmp_path / f"short{i}", [spec]):
            pass
        with pytest.raises(FileExistsError):
            SafetensorsWriter(tmp_path / f"good{i}", [spec])
        huge = TensorSpec("huge", "U8", (2**62,))
        with pytest.raises(OSError, match="there is no space for"):
            SafetensorsWriter(tmp_path / f"huge{i}", [huge])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_encode_and_parse_agree():
    specs = [
        TensorSpec("z", "F32", (2, 2)),
        TensorSpec("a", "BOOL", ()),
        TensorSpec("0", "I64", (0,)),
    ]
    header, starts, size = encode_header(specs, {"k": "v"})
    found, offsets, metadata = parse_header(header[8:], 17)
    # Entries of no bytes may come before their neighbours; the order of the data is kept.
    assert {k: v + len(header) for k, v in offsets.items()} == starts
    assert [name for name in found if name != "0"] == ["z", "a"]
    assert found == {spec.name: spec for spec in specs}
    assert metadata == {"k": "v"}
    assert size == len(header) + 17
    assert len(header) % 8 == 0
    assert json.loads(header[8:])["z"]["shape"] == [2, 2]


def test_the_helper_makes_what_the_package_reads(tmp_path):
    """The hostile cases differ from a sound file in one thing only."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    assert {k: v.nbytes for k, v in load_file(path).items()} == {"a": 8, "b": 4}
    path.write_bytes(container({}))
    assert SafetensorsFile(path).specs == {}
