"""Bad input to every verb: exit code 1 (2 for a wrong call), one line that says ``Error:`` and
names the file or the tensor, never a traceback, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from lora_tools.cli import run
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.formats.sidecar import NAME as SIDECAR

from . import forks, iotools

EMBED = "model.embed_tokens.weight"
Q = "model.layers.0.q_proj.weight"
A = "base_model.model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.q_proj.lora_B.weight"
NORM = "model.layers.1.norm.weight"

COMMANDS = {
    "extract": ["extract", "base", "tuned", "-o", "out", "--rank", "2"],
    "merge": ["merge", "base", "adapter", "-o", "out"],
    "reversible": ["merge", "base", "adapter", "-o", "out", "--reversible"],
    "unmerge": ["unmerge", "merged", "adapter", "-o", "out"],
    "subtract": ["unmerge", "merged", "adapter", "-o", "out", "--no-sidecar"],
    "rescale": ["rescale", "adapter", "-o", "out", "--scale", "2"],
    "quantize": ["quantize", "base", "--adapter", "adapter", "-o", "out"],
    "compensate": ["quantize", "base", "--adapter", "adapter", "-o", "out", "--compensate", "1"],
    "dequantize": ["dequantize", "packed", "-o", "out"],
    "merge packed": ["merge", "packed", "adapter", "-o", "out"],
    "requantize": ["merge", "packed", "adapter", "-o", "out", "--requantize"],
    "resize": ["rescale", "adapter", "-o", "out", "--rank", "1"],
    "combine": ["combine", "adapter", "-o", "out"],
    "prune": ["combine", "adapter", "-o", "out", "--method", "ties", "--density", "0.5"],
    "convert": ["convert", "adapter", "-o", "out", "--to", "diffusers"],
    "export": ["export", "base", "--adapter", "adapter", "-o", "out", *iotools.EXPORT],
    "bundle": ["export", "base", "-o", "out", "--weights", "bundled", *iotools.EXPORT],
}
COMMANDS["cached"] = [*COMMANDS["extract"], "--spectrum-cache", "cache"]
WRITING = tuple(COMMANDS)
COMMANDS |= {
    "inspect": ["inspect", "base"],
    "inspect adapter": ["inspect", "adapter"],
    "diff": ["diff", "base", "tuned"],
    "plot": ["diff", "base", "tuned", "--plot", "x.svg"],
    "verify merged": ["verify", "merged", "--base", "base", "--adapter", "adapter"],
    "verify adapter": ["verify", "adapter", "--base", "base", "--tuned", "tuned"],
    "verify packed": ["verify", "packed", "--against", "base"],
    "verify onnx": ["verify", "onnx", "--against", "base", "--weights-only"],
}
# Each folder that a command reads.
READS = [
    (name, given)
    for name, command in COMMANDS.items()
    for given in ("base", "tuned", "merged", "adapter", "packed")
    if given in command
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Inputs that are all in order; each test spoils a copy."""
    top = tmp_path_factory.mktemp("sound")
    tensors = iotools.weights()
    iotools.checkpoint(top / "base", tensors)
    iotools.checkpoint(top / "tuned", iotools.moved(tensors))
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors))
    iotools.graph(top / "graph", top / "base", tensors)
    merge = ["merge", str(top / "base"), str(top / "adapter"), "-o", str(top / "merged")]
    assert run([*merge, "--reversible"]) == 0
    assert run(["quantize", str(top / "base"), "-o", str(top / "packed")]) == 0
    graph = ["--graph", str(top / "graph"), *iotools.EXPORT[2:]]
    assert run(["export", str(top / "base"), "-o", str(top / "onnx"), *graph]) == 0
    return top


