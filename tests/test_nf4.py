"""The arithmetic of four bits against bitsandbytes itself, bit for bit, on one torch thread."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tools.formats.quantized import loaded_in_four_bits
from lora_tools.formats.quantized.bitsandbytes import BLOCKSIZES, QUANT_TYPES
from lora_tools.formats.quantized.loaded_in_four_bits import loader_skips
from lora_tools.linalg import codebooks, nf4, nf4_search

from . import forks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch compiles bitsandbytes' fallbacks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _with_zero_blocks(n: int) -> torch.Tensor:
    x = noise(n)
    x[: n // 2] = 0
    return x


def _ties(n: int) -> torch.Tensor:
    """Numbers on the codebook's midpoints and values, to the last bit and one beside it."""
    book = codebooks.CODEBOOKS["nf4"]
    points = np.concatenate((book.midpoints, book.table))
    near = np.concatenate([points, np.nextafter(points, -2), np.nextafter(points, 2)])
    return torch.from_numpy(np.resize(near.astype(np.float32), n).clip(-1, 1))


VALUES: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": lambda n: 0.02 * noise(n),
    "wide": lambda n: noise(n) * torch.exp(8 * noise(n, 1)),
    "zero": torch.zeros,
    "zero blocks": _with_zero_blocks,
    "negative zero": lambda n: -torch.zeros(n),
    "denormal": lambda n: 1e-39 * noise(n),
    "smallest": lambda n: 1.4e-45 * torch.arange(n).remainder(3),
    "tiny": lambda n: 2e-38 * noise(n),
    "huge": lambda n: 3e38 * noise(n).clamp(-1, 1),
    "ties": _ties,
    "constant": lambda n: torch.full((n,), -0.3),
    "eighths": lambda n: torch.arange(n).remainder(17).sub(8) / 8,
}


def assert_like_bitsandbytes(x: torch.Tensor, quant_type: str, blocksize: int) -> None:
    book = codebooks.CODEBOOKS[quant_type]
    options = {"blocksize": blocksize, "quant_type": quant_type}
    codes, single = bnb.quantize_4bit(x, **options)
    packed, absmax = nf4.quantize(x.reshape(-1), book, blocksize)
    assert packed.tobytes() == codes.numpy().tobytes()
    assert absmax.tobytes() == single.absmax.numpy().tobytes()
    assert book.table.tobytes() == single.code.numpy().tobytes()
    _, double = bnb.quantize_4bit(x, **options, compress_statistics=True)
    nested = nf4.double_quantize(absmax)
    assert nested.codes.tobytes() == double.absmax.numpy().tobytes()
    assert nested.absmax.tobytes() == double.state2.absmax.numpy().tobytes()
    assert nested.offset.tobytes() == double.offset.numpy().tobytes()
    assert codebooks.dynamic_map().tobytes() == double.state2.code.numpy().tobytes()
    scales = bnb.dequantize_blockwise(double.absmax, double.state2) + double.offset
    restored = nf4.restore_absmax(nested)
    assert restored.tobytes() == scales.numpy().tobytes()
    # Elsewhere bitsandbytes' AVX-512 kernel takes a neighbour's scale.
    if x.shape[-1] % 16 or x.shape[-1] % blocksize == 0:
        for scale, state in ((absmax, single), (restored, double)):
            back = nf4.dequantize(packed, scale, book, blocksize, torch.empty_like(x).view(-1))
            theirs = bnb.dequantize_4bit(codes, state).reshape(-1)
            # Some of its kernels flush denormals, and in some one of FP4's two zeros is negative.
            near = torch.where(theirs.float().abs() < 2.0**-126, back, theirs)
            assert torch.equal(back + 0.0, near + 0.0) or not np.isfinite(scale).all()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_kind_of_number(quant_type, dtype, kind):
    for n, blocksize in ((1, 64), (63, 64), (64, 64), (4096, 64), (70_001, 64), (640, 256)):
        x = VALUES[kind](n).to(dtype)
        if x.isfinite().all():
            assert_like_bitsandbytes(x, quant_type, blocksize)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_block_size(blocksize, dtype):
    for shape in (
        (1,),
        (2 * blocksize,),
        (5 * blocksize + 3,),
        (37, 129),
        (48, 2 * blocksize),
        (nf4.RUN + blocksize + 1,),
    ):
        x = (0.02 * noise(int(np.prod(shape)), blocksize)).reshape(shape).to(dtype)
        assert_like_bitsandbytes(x, "nf4", blocksize)


def test_more_blocks_than_torch_sums_in_one_thread():
    """From 32,768 blocks on, the mean of the scales depends on the number of torch threads."""
    assert torch.get_num_threads() == 1
    assert_like_bitsandbytes((0.02 * noise(32 * 40_000)).bfloat16(), "nf4", 32)


def test_small_numbers_are_rounded_and_not_flushed():
    book = codebooks.CODEBOOKS["nf4"]
    for exponent in range(-149, -110):
        absmax = np.array([2.0**exponent], np.float32)
        packed = np.arange(0, 256, 8, dtype=np.uint8)
        back = nf4.dequantize(packed, absmax, book, 64, torch.empty(64, dtype=torch.bfloat16))
        codes = np.stack((packed >> 4, packed & 15), 1).reshape(-1)
        exact = (book.table[codes] * absmax).astype(np.float64)
        unit = 2.0 ** np.maximum(np.floor(np.log2(np.abs(exact) + 1e-300)) - 7, -133)
        assert np.array_equal(back.double().numpy(), np.rint(exact / unit) * unit), exponent


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from(BLOCKSIZES),
    st.sampled_from(DTYPES),
    st.sampled_from(QUANT_TYPES),
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
)
def test_any_numbers(n, blocksize, dtype, quant_type, seed, exponent):
    x = (noise(n, seed) * 2.0**exponent).to(dtype)
    if x.isfinite().all():
        assert_like_bitsandbytes(x, quant_type, blocksize)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=300))
