"""How to tell that a checkpoint does not hold plain numbers, whatever made it.

A scheme is told by tensors whose names lie side by side, by dtypes that no plain weight has, and by
what config files say. What is told here is only refused: what ``sources.schemes`` has a row for is
decoded first, and shows no sign any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_tools.formats.quantized.packed import ENTRIES, ORIGINAL
from lora_tools.records import TensorSpec

_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_FEWER_BITS = ("F4", "F6_E2M3", "F6_E3M2")
# What a weight cannot be of: in float16 and wider, a tensor beside it of a scale's name is a
# parameter that is learned.
_NARROW = (*_WHOLE, *_EIGHT_BITS, *_FEWER_BITS)

_SAVE = "save it in bfloat16, and give that"
_AGAIN = f"load it with the library that made it, {_SAVE}"
_ORIGINAL = f"{ORIGINAL}, which its model card names"
_WITH_CONFIG = (
    "put the config.json beside it that was saved with it (quant_method, bits, group_size), or "
    f"{_ORIGINAL}"
)


def _load(how: str) -> str:
    return f"load it with transformers and {how}, {_SAVE}"


@dataclasses.dataclass(frozen=True)
class Sign:
    """Tensors whose names differ in their endings only.

    Attributes:
        title: the scheme, as people call it.
        endings: of names that are all there; "" is what the other endings are added to.
        dtypes: of the first tensor; any, where none are given.
        advice: what to do.
        methods: what configs call the scheme.
    """

    title: str
    endings: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    advice: str = _AGAIN
    methods: tuple[str, ...] = ()

    def shows(self, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether the tensor is the first of them, and the others lie beside it."""
        first, *others = self.endings
        name = f".{spec.name}"  # so that one without a module ends like one with
        if not name.endswith(first) or (self.dtypes and spec.dtype not in self.dtypes):
            return False
        stem = name[: len(name) - len(first)]
        return all((stem + other)[1:] in specs for other in others)


# The first that shows is named: those that say most come first.
SIGNS = (
    Sign("GPTQ", (".qweight", ".g_idx"), advice=_WITH_CONFIG, methods=("gptq",)),
    Sign("AWQ or GPTQ", (".qweight", ".qzeros", ".scales"), advice=_WITH_CONFIG,
         methods=("awq",)),
    Sign("GPTQ, AWQ or a similar format", (".qweight",), _NARROW, _ORIGINAL),
    Sign("bitsandbytes int8", (".SCB",), advice=_load("call its dequantize()"),
         methods=("bitsandbytes",)),
    Sign("NVFP4", (".weight", ".weight_scale_2"), _NARROW, _ORIGINAL, ("nvfp4", "modelopt")),
    Sign("NVFP4", (".weight_packed", ".weight_global_scale"), advice=_WITH_CONFIG),
    Sign("compressed-tensors", (".weight_packed",), advice=_WITH_CONFIG,
         methods=("compressed-tensors",)),
    Sign("FP8 with block scales", (".weight_scale_inv", ".weight"),
         advice=_load("FineGrainedFP8Config(dequantize=True)"), methods=("fp8",)),
    Sign("MXFP4", ("_blocks", "_scales"), ("U8",), _load("Mxfp4Config(dequantize=True)"),
         ("mxfp4",)),
    Sign("MXFP4 by OpenAI's own names", (".blocks", ".scales"), ("U8",),
         f"give the checkpoint beside it that transformers loads, or {_ORIGINAL[5:]}"),
    Sign("MLX", (".weight", ".scales"), ("U32",),
         "put the config.json beside it that was saved with it (quantization), or make it plain "
         "with `mlx_lm.convert --dequantize`, and give that"),
    Sign("scaled FP8 of ComfyUI", (".scaled_fp8",)),
    Sign("scaled FP8 of ComfyUI", (".weight", ".scale_weight"), _NARROW),
    Sign("ComfyUI's quantized form", (".comfy_quant",)),
    Sign("HQQ", (".W_q",), _NARROW, _ORIGINAL, ("hqq",)),
    Sign("HQQ", (".W_q", ".scale"), advice=_ORIGINAL),
    Sign("EXL2", (".q_weight", ".q_scale"), advice=_ORIGINAL, methods=("exl2",)),
    Sign("EXL3", (".trellis", ".suh"), advice=_ORIGINAL, methods=("exl3",)),
    Sign("AQLM", (".codes", ".codebooks"), _WHOLE, _ORIGINAL, ("aqlm",)),
    Sign("VPTQ", (".indices", ".centroids.weight"), _WHOLE, _ORIGINAL, ("vptq",)),
    Sign("SpQR", (".dense_weights", ".row_offsets", ".col_vals"), advice=_ORIGINAL,
         methods=("spqr",)),
    Sign("QuIP#", (".Qidxs", ".SU", ".SV"), advice=_ORIGINAL, methods=("quip",)),
    Sign("QTIP", (".trellis", ".SU", ".SV"), advice=_ORIGINAL),
    Sign("QQQ", (".B", ".s_channel"), ("I32",), _ORIGINAL, ("qqq",)),
    Sign("Marlin", (".B", ".s"), ("I32",), _ORIGINAL, ("marlin",)),
    Sign("quanto", ("weight._data",), methods=("quanto",)),
    Sign("quanto", ("weight._data._data",)),
    Sign("torchao", ("weight_qdata",), methods=("torchao",)),
    Sign("torchao", ("weight:qdata",)),
    Sign("eight bits with scales (EETQ)", (".weight", ".weight_scales"), _NARROW,
         methods=("eetq",)),
    Sign("FP8 with scales", (".weight", ".weight_scale"), _EIGHT_BITS, methods=("fbgemm_fp8",)),
    Sign("numbers with scales (int8)", (".weight", ".weight_scale"), _NARROW),
    Sign("eight-bit floats (FP8)", ("",), _EIGHT_BITS),
    Sign("floats of four or six bits (MXFP4, NVFP4, MXFP6)", ("",), _FEWER_BITS),
    Sign("whole numbers with scales", ("", "_scale"), _WHOLE),
    Sign("whole numbers with scales", ("", "_scales"), _WHOLE),
    Sign("whole numbers with scales", ("", "_weight_scale"), _WHOLE),
    Sign("whole numbers instead of a weight", (".weight",), (*_WHOLE, "I64", "U64")),
)  # fmt: skip
# Entries of a config.json, at whatever depth, and files beside it.
_ENTRIES = (*ENTRIES, "quantization")
FILES = {
    "hf_quant_config.json": "ModelOpt (FP8 or NVFP4)",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
_MARKS = tuple({sign.endings[0] for sign in SIGNS if not sign.dtypes})


@dataclasses.dataclass(frozen=True)
class Found:
    """A scheme that shows: its title, where it is seen, and what to do."""

    title: str
    where: str
    advice: str


def sign_of(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], files: Collection[str]
) -> Found | None:
    """The scheme that a checkpoint is quantized in, as far as it shows; None of a plain one.

    Args:
        config: its config.json.
        files: those of ``FILES`` that lie beside it.
    """
    said = _said(config, files)
    known = [s for s in specs.values() if not s.is_float or f".{s.name}".endswith(_MARKS)]
    for sign in SIGNS if known else ():
        for spec in known:
            if sign.shows(spec, specs):
                where = f"{spec.name} ({spec.dtype})" + (f" and {said.where}" if said else "")
                return Found(sign.title, where, sign.advice)
    return said or _unknown(specs)


