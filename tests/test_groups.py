"""GPTQ, AWQ, MLX and bitsandbytes int8, read as the numbers they stand for: against packers written
from the formats' descriptions, and against MLX and bitsandbytes themselves, to the bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lora_tools
from lora_tools.errors import CheckpointError, LoraToolsError, NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.linalg.bits import awq_stream, stream
from lora_tools.linalg.int8 import dequantize_rows, quantize_rows
from lora_tools.linalg.noise import uniform_noise
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.schemes import SCHEMES
from tests.forms_groups import (
    AWQ_CONFIG,
    AWQ_ORDER,
    F16,
    FORMS,
    MLX_CONFIG,
    V2,
    Layer,
    Tensors,
    awq_layer,
    form,
    gptq_config,
    gptq_layer,
    int8_layer,
    mlx_layer,
    words,
)
from tests.iotools import checkpoint, weights

Q, UP = "model.layers.0.q_proj", "model.layers.0.up_proj"


def written(folder: Path, stored: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    """A folder of these tensors with this config."""
    checkpoint(folder, {name: t.contiguous() for name, t in stored.items()}, shards)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def decoded(path: Path) -> Dequantized[Any]:
    found = open_checkpoint(path)
    assert isinstance(found, Dequantized)
    return found


def check_layer(
    folder: Path, layer: Layer, config: dict[str, Any], shape: tuple[int, ...], module: str = Q
) -> None:
    """Whole, by pieces of rows, and in the plain dtype, of one layer."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    stored, plain = layer(module, w)
    found = decoded(written(folder, stored, config))
    name = f"{module}.weight"
    assert found.specs[name].shape == plain.shape
    assert torch.equal(found.tensor(name), plain)
    dtype = getattr(torch, config.get("torch_dtype", "bfloat16"))
    assert torch.equal(found.rounded(name), plain.to(dtype))
    matrix = plain.flatten(0, -2)
    for start, stop in ((0, 1), (3, 8), (len(matrix) - 1, len(matrix))):
        assert torch.equal(found.decode(name, start, stop), matrix[start:stop])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize("kind", FORMS)
def test_forms_decode_to_what_they_stand_for(kind: str, tmp_path: Path) -> None:
    stored, config, plain = FORMS[kind](weights(layers=1))
    found = decoded(written(tmp_path / "q", stored, config, shards=2))
    assert set(found.specs) == set(plain)
    for name, tensor in plain.items():
        assert torch.equal(found.rounded(name), tensor), name
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain")
    given = {
        k: v for f in (tmp_path / "plain").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert given.keys() == plain.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in plain.items())
    said = json.loads((tmp_path / "plain/config.json").read_text())
    assert not said.keys() & {"quantization_config", "quantization"}


def test_rows_can_be_pickled() -> None:
    for scheme in SCHEMES:
        assert pickle.loads(pickle.dumps(scheme)) == scheme


# ------------------------------------------------------------------------------------ packed words


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 3), st.data())
def test_a_stream_gives_back_what_was_packed(bits: int, n: int, rows: int, data: Any) -> None:
    codes = torch.from_numpy(np.random.default_rng(n).integers(0, 1 << bits, (rows, n)))
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    assert torch.equal(stream(words(codes, bits), bits, start, stop), codes[:, start:stop].byte())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.data())
def test_awq_order(eights: int, data: Any) -> None:
    n = 8 * eights
    codes = torch.from_numpy(np.random.default_rng(n).integers(0, 16, (3, n)))
    packed = words(codes[:, [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(n)]], 4)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    assert torch.equal(awq_stream(packed, start, stop), codes[:, start:stop].byte().T)


