"""Inputs that something changes while a command reads them."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

import lora_tools

from . import forks, forms_gguf, iotools

# Does something to a file before the n-th use of its bytes.
_CODE = r"""
import json, os, sys, threading
from lora_tools.cli import run
from lora_tools.watch.files import Watched
path, what, at = json.loads(sys.argv.pop(1))
lock, count, real = threading.Lock(), 0, Watched.used

def change():
    if what == "cut":
        os.truncate(path, 4096)
    elif what == "removed":
        os.remove(path)
    elif what == "rewritten":
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
    else:
        with open(path, "rb") as old, open(path + ".new", "wb") as new:
            new.write(old.read())
        found = os.stat(path)
        os.utime(path + ".new", ns=(found.st_atime_ns, found.st_mtime_ns))
        os.replace(path + ".new", path)

def used(self):
    global count
    real(self)
    if os.fspath(self.path) == path:
        with lock:
            count += 1
            if count == at:
                change()

Watched.used = used
code = run(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""
SAID = {
    "cut": "became shorter while it was read",
    "removed": "was deleted since it was opened; put it back",
    "rewritten": "changed since it was opened; run the command again",
    "replaced": "changed since it was opened; run the command again",
}
VERBS = {
    "merge": ["merge", "base", "adapter"],
    "reversible": ["merge", "base", "adapter", "--reversible"],
    "adapter": ["merge", "tuned", "adapter"],
    "quantize": ["quantize", "base"],
    "requantize": ["merge", "packed", "adapter", "--requantize"],
    "dequantize": ["dequantize", "packed"],
    "extract": ["extract", "base", "tuned", "--rank", "2"],
    "unmerge": ["unmerge", "base", "adapter"],
    "export": ["export", "base", *iotools.EXPORT],
    "verify": ["verify", "base", "--base", "tuned", "--adapter", "adapter"],
    "diff": ["diff", "base", "tuned"],
    "inspect": ["inspect", "base"],
    "pickle": ["quantize", "pickled", "--allow-pickle"],
    "GGUF": ["dequantize", "model.gguf"],
}
CUT = {
    "adapter": "adapter/adapter_model.safetensors",
    "requantize": "packed/model.safetensors",
    "dequantize": "packed/model.safetensors",
    "pickle": "pickled/pytorch_model.bin",
    "GGUF": "model.gguf",
}
BASE = "base/model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base of tensors of many pages, and what goes with it."""
    folder = tmp_path_factory.mktemp("inputs")
    tensors = iotools.weights(width=256)
    iotools.checkpoint(folder / "base", tensors)
    iotools.checkpoint(folder / "tuned", iotools.moved(tensors))
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=8)
    lora_tools.quantize(folder / "base", folder / "packed")
    iotools.graph(folder / "graph", folder / "base", tensors)
    shutil.copytree(folder / "base", folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(tensors, folder / "pickled" / "pytorch_model.bin")
    config = {
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    shapes = {"token_embd": (32, 256), "blk.0.attn_q": (256, 256), "blk.0.ffn_up": (512, 256)}
    made = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    forms_gguf.write(folder / "model.gguf", "llama", forms_gguf.fields_of(config), made, "Q8_0")
    return folder


def changed(inputs, folder, verb, what, at=3):
    """What a command says while something happens to one of its inputs; it must write nothing."""
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    line = [str(folder / w) if (inputs / w).exists() else w for w in VERBS[verb]]
    if line[0] not in ("verify", "diff", "inspect"):
        line += ["-o", str(folder / "out")]
    path = str(folder / CUT.get(verb, BASE))
    done = forks.run(json.dumps([path, what, at]), *line, "-q", code=_CODE)
    assert {p.name for p in folder.iterdir()} == {p.name for p in inputs.iterdir()}
    assert done.returncode == 1, (done.returncode, done.stderr)
    said = done.stderr.strip()
    assert said.startswith(f"Error: {path}: ")
    assert "\n" not in said
    return said


@pytest.mark.sweep(2)
@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_is_cut_short(verb, inputs, tmp_path):
    assert SAID["cut"] in changed(inputs, tmp_path, verb, "cut")


@pytest.mark.parametrize("what", SAID)
def test_a_file_that_is_another_by_the_end(what, inputs, tmp_path):
    assert SAID[what] in changed(inputs, tmp_path, "merge", what)


# Reads a map of a file that is cut short, and afterwards is as it was again.
_TORN = """
import os, sys
from pathlib import Path
from lora_tools.errors import CheckpointError
from lora_tools.formats.mapped import MappedFile
from lora_tools.watch.files import unchanged
path, is_watched = Path(sys.argv[1]), sys.argv[2] == "watched"
with path.open("rb") as file:
    mapped = MappedFile(file, path)
found, view = path.stat(), mapped.view
def read():
    os.truncate(path, 0)
    assert not any(view[5000:])  # in the midst of a page, and over the pages behind it
    os.truncate(path, found.st_size)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
if not is_watched:
    read()
try:
    with unchanged():
        mapped.view
        read()
except CheckpointError as error:
    print(error)
assert not any(view)
"""


def test_a_page_that_is_gone_is_told_though_the_file_looks_as_before(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20000)
    done = forks.run(path, "watched", code=_TORN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "failed during reading; copy it to another disk" in done.stdout


def test_faults_outside_of_a_run_are_not_touched(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20000)
    assert forks.run(path, "not", code=_TORN).returncode == -signal.SIGBUS
