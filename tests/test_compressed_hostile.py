"""What configs say of compressed-tensors' formats and of ModelOpt's; what does not fit them is
refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tools.errors import CheckpointError, NonFiniteError
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.quantized.compressed_config import groups_of
from lora_tools.formats.quantized.compressed_find import find_compressed
from lora_tools.formats.quantized.modelopt import find_nvfp4
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint
from tests.compressed_checkpoints import STEM, Q, form, made, opened
from tests.forms_compressed import Tensors, config_of, scheme_of

# -------------------------------------------------------------------------------- what configs say


def test_which_group_a_module_is_in() -> None:
    """A name before a pattern before a class, as the package matches them."""
    schemes = {
        str(n): scheme_of("pack-quantized", num_bits=n, strategy="channel") for n in (2, 3, 4, 5)
    }
    targets = (["Linear"], ["re:.*q_proj$"], ["a.q_proj"], ["Embedding"])
    for scheme, names in zip(schemes.values(), targets, strict=True):
        scheme.targets = names
    groups = groups_of(config_of(schemes, ignore=["lm_head", "re:.*gate$"]))
    assert groups is not None
    for module, number in {"a.q_proj": 4, "b.q_proj": 3, "b.o_proj": 2, "embed_tokens": 5}.items():
        assert groups.settings_of(module).bits == number
    assert [groups.ignores(m) for m in ("lm_head", "a.gate", "a.gates")] == [True, True, False]
    del schemes["2"], schemes["5"]
    left = groups_of(config_of(schemes))
    assert left is not None
    with pytest.raises(CheckpointError, match=r"b\.o_proj\.weight: .* no config group"):
        left.settings_of("b.o_proj")


def test_formats_that_say_all_by_their_names(tmp_path: Path) -> None:
    """NVFP4 and MXFP4 are read without ``config_groups``; the number of bits of others is not
    known."""
    for kind in ("nvfp4", "mxfp4"):
        stored, config, plain = form(kind)
        entry = {k: config["quantization_config"][k] for k in ("quant_method", "format")}
        view = opened(made(tmp_path / kind, stored, {**config, "quantization_config": entry}))
        assert torch.equal(view.rounded(Q), plain[Q])
    stored, config, _ = form("int4 in groups")
    entry = {k: config["quantization_config"][k] for k in ("quant_method", "format")}
    made(tmp_path / "int4", stored, {**config, "quantization_config": entry})
    with pytest.raises(CheckpointError, match="no config_groups"):
        open_checkpoint(tmp_path / "int4")


Change = Callable[[Tensors, dict[str, Any]], Any]


def entry_of(config: dict[str, Any]) -> Any:
    return config["quantization_config"]


def weights_of(config: dict[str, Any]) -> Any:
    return next(iter(entry_of(config)["config_groups"].values()))["weights"]


LIES: dict[str, tuple[str, Change, str]] = {
    "a scale is missing": (
        "int4 in groups",
        lambda t, _: t.pop(f"{Q}_scale"),
        rf"{Q}_scale: expected BF16 \[16, 2\]",
    ),
    "a scale of another weight": (
        "int4 in groups",
        lambda t, _: t.update({f"{Q}_scale": torch.ones(16, 4)}),
        rf"{Q}_scale: expected BF16 \[16, 2\] .* found F32 \[16, 4\]",
    ),
    "a scale of whole numbers": (
        "int8",
        lambda t, _: t.update({f"{Q}_scale": torch.ones(16, 1, dtype=torch.int32)}),
        rf"{Q}_scale: expected",
    ),
    "a truncated pack": (
        "int4 in groups",
        lambda t, _: t.update({f"{Q}_packed": t[f"{Q}_packed"][:, :1]}),
        rf"{Q}_packed: expected I32 \[16, 2\]",
    ),
    "a pack of bytes": (
        "int4 in groups",
        lambda t, _: t.update({f"{Q}_packed": t[f"{Q}_packed"].view(torch.uint8)}),
        rf"{Q}_packed: expected I32",
    ),
    "no shape": (
        "int4 in groups",
        lambda t, _: t.pop(f"{Q}_shape"),
        rf"{Q}_shape: expected the two or three numbers",
    ),
    "a lying shape": (
        "int4 in groups",
        lambda t, _: t.update({f"{Q}_shape": torch.tensor([16, 24])}),
        rf"{Q}_packed: expected I32 \[16, 3\]",
    ),
    "a negative shape": (
        "int4 in groups",
        lambda t, _: t.update({f"{Q}_shape": torch.tensor([-16, -16])}),
        rf"{Q}_packed",
    ),
    "groups that do not fit": (
        "int4 in groups",
        lambda _, c: weights_of(c).update(group_size=5),
        rf"{Q}: rows of 16 numbers cannot be divided into groups of 5",
    ),
    "other bits": (
        "int4 in groups",
        lambda _, c: weights_of(c).update(num_bits=8),
        rf"{Q}_packed: expected I32 \[16, 4\]",
    ),
    "zero points are missing": (
        "int4 with zero points",
        lambda t, _: t.pop(f"{Q}_zero_point"),
        rf"{Q}_zero_point: expected I32 \[2, 4\]",
    ),
    "a part that is not known": (
        "fp8",
        lambda t, _: t.update({f"{Q}_scale_2": torch.ones(1)}),
        rf"{Q}_scale_2 .* unknown beside a weight",
    ),
    "no global scale": (
        "nvfp4",
        lambda t, _: t.pop(f"{Q}_global_scale"),
        rf"{Q}_global_scale: expected F32 \[1\]",
    ),
    "no codes": (
        "fp8",
        lambda t, _: t.pop(Q),
        rf"{Q}_scale: weight or weight_packed is expected beside it .* found none",
    ),
    "no packed codes": (
        "int4 with zero points",
        lambda t, _: t.pop(f"{Q}_packed"),
        rf"{Q}_\w+: weight or weight_packed is expected beside it",
    ),
    "plain, with a scale": (
        "fp8",
        lambda t, _: t.update({Q: t[Q].bfloat16()}),
        rf"{Q}: expected F8_E4M3 \[16, 16\]",
    ),
    "codes of an ignored module": (
        "fp8",
        lambda _, c: entry_of(c).update(ignore=["re:.*q_proj"]),
        rf"{Q}: stored as codes, but .* not quantized",
    ),
    "a pattern that is none": (
        "fp8",
        lambda _, c: entry_of(c).update(ignore=["re:("]),
        "is not a pattern",
    ),
    "sparse": (
        "fp8",
        lambda _, c: entry_of(c).update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config says 'sparse-24-bitmask'",
    ),
    "rotated": (
        "fp8",
        lambda _, c: entry_of(c).update(transform_config={"config_groups": {"u": {}}}),
        r"transform_config:.*rotated",
    ),
    "a form to come": (
        "fp8",
        lambda _, c: next(iter(entry_of(c)["config_groups"].values())).update(format="marlin-24"),
        "'marlin-24' of float8 by tensor",
    ),
    "no number of bits": (
        "fp8",
        lambda _, c: weights_of(c).update(num_bits="8"),
        "is not a way to store weights",
    ),
    "blocks of nothing": (
        "fp8 in blocks",
        lambda _, c: weights_of(c).update(block_structure=[0, 5]),
        "is not a way to store weights",
    ),
    "groups that are none": (
        "fp8",
        lambda _, c: entry_of(c).update(config_groups={"a": ["Linear"]}),
        "config group a names no targets",
    ),
    "modelopt: a lying scale": (
        "modelopt",
        lambda t, _: t.update({f"{Q}_scale": t[f"{Q}_scale"][:3]}),
        rf"{Q}_scale: expected F8_E4M3 \[16, 1\]",
    ),
    "modelopt: no scale": (
        "modelopt",
        lambda t, _: t.pop(f"{Q}_scale"),
        rf"{Q}_scale: expected F8_E4M3 \[16, 1\] .* found none",
    ),
    "modelopt: many global scales": (
        "modelopt",
        lambda t, _: t.update({f"{Q}_scale_2": torch.ones(16)}),
        rf"{Q}_scale_2 F32 \[16\]: expected one number",
    ),
    "modelopt: inputs are scaled": (
        "modelopt",
        lambda t, _: t.update({f"{STEM}pre_quant_scale": torch.ones(16)}),
        r"q_proj\.pre_quant_scale:.*a weight in NVFP4",
    ),
    "modelopt: other groups": (
        "modelopt",
        lambda _, c: entry_of(c).update(group_size=32),
        rf"{Q}: NVFP4 in groups of 32",
    ),
    "modelopt: another algorithm": (
        "modelopt",
        lambda _, c: entry_of(c).update(quant_algo="W4A8_NVFP4_FP8"),
        rf"{Q}: stored as NVFP4, but quant_algo says 'W4A8_NVFP4_FP8'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_does_not_fit_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    kind, change, said = LIES[lie]
    stored, config, _ = form(kind)
    config = json.loads(json.dumps(config))
    change(stored, config)
    made(tmp_path / "q", stored, config)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "q")


JUNK = (None, 0, -1, 3, 10**9, 1.5, True, "x", "re:(", "128x128", [], [1], {}, {"a": 1}, ["a"])


@pytest.mark.parametrize("kind", ["mixed", "fp8 in blocks", "mxfp4", "modelopt"])
def test_configs_of_anything(kind: str) -> None:
    """Whatever stands in a config's place: it is read, or refused in words."""
    stored, config, _ = form(kind)
    specs = {n: TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in stored.items()}
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        paths.append(path)
        for key in value if isinstance(value, dict) else ():
            walk(value[key], (*path, key))

    walk(config["quantization_config"], ("quantization_config",))
    outcomes = set()
    for *path, last in paths:
        for junk in JUNK:
            lying = json.loads(json.dumps(config))
            inner = lying
            for key in path:
                inner = inner[key]
            inner[last] = junk
            try:
                find_compressed(specs, lying, lambda name: stored[name].tolist())
                find_nvfp4(specs, lying, {})
                outcomes.add("read")
            except CheckpointError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["int4 in groups", "nvfp4", "modelopt"])
