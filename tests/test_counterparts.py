"""Models in their makers' layout and in diffusers': which rows of which tensor are which, with
diffusers' own converters as the oracle; and adapters of either merged into either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.counterparts.table import Counterpart, counterparts

from .diffusers_layouts import (
    CASES,
    Tensors,
    by_makers,
    clip_text,
    first_column,
    laid_out,
    numbered,
    original_of,
    recorded,
    recorded_anew,
    specs,
    xlabs,
)


def made(counterpart: Counterpart, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    stored = [tensors[piece.stored] for piece in counterpart.pieces]
    if len(stored) == 1 and stored[0].dim() > 2:
        return stored[0]
    pairs = zip(stored, counterpart.pieces, strict=True)
    return torch.cat([x[p.first : p.first + p.rows] for x, p in pairs])


@pytest.fixture(scope="module")
def layouts() -> dict[str, Any]:
    return recorded()


@pytest.mark.sweep(0)
def test_the_record_is_what_diffusers_does(layouts: dict[str, Any]) -> None:
    pytest.importorskip("diffusers")
    assert recorded_anew() == layouts, "run: python -m tests.diffusers_layouts"


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_that_diffusers_converter_puts_there(
    case: str, layouts: dict[str, Any]
) -> None:
    shapes = {name: tuple(shape) for name, shape in layouts[case]["shapes"].items()}
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    known = by_makers(counterparts(specs(theirs)))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    original = original_of(case, shapes)
    back = counterparts(specs(original))
    original = first_column(original)
    there = laid_out(original, layouts[case]["rows"])
    assert back.keys() >= covered
    for name in sorted(covered):
        assert torch.equal(there[name], made(back[name], original)), name
    for name, each in known.items():  # and the other way about
        assert torch.equal(original[name], made(each, there)), name
    # What is left over has one name in both, or is of a kind that no adapter acts on.
    same = shapes.keys() - covered
    weights = {k for k in same if k.endswith(".weight") and len(shapes[k]) > 1}
    assert all(k in there for k in weights)


def test_open_clip_as_diffusers_converter_cuts_it(layouts: dict[str, Any]) -> None:
    wrapper = "conditioner.embedders.1."
    original = numbered({wrapper + name: shape for name, shape in clip_text().items()})
    known = counterparts(specs(original))
    original = first_column(original)
    there = laid_out(original, layouts["open_clip"]["rows"])
    assert {name.removeprefix(wrapper) for name in known} == there.keys()
    for name, each in known.items():
        assert torch.equal(there[name.removeprefix(wrapper)], made(each, original)), name


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASES = {
    "flux": ("flux_8", "transformer."),
    "sd1": ("sd1", "unet."),
    "sdxl": ("sdxl", "unet."),
    "sd3": ("sd3", "transformer."),
    "wan": ("wan", "transformer."),
}


def in_both(case: str) -> tuple[Tensors, Tensors]:
    """A model in the original's layout and in diffusers'."""
    shapes = recorded()[BASES[case][0]]["shapes"]
    theirs = {k: noise(tuple(shape), i) for i, (k, shape) in enumerate(shapes.items())}
    known = counterparts(specs(theirs))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    theirs = {name: x for name, x in theirs.items() if name in covered}
    return {name: made(each, theirs).contiguous() for name, each in known.items()}, theirs


def adapter(path: Path, model: Tensors, flat: bool, prefix: str) -> Tensors:
    """Factors of every linear layer and convolution, and the model with them."""
    tensors, result = {}, dict(model)
    for i, (name, weight) in enumerate(sorted(model.items())):
        if not name.endswith(".weight") or weight.dim() < 2:
            continue
        A = noise((2, *weight.shape[1:]), 100 + i)
        B = noise((weight.shape[0], 2, *[1] * (weight.dim() - 2)), 200 + i)
        module = name.removesuffix(".weight")
        key = f"lora_unet_{module.replace('.', '_')}" if flat else prefix + module
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = A, B
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        result[name] = weight + 0.5 * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
    save_file(tensors, path)
    return result


@pytest.mark.sweep(4)
@pytest.mark.parametrize("wrapper", ["", "model.diffusion_model."])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("case", BASES)
def test_an_adapter_of_one_layout_merges_into_the_other(
    case: str, flat: bool, wrapper: str, tmp_path: Path
) -> None:
    original, theirs = in_both(case)
    for mine, base in ((theirs, original), (original, theirs)):
        merged = adapter(tmp_path / "l.safetensors", mine, flat, BASES[case][1])
        save_file({wrapper + k: v for k, v in base.items()}, tmp_path / "b.safetensors")
        out = tmp_path / "m.safetensors"
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], out, force=True)
        found = load_file(out)
        known = counterparts(specs(mine))
        for name in base:
            wanted = made(known[name], merged) if name in known else merged[name]
            torch.testing.assert_close(
                found[wrapper + name],
                wanted,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def effects(path: Path) -> Tensors:
    """By the name of a module in a file, its change of the weight."""
    file, result = load_file(path), {}
    for key in file:
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{a}.weight"):
                module = key.removesuffix(f".{a}.weight")
                A, B = file[key], file[f"{module}.{b}.weight"]
                scale = file.get(f"{module}.alpha", torch.tensor(float(len(A)))) / len(A)
                product = scale * (B.flatten(1) @ A.flatten(1))
                result[module] = product.reshape(B.shape[0], *A.shape[1:])
    return result


# The layout that kohya's files have: sd-scripts 0.9 (networks/lora.py, lora_sd3.py, lora_flux.py),
# musubi-tuner: ``lora_unet_`` before the names of the modules that they train, with underscores.
KOHYA = {case: "diffusers" if case == "sd1" else "original" for case in BASES}


def comfyui(case: str, original: Tensors, theirs: Tensors) -> set[str]:
    """What ComfyUI knows modules by (comfy/lora.py, ``model_lora_keys_unet``, v0.3.77): the makers'
    names with dots and flat; diffusers' flat of a UNet (with dots only as attention processors),
    and under ``transformer.`` of SD3 and FLUX. Of Wan it has none of diffusers' names."""
    own = [n.removesuffix(".weight") for n in original if n.endswith(".weight")]
    other = [n.removesuffix(".weight") for n in theirs if n.endswith(".weight")]
    known = {f"lora_unet_{n.replace('.', '_')}" for n in own} | {
        f"diffusion_model.{n}" for n in own
    }
    if case in ("sd1", "sdxl"):
        known |= {f"lora_unet_{n.replace('.', '_')}" for n in other}
    if case in ("sd3", "flux"):
        known |= {f"transformer.{n}" for n in other}
        known |= {f"lora_transformer_{n.replace('.', '_')}" for n in other}
    return known