@pytest.fixture
def work(sound, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(sound, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def refused(capfd):
    """Runs a command that must fail, and checks how; returns what it says."""

    def check(command: list[str], *says: str, code: int = 1) -> str:
        before = iotools.tree(Path())
        capfd.readouterr()
        assert run(command) == code
        printed, said = capfd.readouterr()
        assert said.startswith("Error: "), said
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        assert printed == ""
        for words in says:
            assert words in said
        assert iotools.tree(Path()) == before
        return said

    return check


def weights_of(folder: str) -> Path:
    name = "adapter_model.safetensors" if folder == "adapter" else "model.safetensors"
    return Path(folder) / name


def change(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a folder's tensors."""
    tensors = load_file(weights_of(folder))
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights_of(folder))


def configure(folder: str, **fields: Any) -> None:
    """Change fields of an adapter's config; ``...`` removes one."""
    path = Path(folder) / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_sound_inputs_pass(name, work, capfd):
    """Else no test below shows anything."""
    assert run(COMMANDS[name]) == 0
    assert "Error" not in capfd.readouterr().err
    assert Path("out").is_dir() == (name in WRITING)
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


# --------------------------------------------------------------------------- files of tensors


def _bad_header(header: Any) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(iotools.container(header))


SPOILT_FILES: dict[str, Callable[[Path], object]] = {
    "truncated by one": lambda path: os.truncate(path, path.stat().st_size - 1),
    "truncated to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "truncated in the header": lambda path: os.truncate(path, 50),
    "empty": lambda path: os.truncate(path, 0),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_text("<!DOCTYPE html><title>404: not found</title>"),
    "a pointer of git lfs": lambda path: path.write_text("version https://git-lfs.github.com/"),
    "deep": _bad_header(b'{"a":' * 50_000),
    "an endless number": _bad_header(b'{"a":' + b"1" * 5000 + b"}"),
    "no tensors": _bad_header({}),
    "unknown dtype": _bad_header({EMBED: iotools.entry("F1", (0,), (0, 0))}),
    "lying": _bad_header({EMBED: iotools.entry("F32", (9, 9), (0, 8))}),
    "too large": _bad_header({EMBED: iotools.entry("F32", (0, 2**62, 2**62), (0, 0))}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.sweep(6)
@pytest.mark.parametrize("what", SPOILT_FILES)
@pytest.mark.parametrize(("name", "folder"), READS)
def test_spoilt_weights(name, folder, what, work, refused):
    if what == "no tensors" and (name, folder) in (
        ("inspect", "base"),
        ("verify merged", "merged"),
        ("verify packed", "base"),
        ("verify onnx", "base"),
    ):
        pytest.skip("nothing wrong with it to look at; and nothing that was merged is exit code 3")
    SPOILT_FILES[what](weights_of(folder))
    said = refused(COMMANDS[name])
    if what not in ("no tensors", "gone"):
        assert str(weights_of(folder)) in said or what == "a folder"
    assert folder in said or (name, what) == ("bundle", "no tensors")  # a tensor and a graph


@pytest.mark.sweep(3)
@pytest.mark.parametrize("what", ["absent", "empty folder", "text file", "device"])
@pytest.mark.parametrize(("name", "folder"), READS)
def test_no_such_input(name, folder, what, work, refused):
    command = list(COMMANDS[name])
    if what == "device":
        command[command.index(folder)] = "/dev/null"
        refused(command, "/dev/null")
        return
    shutil.rmtree(folder)
    if what == "empty folder":
        Path(folder).mkdir()
    elif what == "text file":
        Path(folder).write_text("hello, this is not a checkpoint")
    refused(command, folder)


@pytest.mark.parametrize("name", ["extract", "merge", "rescale"])
@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "org/" + "x" * 300])
def test_paths_too_long(name, path, work, refused):
    refused([*COMMANDS[name][:1], path, *COMMANDS[name][2:]], path[:100])
    refused([*COMMANDS[name][:-3], *COMMANDS[name][-3:], "-o", path])


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000, "9" * 5000], ids=range(6))
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("extract", "base/config.json"),
        ("extract", "tuned/config.json"),
        ("merge", "base/config.json"),
        ("unmerge", "merged/config.json"),
        ("export", "base/config.json"),
        ("export", "graph/config.json"),
        ("merge", "base/model.safetensors.index.json"),
        ("merge", "adapter/adapter_config.json"),
        ("unmerge", "adapter/adapter_config.json"),
        ("rescale", "adapter/adapter_config.json"),
    ],
)
def test_json_that_is_none(name, file, text, work, refused):
    Path(file).write_bytes(text.encode("latin-1"))
    refused(COMMANDS[name], file)