# -------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [-1, 16, 32, 40])
def test_gptq(bits: int, v2: bool, order: bool, group: int, tmp_path: Path) -> None:
    """Groups that do not divide, the least zero point and the largest, bits that lie across
    words."""
    more = {**(V2 if v2 else {}), "desc_act": order}
    layer = gptq_layer(bits, group, order=order, v2=v2)
    check_layer(tmp_path / "q", layer, gptq_config(bits, group, **more), (64, 96))
    if not order:
        layer = gptq_layer(bits, group, v2=v2, index=False)
        check_layer(tmp_path / "q", layer, gptq_config(bits, group, **more), (64, 96))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_gptq_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, bits: int, a: int, b: int, order: bool
) -> None:
    folder = tmp_path_factory.mktemp("any") / "q"
    layer = gptq_layer(bits, 16, order=order)
    check_layer(folder, layer, gptq_config(bits, 16), (16 * a, 16 * b))


def test_gptq_with_words_that_are_not_full(tmp_path: Path) -> None:
    """GPTQModel's embeddings, of vocabularies that do not divide, lie as (in, out)."""
    layer = gptq_layer(4, -1)
    config = gptq_config(4, -1)

    def embedding(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stored, plain = layer(module, w)
        return stored, plain.T.contiguous()

    check_layer(tmp_path / "q", embedding, config, (16, 27), "model.embed_tokens")


def test_gptq_of_a_conv1d(tmp_path: Path) -> None:
    """GPT-2's, which a plain checkpoint stores as (in, out)."""
    layer = gptq_layer(3, 32, order=True)

    def conv1d(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stored, plain = layer(module, w)
        return stored, plain.T.contiguous()

    config = {"model_type": "gpt2", **gptq_config(3, 32)}
    check_layer(tmp_path / "q", conv1d, config, (96, 64), "h.0.attn.c_attn")


def test_gptq_by_its_own_file_and_with_rules(tmp_path: Path) -> None:
    """``dynamic`` gives modules bits and groups of their own: their shapes tell. lm_head too."""
    rules = {"dynamic": {"+:.*up_proj": {"bits": 8, "group_size": 16}}, "lm_head": True}
    one, q = gptq_layer(4, 8)(Q, torch.randn(16, 64))
    two, up = gptq_layer(8, 16)(UP, torch.randn(32, 64))
    head, lm = gptq_layer(4, 8)("lm_head", torch.randn(24, 64))
    folder = written(tmp_path / "q", one | two | head, {"torch_dtype": "float16"})
    said = {"bits": 4, "group_size": 8, "desc_act": False, **rules}
    (folder / "quantize_config.json").write_text(json.dumps(said))
    found = decoded(folder)
    for name, plain in ((Q, q), (UP, up), ("lm_head", lm)):
        assert torch.equal(found.tensor(f"{name}.weight"), plain)
    lora_tools.dequantize(folder, tmp_path / "plain")
    assert not (tmp_path / "plain/quantize_config.json").exists()
    assert open_checkpoint(tmp_path / "plain").scheme is None
    config = gptq_config(4, 8, **rules)
    (folder / "config.json").write_text(json.dumps(config))
    assert decoded(folder).scheme is not None
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    said["checkpoint_format"] = "gptq"
    (folder / "quantize_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="says checkpoint_format 'gptq', but config"):
        open_checkpoint(folder)


def test_a_zero_point_that_v1_cannot_say_is_refused(tmp_path: Path) -> None:
    """GPTQModel reads it as 0, exllama's kernels as 16."""
    stored, _ = gptq_layer(4, 8)(Q, torch.randn(16, 16))
    stored[f"{Q}.qzeros"][1, 0] |= 0xF0
    folder = written(tmp_path / "q", stored, gptq_config())
    with pytest.raises(CheckpointError, match=rf"{Q}.qzeros: holds the zero point 15 \+ 1"):
        decoded(folder).tensor(f"{Q}.weight")
    assert decoded(folder).decode(f"{Q}.weight", 8, 16).shape == (8, 16)  # of other words
    (folder / "config.json").write_text(json.dumps(gptq_config(**V2)))
    decoded(folder).tensor(f"{Q}.weight")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([0] * 16, "puts all inputs into the first of 2 groups"),
        ([0] * 8 + [2] * 8, "has groups 0 to 2, but there are only 2"),
        ([-1] * 8 + [1] * 8, "has groups -1 to 1, but there are only 2"),
    ],
)
def test_lying_groups_are_refused(index: list[int], said: str, tmp_path: Path) -> None:
    stored, _ = gptq_layer(4, 8)(Q, torch.randn(16, 16))
    stored[f"{Q}.g_idx"] = torch.tensor(index, dtype=torch.int32)
    folder = written(tmp_path / "q", stored, gptq_config())
    with pytest.raises(CheckpointError, match=f"{Q}.g_idx: {said}"):
        decoded(folder).tensor(f"{Q}.weight")


GPTQ_FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "marlin": ({}, {"checkpoint_format": "marlin"}, f"{Q}.qweight: GPTQ in the layout marlin"),
    "old marlin": ({}, {"is_marlin_format": True}, "in the layout marlin"),
    "planar": ({}, {"checkpoint_format": "gptq_p"}, "in the layout gptq_p"),
    "two layouts": ({}, {"format": "gptq", "checkpoint_format": "gptq_v2"}, "gptq or gptq_v2"),
    "words of 16": ({}, {"pack_dtype": "int16"}, "packed in int16"),
    "rotated": ({}, {"rotation": "hadamard"}, "rotated .hadamard. before"),
    "bits": ({}, {"bits": 8}, f"{Q}.qweight: 8 bits are said"),
    "no bits": ({}, {"bits": None}, "None bits are said"),
    "bits of a float": ({}, {"bits": 4.0}, r"4\.0 bits are said"),
    "scales of activations": (
        {"act.scales": torch.ones(16)},
        {},
        f"{Q}.act.scales: scales without",
    ),
    "bits in words": ({}, {"bits": "four"}, "'four' bits are said"),
    "group size": ({}, {"group": 16}, f"{Q}.scales: 1 groups of 16 inputs"),
    "group of none": ({}, {"group": 0}, f"{Q}.scales: group_size 0 is not a size"),
    "no qzeros": ({"qzeros": None}, {}, f"{Q}.qzeros: missing beside qweight"),
    "no scales": ({"scales": None}, {}, f"{Q}.scales: missing beside qweight"),
    "no qweight": ({"qweight": None}, {}, f"{Q}.qweight is missing"),
    "no index, act-order": (
        {"g_idx": None},
        {"desc_act": True},
        f"{Q}.g_idx: is missing, but desc",
    ),
    "cut": ({"qweight": torch.zeros(1, 16, dtype=torch.int32)}, {}, "do not fit them"),
    "narrow": ({"qweight": torch.zeros(2, 8, dtype=torch.int32)}, {}, f"{Q}.qweight: I32 .2, 16."),
    "zeros cut": ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, {}, f"{Q}.qzeros: I32 .2, 2."),
    "scales cut": ({"scales": torch.ones(2, 8).half()}, {}, "do not fit them"),
    "scales too many": ({"scales": torch.ones(3, 16).half()}, {}, f"{Q}.scales: 2 groups of 8"),
    "scales of whole numbers": ({"scales": torch.ones(2, 16).byte()}, {}, f"{Q}.scales: F16 or BF"),
    "codes of floats": ({"qweight": torch.ones(2, 16)}, {}, f"{Q}.qweight: I32 a matrix"),
    "codes in a row": ({"qweight": torch.ones(32).int()}, {}, f"{Q}.qweight: I32 a matrix"),
    "index of another length": ({"g_idx": torch.zeros(24).int()}, {}, "do not fit them"),
    "index of floats": ({"g_idx": torch.zeros(16)}, {}, f"{Q}.g_idx: I32 or I64"),
    "a weight as well": (
        {"weight": torch.ones(16, 16)},
        {},
        f"{Q}: has both a weight and a qweight",
    ),
}


