"""Values of a wrong type where a file is read: an error of the tree, with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import CheckpointError, LoraToolsError, MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.safetensors_file import SafetensorsFile

from . import iotools

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 24,
    "tie_word_embeddings": False,
}
KEYS = [
    *CONFIG,
    "text_config",
    "rope_parameters",
    "quantization_config",
    "id2label",
    "num_labels",
    "_name_or_path",
    "torch_dtype",
    "n_layer",
]
VALUES: list[Any] = [1.5, -1, "x", [1], {"a": 1}, True, [None], {"model_type": [1]}, 10**40]


@pytest.mark.parametrize("key", KEYS)
def test_a_config_of_wrong_types(key: str, tmp_path: Path) -> None:
    """Read, or refused; never anything else."""
    tensors = iotools.weights(layers=1)
    base = iotools.checkpoint(tmp_path / "base", tensors)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    refused = 0
    for value in VALUES:
        (base / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        for verb in (
            lambda: lora_tools.merge(base, [tmp_path / "adapter"], tmp_path / "out", dry_run=True),
            lambda: lora_tools.quantize(base, tmp_path / "out", dry_run=True),
            lambda: lora_tools.inspect(base),
        ):
            try:
                verb()
            except LoraToolsError:  # noqa: PERF203
                refused += 1
    assert refused or key not in ("model_type", "architectures", "vocab_size", "text_config")


def test_it_says_which_entry_and_what_it_should_be(tmp_path: Path) -> None:
    base = iotools.checkpoint(tmp_path / "base", iotools.weights(layers=1))
    for said, why in {
        "architectures": "but must be a list of names",
        "model_type": "but must be a string",
        "text_config": "but must be a table",
    }.items():
        (base / "config.json").write_text(json.dumps(CONFIG | {said: 1.5}))
        with pytest.raises(CheckpointError, match=f"config.json: {said} is '1.5', {why}"):
            lora_tools.inspect(base)


@pytest.mark.parametrize("part", [b"producer", b"the_graph", b"an_input", b"a_node", b"a_domain"])
def test_an_onnx_string_that_is_no_text(part: bytes, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    node = helper.make_node("Identity", ["an_input"], ["out"], name="a_node", domain="a_domain")
    ends = [helper.make_tensor_value_info(name, 1, [1]) for name in ("an_input", "out")]
    graph = helper.make_graph([node], "the_graph", ends[:1], ends[1:])
    data = helper.make_model(graph, producer_name="producer").SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    lora_tools.inspect(path)
    path.write_bytes(data.replace(part, b"\xff" * len(part)))
    with pytest.raises(CheckpointError, match=r"model\.onnx: .*is not UTF-8 text"):
        lora_tools.inspect(path)


def reversible(folder: Path) -> Path:
    tensors = {k: v.bfloat16() for k, v in iotools.weights(layers=1).items()}
    save_file(tensors, folder / "base.safetensors")
    iotools.adapter(folder / "adapter", iotools.linear_shapes(tensors))
    merged = folder / "merged.safetensors"
    lora_tools.merge(folder / "base.safetensors", [folder / "adapter"], merged, reversible=True)
    return merged


LENGTHS = {
    "negative": torch.tensor([[-1, 3]]),
    "huge": torch.tensor([[2**62, 2**62]]),
    "one column": torch.tensor([[1]]),
    "no rows": torch.zeros(0, 2, dtype=torch.int64),
    "flat": torch.tensor([1, 2]),
    "floats": torch.tensor([[1.5, 2.5]]),
    "off by one": None,
}


@pytest.mark.parametrize("what", LENGTHS)
def test_a_sidecar_with_other_lengths(what: str, tmp_path: Path) -> None:
    """Sealed with a digest of its own, as who makes one on purpose would."""
    merged = reversible(tmp_path)
    path = Path(f"{merged}.sidecar")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    given = LENGTHS[what]
    for name in tensors:
        if name.startswith("lengths/"):
            tensors[name] = tensors[name] + 1 if given is None else given.clone()
    save_file(tensors, path, metadata)
    read = SafetensorsFile(path)
    hashes = {name: hashing.tensor_hash(read.raw(name)) for name in read.specs}
    metadata["digest"] = hashing.digest(read.specs.values(), hashes)
    save_file(tensors, path, metadata)
    with pytest.raises((CheckpointError, MismatchError)):
        lora_tools.unmerge(merged, [tmp_path / "adapter"], tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def test_a_new_sidecar_beside_an_old_file_makes_no_base(tmp_path: Path) -> None:
    """What a kill between the two can leave until the next run to the same place."""
    merged = reversible(tmp_path)
    shutil.copy(merged, tmp_path / "old")
    iotools.adapter(tmp_path / "other", iotools.linear_shapes(iotools.weights(layers=1)), r=4)
    base = tmp_path / "base.safetensors"
    lora_tools.merge(base, [tmp_path / "other"], merged, reversible=True, force=True)
    (tmp_path / "old").replace(merged)
    for adapter in ("adapter", "other"):
        with pytest.raises(MismatchError):
            lora_tools.unmerge(merged, [tmp_path / adapter], tmp_path / "back.safetensors")
        assert not (tmp_path / "back.safetensors").exists()
