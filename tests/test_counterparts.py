"""Models in their makers' layout and in diffusers': which rows of which tensor are which, with
diffusers' own converters as the oracle; and adapters of either merged into either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.counterparts.table import Counterpart, counterparts
from lora_tools.formats.dtypes import dtype_name
from lora_tools.records import TensorSpec

pytest.importorskip("diffusers")

Tensors = dict[str, torch.Tensor]


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(k, dtype_name(v.dtype), tuple(v.shape)) for k, v in tensors.items()}


def made(counterpart: Counterpart, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    stored = [tensors[piece.stored] for piece in counterpart.pieces]
    if len(stored) == 1 and stored[0].dim() > 2:
        return stored[0]
    pairs = zip(stored, counterpart.pieces, strict=True)
    return torch.cat([x[p.first : p.first + p.rows] for x, p in pairs])


def first_column(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: x[(slice(None), *[0] * (x.dim() - 1))] for name, x in tensors.items()}


def flux(head: int = 1536) -> Any:  # what the converter takes for granted
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(head - 4, 2, 2),
    )


def flux_2() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        axes_dims_rope=(1, 1, 1, 1),
    )


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=6,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=8,
        image_dim=7,
        added_kv_proj_dim=24,
    )


def z_image() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=6, axes_dims=[4, 2, 2], axes_lens=[4, 4, 4],
    )  # fmt: skip


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=1536,  # as above
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=6,
        pooled_projection_dim=5,
        rope_axes_dim=(512, 512, 512),
    )


def unet(sdxl: bool = False) -> Any:
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if sdxl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


# What of an original no adapter acts on, so that no pair names it: as converters look for it.
NORM = ("query_norm", "key_norm")
BESIDE: dict[str, list[str]] = {
    "flux": [
        *(
            f"double_blocks.0.{s}_attn.norm.{n}.scale"
            for s in ("img", "txt") for n in NORM
        ),
        *(f"single_blocks.0.norm.{n}.scale" for n in NORM),
    ],
    "sd3": [
        "pos_embed",
        *(
            f"joint_blocks.{i}.{block}.ln_{n}.weight"
            for i, blocks in enumerate(
                (("x_block.attn", "context_block.attn", "x_block.attn2"),
                 ("x_block.attn", "context_block.attn"))
            )
            for block in blocks for n in "qk"
        ),
    ],
}  # fmt: skip
SINGLE = "diffusers.loaders.single_file_utils"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "flux": (flux, "convert_flux_transformer_checkpoint_to_diffusers"),
    "flux_2": (flux_2, "convert_flux2_transformer_checkpoint_to_diffusers"),
    "sd3": (sd3, "convert_sd3_transformer_checkpoint_to_diffusers"),
    "wan": (wan, "convert_wan_transformer_to_diffusers"),
    "z_image": (z_image, "convert_z_image_transformer_checkpoint_to_diffusers"),
    "hunyuan_video": (hunyuan_video, "convert_hunyuan_video_transformer_to_diffusers"),
    "sd1": (unet, "convert_ldm_unet_checkpoint"),
    "sdxl": (lambda: unet(sdxl=True), "convert_ldm_unet_checkpoint"),
}


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors whose rows have a number each, that take no memory."""
    result, first = {}, 0
    for name, shape in shapes.items():
        rows = torch.arange(first, first + shape[0], dtype=torch.float32)
        result[name] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        first += shape[0]
    return result


def converter(name: str) -> Callable[..., Tensors]:
    import importlib

    found: Callable[..., Tensors] = getattr(importlib.import_module(SINGLE), name)
    return found


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_that_diffusers_converter_puts_there(case: str) -> None:
    build, convert = CASES[case]
    with torch.device("meta"):
        model = build()
    theirs = {k: v.float() for k, v in model.state_dict().items()}
    known = counterparts(specs(theirs))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    same = {k: tuple(v.shape) for k, v in theirs.items() if k not in covered}
    shapes = {name: each.spec.shape for name, each in known.items()}
    beside = dict.fromkeys(BESIDE.get(case, ()), (4,))
    original = numbered({**shapes, **beside, **same})
    prefix = "model.diffusion_model." if convert == "convert_ldm_unet_checkpoint" else ""
    given = {prefix + name: x for name, x in original.items()}
    there = first_column(converter(convert)(given, config=dict(model.config)))
    back = counterparts(specs(original))
    original = first_column(original)
    assert back.keys() >= covered
    for name in sorted(covered):
        assert torch.equal(there[name], made(back[name], original)), name
    for name, each in known.items():  # and the other way about
        assert torch.equal(original[name], made(each, there)), name
    # What is left over has one name in both, or is of a kind that no adapter acts on.
    weights = {k for k in same if k.endswith(".weight") and len(same[k]) > 1}
    assert all(k in there for k in weights)


def test_open_clip_as_diffusers_converter_cuts_it() -> None:
    from types import SimpleNamespace

    block, d = "model.transformer.resblocks.0", 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.token_embedding.weight": (9, d),
        "model.ln_final.weight": (d,),
        f"{block}.attn.in_proj_weight": (3 * d, d),
        f"{block}.attn.in_proj_bias": (3 * d,),
        **{f"{block}.{n}.weight": (d, d) for n in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")},
        **{f"{block}.{n}.bias": (d,) for n in ("attn.out_proj", "mlp.c_fc", "ln_1", "ln_2")},
    }
    wrapper = "conditioner.embedders.1."
    original = numbered({wrapper + name: shape for name, shape in shapes.items()})
    text = SimpleNamespace(config=SimpleNamespace(hidden_size=d))
    there = converter("convert_open_clip_checkpoint")(text, original, wrapper + "model.")
    known = counterparts(specs(original))
    assert {name.removeprefix(wrapper) for name in known} == there.keys()
    for name, each in known.items():
        assert torch.equal(there[name.removeprefix(wrapper)], made(each, original)), name


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "flux": (lambda: flux(8), "transformer."),
    "sd1": (unet, "unet."),
    "sdxl": (lambda: unet(sdxl=True), "unet."),
}


def in_both(case: str) -> tuple[Tensors, Tensors]:
    """A model in the original's layout and in diffusers'."""
    with torch.device("meta"):
        model = BASES[case][0]()
    state = model.state_dict().items()
    theirs = {k: noise(tuple(v.shape), i) for i, (k, v) in enumerate(state)}
    known = counterparts(specs(theirs))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    theirs = {name: x for name, x in theirs.items() if name in covered}
    return {name: made(each, theirs).contiguous() for name, each in known.items()}, theirs


def adapter(path: Path, model: Tensors, flat: bool, prefix: str) -> Tensors:
    """Factors of every linear layer and convolution, and the model with them."""
    tensors, result = {}, dict(model)
    for i, (name, weight) in enumerate(sorted(model.items())):
        if not name.endswith(".weight") or weight.dim() < 2 or "pos_embed" in name:
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


# The layout that kohya's files have.
KOHYA = {"flux": "original", "sd1": "diffusers", "sdxl": "original"}


@pytest.mark.sweep(3)
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
    with pytest.raises(UnsupportedAdapter, match=r"dora .* stores in parts or in one with others"):
        lora_tools.merge(tmp_path / "b.safetensors", [tmp_path / "l.safetensors"], tmp_path / "m")


def test_blocks_that_are_not_all_there_are_not_counted() -> None:
    names = [f"input_blocks.{i}.0.in_layers.2.weight" for i in (0, 1, 4)]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (4, 4, 3, 3))
    assert not counterparts(specs(numbered(shapes)))