def test_scales_that_are_no_numbers(kind: str, bad: float, tmp_path: Path) -> None:
    stored, config, _ = form(kind)
    part = {"nvfp4": "_global_scale", "modelopt": "_scale_2"}.get(kind, "_scale")
    stored[Q + part] = torch.full_like(stored[Q + part], bad)
    view = open_checkpoint(made(tmp_path / "q", stored, config))
    with pytest.raises(NonFiniteError, match=rf"{Q}{part}: holds an inf or a NaN"):
        view.tensor(Q)


def test_a_power_of_two_that_is_none(tmp_path: Path) -> None:
    stored, config, _ = form("mxfp4")
    stored[f"{Q}_scale"][0] = 255
    view = open_checkpoint(made(tmp_path / "q", stored, config))
    with pytest.raises(NonFiniteError, match=Q):
        view.tensor(Q)


def test_what_belongs_to_activations_leaves_with_the_codes(tmp_path: Path) -> None:
    stored, config, plain = form("mixed")
    view = opened(made(tmp_path / "q", stored, config))
    assert "model.layers.0.k_scale" not in view.specs
    stored["model.layers.0.k_scale"] = torch.full((1,), torch.nan)  # of no weight's numbers
    view = opened(made(tmp_path / "again", stored, config))
    assert torch.equal(view.rounded(Q), plain[Q])