@pytest.mark.parametrize("kind", GPTQ_FAULTS)
def test_broken_gptq_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    parts, said, message = GPTQ_FAULTS[kind]
    stored, _ = gptq_layer(4, 8)(Q, torch.randn(16, 16))
    refused(
        tmp_path / "q",
        change(stored, parts),
        gptq_config(**{"bits": 4, "group": 8, **said}),
        message,
    )


def change(stored: Tensors, parts: dict[str, Any]) -> Tensors:
    changed = {**stored, **{f"{Q}.{part}": tensor for part, tensor in parts.items()}}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def refused(folder: Path, stored: Tensors, config: dict[str, Any], message: str) -> None:
    """On opening it, as every verb does."""
    written(folder, stored | {"norm.weight": torch.ones(2)}, config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(kind: str, bad: float, tmp_path: Path) -> None:
    stored, config, _ = FORMS[kind](weights(layers=1))
    name = next(f"{Q}.{part}" for part in ("scales", "SCB") if f"{Q}.{part}" in stored)
    stored[name] = stored[name].clone()
    stored[name].view(-1)[-1] = bad
    with pytest.raises(NonFiniteError, match=f"{name}: holds an inf or a NaN"):
        decoded(written(tmp_path / "q", stored, config)).tensor(f"{Q}.weight")


# --------------------------------------------------------------------------------------------- AWQ


@pytest.mark.parametrize("group", [-1, 8, 24])
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(group: int, symmetric: bool, tmp_path: Path) -> None:
    entry = {**AWQ_CONFIG["quantization_config"], "group_size": group}
    for more in (
        {},
        {"version": "GEMM", "zero_point": not symmetric, "modules_to_not_convert": []},
    ):
        config = {**AWQ_CONFIG, "quantization_config": {**entry, **more}}
        check_layer(tmp_path / "q", awq_layer(group, symmetric), config, (40, 48))


def test_awq_by_its_own_file(tmp_path: Path) -> None:
    stored, plain = awq_layer()(Q, torch.randn(16, 16))
    folder = written(tmp_path / "q", stored, {"torch_dtype": "float16"})
    said = {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(said))
    assert torch.equal(decoded(folder).tensor(f"{Q}.weight"), plain)
    (folder / "quant_config.json").unlink()
    said = {"quant_method": "awq", "bits": 4, "group_size": 8, "format": "gemm"}  # GPTQModel's
    (folder / "quantize_config.json").write_text(json.dumps(said))
    assert torch.equal(decoded(folder).tensor(f"{Q}.weight"), plain)


AWQ_FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gemv": ({}, {"version": "gemv"}, f"{Q}.qweight: AWQ of 4 bits in the layout gemv"),
    "marlin": ({}, {"version": "marlin"}, "in the layout marlin"),
    "exllama": ({}, {"version": "exllama"}, "in the layout exllama"),
    "llm-awq": ({}, {"backend": "llm-awq"}, f"{Q}.qweight: AWQ"),
    "eight bits": ({}, {"bits": 8}, "AWQ of 8 bits"),
    "order": ({"g_idx": torch.zeros(16).int()}, {}, "with g_idx"),
    "group size": ({}, {"group_size": 12}, f"{Q}.qweight: 16 inputs cannot be divided"),
    "group of none": ({}, {"group_size": None}, "groups of None"),
    "other group size": ({}, {"group_size": 16}, f"{Q}.qzeros: I32 .1, 2. is expected"),
    "zeros cut": ({"qzeros": torch.zeros(2, 1).int()}, {}, f"{Q}.qzeros: I32 .2, 2. is expected"),
    "scales cut": ({"scales": torch.ones(2, 8).half()}, {}, f"{Q}.scales: F16 or BF16 or F32 .2,"),
    "no zeros": ({"qzeros": None}, {}, f"{Q}.qzeros: missing"),
    "scales of activations": (
        {"act.scales": torch.ones(16)},
        {},
        f"{Q}.act.scales: scales without",
    ),
}