def test_any_bits(numbers):
    assert_like_bitsandbytes(torch.tensor(numbers), "nf4", 64)


def test_the_nested_encoder_at_every_step():
    """Around each of the places where the eight-bit code changes."""
    steps = np.arange(65536, dtype=np.float64) / 32767.5 - 1
    edges = (np.arange(1, 65536) - 0.5) / 32767.5 - 1
    values = np.concatenate((steps, edges)).astype(np.float32)
    values = np.concatenate((values, np.nextafter(values, -2), np.nextafter(values, 2))).clip(-1, 1)
    blocks = np.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    absmax = np.concatenate((blocks, np.ones((len(blocks), 1), np.float32)), 1).reshape(-1)
    codes, _ = bnb.quantize_blockwise(torch.from_numpy(absmax), blocksize=256)
    assert np.array_equal(nf4._encode_nested(absmax.reshape(-1, 256))[0].reshape(-1), codes.numpy())


def test_the_dynamic_map_is_exact():
    digest = hashlib.sha256(codebooks.dynamic_map().tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


SOURCES = {
    "normal": (torch.distributions.Normal(0.0, 0.02), 0.09),
    "laplace": (torch.distributions.Laplace(0.0, 0.02), 0.08),
    "student-t": (torch.distributions.StudentT(3.0), 0.05),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_searched_scales_lower_the_error(kind):
    source, wanted = SOURCES[kind]
    torch.manual_seed(0)
    x, book, scratch = source.sample((1 << 19,)), codebooks.CODEBOOKS["nf4"], nf4.Scratch()
    errors = []
    for work in (nf4.quantize_whole, nf4_search.quantize_searched):
        room = torch.empty(x.numel() // 2, dtype=torch.uint8)
        made = work(x, book, 64, True, room, scratch)
        error, energy = nf4.measure(x, made.packed, made.scales, book, 64, scratch)
        errors.append((error / energy) ** 0.5)
    assert 1 - errors[1] / errors[0] >= wanted


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("n", [1, 63, 65, 4096, nf4.RUN + 777])
def test_searched_scales_are_hardly_worse_anywhere_and_bitsandbytes_reads_them(kind, n):
    x, book, scratch = VALUES[kind](n), codebooks.CODEBOOKS["nf4"], nf4.Scratch()
    room = torch.empty(nf4.packed_size(n), dtype=torch.uint8)
    made = nf4_search.quantize_searched(x, book, 64, False, room, scratch)
    back = nf4.dequantize(made.packed, made.scales, book, 64, torch.empty(n))
    state = bnb.QuantState(
        torch.from_numpy(made.scales),
        torch.Size([n]),
        torch.from_numpy(book.table),
        64,
        "nf4",
        torch.float32,
    )
    if n % 16 or n % 64 == 0:
        assert torch.equal(bnb.dequantize_4bit(room.view(-1, 1), state).view(-1), back)
    packed, absmax = nf4.quantize(x, book, 64)
    plain = nf4.dequantize(packed, absmax, book, 64, torch.empty(n))
    error, before = ((b.double() - x.double()).norm() for b in (back, plain))
    if kind not in ("denormal", "smallest", "tiny"):
        assert error <= before * 1.03 + 1e-6 * x.double().norm()


HASH = """
import hashlib, torch
from lora_tools.linalg import codebooks, nf4
torch.set_num_threads(1)
x = (torch.arange(3_000_001) * 7919 % 100_003 - 50_001).float() / 1e6
state = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    packed, absmax = nf4.quantize(x.to(dtype), codebooks.CODEBOOKS["nf4"], 64)
    nested = nf4.double_quantize(absmax)
    for part in (packed, absmax, nested.codes, nested.absmax, nested.offset):
        state.update(part.tobytes())
print(state.hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_instruction_set():
    """What torch and numpy use, turned off step by step (processors that lack it do no harm)."""
    told = {forks.run(code=HASH).stdout} | {
        subprocess.run(
            [sys.executable, "-c", HASH],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **extra},
        ).stdout
        for extra in (
            {
                "ATEN_CPU_CAPABILITY": "avx2",
                "NPY_DISABLE_CPU_FEATURES": "AVX512F,AVX512_SKX,AVX512_ICL",
            },
            {
                "ATEN_CPU_CAPABILITY": "default",
                "NPY_DISABLE_CPU_FEATURES": "AVX512F,AVX512_SKX,AVX512_ICL,AVX2,FMA3",
            },
        )
    }
    assert len(told) == 1
    assert told != {""}


_NAMES = st.text("ab.", max_size=6)


@given(module=_NAMES, skip=st.sets(_NAMES, max_size=4))
def test_few_modules_to_skip_are_as_many_are(module: str, skip: set[str]) -> None:
    few = loader_skips(module, skip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_in_four_bits, "_FEW", 0)
        assert loader_skips(module, skip) is few