# -------------------------------------------------------------------------- names and shapes


def _put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)


ONES = torch.ones
MISFITS: dict[str, tuple[str, str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "another width": ("extract", "tuned", _put(Q, ONES(16, 15)), Q),
    "a vector": ("extract", "tuned", _put(Q, ONES(16)), Q),
    "vocabulary grown": ("extract", "tuned", _put(EMBED, ONES(25, 16)), "--embeddings"),
    "vocabulary shrunk": ("extract", "tuned", _put(EMBED, ONES(23, 16)), EMBED),
    "another norm": ("extract", "tuned", _put(NORM, ONES(15)), NORM),
    "nothing in common": ("extract", "tuned", lambda t: (t.clear(), t.update(x=ONES(1))), "tuned"),
    "target missing": ("merge", "base", _drop(Q), "model.layers.0.q_proj.weight"),
    "target missing in merged": ("subtract", "merged", _drop(Q), "model.layers.0.q_proj.weight"),
    "target missing with sidecar": ("unmerge", "merged", _drop(Q), "model.layers.0.q_proj.weight"),
    "a copied one missing with sidecar": ("unmerge", "merged", _drop(NORM), NORM),
    "another shape with sidecar": ("unmerge", "merged", _put(Q, ONES(16, 8)), Q),
    "another dtype with sidecar": ("unmerge", "merged", _put(Q, ONES(16, 16).half()), Q),
    "one changed with sidecar": ("unmerge", "merged", _put(NORM, ONES(16)), "not the base"),
    "base of another width": ("merge", "base", _put(Q, ONES(16, 17)), "q_proj"),
    "base of integers": ("merge", "base", _put(Q, ONES(16, 16, dtype=torch.int8)), "I8"),
    "merged of another width": ("subtract", "merged", _put(Q, ONES(15, 16)), "q_proj"),
    "A without B": ("merge", "adapter", _drop(B), "lora_B"),
    "B without A": ("rescale", "adapter", _drop(A), "lora_A"),
    "A and B do not multiply": ("merge", "adapter", _put(B, ONES(16, 3)), "q_proj"),
    "rank zero": (
        "rescale",
        "adapter",
        lambda t: t.update({A: ONES(0, 16), B: ONES(16, 0)}),
        "q_proj",
    ),
    "rank not the config's": (
        "merge",
        "adapter",
        lambda t: t.update({A: ONES(3, 16), B: ONES(16, 3)}),
        "rank 2",
    ),
    "a vector for A": ("merge", "adapter", _put(A, ONES(16)), "q_proj"),
    "an unknown key": ("merge", "adapter", _put("x.lora_C.weight", ONES(2)), "x.lora_C.weight"),
    "a key that matches nothing": (
        "merge",
        "adapter",
        _rename(A, A.replace(".0.", ".7.")),
        "q_proj",
    ),
    "a key that matches nothing, exported": (
        "export",
        "adapter",
        _rename(A, A.replace(".0.", ".7.")),
        "q_proj",
    ),
    "a weight of the graph missing": ("bundle", "base", _drop(NORM), NORM),
    "another shape than the graph's": ("bundle", "base", _put(NORM, ONES(17)), NORM),
    "integers for the graph": ("bundle", "base", _put(NORM, ONES(16).int()), NORM),
    "the same twice": (
        "rescale",
        "adapter",
        _put(A.replace("A.weight", "A.default.weight"), ONES(2, 16)),
        "q_proj",
    ),
    "DoRA unannounced": (
        "merge",
        "adapter",
        _put(A.replace("A.weight", "magnitude_vector"), ONES(16)),
        "use_dora",
    ),
    "factors of integers": ("rescale", "adapter", _put(A, ONES(2, 16).int()), "q_proj"),
    "factors of integers, merged": ("merge", "adapter", _put(A, ONES(2, 16).int()), "q_proj"),
    "factors of complex numbers": (
        "merge",
        "adapter",
        _put(B, ONES(16, 2, dtype=torch.complex64)),
        "q_proj",
    ),
    "factors of float8": (
        "resize",
        "adapter",
        _put(B, ONES(16, 2).to(torch.float8_e4m3fn)),
        "q_proj",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit(what, work, refused):
    name, folder, spoil, says = MISFITS[what]
    change(folder, spoil)
    refused(COMMANDS[name], says)


def test_an_adapter_as_a_checkpoint_and_a_checkpoint_as_an_adapter(work, refused):
    for command in (
        ["extract", "adapter", "tuned", "-o", "out"],
        ["extract", "base", "adapter", "-o", "out"],
        ["merge", "adapter", "adapter", "-o", "out"],
        ["unmerge", "adapter", "adapter", "-o", "out"],
    ):
        refused(command, "adapter: this is an adapter")
    for command in (
        ["merge", "base", "tuned", "-o", "out"],
        ["unmerge", "merged", "base", "-o", "out"],
        ["rescale", "base", "-o", "out", "--scale", "2"],
    ):
        refused(command, "adapter_config.json")


# ------------------------------------------------------------------------- numbers that are none


@pytest.mark.sweep(6)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "folder", "tensor"),
    [
        ("extract", "base", Q),
        ("extract", "tuned", Q),
        ("extract", "tuned", EMBED),
        ("merge", "base", Q),
        ("merge", "adapter", A),
        ("merge", "adapter", B),
        ("reversible", "base", Q),
        ("reversible", "adapter", A),
        ("unmerge", "merged", Q),
        ("unmerge", "adapter", A),
        ("subtract", "merged", Q),
        ("subtract", "adapter", B),
        ("rescale", "adapter", A),
        ("rescale", "adapter", B),
        ("resize", "adapter", A),
        ("combine", "adapter", A),
        ("prune", "adapter", B),
        ("convert", "adapter", A),
        ("diff", "base", Q),
        ("diff", "tuned", Q),
        ("diff", "tuned", EMBED),
        ("verify adapter", "tuned", Q),
        ("verify adapter", "adapter", A),
        ("verify packed", "base", Q),
    ],
)
def test_no_number(name, folder, tensor, dtype, value, work, refused):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor] = tensors[tensor].to(dtype)
        tensors[tensor][1, 1] = value

    change(folder, spoil)
    # Then a hash, which names no tensor, tells the change.
    exact = name == "unmerge" or (name, folder) == ("subtract", "adapter")
    refused(
        COMMANDS[name], "" if exact else tensor.split(".lora_")[0].removeprefix("base_model.model.")
    )