@pytest.mark.parametrize("kind", AWQ_FAULTS)
def test_broken_awq_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    parts, said, message = AWQ_FAULTS[kind]
    stored, _ = awq_layer(8)(Q, torch.randn(16, 16))
    entry = {**AWQ_CONFIG["quantization_config"], **said}
    refused(tmp_path / "q", change(stored, parts), {"quantization_config": entry}, message)


def test_awq_of_no_linear_layer(tmp_path: Path) -> None:
    stored, _ = awq_layer(8)("model.embed_tokens", torch.randn(16, 16))
    refused(tmp_path / "q", stored, AWQ_CONFIG, r"embed_tokens.qweight: AWQ.*linear")


def test_awq_said_to_be_symmetric_and_not(tmp_path: Path) -> None:
    stored, _ = awq_layer(8)(Q, torch.randn(16, 16))
    entry = {**AWQ_CONFIG["quantization_config"], "zero_point": False}
    folder = written(tmp_path / "q", stored, {"quantization_config": entry})
    with pytest.raises(CheckpointError, match=f"{Q}.qzeros: holds zero points other than 8"):
        decoded(folder).tensor(f"{Q}.weight")


# --------------------------------------------------------------------------------------------- MLX


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mlx_says_the_same(bits: int, group: int, dtype: str, tmp_path: Path) -> None:
    """To the bit, where it computes in float32. In the dtype of the scales it rounds the product
    and the sum: that is less near to these numbers than rounding them once."""
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    w = torch.randn(3, 8, 384, generator=torch.Generator().manual_seed(bits))
    own = mx.array(w.numpy()).astype(getattr(mx, dtype))
    codes, *floats = mx.quantize(own, group_size=group, bits=bits)
    wide = [part.astype(mx.float32) for part in floats]
    scales, biases = (torch.from_numpy(np.array(part)).to(getattr(torch, dtype)) for part in wide)
    stored = {
        f"{Q}.weight": torch.from_numpy(np.array(codes)),
        f"{Q}.scales": scales,
        f"{Q}.biases": biases,
    }
    config = {"quantization": {"group_size": group, "bits": bits, "mode": "affine"}}
    found = decoded(written(tmp_path / "q", stored, config))
    exact = torch.from_numpy(np.array(mx.dequantize(codes, *wide, group_size=group, bits=bits)))
    assert torch.equal(found.tensor(f"{Q}.weight"), exact)
    assert found.specs[f"{Q}.weight"].shape == w.shape
    rounded = found.rounded(f"{Q}.weight")
    assert rounded.dtype == scales.dtype
    narrow = mx.dequantize(codes, *floats, group_size=group, bits=bits).astype(mx.float32)
    theirs = torch.from_numpy(np.array(narrow))
    assert (rounded.float() - exact).norm() <= (theirs - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, tmp_path: Path) -> None:
    for group, shape in ((32, (24, 96)), (64, (3, 5, 64))):
        config = {"quantization": {"group_size": group, "bits": bits}}
        check_layer(tmp_path / "q", mlx_layer(bits, group), config, shape)