@pytest.mark.sweep(4)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("mine_is", ["original", "diffusers"])
@pytest.mark.parametrize("case", BASES)
def test_converted_into_the_layout_of_its_readers(
    case: str, mine_is: str, to: str, tmp_path: Path
) -> None:
    original, theirs = in_both(case)
    mine, base = (original, theirs) if mine_is == "original" else (theirs, original)
    merged = adapter(tmp_path / "l.safetensors", mine, flat=True, prefix="")
    deltas = {name: merged[name] - mine[name] for name in mine}
    known = counterparts(specs(mine))
    wanted = KOHYA[case] if to == "kohya" else "diffusers"
    save_file(base, tmp_path / "b.safetensors")
    out = tmp_path / "o.safetensors"
    lora_tools.convert(tmp_path / "l.safetensors", out, to=to, base=tmp_path / "b.safetensors")
    found = effects(out)
    if to == "kohya" or case in ("sd3", "flux"):
        assert found.keys() <= comfyui(case, original, theirs)
    for name, weight in (original if wanted == "original" else theirs).items():
        if not name.endswith(".weight") or weight.dim() < 2:
            continue
        module = name.removesuffix(".weight")
        flat = f"lora_unet_{module.replace('.', '_')}"
        got = found.pop(flat if to == "kohya" else BASES[case][1] + module)
        delta = deltas[name] if wanted == mine_is else made(known[name], deltas)
        torch.testing.assert_close(got, delta, rtol=1e-4, atol=1e-4, msg=name)
    assert not found