def test_what_overflows_the_output_is_named(work, refused):
    change("base", lambda t: t.update({Q: (t[Q].sign() * 65000).half()}))
    change("adapter", lambda t: t.update({A: t[A] * 1e5}))
    refused(COMMANDS["merge"], Q)
    narrow = ["--dtype", "float16", "--alpha", "1e-12"]
    refused([*COMMANDS["extract"], *narrow], "its factors overflow torch.float16", "_proj.weight")


# ----------------------------------------------------------------------------- adapter_config.json

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"r": ...}, "rank"),
    "rank a text": ({"r": "2"}, "rank"),
    "rank null": ({"r": None}, "rank"),
    "rank another": ({"r": 3}, "rank 3"),
    "rank a list": ({"r": [2]}, "rank"),
    "no alpha": ({"lora_alpha": ...}, "lora_alpha"),
    "alpha a text": ({"lora_alpha": "16"}, "lora_alpha"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha"),
    "alpha NaN": ({"lora_alpha": float("nan")}, ""),
    "alpha infinite": ({"lora_alpha": float("inf")}, ""),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "401 digits"),
    "patterns a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "patterns a text": ({"alpha_pattern": "q_proj"}, "alpha_pattern"),
    "pattern no regex": ({"rank_pattern": {"(q_proj": 4}}, "rank_pattern"),
    "alpha pattern no regex": ({"alpha_pattern": {"*": 4}}, "alpha_pattern"),
    "pattern of another rank": ({"rank_pattern": {"q_proj": 4}}, "rank 4"),
    "pattern's alpha a text": ({"alpha_pattern": {"q_proj": "4"}}, "lora_alpha"),
    "not LoRA": ({"peft_type": "IA3"}, "IA3"),
    "type a number": ({"peft_type": 5}, "5"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "aLoRA"),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["merge", "unmerge", "rescale", "resize", "combine", "convert"])