def test_mlx_with_entries_of_single_layers(tmp_path: Path) -> None:
    """mlx's defaults stand for what such an entry does not say."""
    one, q = mlx_layer(6, 32)(Q, torch.randn(16, 64))
    two, up = mlx_layer(4, 64)(UP, torch.randn(32, 64))
    said = {"group_size": 32, "bits": 6, UP: {"mode": "affine"}, "lm_head": False}
    folder = written(tmp_path / "q", one | two, {"quantization": said, "quantization_config": said})
    found = decoded(folder)
    for name, plain in ((Q, q), (UP, up)):
        assert torch.equal(found.tensor(f"{name}.weight"), plain)
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    assert torch.equal(decoded(folder).tensor(f"{Q}.weight"), q)


MLX_FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mxfp4": ({}, {"mode": "mxfp4"}, f"{Q}.weight: MLX's mode mxfp4 cannot be read"),
    "said to be plain": ({}, {Q: False}, f"{Q}.weight: holds codes, but config.json says"),
    "bits": ({}, {"bits": 8}, f"{Q}.weight: U32 .16, 2. cannot be divided into groups of 16"),
    "other bits": ({}, {"bits": 2}, f"{Q}.scales: F16 or BF16 or F32 .16, 2. is expected"),
    "another layer's": ({}, {"model.k_proj": {"bits": 8}}, "names model.k_proj, which is not"),
    "bits of a float": ({}, {"bits": 4.0}, rf"{Q}.weight: MLX does not have 4\.0 bits in groups"),
    "seven bits": ({}, {"bits": 7}, f"{Q}.weight: MLX does not have 7 bits in groups of 16"),
    "no group": ({}, {"group_size": 0}, "groups of 0"),
    "no scales": ({"scales": None}, {}, f"{Q}.scales: missing beside"),
    "no biases": ({"biases": None}, {}, f"{Q}.biases: missing beside"),
    "biases of another dtype": (
        {"biases": torch.ones(16, 1)},
        {},
        f"{Q}.biases: BF16 .16, 1. is expected",
    ),
    "scales cut": (
        {"scales": torch.ones(8, 1).bfloat16()},
        {},
        f"{Q}.scales: F16 or BF16 or F32 .16, 1. is",
    ),
    "scales of codes": (
        {"scales": torch.ones(16, 1).byte()},
        {},
        f"{Q}.scales: F16 or BF16 or F32 .16, 1. is",
    ),
    "another layer without codes": (
        {"up.scales": torch.ones(4, 1)},
        {},
        f"{Q}.up.scales: U32 weight is expected",
    ),
    "another layer of floats": (
        {"up.biases": torch.ones(4, 1), "up.weight": torch.ones(4, 4)},
        {},
        f"{Q}.up.biases: U32 weight is expected beside it in {Q}.up, found {Q}.up.weight F32",
    ),
    "a vector": (
        {"weight": torch.ones(16, dtype=torch.uint32)},
        {},
        f"{Q}.weight: U32 .16. cannot be divided",
    ),
    "a number": (
        {"weight": torch.ones((), dtype=torch.uint32)},
        {},
        rf"{Q}.weight: U32 \[\] cannot be divided",
    ),
}


