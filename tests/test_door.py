"""The one door to checkpoints: what every verb reads as plain numbers, and what every verb refuses.

Each way of storing numbers is made by hand, small, as the library that writes it does; each is
given to every verb in every place that takes a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.engine import threads
from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.records import TensorSpec
from lora_tools.sources import schemes
from lora_tools.sources.as_loaded import LoadedView
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.schemes.row import Scheme
from lora_tools.sources.transformers_names import Loaded, LoadedTensor, Piece
from tests.iotools import adapter, checkpoint, extracted, graph, linear_shapes, moved, tree, weights

F8 = torch.float8_e4m3fn
Q = "model.layers.0.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Codes of some kind."""
    noise = torch.Generator().manual_seed(0)
    return torch.randint(1, 100, shape, generator=noise).to(dtype)


def gptq(module: str, w: torch.Tensor) -> Tensors:
    out, width = w.shape
    return {
        f"{module}.qweight": packed((width // 8, out), torch.int32),
        f"{module}.qzeros": packed((1, out // 8), torch.int32),
        f"{module}.scales": torch.rand(1, out).half(),
        f"{module}.g_idx": torch.zeros(width, dtype=torch.int32),
    }


def awq(module: str, w: torch.Tensor) -> Tensors:
    out, width = w.shape
    return {
        f"{module}.qweight": packed((width, out // 8), torch.int32),
        f"{module}.qzeros": packed((1, out // 8), torch.int32),
        f"{module}.scales": torch.rand(1, out).half(),
    }


def four_bits_without_states(module: str, w: torch.Tensor) -> Tensors:
    return {f"{module}.weight": packed((w.numel() // 2, 1))}


# How one linear layer is stored: tensors by name. GPTQ, AWQ and MLX are read only where a config
# says how.
LAYERS: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
    "codes of fp8 in bfloat16": lambda m, w: {
        f"{m}.weight": w.bfloat16(),
        f"{m}.weight_scale_inv": torch.ones(1, 1),
    },
    "codes of comfy in bfloat16": lambda m, w: {
        f"{m}.weight": w.bfloat16(),
        f"{m}.scale_weight": torch.tensor(1.0),
    },
    "comfy mxfp8": lambda m, w: {
        f"{m}.weight": w.to(F8),
        f"{m}.weight_scale": torch.ones(128, 4).to(torch.float8_e8m0fnu),
        f"{m}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
    },
    "gptq": gptq,
    "awq": awq,
    "int8 alone": lambda m, w: {f"{m}.weight": packed(tuple(w.shape), torch.int8)},
    "four bits without states": four_bits_without_states,
    "packed": lambda m, w: {
        f"{m}.weight_packed": packed((len(w), w.shape[1] // 8), torch.int32),
        f"{m}.weight_scale": torch.rand(len(w), 1).bfloat16(),
        f"{m}.weight_shape": torch.tensor(w.shape),
    },
    "nvfp4": lambda m, w: {
        f"{m}.weight_packed": packed((len(w), w.shape[1] // 2)),
        f"{m}.weight_scale": torch.ones(len(w), 1).to(F8),
        f"{m}.weight_global_scale": torch.ones(1),
    },
    "mxfp4 of openai": lambda m, w: {
        f"{m}.blocks": packed((1, len(w), 1, w.shape[1] // 2)),
        f"{m}.scales": packed((1, len(w), 1)),
    },
    "mxfp4": lambda m, w: {
        f"{m}_blocks": packed((1, len(w), 1, w.shape[1] // 2)),
        f"{m}_scales": packed((1, len(w), 1)),
    },
    "mlx": lambda m, w: {
        f"{m}.weight": packed((len(w), w.shape[1] // 8), torch.uint32),
        f"{m}.scales": torch.rand(len(w), 1),
        f"{m}.biases": torch.rand(len(w), 1),
    },
    "hqq": lambda m, w: {f"{m}.W_q": packed((len(w), w.shape[1] // 2)), f"{m}.scale": w[:, :1]},
    "quanto of four bits": lambda m, w: {
        f"{m}.weight._data._data": packed((len(w) // 2, w.shape[1])),
        f"{m}.weight._scale": torch.ones(len(w), 1),
        f"{m}.weight._shift": torch.ones(len(w), 1),
    },
    "vptq": lambda m, w: {
        f"{m}.indices": packed((1, len(w) // 4, w.shape[1]), torch.int32),
        f"{m}.centroids.weight": torch.rand(1, 64).half(),
        f"{m}.weight_scale": torch.rand(w.shape[1]).half(),
    },
    "spqr": lambda m, w: {
        f"{m}.dense_weights": packed((w.numel() // 16,), torch.int64),
        f"{m}.row_offsets": packed((len(w) + 1,), torch.int32),
        f"{m}.col_vals": packed((4,), torch.int32),
    },
    "quip": lambda m, w: {
        f"{m}.Qidxs": packed((len(w), w.shape[1] // 8), torch.int64),
        f"{m}.SU": torch.ones(w.shape[1]).half(),
        f"{m}.SV": torch.ones(len(w)).half(),
    },
    "qtip": lambda m, w: {
        f"{m}.trellis": packed((len(w), w.shape[1] // 8), torch.int16),
        f"{m}.SU": torch.ones(w.shape[1]).half(),
        f"{m}.SV": torch.ones(len(w)).half(),
    },
    "marlin": lambda m, w: {
        f"{m}.B": packed((w.shape[1] // 16, len(w) * 2), torch.int32),
        f"{m}.s": torch.rand(1, len(w)).half(),
    },
    "qqq": lambda m, w: {
        f"{m}.B": packed((w.shape[1] // 16, len(w) * 2), torch.int32),
        f"{m}.s_channel": torch.rand(1, len(w)),
    },
    "of next year": lambda m, w: {
        f"{m}.codes8": packed(tuple(w.shape), torch.int8),
        f"{m}.step": torch.tensor(0.1),
    },
    "of the year after": lambda m, w: {
        f"{m}.nibbles": packed((w.numel() // 8, 1), torch.int32),
        f"{m}.lattice.a": torch.rand(len(w), 1).half(),
        f"{m}.lattice_of_rows": torch.rand(len(w), 1).half(),
    },
    "fused experts": lambda m, w: {
        f"{m}.experts.up_proj": packed((2, len(w), w.shape[1])),
        f"{m}.experts.up_proj_scale": torch.ones(2, len(w), 1),
    },
}
# Config entries and files that say so whatever the tensors are.
CONFIGS: dict[str, dict[str, Any]] = {
    "config": {"quantization_config": {"quant_method": "fp8"}},
    "config of the text": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "config of two levels": {"a": {"text_config": {"quantization_config": {"bits": 4}}}},
    "older config": {"compression_config": {"format": "pack-quantized"}},
    "config of mlx": {"quantization": {"group_size": 32, "bits": 4}},
    "four bits to come": {"quantization_config": {"quant_method": "bitsandbytes"}},
}
FILES = {
    "modelopt": "hf_quant_config.json",
    "autogptq": "quantize_config.json",
    "autoawq": "quant_config.json",
}
KINDS = [*LAYERS, *CONFIGS, *FILES]


def make(kind: str, folder: Path, tensors: Tensors) -> Path:
    """A checkpoint that stores its linear layers in that way."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if kind in LAYERS and tensor.dim() == 2 and "embed" not in name:
            stored |= LAYERS[kind](name.removesuffix(".weight"), tensor)
        else:
            stored[name] = tensor
    if kind == "codes of comfy in bfloat16":
        stored["scaled_fp8"] = torch.empty(2, dtype=F8)
    checkpoint(folder, {name: tensor.contiguous() for name, tensor in stored.items()})
    if kind in CONFIGS:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIGS[kind]}))
    if kind in FILES:
        (folder / FILES[kind]).write_text('{"bits": 4}')
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``tuned``, plain; ``adapter``, extracted of them; ``text``."""
    folder = tmp_path_factory.mktemp("plain")
    extracted(folder)
    (folder / "text").write_text("some words")
    return folder


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("stored")
    base = weights(layers=1)

    def made(kind: str) -> Path:
        path = folder / kind.replace(" ", "-")
        return path if path.exists() else make(kind, path, base)

    return made


Run = Callable[[Path, Path, Path], Any]
# Every place of every verb that takes a checkpoint: run on (the checkpoint, plain things, out).
PLACES: dict[str, Run] = {
    "extract BASE": lambda q, p, o: lora_tools.extract(q, p / "tuned", o, rank=1),
    "extract TUNED": lambda q, p, o: lora_tools.extract(p / "base", q, o, rank=1),
    "merge": lambda q, p, o: lora_tools.merge(q, [p / "adapter"], o),
    "merge --dtype": lambda q, p, o: lora_tools.merge(q, [], o, dtype="bfloat16"),
    "unmerge": lambda q, p, o: lora_tools.unmerge(q, [p / "adapter"], o),
    "quantize": lambda q, p, o: lora_tools.quantize(q, o),
    "dequantize": lambda q, p, o: lora_tools.dequantize(q, o),
    "diff BASE": lambda q, p, o: lora_tools.diff(q, p / "tuned"),
    "diff TUNED": lambda q, p, o: lora_tools.diff(p / "base", q),
    "verify": lambda q, p, o: lora_tools.verify(q, base=p / "base", adapters=[p / "adapter"]),
    "verify --base": lambda q, p, o: lora_tools.verify(
        p / "tuned", base=q, adapters=[p / "adapter"]
    ),
    "verify --tuned": lambda q, p, o: lora_tools.verify(p / "adapter", base=p / "base", tuned=q),
    "verify --against": lambda q, p, o: lora_tools.verify(p / "base", against=q),
    "verify, against": lambda q, p, o: lora_tools.verify(q, against=p / "base"),
    "export": lambda q, p, o: lora_tools.export(q, o, no_verify=True),
    "collect-stats": lambda q, p, o: lora_tools.collect_stats(q, p / "text", o),
    "convert --base": lambda q, p, o: lora_tools.convert(p / "adapter", o, to="kohya", base=q),
    "rescale --base": lambda q, p, o: lora_tools.rescale(p / "adapter", o, scale=2, base=q),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_verb_takes_codes_for_numbers(
    kind: str, place: str, stored: Callable[[str], Path], plain: Path, tmp_path: Path
) -> None:
    """By name, with what is seen and what to do; and nothing is written."""
    path = stored(kind)
    with pytest.raises(CheckpointError) as caught:
        PLACES[place](path, plain, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"{path}: quantized as ")
    assert any(word in said for word in ("bfloat16", "quantized from", "mlx_lm"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_bare_file_has_no_config_and_is_known(
    kind: str, stored: Callable[[str], Path], plain: Path
) -> None:
    with pytest.raises(CheckpointError, match="quantized as"):
        lora_tools.diff(plain / "base", stored(kind) / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "title", "where"),
    [
        ("codes of fp8 in bfloat16", "FP8 with block scales", f"{Q}_scale_inv (F32)"),
        ("codes of comfy in bfloat16", "scaled FP8 of ComfyUI", "scaled_fp8 (F8_E4M3)"),
        ("comfy mxfp8", "ComfyUI's quantized form", "q_proj.comfy_quant (U8)"),
        ("gptq", "GPTQ", "q_proj.qweight (I32)"),
        ("awq", "AWQ", "q_proj.qweight (I32)"),
        ("packed", "compressed-tensors", "q_proj.weight_packed (I32)"),
        ("nvfp4", "NVFP4", f"{Q}_packed (U8)"),
        ("mxfp4 of openai", "MXFP4 by OpenAI's own names", "q_proj.blocks (U8)"),
        ("mxfp4", "MXFP4", "q_proj_blocks (U8)"),
        ("mlx", "MLX", f"{Q} (U32)"),
        ("vptq", "VPTQ", "q_proj.indices (I32)"),
        ("spqr", "SpQR", "q_proj.dense_weights (I64)"),
        ("quip", "QuIP#", "q_proj.Qidxs (I64)"),
        ("qtip", "QTIP", "q_proj.trellis (I16)"),
        ("marlin", "Marlin", "q_proj.B (I32)"),
        ("qqq", "QQQ", "q_proj.B (I32)"),
        ("quanto of four bits", "quanto", "q_proj.weight._data._data (U8)"),
        ("of next year", "an unknown format", "q_proj.codes8 (I8)"),
        ("config", "FP8 with block scales", "quantization_config in config.json (fp8)"),
        ("config of the text", "AWQ", "text_config.quantization_config in config.json (awq)"),
        ("modelopt", "ModelOpt", "hf_quant_config.json"),
    ],
)
def test_it_is_called_what_people_call_it(
    kind: str, title: str, where: str, stored: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(stored(kind))
    assert title in str(caught.value)
    assert where in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_that_it_is_quantized(kind: str, stored: Callable[[str], Path]) -> None:
    report = lora_tools.inspect(stored(kind))
    assert report.totals["kind"].startswith("quantized checkpoint (")
    assert any(note.startswith("quantized (by ") for note in report.notes)
    specs = open_checkpoint(stored(kind), decoded=False).specs
    assert {t.tensor for t in report.stored} == set(specs)


def test_buffers_of_whole_numbers_are_no_sign(plain: Path, tmp_path: Path) -> None:
    """A mask, positions, counters, a tokenizer's bytes, scales: none is a weight's code."""
    buffers = {
        "model.position_ids": torch.arange(8)[None],
        "model.norm.num_batches_tracked": torch.tensor(3),
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.layers.0.attn.masked": torch.ones(8, 8, dtype=torch.bool),
        "model.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        "model.logit_scale": torch.ones(()),
        "model.layers.0.q_norm.scale": torch.ones(4),
        "model.layers.0.layer_scale.weight": torch.ones(4),
        "model.quantizer.codes": torch.zeros(4, 4, dtype=torch.int64),
        "model.quantizer.codebooks": torch.ones(2, 4),
    }
    base = checkpoint(tmp_path / "base", weights(layers=1) | buffers)
    (base / "config.json").write_text('{"quantization_config": null, "quantization": {}}')
    assert open_checkpoint(base).scheme is None
    lora_tools.merge(base, [plain / "adapter"], tmp_path / "out", allow_other_base=True)
    for name, tensor in buffers.items():
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "companion", ["weight_scale", "weight_scales", "weight_scale_2", "scale_weight", "scales"]
)
def test_a_learned_scale_beside_a_float_weight_is_plain(
    companion: str, dtype: torch.dtype, plain: Path, tmp_path: Path
) -> None:
    """It is a parameter like any other; a config that says otherwise is believed."""
    base = {name: tensor.to(dtype) for name, tensor in weights(layers=1).items()}
    name = f"model.layers.0.q_proj.{companion}"
    path = checkpoint(tmp_path / "base", base | {name: torch.ones(16, 1, dtype=dtype)})
    tuned = checkpoint(tmp_path / "tuned", moved(base) | {name: torch.full((16, 1), 2.0).to(dtype)})
    assert open_checkpoint(path).scheme is None
    lora_tools.extract(path, tuned, tmp_path / "a", rank=1)
    lora_tools.merge(path, [tmp_path / "a"], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged[name], torch.full((16, 1), 2.0))
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(CheckpointError, match="quantized as"):
        open_checkpoint(path)


# ------------------------------------------------------------------------------- four bits: read


@pytest.fixture(scope="module")
def four(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``tuned`` in four bits, and what each dequantizes to as ``plain-…``."""
    folder = tmp_path_factory.mktemp("four")
    for side in ("base", "tuned"):
        lora_tools.quantize(plain / side, folder / side, blocksize=32)
        lora_tools.dequantize(folder / side, folder / f"plain-{side}")
    return folder


def factors(adapter: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize("sides", ["base", "tuned", "base and tuned"])
def test_four_bits_on_either_side_of_extract(
    sides: str, four: Path, plain: Path, tmp_path: Path
) -> None:
    """The factors are those of what they dequantize to; the digests name what is stored."""
    given = {side: four / side for side in ("base", "tuned")}
    same = {side: four / f"plain-{side}" for side in given}
    for side in {"base", "tuned"} - set(sides.split(" and ")):
        given[side] = same[side] = plain / side
    done = lora_tools.extract(given["base"], given["tuned"], tmp_path / "a", rank=2)
    lora_tools.extract(same["base"], same["tuned"], tmp_path / "b", rank=2)
    mine, wanted = factors(tmp_path / "a"), factors(tmp_path / "b")
    assert mine.keys() == wanted.keys()
    assert any("lora_A" in key for key in mine)
    for key, tensor in wanted.items():
        assert mine[key].dtype == tensor.dtype
        torch.testing.assert_close(mine[key], tensor, atol=1e-5, rtol=1e-4)
    stored = [open_checkpoint(path, decoded=False).digest({}) for path in given.values()]
    assert [i.digest for i in done.inputs[:2]] == stored
    notes = [note for note in done.notes if note.endswith("its dequantized numbers are used")]
    assert len(notes) == len(sides.split(" and "))


def test_no_rank_is_spent_on_the_noise_of_codes(tmp_path: Path) -> None:
    """What four bits cost is foretold by the codes; of rank four are found four directions."""
    noise = torch.Generator().manual_seed(0)
    plain = {Q: torch.randn(320, 256, generator=noise) * 0.02}
    planted = torch.randn(320, 4, generator=noise) @ torch.randn(4, 256, generator=noise)
    base = checkpoint(tmp_path / "plain", plain)
    tuned = checkpoint(tmp_path / "tuned", {Q: plain[Q] + planted * 2e-3})
    same = {"blocksize": 64, "double_quant": False, "quant_type": "fp4"}
    for name, options in (("nf4", {}), ("fp4", same)):
        report = lora_tools.quantize(base, tmp_path / name, **options)
        lost = (report.tensors[0].relative_error * report.tensors[0].norm) ** 2
        pair = tmp_path / name, tuned
        done = lora_tools.extract(*pair, tmp_path / f"a-{name}", noise_floor=True)
        [module] = done.modules
        assert module.rank == 4
        said = module.quantization_noise * module.delta_norm**2
        assert said == pytest.approx(lost, rel=0.1)
        assert done.totals["quantization_noise"] == pytest.approx(module.quantization_noise)
        assert done.notes[-1].startswith(
            f"about {module.quantization_noise:.1%} of the change's energy"
        )
        assert lora_tools.diff(*pair).spectra[0].rank == 4
    with pytest.raises(UsageError, match="and gavish_donoho=True does not know its rounding"):
        lora_tools.extract(*pair, tmp_path / "a", gavish_donoho=True)


def test_a_scheme_that_tells_no_noise(stepped: dict[str, Path], tmp_path: Path) -> None:
    pair = stepped["base"], stepped["tuned"]
    done = lora_tools.extract(*pair, tmp_path / "a", rank=1)
    assert all(math.isnan(module.quantization_noise) for module in done.modules)
    assert math.isnan(done.totals["quantization_noise"])
    assert not any("energy is what rounding" in note for note in done.notes)
    with pytest.raises(UsageError, match="noise_floor=True does not know"):
        lora_tools.extract(*pair, tmp_path / "b", noise_floor=True)
    [first, *_] = lora_tools.diff(*pair).notes
    assert "the error of its rounding is not known for" in first
    assert done.notes[0] == first


def test_a_quantized_tensor_saved_whole_is_rounded(four: Path, plain: Path, tmp_path: Path) -> None:
    """It is decoded in float32, and saved in the dtype that it was quantized from."""
    base = {n: t.bfloat16() for n, t in weights(layers=1).items()}
    small, tuned = dict(base), checkpoint(tmp_path / "tuned", moved(base))
    del small["model.layers.0.up_proj.weight"]
    checkpoint(tmp_path / "base", small)
    lora_tools.quantize(tuned, tmp_path / "four")
    lora_tools.extract(tmp_path / "base", tmp_path / "four", tmp_path / "a", rank=1)
    [saved] = [t for name, t in factors(tmp_path / "a").items() if "up_proj" in name]
    lora_tools.dequantize(tmp_path / "four", tmp_path / "plain")
    wanted = load_file(tmp_path / "plain/model.safetensors")["model.layers.0.up_proj.weight"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved, wanted)


def test_four_bits_as_the_base_of_others(four: Path, plain: Path, tmp_path: Path) -> None:
    """``verify`` of an adapter, ``diff``, and the names and shapes for ``convert --base``."""
    base, same = four / "base", four / "plain-base"
    lora_tools.extract(base, plain / "tuned", tmp_path / "a", rank=16)
    found = lora_tools.verify(tmp_path / "a", base=base, tuned=plain / "tuned", max_error=1e-4)
    assert found.inputs[1].digest == open_checkpoint(base, decoded=False).digest({})
    pairs = [(base, plain / "tuned"), (same, plain / "tuned")]
    mine, wanted = (lora_tools.diff(*pair).totals["relative_change"] for pair in pairs)
    assert mine == pytest.approx(wanted)
    for given in (base, same):
        lora_tools.convert(plain / "adapter", tmp_path / given.name, to="loralib", base=given)
    assert tree(tmp_path / "base").keys() == tree(tmp_path / "plain-base").keys()


@pytest.mark.parametrize("verb", ["quantize", "unmerge"])
def test_what_cannot_be_done_to_four_bits(
    verb: str, four: Path, plain: Path, tmp_path: Path
) -> None:
    given = four / "base"
    if verb == "quantize":  # which takes it in other settings of the format
        given = tmp_path / "default"
        lora_tools.quantize(four / "base", given)
    with pytest.raises(CheckpointError, match="loratools dequantize"):
        PLACES[verb](given, plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_are_decoded_alone(four: Path) -> None:
    """Whatever rows of a weight are asked for, also from within a block."""
    view = open_checkpoint(four / "base")
    whole = view.tensor(Q)
    for start, stop in ((0, 16), (0, 1), (3, 7), (15, 16), (5, 5)):
        rows = view.rows(Q, (16, 16), start, stop)
        assert torch.equal(rows, whole[start:stop])
    assert view.scheme is not None
    assert view.stored.specs[Q].dtype == "U8"
    assert view.specs[Q].dtype == "F32"


def test_codes_of_two_kinds(four: Path, tmp_path: Path) -> None:
    """What a row decodes is not all: what is left and shows a sign is refused."""
    shutil.copytree(four / "base", tmp_path / "mixed")
    file = tmp_path / "mixed/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"other.weight": torch.ones(4, 4).to(F8)}, file)
    with pytest.raises(CheckpointError, match=r"other.weight \(F8_E4M3\)"):
        open_checkpoint(tmp_path / "mixed")


# ----------------------------------------------------------------------- a row is all that it takes


@dataclasses.dataclass(frozen=True)
class Stepped:
    """``P.weight`` as whole numbers ``P_blocks`` and a step for each row, ``P_scales``."""

    name: str
    specs: dict[str, TensorSpec]

    @property
    def plain(self) -> TensorSpec:
        return TensorSpec(self.name, "BF16", self.specs["codes"].shape)

    @property
    def label(self) -> str:
        return "stepped"


def find_stepped(stored: Checkpoint) -> dict[str, Stepped]:
    found = {}
    for name, spec in stored.specs.items():
        if name.endswith("_blocks"):
            module = name.removesuffix("_blocks")
            parts = {"codes": spec, "steps": stored.specs[f"{module}_scales"]}
            found[f"{module}.weight"] = Stepped(f"{module}.weight", parts)
    return found


def decode_stepped(
    weight: Stepped, parts: Mapping[str, torch.Tensor], out: torch.Tensor, first: int
) -> None:
    rows = slice(first, first + len(out))
    out.copy_(parts["codes"][rows].float() * parts["steps"][rows])


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """A base and its tuned copy in a scheme of our own, and in plain numbers; an adapter."""
    row = Scheme("stepped", "steps of rows", find_stepped, decode_stepped, files=("steps.json",))
    monkeypatch.setattr(schemes, "SCHEMES", (*schemes.SCHEMES, row))
    made = {}
    base = {n: t.bfloat16() for n, t in weights(layers=2).items()}
    for side, tensors in (("base", base), ("tuned", moved(base))):
        stored, plain = dict(tensors), dict(tensors)
        for name in (n for n in tensors if n.endswith("_proj.weight")):
            module, values = name.removesuffix(".weight"), stored.pop(name).float()
            steps = values.abs().amax(1, keepdim=True) / 127
            stored[f"{module}_blocks"] = (values / steps).round().abs().to(torch.uint8)
            stored[f"{module}_scales"] = steps
            plain[name] = (stored[f"{module}_blocks"].float() * steps).bfloat16()
        made[side] = checkpoint(tmp_path / side, stored, shards=3)
        made[f"plain {side}"] = checkpoint(tmp_path / f"plain-{side}", plain, shards=3)
        config = {"model_type": "llama", "quantization_config": {"quant_method": "steps"}}
        (made[side] / "config.json").write_text(json.dumps(config))
        (made[side] / "steps.json").write_text("{}")
    made["adapter"] = adapter(tmp_path / "adapter", linear_shapes(base))
    return made


def numbers(folder: Path) -> Tensors:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_every_verb_reads_a_new_row(stepped: dict[str, Path], tmp_path: Path) -> None:
    """Parts in other shards than each other, names that are not the weight's, a file that says so:
    what is made of it is what is made of the plain numbers."""
    given = ("base", "tuned"), ("plain base", "plain tuned")
    for i, (base, tuned) in enumerate(given):
        out = tmp_path / f"out{i}"
        out.mkdir()
        lora_tools.merge(stepped[base], [stepped["adapter"]], out / "merged")
        lora_tools.merge(stepped[base], [], out / "cast", dtype="bfloat16")
        lora_tools.extract(stepped[base], stepped[tuned], out / "extracted", rank=2)
        found = lora_tools.diff(stepped[base], stepped[tuned])
        (out / "diff").write_text(json.dumps([(s.module, s.norm) for s in found.spectra]))
        merged = lora_tools.verify(
            out / "merged", base=stepped[base], adapters=[stepped["adapter"]]
        )
        assert merged.totals["same"]
    same = [numbers(tmp_path / f"out{i}/cast") for i in (0, 1)]
    assert same[0].keys() == same[1].keys()
    for name, tensor in same[1].items():
        assert torch.equal(same[0][name], tensor)
    assert not (tmp_path / "out0/cast/steps.json").exists()
    assert "quantization_config" not in (tmp_path / "out0/cast/config.json").read_text()
    theirs, wanted = (numbers(tmp_path / f"out{i}/merged") for i in (0, 1))
    for name, tensor in wanted.items():  # the plain base is rounded twice
        torch.testing.assert_close(theirs[name], tensor, atol=0.05, rtol=0.02)
    lora_tools.dequantize(stepped["base"], tmp_path / "plain")
    for name, tensor in numbers(stepped["plain base"]).items():
        assert torch.equal(numbers(tmp_path / "plain")[name], tensor)
    numbers_in = 2 * (16 * 16 + 32 * 16)
    assert lora_tools.inspect(stepped["base"]).totals["quantized"] == {
        "weights": 4,
        "schemes": {"stepped": 4},
        "dtypes": {"BF16": 4},
        "numbers": numbers_in,
        "bits_per_parameter": 8 * (numbers_in + 4 * 2 * (16 + 32)) / numbers_in,
    }
    with pytest.raises(UsageError, match=r"in steps of rows;.*it was rounded from"):
        lora_tools.verify(stepped["tuned"], base=stepped["base"], adapters=[stepped["adapter"]])
    with pytest.raises(UsageError, match=r"requantize=True: .* can be read but not written"):
        lora_tools.merge(stepped["base"], [stepped["adapter"]], tmp_path / "x", requantize=True)
    with pytest.raises(
        UsageError, match="reversible=True: a BASE in steps of rows cannot be restored"
    ):
        lora_tools.merge(stepped["base"], [stepped["adapter"]], tmp_path / "x", reversible=True)


def test_people_are_told_of_a_new_row(
    stepped: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(stepped["base"])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantized: 4 weights (4 in stepped), 1,536 numbers at 10.000 bits, read" in said


def test_four_bits_made_of_a_new_row(stepped: dict[str, Path], tmp_path: Path) -> None:
    """They are those of the plain numbers, which are rounded before; and to ``verify``, codes of
    another scheme are no four bits that stay as they are."""
    lora_tools.dequantize(stepped["base"], tmp_path / "plain")
    lora_tools.merge(stepped["base"], [stepped["adapter"]], tmp_path / "merged")
    for source, adapters in (("plain", []), ("merged", [stepped["adapter"]])):
        lora_tools.quantize(tmp_path / source, tmp_path / f"{source}-4")
        done = lora_tools.quantize(stepped["base"], tmp_path / f"{source}-1", adapters=adapters)
        assert f"{stepped['base']}: is in steps of rows; errors are" in done.notes[0]
        mine, wanted = (numbers(tmp_path / f"{source}-{n}") for n in (1, 4))
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(mine[name], tensor), name
        for n in (1, 4):
            found = lora_tools.verify(
                tmp_path / f"{source}-{n}", against=stepped["base"], adapters=adapters
            )
            assert found.totals["same"]
    assert not (tmp_path / "plain-1/steps.json").exists()


def test_a_new_row_is_exported_as_plain_numbers(stepped: dict[str, Path], tmp_path: Path) -> None:
    base, plain = stepped["base"], stepped["plain base"]
    graph(tmp_path / "graph", plain, numbers(plain))
    done = lora_tools.export(
        base, tmp_path / "out", graph=tmp_path / "graph", task="features", no_verify=True
    )
    written = numbers(tmp_path / "out")
    for name, tensor in numbers(plain).items():
        assert torch.equal(written[name], tensor)
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert done.inputs[0].role == "base"
    assert done.inputs[0].digest == open_checkpoint(base, decoded=False).digest({})
    with pytest.raises(UsageError, match="in steps of rows, which"):
        lora_tools.export(base, base, force=True, task="features")


def test_rows_of_a_weight_in_memory(stepped: dict[str, Path]) -> None:
    """A view by names in memory of a decoded checkpoint decodes no more than it is asked for."""
    side = open_checkpoint(stepped["base"])
    name, shape = Q, (16, 16)
    piece = Piece(name, 4, 8)
    spec = TensorSpec("half.weight", "BF16", (8, 16))
    how = Loaded("by hand", {spec.name: LoadedTensor(spec, (piece,))}, {}, ())
    view = LoadedView(side, how)
    assert view.scheme is side.scheme
    assert view.stored is side.stored
    assert torch.equal(view.tensor(spec.name), side.rows(name, shape, 4, 12))
    assert view.rounded(spec.name).dtype == torch.bfloat16
    assert view.digest({}) == side.stored.digest({})


@pytest.mark.parametrize("verb", ["merge", "merge --dtype", "quantize", "dequantize", "verify"])
def test_what_is_decoded_counts_as_working_memory(
    verb: str, stepped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole weight is held in float32, beside what is made of it."""
    seen: dict[str, int] = {}
    own = threads.run

    def spy(tasks: Any, *args: Any, **options: Any) -> Any:
        seen.update({task.label: task.nbytes for task in tasks})
        return own(tasks, *args, **options)

    base, adapters = stepped["base"], [stepped["adapter"]]
    if verb == "verify":
        lora_tools.merge(base, adapters, tmp_path / "merged")
    monkeypatch.setattr(threads, "run", spy)
    {
        "merge": lambda: lora_tools.merge(base, adapters, tmp_path / "out"),
        "merge --dtype": lambda: lora_tools.merge(base, [], tmp_path / "out", dtype="float16"),
        "quantize": lambda: lora_tools.quantize(base, tmp_path / "out"),
        "dequantize": lambda: lora_tools.dequantize(base, tmp_path / "out"),
        "verify": lambda: lora_tools.verify(tmp_path / "merged", base=base, adapters=adapters),
    }[verb]()
    made = 2 * 256 + 128 if verb == "quantize" else 0  # the tensor in bfloat16, and its codes
    assert seen[Q] >= 4 * 256 + made
    assert seen["model.layers.0.norm.weight"] < 4 * 256
