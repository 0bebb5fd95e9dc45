"""Rows encoded band by band: the same bytes and figures as the whole weight at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lora_tools.engine.buffers import Buffers
from lora_tools.errors import NonFiniteError
from lora_tools.formats.quantized.bitsandbytes_int8 import CODES as INT8_CODES
from lora_tools.formats.quantized.bitsandbytes_int8 import SCB, Int8Weight
from lora_tools.formats.quantized.compressed_tensors import WRITTEN, compressed_weight
from lora_tools.formats.quantized.fp8 import CODES, FP8, SCALE
from lora_tools.formats.quantized.modelopt import CODES as FP4_CODES
from lora_tools.formats.quantized.modelopt import GROUP, NVFP4, WHOLE
from lora_tools.formats.quantized.modelopt import SCALE as FP4_SCALE
from lora_tools.quantizing import encoded
from lora_tools.quantizing.pack import into
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorSpec
from lora_tools.sources.schemes.bitsandbytes_int8 import BITSANDBYTES_INT8
from lora_tools.sources.schemes.compressed_tensors import COMPRESSED_TENSORS
from lora_tools.sources.schemes.fp8 import FLOATS
from lora_tools.sources.schemes.modelopt import MODELOPT

ROWS, COLS = 300, 256  # the last blocks of 128 rows are ragged


class Sink:
    """Keeps what is written, and how often."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}
        self.writes = 0

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        held = self.data.setdefault(name, bytearray())
        assert offset == len(held), "one after another, and without a hole"
        held += data.cast("B")
        self.writes += 1


def _fp8(shape: tuple[int, ...], grid: tuple[int, int, int], block: tuple[int, int]) -> FP8:
    scales = grid if len(shape) == 3 else grid[1:]
    specs = {
        CODES: TensorSpec("m.weight", "F8_E4M3", shape),
        SCALE: TensorSpec("m.weight_scale_inv", "F32", scales),
    }
    return FP8(TensorSpec("m.weight", "BF16", shape), specs, "fp8", grid, block)


def _cases() -> dict[str, tuple[Any, Any]]:
    plain = TensorSpec("m.weight", "BF16", (ROWS, COLS))
    cases: dict[str, tuple[Any, Any]] = {
        name: (COMPRESSED_TENSORS, compressed_weight(plain, settings))
        for name, settings in WRITTEN.items()
        if settings.strategy != "tensor"
    }
    cases["int4 with zero points"] = (
        COMPRESSED_TENSORS,
        compressed_weight(plain, dataclasses.replace(WRITTEN["int4"], symmetric=False)),
    )
    experts = dataclasses.replace(plain, shape=(3, 256, COLS))
    cases["channels of experts"] = (
        COMPRESSED_TENSORS,
        compressed_weight(experts, WRITTEN["fp8-channel"]),
    )
    cases["blocks"] = FLOATS, _fp8((ROWS, COLS), (1, 3, 2), (128, 128))
    cases["blocks of experts"] = FLOATS, _fp8((3, 256, COLS), (3, 2, 2), (128, 128))
    cases["ragged blocks of experts"] = FLOATS, _fp8((2, 200, COLS), (2, 2, 2), (128, 128))
    codes = {CODES: TensorSpec("m.weight", "F8_E5M2", (ROWS, COLS))}
    cases["no scales"] = FLOATS, FP8(plain, codes, "fp8")
    rows = {
        INT8_CODES: TensorSpec("m.weight", "I8", (ROWS, COLS)),
        SCB: TensorSpec("m.SCB", "F32", (ROWS,)),
    }
    cases["LLM.int8()"] = BITSANDBYTES_INT8, Int8Weight(plain, rows, "int8", False)
    groups = {
        FP4_CODES: TensorSpec("m.weight", "U8", (ROWS, COLS // 2)),
        FP4_SCALE: TensorSpec("m.weight_scale", "F8_E4M3", (ROWS, COLS // GROUP)),
        WHOLE: TensorSpec("m.weight_scale_2", "F32", ()),
    }
    cases["ModelOpt"] = MODELOPT, NVFP4(plain, groups, "nvfp4")
    return cases


CASES = _cases()
WHOLE_ONLY = {"int4 with zero points", "ragged blocks of experts"}  # a part spans their rows


def _packed(case: str, band: int, x: torch.Tensor, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    scheme, packed = CASES[case]
    patch.setattr(encoded, "_BAND", band)
    item = Item(None, packed.plain, packed, scheme)  # type: ignore[arg-type]
    sink, back = Sink(), torch.full((packed.plain.numel,), torch.nan)
    there, read = torch.full_like(x, torch.nan), list[tuple[int, int]]()  # a NaN is refused

    def ready(stop: int) -> None:
        there[:stop] = x[:stop]

    def done(start: int, stop: int) -> None:
        assert not back[:stop].isnan().any()
        read.append((start, stop))

    given = item, there, sink, Buffers(), done, into(back), ready
    result = encoded.pack(*given)  # type: ignore[arg-type]
    assert read[0][0] == 0
    assert read[-1][1] == packed.plain.numel
    return sink, back, result


def _numbers(case: str) -> torch.Tensor:
    numel = CASES[case][1].plain.numel
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    x[numel // 2] = -3  # the largest is in the middle
    return x.bfloat16()


@pytest.mark.parametrize("case", CASES)
def test_bands_are_the_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _numbers(case)
    whole, whole_back, at_once = _packed(case, 1 << 30, x, monkeypatch)
    bands, back, result = _packed(case, 1, x, monkeypatch)
    assert bands.data == whole.data
    specs = CASES[case][1].specs.values()
    assert {name: len(data) for name, data in bands.data.items()} == {
        spec.name: spec.nbytes for spec in specs
    }
    assert torch.equal(back, whole_back)
    assert result == at_once
    assert (bands.writes == whole.writes) == (case in WHOLE_ONLY)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused_in_a_band(
    case: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = _numbers(case)
    x[-1] = value
    with pytest.raises(NonFiniteError, match=r"m\.|float16"):
        _packed(case, 1, x, monkeypatch)