def _unknown(specs: Mapping[str, TensorSpec]) -> Found | None:
    """A module that holds a matrix of whole numbers and floats, and no weight, nor a layer with
    one: codes and scales, whatever made them. Masks, positions and counters lie otherwise."""
    candidates = {
        spec.name.rpartition(".")[0]: spec
        for spec in specs.values()
        if spec.dtype in _NARROW and len(spec.shape) > 1 and spec.numel > 1
    }
    candidates.pop("", None)
    floats: set[str] = set()
    for name, spec in specs.items() if candidates else ():
        module, _, parameter = name.rpartition(".")
        if spec.is_float:
            floats.add(module)
        while parameter == "weight" and module:  # or one of a module of its own
            candidates.pop(module, None)
            module = module.rpartition(".")[0]
    for module, spec in candidates.items():
        if module in floats:
            return Found("an unknown format", f"{spec.name} ({spec.dtype})", _ORIGINAL)
    return None


def _said(config: Mapping[str, Any], files: Collection[str]) -> Found | None:
    """What config files say."""
    for place, method in _entries(config):
        where = f"{place} in config.json" + (f" ({method})" if method else "")
        sign = next((s for s in SIGNS if method.lower() in s.methods), None)
        title = sign.title if sign else method or "a quantized form"
        advice = sign.advice if sign else _AGAIN
        return Found(title, where, f"{advice}; if its numbers are plain, remove that entry")
    for file in files:
        advice = f"{_ORIGINAL}; if its numbers are plain, remove that file"
        return Found(FILES[file], file, advice)
    return None


def _entries(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Where an entry on quantization lies that is not empty, and the method it names."""
    for key, value in config.items():
        settings = value if isinstance(value, Mapping) else {}
        if key in _ENTRIES and value and (settings or key != "quantization"):
            named = settings.get("quant_method") or settings.get("quant_algo")
            yield place + key, str(named or ("MLX" if key == "quantization" else ""))
        elif settings:
            yield from _entries(settings, f"{place}{key}.")


def without_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says that its weights are quantized."""
    return {
        key: without_entries(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _ENTRIES
    }
