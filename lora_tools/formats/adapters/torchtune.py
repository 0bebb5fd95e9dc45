"""torchtune (0.6): ``layers.0.attn.q_proj.lora_a.weight`` (r, in), ``lora_b.weight`` (out, r),
``magnitude`` (out,); one rank and one alpha, which stand in the recipe's YAML and not in the file.

Written files carry lora_alpha in the metadata of the safetensors file. Llama's q and k rows are in
Meta's interleaved order; the base's config gives the heads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError, UnsupportedAdapter
from lora_tools.formats.adapters.architectures import architecture, heads, is_rotated
from lora_tools.formats.adapters.format import READ_AND_WRITTEN, Format
from lora_tools.formats.adapters.outline import Context, Outline, group_parts, pair, stored_alphas
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.tensor_file import TensorFile

_PARTS = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "magnitude"}
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "output_proj": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(?:attn|mlp)\.(\w+)")
_THEIRS = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)")


def split(key: str) -> tuple[str, str] | None:
    """A key → its module and which part it is."""
    match = _KEY.fullmatch(key)
    return (match["module"], _PARTS[match["part"]]) if match else None


def knows(key: str) -> bool:
    """Whether a key is one of these."""
    return split(key) is not None


def to_peft(module: str) -> str:
    """torchtune's module name → transformers', or ""."""
    if module == "output":
        return "lm_head"
    match = _LAYER.fullmatch(module)
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}" if match and match[2] in _NAMES else ""


def from_peft(module: str) -> str:
    """The inverse, or ""."""
    if module == "lm_head":
        return "output"
    match = _THEIRS.fullmatch(module)
    mine = {theirs: ours for ours, theirs in _NAMES.items()}
    if not match or match[2] not in mine:
        return ""
    return f"layers.{match[1]}.{'attn' if 'attn' in match[2] else 'mlp'}.{mine[match[2]]}"


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the file holds, as PEFT would."""
    outline = Outline(path, file, "torchtune")
    base = context.base_for(outline, "torchtune has its own names and order of rows")
    row = architecture(base, path, "torchtune") if base is not None else None
    alphas = stored_alphas(outline)
    for theirs, keys in group_parts(outline, set(_PARTS.values()), split).items():
        module = to_peft(theirs) if base is not None else theirs
        if not module:
            raise outline.fail(f"{theirs} is not a module that torchtune adapts in such a model")
        a, b = pair(outline, module, keys, "A", "B")
        alpha = alphas.get(theirs)
        if alpha is None:
            alpha = context.need_alpha(outline)
        B, turned = outline.same(b), None
        if base is not None and row is not None and is_rotated(row, module):
            turned = ("interleaved_to_half", (heads(base.config, module),))
            B = outline.recipe(B, *turned)
        outline.add_lora(
            module,
            outline.same(a),
            B,
            alpha,
            magnitude=keys.get("magnitude", ""),
            magnitude_recipe=turned,
        )
    return outline


class TorchtuneWriter(Keyed):
    """Writes one safetensors file, as the checkpointer's ``adapter_checkpoint`` takes it."""

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        if self.base is None:
            raise AdapterError(
                "torchtune has its own names and order of rows: give --base CHECKPOINT"
            )
        row = architecture(self.base, self.base.path, "torchtune")
        name = from_peft(factors.module)
        if not name:
            raise UnsupportedAdapter(f"{factors.module}: torchtune does not adapt this module")
        B, magnitude = factors.lora_B, factors.magnitude
        if is_rotated(row, factors.module):
            numbers = (heads(self.base.config, factors.module),)
            B = self.compute("half_to_interleaved", [B], numbers)
            if magnitude is not None:
                magnitude = self.compute("half_to_interleaved", [magnitude], numbers)
        result = {f"{name}.lora_a.weight": factors.lora_A, f"{name}.lora_b.weight": B}
        if magnitude is not None:
            result[f"{name}.magnitude"] = magnitude
        self.named_alphas[name] = factors.alpha
        return result


FORMAT = Format(
    "torchtune",
    "torchtune",
    frozenset({"dora"}),
    "one",
    "torchtune 0.6",
    one_rank=True,
    base=READ_AND_WRITTEN,
    knows=knows,
    read=read,
    writer=TorchtuneWriter,
)
