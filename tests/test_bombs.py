"""Small inputs that stand for far more than any model has: refused at once, by name."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file

import lora_tools
from lora_tools import pretrained
from lora_tools.errors import CheckpointError
from lora_tools.formats import digest as hashing
from lora_tools.formats import gguf_file, json_file, patterns, pickle_file, regular_files, sidecar
from lora_tools.formats.safetensors_file import MAX_NAME, SafetensorsFile
from lora_tools.formats.sidecar import NAME, Sidecar
from lora_tools.options import parse
from lora_tools.pretrained import config_of, tokenizer_of, too_many
from lora_tools.sources.class_fit import fit_class
from lora_tools.sources.transformers_names import look, weightless

from . import iotools

MOST = 20  # seconds of the processor; the slowest takes one


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < MOST


def tensors_of(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    file = SafetensorsFile(path)
    return {name: bytes(file.raw(name)) for name in file.specs}, dict(file.metadata)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("merged")
    base = iotools.weights(layers=1)
    iotools.checkpoint(top / "base", base)
    iotools.adapter(top / "adapter", iotools.linear_shapes(base))
    lora_tools.merge(top / "base", [top / "adapter"], top / "m", reversible=True)
    return top


def changed(merged: Path, folder: Path, entry: str, data: bytes) -> Path:
    """A copy whose sidecar has other bytes for an entry, or a new one, and the right digest."""
    shutil.copytree(merged / "m", folder)
    path = folder / NAME
    file = SafetensorsFile(path)
    specs, raw = dict(file.specs), {name: bytes(file.raw(name)) for name in file.specs}
    metadata = dict(file.metadata)
    raw[entry] = data
    specs[entry] = lora_tools.TensorSpec(entry, "U8", (len(data),))
    hashes = {name: hashing.tensor_hash(memoryview(raw[name])) for name in raw}
    metadata["digest"] = hashing.digest(specs.values(), hashes)
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, spec in specs.items():
        place = [len(body), len(body) + len(raw[name])]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
        body += raw[name]
    del file
    path.write_bytes(iotools.container(header, body))
    return folder


def zeros(count: int, sized: bool) -> bytes:
    """So many zeros, compressed, with or without word of how many there are."""
    packer = zstandard.ZstdCompressor(level=3, write_content_size=sized)
    if sized:
        return packer.compress(bytes(count))
    stream = packer.compressobj()
    piece = bytes(1 << 20)
    parts = [stream.compress(piece) for _ in range(count >> 20)]
    return b"".join([*parts, stream.flush()])


def entries(folder: Path) -> list[str]:
    return list(SafetensorsFile(folder / NAME).specs)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    "prefix", ["header/", "file/", "gaps/", "distances/", "excess/", "within/"]
)
def test_a_bomb_in_a_sidecar_is_refused(
    prefix: str, sized: bool, merged: Path, tmp_path: Path
) -> None:
    known = [name for name in entries(merged / "m") if name.startswith(prefix)]
    entry = known[0] if known else f"{prefix}x.json"
    folder = changed(merged, tmp_path / "m", entry, zeros(128 << 20, sized))
    assert (folder / NAME).stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match=rf"{prefix}.*(would unfold to|is damaged)"):
        lora_tools.unmerge(folder, [merged / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_small_bombs_are_one_large(merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "0"
    shutil.copytree(merged / "m", folder)
    for i in range(1, 5):
        source = tmp_path / f"s{i}"
        (source).mkdir()
        folder.rename(source / "m")
        folder = changed(source, tmp_path / str(i), f"file/{i}", zeros(20 << 20, True))
    with pytest.raises(CheckpointError, match="would decompress to 20,971,520"):
        Sidecar(folder / NAME).files()


def test_a_sound_sidecar_is_within_all_bounds(merged: Path, tmp_path: Path) -> None:
    lora_tools.unmerge(merged / "m", [merged / "adapter"], tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (merged / "base" / name).read_bytes()


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "num_hidden_layers": 1,
}
LARGE = {
    "labels": ("llama", "LlamaForSequenceClassification", {"num_labels": 10**9}),
    "layers": ("llama", "LlamaForCausalLM", {"num_hidden_layers": 10**9}),
    "experts": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 10**9}),
    "stages": ("swin", "SwinModel", {"depths": [10**9], "num_heads": [1]}),
    "a tower's layers": ("llava", "LlavaModel", {"text_config": {"num_hidden_layers": 10**9}}),
    "layer types": ("qwen2", "Qwen2ForCausalLM", {"num_hidden_layers": 10**8}),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_config_of_more_parts_than_there_are_is_not_made(what: str, tmp_path: Path) -> None:
    kind, name, entries = LARGE[what]
    config = {**SIZES, "model_type": kind, "architectures": [name], **entries}
    assert "at most" in too_many(config)
    with pytest.raises(ValueError, match="at most"):
        weightless(name, config)
    with pytest.raises(LookupError, match="at most"):
        fit_class(name, config, {})
    assert look(config, {})[0] is None
    folder = iotools.checkpoint(tmp_path / "m", iotools.weights(layers=1))
    (folder / "config.json").write_text(json.dumps(config))
    for loads in (config_of, tokenizer_of):
        with pytest.raises(CheckpointError, match=r"m: config\.json has .*at most"):
            loads(folder)
    iotools.adapter(tmp_path / "a", iotools.linear_shapes(iotools.weights(layers=1)))
    lora_tools.inspect(folder)
    lora_tools.merge(folder, [tmp_path / "a"], tmp_path / "out")  # by its own names


@pytest.mark.parametrize(
    "config",
    [
        {
            "num_hidden_layers": 61,
            "n_routed_experts": 384,
            "vocab_size": 10**6,
            "num_labels": 10**5,
        },
        {"max_position_embeddings": 10**7, "rope_theta": 10**9, "block_size": 10**6},
        {"text_config": {"num_hidden_layers": 126}, "vision_config": {"depths": [2, 2, 30, 2]}},
        {"num_experts": 2048, "num_experts_per_tok": 8, "num_layers": 64},
    ],
)
def test_what_models_have_is_not_too_many(config: dict[str, Any]) -> None:
    assert not too_many(config)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "merges.txt"])
def test_a_small_file_without_end_is_not_given_to_transformers(name: str, tmp_path: Path) -> None:
    """Which reads all of it into memory, several times."""
    folder = iotools.checkpoint(tmp_path / "m", iotools.weights(layers=1))
    with (folder / name).open("a") as file:
        file.truncate(1 << 32)
    for loads in (config_of, tokenizer_of):
        with pytest.raises(CheckpointError, match=rf"{name}: 4,294,967,296 bytes; at most"):
            loads(folder)


def test_an_index_of_brackets_takes_bounded_memory(tmp_path: Path) -> None:
    import resource

    folder = iotools.checkpoint(tmp_path / "m", iotools.weights(layers=1), shards=2)
    (folder / "model.safetensors.index.json").write_text("[" + "[]," * 10**6 + "[]]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        lora_tools.inspect(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_brackets_without_end_are_refused_unread(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        folder = iotools.checkpoint(tmp_path / name, iotools.weights(layers=1))
        (folder / name).write_text("[" + "[]," * 6_000_000 + "[]]")
        with pytest.raises(CheckpointError, match="more than 5,000,000 lists"):
            lora_tools.inspect(folder)


def test_a_name_of_megabytes_is_refused(tmp_path: Path) -> None:
    name = "a." * 10**6
    save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
    torch.save({name: torch.zeros(2)}, tmp_path / "x.bin")
    for file in ("x.safetensors", "x.bin"):
        with pytest.raises(CheckpointError, match="a name of 2,000,000 characters"):
            lora_tools.inspect(tmp_path / file, allow_pickle=True)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (struct.pack("<IIQ", 9, 8, 1 << 40), "a list of 1,099,511,627,776"),
        (struct.pack("<IIQ", 9, 6, 1 << 40), "a list of 1,099,511,627,776"),
        (struct.pack("<IIQ", 9, 0, 4 << 30), "a list of 4,294,967,296"),
        (struct.pack("<IQ", 8, 4 << 30), "a string of 4,294,967,296"),
    ],
)
def test_a_gguf_with_holes_of_gigabytes_is_refused(field: bytes, said: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + field)
        file.truncate(8 << 30)
    with pytest.raises(CheckpointError, match=rf"x\.gguf: .*{said}"):
        lora_tools.inspect(path)


def test_the_bounds_are_those_that_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs/untrusted.md").read_text()
    for text in (
        f"{regular_files.MOST // 10**6} MB; JSON of {json_file._MOST_NESTED:,} lists",
        f"whole numbers of {json_file._MOST_DIGITS} digits",
        f"{MAX_NAME:,} characters",
        f"{parse._MOST_TEXT >> 30} GiB",
        f"{regular_files.MOST_OF_GRAPH + 1 >> 30} GiB (protobuf's)",
        f"{gguf_file._MOST_LISTED:,} elements",
        f"{pickle_file._UNFOLDED >> 30} GiB, or {pickle_file._RATIO} times",
        f"{sidecar._UNFOLDED >> 20} MiB or {sidecar._RATIO} times",
        f"{pretrained._MOST_PARTS:,} layers or heads, {pretrained._MOST_EXPERTS:,} experts",
        f"{pretrained._MOST_LABELS:,} labels",
        f"{patterns.LONGEST:,} characters; matched",
        f"at most {patterns._WAYS:,} ways",
    ):
        assert text in page, text