@pytest.mark.parametrize("unlike", ["alpha", "dora", "dtype"])
def test_what_does_not_stack_exactly_is_refused(unlike: str, tmp_path: Path) -> None:
    original, _ = in_both("flux")
    save_file(original, tmp_path / "b.safetensors")
    tensors, key = {}, ""
    for name in ("to_q", "to_k"):
        key = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{key}.lora_A.weight"] = noise((2, 16), 0)
        tensors[f"{key}.lora_B.weight"] = noise((16, 2), 1)
        if unlike == "dora":
            tensors[f"{key}.lora_magnitude_vector"] = noise((16,), 2)
    if unlike == "alpha":
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    elif unlike == "dtype":
        tensors[f"{key}.lora_A.weight"] = tensors[f"{key}.lora_A.weight"].bfloat16()
    save_file(tensors, tmp_path / "l.safetensors")
    words = {"alpha": "another scaling", "dora": "has DoRA", "dtype": "another dtype"}
    out = tmp_path / "o.safetensors"
    with pytest.raises(UnsupportedAdapter, match=words[unlike]):
        lora_tools.convert(
            tmp_path / "l.safetensors", out, to="kohya", base=tmp_path / "b.safetensors"
        )
    assert not out.exists()


def test_what_a_part_of_a_fused_weight_cannot_have_is_refused(tmp_path: Path) -> None:
    original, _ = in_both("flux")
    save_file(original, tmp_path / "b.safetensors")
    key = "transformer.single_transformer_blocks.0.attn.to_q"
    factors = {f"{key}.lora_A.weight": noise((2, 16), 0), f"{key}.lora_B.weight": noise((16, 2), 1)}
    save_file(
        factors | {f"{key}.lora_magnitude_vector": noise((16,), 2)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(UnsupportedAdapter, match=r"dora .* stores in parts or in one.*others"):
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")


def test_blocks_that_are_not_all_there_are_not_counted() -> None:
    names = [f"input_blocks.{i}.0.in_layers.2.weight" for i in (0, 1, 4)]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (4, 4, 3, 3))
    assert not counterparts(specs(numbered(shapes)))


@pytest.mark.parametrize("mine_is", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_factors_are_those_that_diffusers_makes_of_them(
    prefix: str, mine_is: str, layouts: dict[str, Any], tmp_path: Path
) -> None:
    original, theirs = in_both("flux")
    shapes = {k: (2 * n if n > 2 else n, 2 * m if m > 2 else m) for k, (n, m) in xlabs().items()}
    file = {k: noise(shape, i) for i, (k, shape) in enumerate(shapes.items())}
    save_file({prefix + k: v for k, v in file.items()}, tmp_path / "l.safetensors")
    base = original if mine_is == "original" else theirs
    save_file(base, tmp_path / "b.safetensors")
    out = tmp_path / "m.safetensors"
    lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], out)
    wanted = dict(theirs)
    rows = layouts["xlabs"]["rows"]
    for key, runs in rows.items():
        if key.endswith(".lora_B.weight"):
            module = key.removesuffix(".lora_B.weight")
            # of twice the width of the recorded
            [(up, first, count)] = runs
            B = file[up][2 * first : 2 * (first + count)]
            A = file[rows[f"{module}.lora_A.weight"][0][0]]
            name = f"{module.removeprefix('transformer.')}.weight"
            wanted[name] = theirs[name] + B @ A
    known = counterparts(specs(theirs))
    found = load_file(out)
    assert sum(not torch.equal(wanted[k], theirs[k]) for k in theirs) == 12
    for name in base:
        tensor = made(known[name], wanted) if mine_is == "original" else wanted[name]
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_control_lora_is_refused_by_name(tmp_path: Path) -> None:
    """black-forest-labs' FLUX.1-Depth-dev-lora: img_in has 128 inputs, and norms are replaced."""
    file = {"img_in.lora_A.weight": noise((2, 8), 0), "img_in.lora_B.weight": noise((16, 2), 1)}
    file["img_in.lora_B.bias"] = noise((16,), 2)
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": noise((8,), 3)}
    save_file(file | norm, tmp_path / "l.safetensors")
    original, _ = in_both("flux")
    save_file(original, tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedAdapter, match=r"a control LoRA of FLUX\.1 Tools.*widens img_in"):
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")
