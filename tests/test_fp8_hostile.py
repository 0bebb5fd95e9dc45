"""Eight-bit floats that are refused, by the tensor's name, and what ComfyUI's files
say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools
from lora_tools.errors import CheckpointError, NonFiniteError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.quantized.packed import entry_of
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.schemes.fp8 import COMFY, FLOATS
from tests.forms_fp8 import (
    E4M3,
    E5M2,
    E8M0,
    FORMS,
    Tensors,
    fp8_config,
    json_bytes,
    made,
    opened,
    seeded,
)
from tests.iotools import weights

Q = "model.layers.0.q_proj.weight"
UP = "model.layers.0.up_proj.weight"


# ---------------------------------------------------------------------------------------- refused


def pair(shape: tuple[int, ...] = (16, 16)) -> Tensors:
    return {Q: torch.randn(shape, generator=seeded()).to(E4M3)}


SCALES: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "of another shape": ({f"{Q}_scale_inv": torch.ones(3, 2)}, {}, "q_proj.weight_scale_inv F32"),
    "of rows of a wider one": ({f"{Q}_scale": torch.ones(17, 1)}, {}, "F32 [17, 1]"),
    "not of the stated blocks": (
        {f"{Q}_scale_inv": torch.ones(1, 1)}, fp8_config([8, 8]), "block of 8x8"
    ),
    "by rows, of stated blocks": (
        {f"{Q}_scale_inv": torch.ones(16, 1)}, fp8_config([8, 8]), "block of 8x8"
    ),
    "of columns": ({f"{Q}_scale": torch.ones(1, 16)}, {}, "one a row, or"),
    "of columns, by a method of rows": (
        {f"{Q}_scale": torch.ones(1, 16)},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        "F32 [1, 16]",
    ),
    "empty": ({f"{Q}_scale": torch.ones(0, 1)}, {}, "F32 [0, 1]"),
    "of whole numbers": ({f"{Q}_scale": torch.ones(1, dtype=torch.int32)}, {}, "I32"),
    "of bytes": ({f"{Q}_scale": torch.ones(1, dtype=torch.uint8)}, {}, "powers of two"),
    "missing": ({}, fp8_config([8, 8]), "weight_scale_inv or"),
    "missing of one": (
        {UP: torch.ones(4, 4).to(E4M3), f"{UP}_scale": torch.ones(())}, {}, f"{Q} .*missing"
    ),
    "twice": ({f"{Q}_scale": torch.ones(1), f"{Q}_scale_inv": torch.ones(1)}, {}, "two scales"),
    "of a weight that is not there": ({"b.weight_scale_inv": torch.ones(1)}, {}, "b.weight_scale"),
    "of a weight in bfloat16": (
        {"b.weight": torch.ones(2, 2).bfloat16(), "b.weight_scale_inv": torch.ones(1)}, {}, "BF16"
    ),
    "of a meaning not known": ({f"{Q[:-7]}.scale": torch.ones(1)}, {}, "q_proj.scale"),
    "beside a second": (
        {f"{Q}_scale": torch.ones(1), f"{Q}_scale_2": torch.ones(1)}, {}, "weight_scale_2"
    ),
    "beside a zero point": (
        {f"{Q}_scale": torch.ones(1), f"{Q}_zero_point": torch.ones(1)}, {}, "zero_point"
    ),
    "of blocks of two words": ({}, fp8_config(["a", "b"]), "weight_block_size"),
    "of blocks of nothing": ({}, fp8_config([0, 8]), "weight_block_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALES)
def test_scales_that_lie_are_refused(case: str, tmp_path: Path) -> None:
    more, config, words = SCALES[case]
    path = made(tmp_path / "q", pair() | more, config)
    escaped = words.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(CheckpointError, match=escaped):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(96, 96), (100, 64), (24, 16)])
def test_blocks_that_shapes_do_not_tell_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    """Three scales across 100 or 24, without a block size: many sizes would do."""
    tensors = {Q: torch.zeros(shape).to(E4M3), f"{Q}_scale_inv": torch.ones(5, 1)}
    with pytest.raises(CheckpointError, match="block"):
        open_checkpoint(made(tmp_path / "q", tensors))


@pytest.mark.parametrize("method", ["compressed-tensors", "quark", "gptq", ""])
def test_other_schemes_of_eight_bit_floats_are_not_ours(method: str, tmp_path: Path) -> None:
    entry = {"quant_method": method, "bits": 8}
    tensors = pair() | {f"{Q}_scale": torch.ones(16, 1)}
    path = made(tmp_path / "q", tensors, {"quantization_config": entry})
    stored = open_checkpoint(path, decoded=False)
    assert FLOATS.find(stored) == {}
    assert entry_of(stored.config) == entry


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_scales_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    for i, scale in enumerate((torch.tensor(bad), torch.tensor([[bad]]).bfloat16())):
        view = opened(tmp_path / str(i), pair() | {f"{Q}_scale": scale})
        with pytest.raises(NonFiniteError, match=f"{Q}_scale: holds"):
            view.tensor(Q)


def test_bytes_and_codes_that_are_no_number_are_refused(tmp_path: Path) -> None:
    byte = torch.tensor([[255]], dtype=torch.uint8)
    nan = torch.tensor([[0x7F]], dtype=torch.uint8).view(E4M3)
    for i, tensors in enumerate((
        pair() | {f"{Q}_scale_inv": byte},
        pair() | {f"{Q}_scale_inv": byte.view(E8M0)},
        {Q: nan},
        {Q: torch.tensor([[torch.inf]]).to(E5M2)},
    )):  # fmt: skip
        with pytest.raises(NonFiniteError, match=Q):
            opened(tmp_path / str(i), tensors).tensor(Q)


def test_the_least_power_of_two(tmp_path: Path) -> None:
    """A byte of 0 is 2⁻¹²⁷, which float32 holds below its normal numbers."""
    zero = torch.zeros(1, 1, dtype=torch.uint8)
    view = opened(tmp_path / "q", {Q: torch.full((1, 1), 256.0).to(E4M3), f"{Q}_scale_inv": zero})
    assert view.tensor(Q).item() == 2.0**-119


def test_truncated_codes_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "q", pair()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "q")


# ---------------------------------------------------------------------------------------- ComfyUI


def comfy(text: dict[str, Any], **more: torch.Tensor) -> Tensors:
    module = Q.removesuffix(".weight")
    return {**pair(), f"{module}.weight_scale": torch.tensor(2.0),
            f"{module}.comfy_quant": json_bytes(**text), **more}  # fmt: skip


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8_tensorwise", "of next year", ""])
def test_formats_of_comfyui_that_are_not_known(name: str, tmp_path: Path) -> None:
    """Those of one layer keep all others from being read, too, and inspect still looks."""
    tensors = comfy({"format": "float8_e4m3fn"}, **{"b.comfy_quant": json_bytes(format=name)})
    path = made(tmp_path / "q", tensors)
    with pytest.raises(CheckpointError, match=r"ComfyUI's quantized form \(by .*comfy_quant"):
        open_checkpoint(path)
    assert lora_tools.inspect(path).totals["kind"].startswith("quantized checkpoint (ComfyUI")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (comfy({"format": "float8_e4m3fn", "convrot": True}), f"{Q}: 'convrot'"),
        (comfy({"format": "float8_e5m2"}), f"{Q} F8_E4M3 .*F8_E5M2 is expected"),
        ({**comfy({"format": "float8_e4m3fn"}), Q: torch.ones(4, 4)}, f"{Q}: .*found {Q} F32"),
        ({**comfy({"format": "float8_e4m3fn"}), "b.comfy_quant": json_bytes(
            format="float8_e4m3fn")}, "b.weight: .*no such tensor"),
        ({**pair(), f"{Q[:-7]}.comfy_quant": json_bytes(format="float8_e4m3fn")},
         "_scale are expected, .*without it"),
        ({**pair(), f"{Q[:-7]}.comfy_quant": torch.zeros(3)}, "bytes of JSON"),
        ({**pair(), f"{Q[:-7]}.comfy_quant": torch.zeros(3, dtype=torch.uint8)},
         "comfy_quant: not JSON"),
        ({**pair(), f"{Q[:-7]}.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
         "a format is expected"),
        ({**pair(), f"{Q[:-7]}.scale_weight": torch.ones(5)}, r"scale_weight F32 \[5\]"),
        ({**pair(), "b.scale_weight": torch.ones(())}, "b.scale_weight .*download"),
    ],
)  # fmt: skip
def test_marks_of_comfyui_that_lie(tensors: Tensors, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(made(tmp_path / "q", tensors))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_says_it_in_metadata_too(prefix: str, tmp_path: Path) -> None:
    """One text for all layers; it is not passed on with plain numbers."""
    tensors = {f"{prefix}a.weight": torch.ones(4, 4).to(E4M3),
               f"{prefix}a.weight_scale": torch.tensor(3.0),
               f"{prefix}b.weight": torch.ones(2, 2).bfloat16()}  # fmt: skip
    text = {"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn"}}}
    meta = {"_quantization_metadata": json.dumps(text), "title": "a model"}
    view = opened(tmp_path / "q", tensors, {}, **meta)
    assert view.scheme is COMFY
    lora_tools.dequantize(tmp_path / "q/model.safetensors", tmp_path / "plain.safetensors")
    [file] = open_checkpoint(tmp_path / "plain.safetensors").files
    assert file.metadata["title"] == "a model"
    assert "_quantization_metadata" not in file.metadata
    assert torch.equal(file.tensor(f"{prefix}a.weight"), torch.full((4, 4), 3.0).bfloat16())
    text["layers"]["b"] = {"format": "nvfp4"}  # type: ignore[index]
    made(tmp_path / "r", tensors, {}, _quantization_metadata=json.dumps(text))
    with pytest.raises(CheckpointError, match="quantized as"):
        open_checkpoint(tmp_path / "r")
    made(tmp_path / "s", tensors, {}, _quantization_metadata="[]")
    with pytest.raises(CheckpointError, match="in the file's metadata does not name"):
        open_checkpoint(tmp_path / "s")


def test_some_layers_of_comfyui_have_no_scale(tmp_path: Path) -> None:
    """They are numbers as they stand, as a note says, which a file of scales for all has not;
    biases and norms may be of eight bits, too."""
    stored, _, plain = FORMS["comfy"](weights(layers=2))
    bias, other = "model.layers.0.q_proj.bias", "model.layers.1.q_proj.weight"
    module = other.removesuffix(".weight")
    del stored[f"{module}.scale_weight"], stored[f"{module}.scale_input"]
    stored[bias] = stored[bias].to(E4M3)
    view = opened(tmp_path / "q", stored)
    for name in (bias, other):
        assert torch.equal(view.rounded(name), stored[name].bfloat16())
    assert torch.equal(view.rounded(UP), plain[UP])
    [note] = view.notes
    assert f"no scale beside 2 weights of 5 in FP8 ({bias}, {other})" in note
    report = lora_tools.dequantize(tmp_path / "q", tmp_path / "p")
    assert note in report.notes
    assert not opened(tmp_path / "whole", FORMS["comfy"](weights(layers=2))[0]).notes


def test_a_name_of_a_scale_may_be_that_of_a_norm(tmp_path: Path) -> None:
    """Flux calls its norms' weights so; cast to eight bits they are numbers."""
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    view = opened(tmp_path / "q", pair() | {name: torch.ones(8).to(E4M3), "b.scale": torch.ones(8)})
    assert set(view.quantized) == {Q, name}
    assert view.specs["b.scale"].dtype == "F32"


