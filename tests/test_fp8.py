"""Eight-bit floats: what each way of storing them stands for, against transformers, against
compressed-tensors, and against formulas of our own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, NonFiniteError
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.fp8 import CODES, SCALE, fp8_weight
from lora_tools.linalg import fp8
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.schemes.fp8 import COMFY, FLOATS
from tests.forms_fp8 import E4M3, E5M2, E8M0, FORMS, blocks, fp8_config, made, opened, seeded
from tests.iotools import adapter, linear_shapes, weights

Q = "model.layers.0.q_proj.weight"
UP = "model.layers.0.up_proj.weight"


# -------------------------------------------------------------------------- every way of storing


@pytest.mark.parametrize("kind", FORMS)
def test_each_form_is_read_as_its_numbers(kind: str, tmp_path: Path) -> None:
    """To the bit, whole and by rows, and nothing of it is left in the view."""
    stored, config, plain = FORMS[kind](weights(layers=1))
    view = opened(tmp_path / "q", stored, config)
    assert view.scheme is (COMFY if kind.startswith("comfy") else FLOATS)
    assert view.specs.keys() == plain.keys()
    assert "quantization_config" not in view.config
    for name, tensor in plain.items():
        assert torch.equal(view.rounded(name), tensor), name
        assert torch_dtype(view.specs[name].dtype) == tensor.dtype
    whole = view.tensor(UP)
    for start, stop in ((0, 1), (7, 9), (5, 32), (3, 3), (11, 25)):
        assert torch.equal(view.rows(UP, (32, 16), start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", FORMS)
def test_dequantize_writes_plain_numbers(kind: str, tmp_path: Path) -> None:
    stored, config, plain = FORMS[kind](weights(layers=1))
    made(tmp_path / "q", stored, config)
    lora_tools.dequantize(tmp_path / "q", tmp_path / "plain")
    written = load_file(tmp_path / "plain/model.safetensors")
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.items())
    assert open_checkpoint(tmp_path / "plain").scheme is None


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_encoded_is_stored_alike_and_decodes_near(kind: str, tmp_path: Path) -> None:
    """Codes and scales as ``specs`` names them; numbers that the format holds come back within
    the last bits of their scales, and others as near as ``rounding`` says."""
    stored, config, _ = FORMS[kind](weights(layers=1))
    view = opened(tmp_path / "q", stored, config)
    weight, x = view.quantized[UP], view.tensor(UP)
    scheme = view._scheme
    assert scheme.encode is not None
    assert scheme.rounding is not None
    for numbers, exact in ((x, True), (torch.randn(x.shape, generator=seeded()), False)):
        parts = scheme.encode(weight, numbers)
        for part, tensor in parts.items():
            spec = weight.specs[part]
            assert tensor.shape == spec.shape
            assert tensor.dtype == torch_dtype(spec.dtype)
        assert set(parts) == {p for p in weight.specs if p in (CODES, SCALE)}
        out = torch.empty(x.shape)
        scheme.decode(weight, parts, out, 0)
        error = float((out - numbers).double().square().sum())
        expected = scheme.rounding(weight, parts)
        assert error < 1e-9 if exact else 0.5 < error / expected < 1.5


def test_people_are_told_how_it_is_stored(tmp_path: Path) -> None:
    stored, config, _ = FORMS["fp8 blocks"](weights(layers=1))
    totals = lora_tools.inspect(made(tmp_path / "q", stored, config)).totals
    assert totals["quantized"]["schemes"] == {"fp8 e4m3 per block of 8x8": 2}
    assert totals["quantized"]["bits_per_parameter"] == pytest.approx(8 + 32 / 64)


def test_rows_go_to_other_processes() -> None:
    for row in (FLOATS, COMFY):
        assert pickle.loads(pickle.dumps(row)) == row


def test_a_folder_without_its_config_is_said_to_be_one(tmp_path: Path) -> None:
    """Without ``quantization_config`` a loader takes codes for weights; plain casts are weights."""
    for kind, faults in (("fp8 channels, no config", 1), ("fp8", 0), ("fbgemm", 0)):
        stored, config, _ = FORMS[kind](weights(layers=1))
        view = opened(tmp_path / kind, stored, config)
        assert len(FLOATS.faults(view.stored.config, view.stored.specs, view.quantized)) == faults


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    """It is left behind with the scales; where it lies, codes without a scale are not numbers."""
    stored, _, plain = FORMS["modelopt"](weights(layers=1))
    path = made(tmp_path / "q", stored)
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    lora_tools.dequantize(path, tmp_path / "plain")
    assert not (tmp_path / "plain/hf_quant_config.json").exists()
    written = load_file(tmp_path / "plain/model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.items())
    save_file(FORMS["fp8"](weights(layers=1))[0], path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is the download complete\?"):
        open_checkpoint(path)


# ------------------------------------------------------------------------------------------ verbs

VERBS = ["fp8 ragged blocks", "fbgemm", "modelopt", "comfy", "comfy quant", "fp8 everywhere"]


@pytest.mark.parametrize("kind", VERBS)
def test_merge_adds_to_the_numbers(kind: str, tmp_path: Path) -> None:
    """In float32, rounded once; the rest goes on as it stands for, and no part of the format."""
    stored, config, plain = FORMS[kind](weights(layers=1))
    view = opened(tmp_path / "q", stored, config)
    lora = adapter(tmp_path / "lora", linear_shapes(plain))
    lora_tools.merge(tmp_path / "q", [lora], tmp_path / "out", allow_other_base=True)
    merged = load_file(tmp_path / "out/model.safetensors")
    factors = load_file(lora / "adapter_model.safetensors")
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in factors:
            assert torch.equal(merged[name], tensor)
            continue
        product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        wanted = (view.tensor(name) + product).bfloat16()
        torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=2**-7)
        assert (merged[name] == wanted).float().mean() > 0.99


@pytest.mark.parametrize("kind", VERBS)
@pytest.mark.parametrize("plain_side", ["base", "tuned", ""])
def test_extract_finds_the_change_between_numbers(
    kind: str, plain_side: str, tmp_path: Path
) -> None:
    """Whichever sides are of eight bits: full ranks give all of it, and what is alike has none."""
    sides = {"base": weights(layers=1), "tuned": weights(layers=1)}
    sides["tuned"][UP] = sides["tuned"][UP] + torch.outer(torch.ones(32), torch.ones(16))
    changes = []
    for side, tensors in sides.items():
        stored, config, plain = FORMS[kind](tensors)
        given = (plain, {}) if side == plain_side else (stored, config)
        made(tmp_path / side, *given)
        changes.append(open_checkpoint(tmp_path / side).tensor(UP).float())
    base, tuned, out = (tmp_path / name for name in ("base", "tuned", "lora"))
    lora_tools.extract(base, tuned, out, rank=16, dtype="float32")
    factors = load_file(out / "adapter_model.safetensors")
    key = f"base_model.model.{UP.removesuffix('.weight')}"
    change = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
    torch.testing.assert_close(change, changes[1] - changes[0], atol=1e-4, rtol=1e-4)
    if not plain_side:
        assert len(factors) == 2
        changed = lora_tools.diff(base, tuned).spectra
        assert [s.module for s in changed] == [UP.removesuffix(".weight")]


# ---------------------------------------------------------------------------------- transformers


def test_transformers_reads_the_same_numbers(tmp_path: Path) -> None:
    """``FineGrainedFP8Config(dequantize=True)`` on a CPU, to the bit, where blocks divide."""
    import transformers

    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, dtype="bfloat16"))
    model.bfloat16().save_pretrained(tmp_path / "plain")
    stored = load_file(tmp_path / "plain/model.safetensors")
    for name in [n for n in stored if "_proj" in n]:
        codes, scales, _ = blocks(stored[name], (32, 32))
        stored |= {name: codes, f"{name}_scale_inv": scales}
    config = json.loads((tmp_path / "plain/config.json").read_text())
    view = opened(tmp_path / "q", stored, config | fp8_config([32, 32]))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "q",
        quantization_config=transformers.FineGrainedFP8Config(
            weight_block_size=(32, 32), dequantize=True
        ),
        dtype=torch.bfloat16,
    ).state_dict()
    assert len(view.quantized) == 7
    for name in view.specs:
        assert torch.equal(view.rounded(name), loaded[name]), name


@pytest.mark.parametrize("scales", ["float", "ue8m0", "bytes"])
def test_transformers_operations_agree_on_fused_experts(scales: str, tmp_path: Path) -> None:
    """There and back, (E, out, in)."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    name = "model.layers.0.mlp.experts.gate_up_proj"
    x = torch.randn(3, 64, 96, generator=seeded())
    fmt = "float" if scales == "float" else "ue8m0"
    said = SimpleNamespace(weight_block_size=(16, 32), scale_fmt=fmt)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=said)).convert({name: x})
    if scales == "bytes":
        theirs[f"{name}_scale_inv"] = theirs[f"{name}_scale_inv"].view(torch.uint8)
    view = opened(tmp_path / "q", theirs, fp8_config([16, 32], scale_fmt=fmt))
    wanted = Fp8Dequantize(None)._dequantize_one(
        theirs[name], theirs[f"{name}_scale_inv"], torch.bfloat16
    )
    assert torch.equal(view.rounded(name), wanted)
    for start, stop in ((0, 192), (60, 70), (65, 191)):
        rows = view.rows(name, (192, 96), start, stop)
        assert torch.equal(rows.bfloat16(), wanted.reshape(192, 96)[start:stop])
    assert FLOATS.encode is not None
    mine = FLOATS.encode(view.quantized[name], x)
    assert same_bytes(mine[CODES], theirs[name])
    assert same_bytes(mine[SCALE], theirs[f"{name}_scale_inv"])


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("block", [(128, 128), (1, 384), (256, 1), (256, 384), (16, 32)])
@pytest.mark.parametrize("power", [False, True])
def test_encoding_is_transformers_own(block: tuple[int, int], power: bool) -> None:
    """Also of zeros, and of numbers of all sizes."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    x = torch.randn(256, 384, generator=seeded()) * torch.logspace(-9, 3, 256)[:, None]
    x[: block[0], : block[1]] = 0
    said = SimpleNamespace(weight_block_size=block, scale_fmt="ue8m0" if power else "float")
    op = Fp8Quantize(SimpleNamespace(quantization_config=said))
    theirs = op.convert({"a.weight": x})
    codes, scales = fp8.encode_blocks(x, block, E4M3, E8M0 if power else torch.float32)
    assert same_bytes(codes, theirs["a.weight"])
    assert same_bytes(scales, theirs["a.weight_scale_inv"])
    wide = fp8.encode_blocks(x, block, E4M3, torch.float32, powers=power)[1]
    assert torch.equal(wide, scales.float())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_encoding_by_division_is_that_of_compressed_tensors(strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    x = torch.randn(48, 80, generator=seeded()) * torch.logspace(-4, 1, 48)[:, None]
    x[5] = 0
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if strategy == "tensor":
        low, high = x.min(), x.max()
    scales, zeros = calculate_qparams(low, high, args)
    codes = quantize(x, scales, zeros, args, dtype=E4M3)
    mine = fp8.encode_divided(x, (1 if strategy == "channel" else 48, 80), E4M3, torch.float32)
    assert same_bytes(mine[0], codes)
    assert torch.equal(mine[1].flatten(), scales.flatten())


# ------------------------------------------------------------------------------------- all shapes


@runs(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24),
    st.integers(1, 3), st.sampled_from([E4M3, E5M2]), st.data(),
)  # fmt: skip
def test_ragged_blocks_of_experts(
    rows: int, cols: int, high: int, wide: int, experts: int, dtype: torch.dtype, data: Any
) -> None:
    """Against scales spread over all numbers; any rows; and encoding holds each block's largest."""
    x = torch.randn(experts, rows, cols, generator=seeded(rows))
    down, across = -(rows // -high), -(cols // -wide)
    codes = TensorSpec("e.w", "F8_E4M3" if dtype == E4M3 else "F8_E5M2", (experts, rows, cols))
    scale = TensorSpec("e.w_scale_inv", "F32", (experts, down, across))
    weight = fp8_weight(codes, scale, "BF16", fp8_config([high, wide]))
    assert FLOATS.encode is not None
    parts = FLOATS.encode(weight, x)
    spread = parts[SCALE].repeat_interleave(high, 1)[:, :rows].repeat_interleave(wide, 2)
    wanted = parts[CODES].float() * spread[:, :, :cols]
    first = data.draw(st.integers(0, experts * rows))
    n = data.draw(st.integers(0, experts * rows - first))
    out = torch.empty(n, cols)
    FLOATS.decode(weight, parts, out, first)
    assert torch.equal(out, wanted.reshape(-1, cols)[first : first + n])
    top = torch.finfo(dtype).max
    assert float(parts[CODES].float().abs().max()) == top
    assert bool(((wanted - x).abs() <= spread[:, :, :cols] * top / 13).all())


@pytest.mark.parametrize(
    ("shape", "scale", "method", "label"),
    [
        ((4, 6, 8), (4,), "fp8", "per expert"),
        ((4, 6, 8), (4, 1, 1), "fp8", "per expert"),
        ((4, 6, 8), (4, 6, 1), "fp8", "per channel"),
        ((4, 6, 8), (4, 1, 8), "fbgemm_fp8", "per channel"),
        ((4, 8, 8), (4, 8, 1), "fbgemm_fp8", "per channel"),
        ((4, 6, 8), (4, 2, 1), "fp8", "per projection"),
        ((4, 6, 3, 3), (4, 1, 1, 1), "fp8", "per channel"),
        ((6, 64), (6, 2), "fp8", "per block of 1x32"),
        ((200, 300), (2, 3), "fp8", "per block of 128x128"),
        ((256, 192), (4, 2), "fp8", "per block of 64x128"),
    ],
)
def test_what_shares_a_scale_is_told_by_shapes(
    shape: tuple[int, ...], scale: tuple[int, ...], method: str, label: str
) -> None:
    """Where config.json states no block size: each scale is spread by hand."""
    name = "experts.gate_up_proj" if len(shape) == 3 else "a.weight"
    config = {"quantization_config": {"quant_method": method}}
    specs = TensorSpec(name, "F8_E4M3", shape), TensorSpec(f"{name}_scale", "F32", scale)
    weight = fp8_weight(*specs, "F32", config)
    assert weight.label == f"fp8 e4m3 {label}"
    codes = torch.randn(shape, generator=seeded()).to(E4M3)
    scales = torch.rand(scale, generator=seeded()) + 0.5
    out = torch.empty(codes.numel() // shape[-1], shape[-1])
    FLOATS.decode(weight, {CODES: codes, SCALE: scales}, out, 0)
    seen = scales
    if method == "fbgemm_fp8" and scale[-1] == 1:
        seen = scales.reshape(scale[0], 1, scale[1])
    seen = seen.reshape(*seen.shape, *[1] * (len(shape) - seen.dim()))
    for axis, length in enumerate(shape):
        have = seen.shape[axis]
        size = 128 if length in (192, 200, 300) else length // have
        seen = seen.repeat_interleave(size, axis).narrow(axis, 0, length)
    assert torch.equal(out.reshape(shape), codes.float() * seen)


def test_blocks_of_fused_gate_and_up_start_anew() -> None:
    """Where a half is no whole number of blocks, as the two were quantized one by one."""
    gate, up = (torch.randn(2, 20, 16, generator=seeded(i)) for i in (1, 2))
    made = [[blocks(w, (8, 8)) for w in half] for half in (gate, up)]
    codes, scales, numbers = (
        torch.cat([torch.stack([m[i] for m in half]).view(t) for half in made], 1)
        for i, t in ((0, torch.uint8), (1, torch.float32), (2, torch.float32))
    )
    specs = (TensorSpec("experts.gate_up_proj", "F8_E4M3", (2, 40, 16)),
             TensorSpec("experts.gate_up_proj_scale_inv", "F32", (2, 6, 2)))  # fmt: skip
    weight = fp8_weight(*specs, "F32", fp8_config([8, 8]))
    out = torch.empty(80, 16)
    FLOATS.decode(weight, {CODES: codes.view(E4M3), SCALE: scales}, out, 0)
    assert torch.equal(out.reshape(2, 40, 16), numbers)


@pytest.mark.parametrize(
    ("rows", "cols", "entry", "label"),
    [
        (200, 64, {}, ""),
        (200, 64, {"weight_block_size": [128, 128]}, ""),
        (400, 64, {"weight_block_size": [128, 128]}, ""),
        (200, 64, {"weight_block_size": None}, "per projection"),
        (256, 64, {}, "per projection"),
        (256, 64, {"weight_block_size": [128, 128]}, "per block of 128x128"),
        (200, 192, {}, "per projection"),
        (400, 64, {"weight_block_size": None}, "per projection"),
    ],
)
def test_two_scales_of_projections_or_of_blocks(
    rows: int, cols: int, entry: dict[str, Any], label: str
) -> None:
    """Told by config.json, or by shapes alone where they leave one reading; else refused."""
    down = 4 if rows == 400 and entry["weight_block_size"] else 2
    specs = (TensorSpec("experts.gate_up_proj", "F8_E4M3", (3, rows, cols)),
             TensorSpec("experts.gate_up_proj_scale_inv", "F32", (3, down, 1)))  # fmt: skip
    config = {"quantization_config": {"quant_method": "fp8", **entry}}
    if label:
        assert fp8_weight(*specs, "F32", config).label == f"fp8 e4m3 {label}"
    else:
        with pytest.raises(
            CheckpointError, match=r"gate_up_proj.* two projections.*quantized from"
        ):
            fp8_weight(*specs, "F32", config)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_cost_of_rounding_is_foretold(dtype: torch.dtype) -> None:
    x = torch.randn(300, 500, generator=seeded()) * 0.02
    for block in ((128, 128), (1, 500), (300, 500)):
        codes, scales = fp8.encode_blocks(x, block, dtype, torch.float32)
        spread = scales.repeat_interleave(block[0], 0)[:300].repeat_interleave(block[1], 1)
        error = float((codes.float() * spread[:, :500] - x).double().square().sum())
        assert fp8.rounding_loss(codes, scales, block) == pytest.approx(error, rel=0.05)


def test_small_numbers_and_numbers_beyond_the_range_stay_finite() -> None:
    x = torch.full((4, 8), 1e-38)
    for encode in (fp8.encode_blocks, fp8.encode_divided):
        codes, scales = encode(x, (4, 8), E4M3, torch.float32)
        assert bool(torch.isfinite(codes.float()).all())
        assert float(codes.float().max() * scales) == pytest.approx(1e-38, rel=0.1, abs=1e-38)
    weight = fp8_weight(TensorSpec("w", "F8_E4M3", (1, 3)), None, "BF16", {})
    assert FLOATS.encode is not None
    cast = FLOATS.encode(weight, torch.tensor([[500.0, -1e9, 1.0]]))[CODES]
    assert cast.tolist() == [[448.0, -448.0, 1.0]]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["fp8", "fp8 blocks", "fbgemm", "fp8 blocks, ue8m0"])
def test_what_is_not_finite_is_not_encoded(kind: str, bad: float, tmp_path: Path) -> None:
    stored, config, _ = FORMS[kind](weights(layers=1))
    view = opened(tmp_path / "q", stored, config)
    x = view.tensor(Q)
    x[3, 4] = bad
    assert FLOATS.encode is not None
    with pytest.raises(NonFiniteError, match=Q):
        FLOATS.encode(view.quantized[Q], x)
