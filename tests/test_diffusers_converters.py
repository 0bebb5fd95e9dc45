"""Adapters that diffusers has a converter for: merged here, each weight changes by what diffusers'
own ``lora_conversion_utils`` makes of the file, in diffusers' layout of the model and in the
makers'; or the file is refused by name."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import AdapterError, UnsupportedAdapter
from lora_tools.sources.adapters import open_adapter

from .diffusers_converters import CASES, Case, D, M

Tensors = dict[str, torch.Tensor]
# What diffusers' converters take for granted of the models they know → of those here.
SIZES = {"12288": str(M), "3072": str(D), "[2304, 768, 768]": str([D, 4, 4])}
LAYERS = {"num_layers = 19": "num_layers = 1", "num_single_layers = 38": "num_single_layers = 1"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The file ``diffusers/loaders/lora_conversion_utils.py`` by itself (diffusers takes seconds
    to import), for models of the sizes above."""
    found = importlib.util.find_spec("diffusers")
    if found is None or not found.submodule_search_locations:
        pytest.skip("diffusers is not installed")
    source = Path(found.submodule_search_locations[0], "loaders/lora_conversion_utils.py")
    code = source.read_text()
    for old, new in (SIZES | LAYERS).items():
        assert old in code
        code = re.sub(rf"(?<!\d){re.escape(old)}(?!\d)", new, code)
    names = ("their", "their.utils", "their.loaders", "their.loaders.lora_conversion_utils")
    made = {name: types.ModuleType(name) for name in names}
    made["their"].__path__ = []
    made["their.utils"].logging = types.SimpleNamespace(get_logger=logging.getLogger)  # type: ignore[attr-defined]
    made["their.utils"].state_dict_all_zero = lambda state, only=None: False  # type: ignore[attr-defined]
    module = made[names[-1]]
    module.__package__ = "their.loaders"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, made[name])
        exec(compile(code, str(source), "exec"), module.__dict__)
    return module


