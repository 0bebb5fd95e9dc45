"""GPTQ's weights, as AutoGPTQ 0.7 and GPTQModel 7.7 store them (``pack_original`` there):

===============  ===========================================================================
``P.qweight``    I32 (⌈in · bits / 32⌉, out): a stream of bits down each column, lowest first
``P.qzeros``     I32 (groups, ⌈out · bits / 32⌉): likewise along each row
``P.scales``     F16, BF16 or F32 (groups, out)
``P.g_idx``      I32 (in,), each input's group; older files may lack it
===============  ===========================================================================

Wᵀ[i, o] = (q[i, o] − zero[g_idx[i], o]) · scale[g_idx[i], o]. ``checkpoint_format`` says whether
zero points are stored as they are (``gptq_v2``) or one less (``gptq``). ``bits`` of a module follow
from its shapes where ``dynamic`` rules give it others than config.json. An input embedding
(``quantize_embed`` of GPTQModel) has its tokens where a linear layer has its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.names import layout_name
from lora_tools.formats.quantized.packed import FETCH, ORIGINAL, plain_dtype
from lora_tools.formats.quantized.qweights import (
    FLOATS,
    G_IDX,
    QWEIGHT,
    QZEROS,
    SCALES,
    QWeight,
    check,
    layers,
)
from lora_tools.records import TensorSpec

METHODS = ("gptq", "gptqmodel")
FILES = ("quantize_config.json",)
BITS = (2, 3, 4, 8)
_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def find_gptq(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, QWeight]:
    """Every such weight by its plain name.

    Args:
        config: config.json.
        settings: what it and quantize_config.json say of GPTQ.

    Raises:
        CheckpointError: tensors that do not fit each other or the settings, and what is not read.
    """
    found: dict[str, QWeight] = {}
    for module, parts in layers(specs, (QWEIGHT, QZEROS, SCALES), (QWEIGHT, QZEROS, SCALES, G_IDX)):
        offset = _offset(module, settings)
        out = parts[SCALES].shape[1]
        bits, inputs = _bits(module, parts, out, settings)
        group = _group(parts, inputs, settings)
        check(parts[QWEIGHT], ("I32",), (_words(inputs, bits), out))
        check(parts[QZEROS], ("I32",), (parts[SCALES].shape[0], _words(out, bits)))
        check(parts[SCALES], FLOATS, (parts[SCALES].shape[0], out))
        plain = TensorSpec(f"{module}.weight", plain_dtype(config), (out, inputs))
        turned = layout_name(plain, config) in ("conv1d", "embedding")
        if turned:
            plain = TensorSpec(plain.name, plain.dtype, (inputs, out))
        label = f"GPTQ of {bits} bits"
        found[plain.name] = QWeight(plain, parts, label, bits, group, turned, offset)
    return found


def _offset(module: str, settings: Mapping[str, Any]) -> int:
    """Raises CheckpointError for a layout that is not known for certain."""
    said = {str(settings[k]).lower() for k in ("checkpoint_format", "format") if settings.get(k)}
    form = said.pop() if len(said) == 1 else "gptq" if not said else " or ".join(sorted(said))
    if settings.get("is_marlin_format"):
        form = "marlin"
    if form not in _OFFSETS or settings.get("pack_dtype", "int32") != "int32":
        packs = settings.get("pack_dtype", "int32")
        raise CheckpointError(
            f"{module}.{QWEIGHT}: GPTQ in the layout {form} (packed in {packs}) cannot be read; "
            f"save it as gptq or gptq_v2, or {ORIGINAL}"
        )
    if settings.get("rotation"):
        raise CheckpointError(
            f"{module}.{QWEIGHT}: rotated ({settings['rotation']}) before it was quantized, and a "
            f"plain model does not rotate its inputs back; {ORIGINAL}"
        )
    return _OFFSETS[form]


def _words(count: int, bits: int) -> int:
    return -(count * bits // -32)


def _bits(
    module: str, parts: Mapping[str, TensorSpec], out: int, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """(bits of a code, inputs), by the settings and, where rules change them, by shapes."""
    said, rules = settings.get("bits"), bool(settings.get("dynamic"))
    rows, columns = parts[QWEIGHT].shape[0], parts[QZEROS].shape[1]
    if G_IDX in parts:
        check(parts[G_IDX], ("I32", "I64"), (parts[G_IDX].numel,))
        inputs = dict.fromkeys(BITS, parts[G_IDX].numel)
    else:
        inputs = {b: rows * 32 // b for b in BITS}
    fits = [
        b
        for b in BITS
        if (rows, columns) == (_words(inputs[b], b), _words(out, b))
        and (b != 3 or not (inputs[b] % 32 or out % 32))  # that stream is cut in 32 numbers
    ]
    if type(said) is int and said in fits:
        return said, inputs[said]
    if rules and len(fits) == 1:
        return fits[0], inputs[fits[0]]
    raise CheckpointError(
        f"{module}.{QWEIGHT}: {said!r} bits are said, and {list(parts[QWEIGHT].shape)} with "
        f"{QZEROS} {list(parts[QZEROS].shape)} and {SCALES} {list(parts[SCALES].shape)}"
        + (f" and {G_IDX} {list(parts[G_IDX].shape)}" if G_IDX in parts else "")
        + f" do not fit them; {FETCH}"
    )


def _group(parts: Mapping[str, TensorSpec], inputs: int, settings: Mapping[str, Any]) -> int:
    """Inputs a group. Raises CheckpointError where the scales are of another number of them, or
    where it cannot be told which group an input is in."""
    scales = parts[SCALES]
    said, ordered = settings.get("group_size"), settings.get("desc_act")
    if G_IDX in parts and (said is None or settings.get("dynamic")):
        return inputs  # g_idx says
    if type(said) is not int or not (said > 0 or said == -1):
        raise CheckpointError(f"{scales.name}: group_size {said!r} is not a size; {FETCH}")
    size = inputs if said == -1 else said
    if G_IDX not in parts and ordered and scales.shape[0] > 1:
        name = scales.name.removesuffix(SCALES) + G_IDX
        raise CheckpointError(f"{name}: is missing, but desc_act needs it; {FETCH}")
    if scales.shape[0] != -(inputs // -size):
        raise CheckpointError(
            f"{scales.name}: {-(inputs // -size)} groups of {size} inputs (group_size {said}) are "
            f"expected, found {list(scales.shape)}; {FETCH}"
        )
    return size