@pytest.mark.parametrize("what", CONFIGS)
def test_adapter_config(what, name, work, refused):
    fields, says = CONFIGS[what]
    configure("adapter", **fields)
    refused(COMMANDS[name], says, "adapter" if says else "")


def test_adapter_config_missing(work, refused):
    Path("adapter/adapter_config.json").unlink()
    for name in ("merge", "unmerge", "rescale"):
        refused(COMMANDS[name], "adapter", "adapter_config.json")


@pytest.mark.parametrize("file", ["base/config.json", "graph/config.json", "graph/model.onnx"])
def test_a_file_that_an_export_needs(file, work, refused):
    Path(file).unlink()
    refused(COMMANDS["export"], file.split("/")[0], file.split("/")[1])
    if file.endswith(".onnx"):
        for content in (b"", b"\xff\xff nonsense", b"<html>"):
            Path(file).write_bytes(content)
            refused(COMMANDS["export"], file)


@pytest.mark.parametrize("indices", [None, "x", [1], [1, 24], [1, -1], [1, 2.0], {"other": [1, 2]}])
def test_rows_that_are_not_there(indices, work, refused):
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change("adapter", _put(key, ONES(2, 16)))
    configure("adapter", trainable_token_indices=indices)
    refused(COMMANDS["merge"], "embed_tokens")


# ------------------------------------------------------------------------------------ the sidecar


def _repack(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, f"merged/{SIDECAR}", metadata)


def _packed(data: bytes) -> torch.Tensor:
    packed = zstandard.ZstdCompressor().compress(data)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


PARTS = GAPS, DISTANCES, EXCESS, WITHIN = [
    f"{part}/{Q}" for part in ("gaps", "distances", "excess", "within")
]
LENGTHS = f"lengths/{Q}"
Parts = tuple[dict[str, torch.Tensor], dict[str, str]]


def _listed(tensors: dict[str, torch.Tensor], part: int, data: bytes) -> None:
    """Other contents of one part, and lengths that say so."""
    tensors[PARTS[part]], tensors[LENGTHS] = _packed(data), tensors[LENGTHS].clone()
    tensors[LENGTHS][0, part] = len(data)


SIDECARS: dict[str, Callable[[dict[str, torch.Tensor], dict[str, str]], Any]] = {
    "no version": lambda t, m: m.pop("loratools_sidecar"),
    "another version": lambda t, m: m.update(loratools_sidecar="99"),
    "no digest": lambda t, m: m.pop("base_digest"),
    "no adapters": lambda t, m: m.pop("adapters"),
    "adapters not JSON": lambda t, m: m.update(adapters="{"),
    "adapters a number": lambda t, m: m.update(adapters="5"),
    "adapters of numbers": lambda t, m: m.update(adapters="[5]"),
    "adapters without digests": lambda t, m: m.update(adapters="[{}]"),
    "another digest": lambda t, m: m.update(base_digest="xxh3-128/sha256:0"),
    "no headers": lambda t, m: [t.pop(k) for k in list(t) if k.startswith("header/")],
    "a header not zstd": lambda t, m: t.update({"header/model.safetensors": ONES(9).byte()}),
    "a header not JSON": lambda t, m: t.update({"header/model.safetensors": _packed(b"{")}),
    "a header that lies": lambda t, m: t.update({"header/model.safetensors": _packed(b'{"a":1}')}),
    "a header of other tensors": lambda t, m: t.update(
        {"header/model.safetensors": _packed(json.dumps({"a": iotools.entry()}).encode())}
    ),
    "a header outside": lambda t, m: t.update(
        {"header/../../evil.safetensors": t.pop("header/model.safetensors")}
    ),
    "an absolute header": lambda t, m: t.update(
        {f"header/{Path.cwd()}/evil.safetensors": t.pop("header/model.safetensors")}
    ),
    "a file outside": lambda t, m: t.update({"file/../../evil.json": _packed(b"{}")}),
    "a config not JSON": lambda t, m: t.update({"file/config.json": _packed(b"{")}),
    "a config of numbers": lambda t, m: t.update({"file/config.json": _packed(b"5")}),
    "no listing": lambda t, m: t.pop(GAPS),
    "a listing not zstd": lambda t, m: t.update({EXCESS: ONES(9).byte()}),
    "a listing of another length": lambda t, m: t.update({EXCESS: _packed(b"12345" * 999)}),
    "lengths negative": lambda t, m: t.update({LENGTHS: -t[LENGTHS]}),
    "lengths a vector": lambda t, m: t.update({LENGTHS: t[LENGTHS].reshape(-1)}),
    "lengths of nothing": lambda t, m: t.update(
        {LENGTHS: t[LENGTHS][:0], **{part: _packed(b"") for part in PARTS}}
    ),
    "places beyond the tensor": lambda t, m: _listed(t, 0, b"\xfe" * 40),
    "distances without places": lambda t, m: _listed(t, 1, b"123"),
    "excess of nothing": lambda t, m: _listed(t, 2, b"123"),
    "bits within cut": lambda t, m: _listed(t, 3, b"123"),
}