@pytest.mark.parametrize("kind", MLX_FAULTS)
def test_broken_mlx_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    parts, said, message = MLX_FAULTS[kind]
    stored, _ = mlx_layer()(Q, torch.randn(16, 16))
    config = {"quantization": {**MLX_CONFIG["quantization"], **said}}
    refused(tmp_path / "q", change(stored, parts), config, message)


# ------------------------------------------------------------------------- eight bits, bitsandbytes


def test_eight_bits_to_the_bit(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    w = (
        torch.randn(40, 56, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 3, 40)[:, None]
    )
    codes, absmax, _ = functional.int8_vectorwise_quant(w.half())
    stored = {f"{Q}.weight": codes, f"{Q}.SCB": absmax}  # as older files are: no weight_format
    found = decoded(written(tmp_path / "q", stored, {"torch_dtype": "float32"}))
    theirs = functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(found.tensor(f"{Q}.weight"), theirs)
    assert torch.equal(found.decode(f"{Q}.weight", 7, 20, torch.bfloat16), theirs[7:20].bfloat16())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eight_bits_as_transformers_saves_and_reads_them(kind: str, tmp_path: Path) -> None:
    """Its own ``dequantize`` gives the same, where it leaves linear layers for GPT-2's Conv1D."""
    pytest.importorskip("bitsandbytes")
    import transformers

    sizes = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    own = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    if kind == "gpt2":
        own = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    said = transformers.BitsAndBytesConfig(load_in_8bit=True)
    eight = load(tmp_path / "plain", quantization_config=said, device_map={"": "cpu"})
    eight.save_pretrained(tmp_path / "q")
    found = decoded(tmp_path / "q")
    theirs = load(tmp_path / "q", device_map={"": "cpu"}).dequantize().state_dict()
    assert found.quantized
    for name in found.quantized:
        wanted = theirs[name].T if kind == "gpt2" else theirs[name]
        assert torch.equal(found.rounded(name), wanted), name
        assert found.specs[name].shape == model.get_parameter(name).shape


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(-12, 12))
def test_eight_bits_are_made_to_the_bit(rows: int, cols: int, power: int) -> None:
    """What bitsandbytes makes; and what was decoded gives its codes again."""
    functional = pytest.importorskip("bitsandbytes").functional
    noise = torch.Generator().manual_seed(rows * cols)
    w = torch.randn(rows, cols, generator=noise) * 2.0**power
    codes, absmax = quantize_rows(w)
    theirs, scales, _ = functional.int8_vectorwise_quant(w.half())
    filled = absmax > 0
    assert torch.equal(codes[filled], theirs[filled])
    assert torch.equal(absmax, scales)
    assert not codes[~filled].any()
    plain = dequantize_rows(codes, absmax, torch.empty(rows, cols))
    if power > -8:  # else float16's smallest numbers
        again, _ = quantize_rows(plain)
        assert torch.equal(again, codes)