def test_codes_of_other_schemes_are_not_taken_for_weights(tmp_path: Path) -> None:
    """NVFP4's scales are eight-bit floats."""
    tensors = {
        "a.weight": torch.zeros(4, 8, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 1).to(E4M3),
        "b.weight_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "b.weight_scale": torch.ones(4, 1).to(E4M3),
        "c_blocks": torch.zeros(4, 8, dtype=torch.uint8),
        "c_scales": torch.ones(4, 1).to(E4M3),
    }
    path = made(tmp_path / "q", tensors)
    assert FLOATS.find(open_checkpoint(path, decoded=False)) == {}
    with pytest.raises(CheckpointError, match="quantized as"):
        open_checkpoint(path)
    made(tmp_path / "mixed", tensors | pair() | {f"{Q}_scale": torch.ones(())})
    with pytest.raises(CheckpointError, match="quantized as compressed-tensors"):
        open_checkpoint(tmp_path / "mixed")


def test_scales_of_caches_lie_by_attention(tmp_path: Path) -> None:
    """vLLM's are called ``self_attn.k_scale``; they go with the first of its weights."""
    names = [f"model.layers.0.self_attn.{n}" for n in ("k_scale", "v_scale", "q_proj.input_scale")]
    weight = "model.layers.0.self_attn.q_proj.weight"
    tensors = {weight: torch.ones(4, 4).to(E4M3), f"{weight}_scale": torch.ones(())}
    view = opened(tmp_path / "q", tensors | {name: torch.tensor(torch.nan) for name in names})
    assert set(view.specs) == {weight}
    assert torch.equal(view.tensor(weight), torch.ones(4, 4))
    assert isinstance(view.stored, Checkpoint)