@pytest.mark.parametrize("what", SIDECARS)
def test_a_spoilt_sidecar(what, work, refused, tmp_path):
    file = SafetensorsFile(Path("merged") / SIDECAR)
    tensors = {name: file.tensor(name).clone() for name in file.specs}
    metadata = dict(file.metadata)
    assert int(tensors[LENGTHS][0, 3]) > 3  # sums are rounded: something is left open
    SIDECARS[what](tensors, metadata)
    _repack({k: v.contiguous() for k, v in tensors.items()}, metadata)
    around = sorted(p.name for p in tmp_path.iterdir())
    refused(COMMANDS["unmerge"])
    assert sorted(p.name for p in tmp_path.iterdir()) == around


def test_a_truncated_sidecar(work, refused):
    path = Path("merged") / SIDECAR
    for size in (path.stat().st_size - 1, 100, 0):
        os.truncate(path, size)
        refused(COMMANDS["unmerge"], str(path))
    path.unlink()
    refused([*COMMANDS["unmerge"], "--sidecar"], str(path))


def test_another_adapter_than_was_merged(work, refused):
    change("adapter", lambda t: t[A].mul_(1.5))
    refused(COMMANDS["unmerge"], SIDECAR, "adapter")


# ----------------------------------------------------------------------------------- destinations


@pytest.mark.parametrize("name", WRITING)
def test_destinations(name, work, refused):
    inputs = [word for word in COMMANDS[name] if Path(word).is_dir()]
    command = COMMANDS[name]
    where = command.index("out")

    def to(out: str, *rest: str) -> list[str]:
        return [*command[:where], out, *command[where + 1 :], *rest]

    Path("there").mkdir()
    (Path("there") / "precious").write_text("precious")
    refused(to("there"), "there already exists", "--force")
    refused(to("absent/out"), "absent is not a folder")
    refused(to("/proc/out"), "/proc: cannot write there")
    for given in inputs:
        if given != "base" or "graph" not in inputs:  # export may add to the checkpoint's folder
            refused(to(given, "--force"), given, "input")
        refused(to(f"{given}/out", "--force"), given, "input")
    for out in (".", "..", "/", str(work)):
        refused(to(out, "--force"))


# ------------------------------------------------------------------------------- wrong invocations