def test_eight_bits_encoded_are_what_is_stored(tmp_path: Path) -> None:
    """Also of a Conv1D, which lies as (in, out) where it is plain."""
    w = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    stored, plain = int8_layer("h.0.attn.c_attn", w)
    config = {"model_type": "gpt2", "torch_dtype": "float32"}
    found = decoded(written(tmp_path / "q", stored, config))
    (name,) = found.quantized
    assert torch.equal(found.tensor(name), plain.T)
    assert torch.equal(found.decode(name, 3, 9), plain.T[3:9])
    assert found.scheme.encode is not None
    parts = found.scheme.encode(found.quantized[name], found.tensor(name))
    for part, spec in found.quantized[name].specs.items():
        assert parts[part].dtype == stored[spec.name].dtype
        assert torch.equal(parts[part], stored[spec.name])
    empty = found.scheme.encode(found.quantized[name], torch.zeros(16, 48))
    assert not empty["weight"].any()
    assert not empty["SCB"].any()
    with pytest.raises(NonFiniteError, match=r"c_attn.weight: a number is too large for float16"):
        found.scheme.encode(found.quantized[name], torch.full((16, 48), 1e6))


INT8_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no weight": ({"weight": None}, f"{Q}.weight: I8 .out, in. is expected"),
    "floats": ({"weight": torch.ones(16, 16)}, f"{Q}.weight: I8 .out, in. is expected"),
    "a vector": ({"weight": torch.ones(16).char()}, f"{Q}.weight: I8 .out, in. is expected"),
    "SCB cut": ({"SCB": torch.ones(8)}, f"{Q}.SCB: {Q}.SCB F32 .16. is expected"),
    "SCB of float16": ({"SCB": torch.ones(16).half()}, f"{Q}.SCB: {Q}.SCB F32 .16. is expected"),
    "columns": ({"weight_format": torch.tensor(1).byte()}, f"{Q}.weight_format: U8 0 .row."),
    "a wide format": ({"weight_format": torch.tensor(0)}, f"{Q}.weight_format: U8 0 .row."),
}


@pytest.mark.parametrize("kind", INT8_FAULTS)
def test_broken_eight_bits_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    parts, message = INT8_FAULTS[kind]
    stored, _ = int8_layer(Q, torch.randn(16, 16))
    refused(tmp_path / "q", change(stored, parts), {}, message)


