"""More files than a process may have open; and a process that may open none at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_tools.errors import CheckpointError
from lora_tools.formats.mapped import MappedFile
from lora_tools.formats.open_files import OpenFile, most

from . import distributed, forks, iotools
from .campaign import readers

# A line for each verb, "OUT" aside; what one has made is there for the next.
VERBS = {
    "extracted": ["extract", "base", "tuned", "--rank", "2"],
    "merged": ["merge", "base", "adapter", "--reversible"],
    "unmerged": ["unmerge", "merged", "adapter"],
    "packed": ["quantize", "base", "--adapter", "adapter"],
    "plain": ["dequantize", "packed"],
    "packed anew": ["merge", "packed", "adapter", "--requantize"],
    "graph of it": ["export", "base", "--adapter", "adapter", *iotools.EXPORT],
    "": ["verify", "merged", "--base", "base", "--adapter", "adapter"],
}
# Runs several command lines in one process with so many descriptors.
_LINES = """
import json, os, resource, sys
from lora_tools.cli import run
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
for line in json.loads(sys.argv[2]):
    code = run(line)
    if code:
        print(line[0], code, file=sys.stderr)
sys.stderr.flush()
os._exit(0)
"""
# Leaves that many descriptors and runs a command line.
_FEW = """
import os, resource, sys
from lora_tools.cli import run
left = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    for number in taken[:left]:
        os.close(number)
code = run(sys.argv[2:])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize(("shards", "limit"), [(24, 50), (128, 256), (1100, 1024)])
def test_verbs_with_more_shards_than_descriptors(shards, limit, tmp_path, full):
    if shards > 100 and not full:
        pytest.skip("takes a minute: only with --full")
    tensors = iotools.weights(width=8, layers=shards // 4)
    iotools.checkpoint(tmp_path / "base", tensors, shards)
    iotools.checkpoint(tmp_path / "tuned", iotools.moved(tensors), shards)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    iotools.graph(tmp_path / "graph", tmp_path / "base", tensors)
    made = {"base", "tuned", "adapter", "graph", *VERBS}
    lines = [
        [words[0], *(str(tmp_path / w) if w in made else w for w in words[1:]), "-q"]
        + (["-o", str(tmp_path / out)] if out else [])
        for out, words in VERBS.items()
        if shards > 100 or out in ("merged", "unmerged")
    ]
    done = forks.run(limit, json.dumps(lines), code=_LINES)
    assert done.stderr == ""
    assert iotools.tree(tmp_path / "unmerged") == iotools.tree(tmp_path / "base")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == shards


def _pickled(tensors, folder, shards):
    """Each shard as torch saves it, with the index."""
    folder.mkdir()
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({n: tensors[n] for n in where if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _cut(tensors, folder, shards):
    """A distributed checkpoint of so many files, most tensors in several of them."""
    halves = {name: [[n // 2] for n in x.shape] for name, x in tensors.items()}
    distributed.cut_up(folder, tensors, halves, files=shards)


def _ranks(tensors, folder, shards):
    """A file of each process, and all tensors in all of them."""
    distributed.save_ranks(folder, tensors, (shards,), {})


@pytest.mark.parametrize("stored", [_pickled, _cut, _ranks])
@pytest.mark.parametrize(("shards", "limit"), [(64, 50), (128, 256), (1100, 1024)])
def test_pickles_and_distributed_checkpoints_with_few_descriptors(
    stored, shards, limit, tmp_path, full
):
    """What comes of them is what comes of safetensors."""
    if shards > 100 and not full:
        pytest.skip("takes a minute: only with --full")
    layers = shards // 4 if stored is not _ranks else 1
    tensors = iotools.weights(width=8, layers=layers)
    base, other = tmp_path / "base", tmp_path / "other"
    iotools.checkpoint(base, tensors)
    stored(tensors, other, shards)
    shutil.copy(base / "config.json", other)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    rest = ["-q", "-j", "4", "--allow-pickle"]
    adapter, lines = str(tmp_path / "adapter"), []
    for name, path in (("wanted", base), ("found", other)):
        to = [str(tmp_path / f"{name} {what}") for what in ("plain", "merged", "packed")]
        if path == other:
            lines.append(["dequantize", str(path), "-o", to[0], *rest])
        merge = ["merge", str(path), adapter, "-o", to[1], "--allow-other-base"]
        quantize = ["quantize", str(path), "-o", to[2]]
        lines += [[*merge, *rest], [*quantize, *rest]]
    done = forks.run(limit, json.dumps(lines), code=_LINES)
    assert done.stderr == ""
    for what in ("plain", "merged", "packed"):
        found = readers.weights(tmp_path / f"found {what}")
        wanted = readers.weights(tmp_path / f"wanted {what}") if what != "plain" else tensors
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_descriptors_nothing_is_left_behind(tmp_path):
    """However far it comes: a line that says so, and no trace; with enough it is done."""
    tensors = iotools.weights(layers=1)
    iotools.checkpoint(tmp_path / "base", tensors, 3)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    out, before = tmp_path / "out", iotools.tree(tmp_path)
    line = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", out, "--reversible", "-q"]
    codes = []
    for left in range(4, 40, 3):
        done = forks.run(left, *line, code=_FEW)
        codes.append(done.returncode)
        if done.returncode:
            assert done.returncode == 1, done.stderr
            assert iotools.tree(tmp_path) == before, left
            assert done.stderr.count("\n") == 1, done.stderr
            assert "Too many open files" in done.stderr
        else:
            shutil.rmtree(out)
    assert codes[0] == 1
    assert codes[-1] == 0


def test_the_longest_unused_is_let_go_and_opened_again():
    opened: list[int] = []

    class Thing:
        def __init__(self, number: int) -> None:
            opened.append(number)
            self.number = number

    count = most() + 2
    files = [OpenFile(Thing(i), lambda i=i: Thing(i)) for i in range(count)]  # type: ignore[misc]
    assert files[0].there() is None
    assert files[-1].there() is not None
    kept = files[2].get()
    assert [file.get().number for file in files] == list(range(count))
    assert files[2].there() is not kept or opened.count(2) == 1  # who has it keeps it


def test_another_file_in_its_place_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    with path.open("rb") as file:
        mapped = MappedFile(file, path)
    assert bytes(mapped.view) == b"one"
    mapped._open.let_go()
    assert bytes(mapped.view) == b"one"
    mapped._open.let_go()
    path.write_bytes(b"two, and longer")
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        _ = mapped.view
    path.unlink()
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        _ = mapped.view