PARTS = {
    "AB": ("lora_A.weight", "lora_B.weight"),
    "du": ("lora_down.weight", "lora_up.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
}
RANK = 2


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(case: Case, variant: tuple[str, str, bool, bool]) -> tuple[Tensors, Tensors]:
    """A file, and the change of each module by its name in the makers' layout."""
    prefix, parts, alpha, flat = variant
    a, b = PARTS[parts]
    file: Tensors = {}
    deltas: Tensors = {}
    for i, (module, shape) in enumerate(case.modules.items()):
        key = prefix + (module.replace(".", "_") if flat else module)
        A, B = noise((RANK, *shape[1:]), 2 * i), noise((shape[0], RANK), 2 * i + 1)
        file |= {f"{key}.{a}": A, f"{key}.{b}": B}
        if alpha:
            file[f"{key}.alpha"] = torch.tensor(0.5 * RANK)
        deltas[module] = (0.5 if alpha else 1.0) * B @ A
    return file, deltas


def converted(theirs: Any, case: Case, file: Tensors) -> Tensors:
    """The change of each module by its name in diffusers' layout, by diffusers."""
    convert: Callable[[Tensors], Tensors]
    convert = getattr(theirs, f"{case.converter}_lora_to_diffusers")
    there, deltas = convert({k: v.clone() for k, v in file.items()}), {}
    for key, A in there.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            B = there[f"{module}.lora_B.weight"]
            deltas[module.removeprefix("transformer.")] = B @ A
    return deltas


def merged(deltas: Tensors, beside: tuple[str, ...], file: Tensors, place: Path) -> Tensors:
    """By a model that has those modules, and others, what is added to each."""
    base = {f"{module}.weight": torch.zeros_like(delta) for module, delta in deltas.items()}
    base |= {
        f"{name}.weight": torch.zeros(D, D)
        for name in (*beside, "other.0.to_q", "vae.q")
        if f"{name}.weight" not in base
    }
    save_file(base, place / "b.safetensors")
    save_file(file, given := place / "l.safetensors")
    if all(key.startswith("base_model.model.") for key in file):
        given = as_diffusers_reads(given, place / "b.safetensors")
    out = place / "m.safetensors"
    lora_tools.merge(place / "b.safetensors", [given], out, force=True)
    return load_file(out)


def as_diffusers_reads(peft: Path, base: Path) -> Path:
    """PEFT's keys in a file by itself, where nothing says the alpha, are taken by request alone."""
    with pytest.raises(AdapterError, match=r"without adapter_config.*--from diffusers"):
        open_adapter(peft, base=base)
    out = peft.with_name("d.safetensors")
    lora_tools.convert(peft, out, source="diffusers", to="diffusers", base=base, force=True)
    return out


def check(found: Tensors, deltas: Tensors) -> None:
    for module, delta in deltas.items():
        change = found.pop(f"{module}.weight")
        torch.testing.assert_close(change, delta, rtol=1e-5, atol=1e-5, msg=module)
    assert not any(rest.any() for rest in found.values())


RUNS = [
    pytest.param(name, variant, id=f"{name}-{'-'.join(map(str, variant))}")
    for name, case in CASES.items()
    for variant in case.variants
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_the_changes_are_those_of_diffusers(
    name: str, variant: tuple[str, str, bool, bool], theirs: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    file, original = adapter(case, variant)
    deltas = converted(theirs, case, file)
    rows = sum(len(delta) for delta in original.values())
    assert sum(len(delta) for delta in deltas.values()) == rows
    check(merged(deltas, case.beside, file, tmp_path), deltas)
    if case.original:
        check(merged(original, case.beside, file, tmp_path), original)


@pytest.mark.parametrize("fused", [True, False])
def test_a_change_that_is_there_fused_and_in_parts_is_refused(fused: bool, tmp_path: Path) -> None:
    """Some trainers of Z-Image write both, and diffusers leaves the fused one out."""
    cut = {f"layers.0.attention.to_{x}": (D, D) for x in "qkv"}
    whole = {"layers.0.attention.qkv": (3 * D, D)}
    case = Case("", cut | whole, ())
    file, deltas = adapter(case, ("lora_unet_", "du", False, True))
    base = {name: deltas[name] for name in (whole if fused else cut)}
    with pytest.raises(UnsupportedAdapter, match="probably the same change twice"):
        merged(base, CASES["z-image"].beside, file, tmp_path)


# What ComfyUI 0.3.77 calls HunyuanVideo's modules (process_unet_state_dict), by Tencent's names; of
# the first four kinds its key map of adapters has Tencent's, too (model_lora_keys_unet).
COMFYUI = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "mod.linear": "mod.lin",
    "modulation.linear": "modulation.lin",
    "time_in.mlp.0": "time_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
}


def by_comfyui(module: str) -> str:
    end = next((end for end in COMFYUI if module.endswith(end)), "")
    return module.removesuffix(end) + COMFYUI.get(end, "")


def test_hunyuan_video_as_comfyui_has_it(theirs: Any, tmp_path: Path) -> None:
    """A file of any of three spellings merges into a model of any, and what is written for ComfyUI
    is read by it."""
    case = CASES["hunyuan"]
    file, tencent = adapter(case, ("diffusion_model.", "AB", False, False))
    comfy = {by_comfyui(module): delta for module, delta in tencent.items()}
    diffusers = converted(theirs, case, file)
    renamed = {
        f"diffusion_model.{by_comfyui(module)}.{part}": file[f"diffusion_model.{module}.{part}"]
        for module in tencent
        for part in PARTS["AB"]
    }
    renamed = {key: tensor.clone() for key, tensor in renamed.items()}
    for given, wanted in ((file, comfy), (renamed, tencent), (renamed, diffusers)):
        check(merged(wanted, case.beside, given, tmp_path), wanted)
    with pytest.raises(UnsupportedAdapter, match="probably the same change twice"):
        merged(tencent, case.beside, file | renamed, tmp_path)
    embedders = [m for m in tencent if m.startswith(("time_in", "guidance_in", "txt_in."))]
    embedders = [m for m in embedders if "token_refiner" not in m and "input_embedder" not in m]
    known = {*comfy, *(m for m in tencent if m not in embedders)}
    for wanted in (tencent, diffusers):
        merged(wanted, case.beside, file, tmp_path)  # for the base
        for to in ("diffusers", "comfyui"):
            lora_tools.convert(
                tmp_path / "l.safetensors",
                tmp_path / f"{to}.safetensors",
                to=to,
                base=tmp_path / "b.safetensors",
                force=True,
            )
        made = load_file(tmp_path / "comfyui.safetensors")
        names = {key.partition(".lora_")[0].removeprefix("diffusion_model.") for key in made}
        assert {name.removesuffix(".alpha") for name in names} <= known
        for there in (comfy, tencent, diffusers):
            check(merged(there, case.beside, made, tmp_path), there)
            given = load_file(tmp_path / "diffusers.safetensors")
            check(merged(there, case.beside, given, tmp_path), there)


def test_hunyuan_video_under_comfy_orgs_wrapper(tmp_path: Path) -> None:
    """Flat names stand for one tensor, though that has two names which are the same so."""
    case = CASES["hunyuan"]
    file, tencent = adapter(case, ("lora_unet_", "du", False, True))
    wrapped = {f"model.model.{module}": delta for module, delta in tencent.items()}
    for base in (tencent, wrapped):
        check(merged(base, {}, file, tmp_path), base)
    for to in ("comfyui", "kohya", "diffusers"):
        out = tmp_path / f"{to}.safetensors"
        lora_tools.convert(tmp_path / "l.safetensors", out, to=to, base=tmp_path / "b.safetensors")
        wrong = [k for k in load_file(out) if "model" in k.removeprefix("diffusion_model.")]
        assert not wrong
        check(merged(wrapped, {}, load_file(out), tmp_path), wrapped)