# --------------------------------------------------------------------------------- what it has cost


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (mlx_layer(4, 64, torch.float32), {"quantization": {"group_size": 64, "bits": 4}}),
        (int8_layer, {}),
    ],
)
def test_rounding_is_about_what_it_cost(
    layer: Layer, config: dict[str, Any], tmp_path: Path
) -> None:
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(2))
    stored, plain = layer(Q, w)
    found = decoded(written(tmp_path / "q", stored, config))
    name = f"{Q}.weight"
    assert found.scheme.rounding is not None
    expected = found.scheme.rounding(found.quantized[name], found.parts(name))
    assert expected == pytest.approx(float((w - plain).square().sum()), rel=0.05)


@pytest.mark.parametrize("order", [False, True])
def test_rounding_of_groups(order: bool, tmp_path: Path) -> None:
    """Each number's own scale, squared, over 12."""
    w = torch.randn(16, 40)
    for layer, config in (
        (gptq_layer(4, 16, order=order), gptq_config(4, 16)),
        (awq_layer(8), AWQ_CONFIG),
    ):
        stored, _ = layer(Q, w)
        found = decoded(
            written(tmp_path / config["quantization_config"]["quant_method"], stored, config)
        )  # type: ignore[index]
        weight, parts = found.quantized[f"{Q}.weight"], found.parts(f"{Q}.weight")
        g_idx = parts.get("g_idx", torch.arange(40) // 8).long()
        wanted = float(parts["scales"].double()[g_idx].square().sum()) / 12
        assert found.scheme.rounding is not None
        assert found.scheme.rounding(weight, parts) == pytest.approx(wanted, rel=1e-12)
    assert uniform_noise(torch.ones(3), 4.0) == pytest.approx(1.0)


# ----------------------------------------------------------------------------- what is said of them


def test_a_bare_file_of_groups_says_too_little(tmp_path: Path) -> None:
    """Which version, which sizes: a folder's config tells, or nothing does."""
    for kind in ("gptq", "awq", "mlx"):
        stored, config, _ = FORMS[kind](weights(layers=1))
        folder = written(tmp_path / kind, stored, config)
        with pytest.raises(LoraToolsError, match="quantized as"):
            open_checkpoint(folder / "model.safetensors")
    stored, config, plain = FORMS["int8"](weights(layers=1))
    folder = written(tmp_path / "int8", stored, config)
    tensor = open_checkpoint(folder / "model.safetensors").rounded(f"{Q}.weight")
    assert torch.equal(tensor, plain[f"{Q}.weight"])


def test_inspect_counts_them(tmp_path: Path) -> None:
    stored, config, _ = FORMS["gptq"](weights(layers=1))
    folder = written(tmp_path / "q", stored, config)
    facts = lora_tools.inspect(folder).totals["quantized"]
    numbers = 16 * 16 + 32 * 16
    assert (facts["weights"], facts["numbers"]) == (2, numbers)
    assert facts["schemes"] == {"GPTQ of 4 bits": 2}
    assert isinstance(open_checkpoint(folder, decoded=False), Checkpoint)
    plain, _, _ = form(gptq_layer(), {}, F16)(weights(layers=1))
    assert set(plain) == set(stored)


def test_names_of_mlx_are_told(tmp_path: Path) -> None:
    """mlx-lm stacks experts under a name of its own, which transformers would pass by."""
    hf = pytest.importorskip("transformers")
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    model.bfloat16().save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    experts = "model.layers.0.block_sparse_moe"
    for one, name in names.items():
        stacked = [tensors.pop(f"{experts}.experts.{i}.{one}.weight") for i in range(2)]
        tensors[f"{experts}.switch_mlp.{name}.weight"] = torch.stack(stacked)
    stored, _ = mlx_layer(4, 32)("lm_head", tensors.pop("lm_head.weight").float())
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    said = {"group_size": 32, "bits": 4}
    written(tmp_path / "mlx", tensors | stored, {**config, "quantization": said})
    report = lora_tools.dequantize(tmp_path / "mlx", tmp_path / "out")
    [note] = [n for n in report.notes if "its tensors have MLX's names" in n]
    assert "not find model.layers.0.mlp.experts.down_proj" in note
    assert "switch_mlp" in note