WRONG = {
    "no destination": ["merge", "base", "adapter"],
    "no adapter": ["merge", "base", "-o", "out"],
    "an unknown option": [*COMMANDS["merge"], "--quantise"],
    "an unknown command": ["marge", "base", "adapter", "-o", "out"],
    "rank zero": [*COMMANDS["extract"][:-1], "0"],
    "rank and energy": [*COMMANDS["extract"], "--energy", "0.9"],
    "energy above one": ["extract", "base", "tuned", "-o", "out", "--energy", "1.5"],
    "energy NaN": ["extract", "base", "tuned", "-o", "out", "--energy", "nan"],
    "alpha zero": [*COMMANDS["extract"], "--alpha", "0"],
    "alpha NaN": [*COMMANDS["extract"], "--alpha", "nan"],
    "tolerance zero": [*COMMANDS["extract"], "--tolerance", "0"],
    "not a regex": [*COMMANDS["extract"], "--include", "("],
    "not a dtype": [*COMMANDS["merge"], "--dtype", "int8"],
    "not a size": [*COMMANDS["merge"], "--shard-size", "big"],
    "shards of a bare file": [
        "merge",
        "base/model.safetensors",
        "adapter",
        "-o",
        "out",
        "--shard-size",
        "1GB",
    ],
    "a weight that is none": ["merge", "base", "adapter=much", "-o", "out"],
    "no format": ["convert", "adapter", "-o", "out"],
    "a format that is none": ["convert", "adapter", "-o", "out", "--to", "zip"],
    "a feature that is none": [*COMMANDS["convert"], "--drop", "biases"],
    "blocks that are none": [*COMMANDS["convert"], "--enable-lora", "yes,no"],
    "an alpha of zero": [*COMMANDS["convert"], "--alpha", "0"],
    "density of a sum": [*COMMANDS["combine"], "--density", "0.5"],
    "no density": ["combine", "adapter", "-o", "out", "--method", "ties"],
    "density zero": [*COMMANDS["prune"], "--density", "0"],
    "an infinite weight": ["merge", "base", "adapter=inf", "-o", "out"],
    "a weight NaN": ["merge", "base", "adapter=nan", "-o", "out"],
    "no device": [*COMMANDS["extract"], "--device", "toaster"],
    "no jobs": [*COMMANDS["extract"], "--jobs", "0"],
    "no jobs to merge": [*COMMANDS["merge"], "--jobs", "-3"],
    "nothing to do": ["rescale", "adapter", "-o", "out"],
    "scale NaN": ["rescale", "adapter", "-o", "out", "--scale", "nan"],
    "alpha negative": ["rescale", "adapter", "-o", "out", "--alpha", "-1"],
    "an effect without alpha": [*COMMANDS["rescale"], "--effect", "change"],
    "a report in no folder": [*COMMANDS["rescale"], "--report", "absent/report.json"],
    "weights that are none": [*COMMANDS["export"], "--weights", "linked"],
    "a task that is none": [*COMMANDS["export"], "--task", "poetry"],
    "an opset that is none": [*COMMANDS["export"], "--opset", "99"],
    "an adapter in place": [
        "export",
        "base",
        "-o",
        "base",
        "--adapter",
        "adapter",
        "--task",
        "features",
    ],
    "another dtype, reversible": [*COMMANDS["reversible"], "--dtype", "bf16"],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call(what, work, refused):
    refused(WRONG[what], code=2)


# ------------------------------------------------------------------------------- a real process


@pytest.mark.parametrize(
    "name", ["extract", "merge", "unmerge", "rescale", "combine", "convert", "export"]
)
def test_the_same_from_a_shell(name, work):
    folder = COMMANDS[name][1]
    os.truncate(weights_of(folder), 60)
    before = iotools.tree(Path())
    done = forks.run(*COMMANDS[name])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: {weights_of(folder)}: ")
    assert done.stderr.count("\n") == 1
    assert iotools.tree(Path()) == before


# ------------------------------------------------------------- a sidecar goes with its checkpoint


def test_a_sidecar_does_not_travel_into_another_merge(work):
    again = ["merge", "merged", "adapter=0.5"]
    assert run([*again, "-o", "once"]) == 0
    assert not (Path("once") / SIDECAR).exists()
    assert run([*again, "-o", "twice", "--reversible"]) == 0
    assert run(["unmerge", "twice", "adapter=0.5", "-o", "back", "--sidecar"]) == 0
    for file in ("model.safetensors", "config.json"):
        assert Path("back", file).read_bytes() == Path("merged", file).read_bytes()


def test_the_sidecar_of_a_bare_file_is_never_that_of_another(work, refused):
    bare = ["merge", "base/model.safetensors", "-o", "m.safetensors"]
    assert run([*bare, "adapter", "--reversible"]) == 0
    assert run([*bare, "adapter=2", "--force"]) == 0
    assert not Path("m.safetensors.sidecar").exists()
    Path("m.safetensors").unlink()
    Path("m.safetensors.sidecar").write_text("precious")
    refused([*bare, "adapter", "--reversible"], "m.safetensors.sidecar already exists")
