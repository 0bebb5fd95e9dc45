"""MLX (mlx-lm 0.32): ``adapters.safetensors`` with ``lora_a`` (in, r) and ``lora_b`` (r, out), and
an ``adapter_config.json`` of one rank and one absolute scale: y + scale · (x a) b.

DoRA's ``m`` is one magnitude for each output. mlx-lm's DoRA of an embedding has one for each token
where PEFT's has one for each dimension: refused both ways.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames, named_embedding
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.outline import Compute, Context, Outline, group_parts, pair
from lora_tools.formats.adapters.peft import CONFIG
from lora_tools.formats.adapters.peft_folder import read_config
from lora_tools.formats.adapters.writer import Factors, Keyed
from lora_tools.formats.synced import write_synced
from lora_tools.formats.tensor_file import TensorFile

WEIGHTS = "adapters.safetensors"
_PARTS = ("lora_a", "lora_b", "m")


def split(key: str) -> tuple[str, str] | None:
    """``a.b.lora_a`` → (``a.b``, ``lora_a``)."""
    module, _, part = key.rpartition(".")
    return (module, part) if module else None


def knows(key: str) -> bool:
    """Whether a key is one of these."""
    return key.rpartition(".")[2] in _PARTS


def read(path: Path, file: TensorFile, context: Context) -> Outline:
    """What the folder holds, as PEFT would."""
    outline = Outline(path, file, "MLX")
    config = read_config(file.path.with_name(CONFIG))
    kind, numbers = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapter(
            f"{path}: fine_tune_type {kind!r} in {CONFIG}: the file holds whole weights"
        )
    scale = numbers.get("scale") if isinstance(numbers, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise outline.fail(f"{CONFIG}: lora_parameters does not give a scale")
    for module, keys in group_parts(outline, _PARTS, split).items():
        a, b = pair(outline, module, keys, "lora_a", "lora_b")
        embedding = named_embedding(module)
        if embedding and "m" in keys:
            raise UnsupportedAdapter(
                f"{path}: {module}: MLX's DoRA of an embedding norms each token, PEFT's each "
                "dimension"
            )
        outline.add_lora(
            module,
            outline.transposed(a),
            outline.transposed(b),
            float(scale),
            embedding=embedding,
            magnitude=keys.get("m", ""),
            of_rank=1,
        )
    return outline


class MlxWriter(Keyed):
    """Writes the folder that ``mlx_lm.generate --adapter-path`` takes."""

    file_name = WEIGHTS

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self._modules: list[str] = []
        self._last: Factors  # all have one rank and one scale

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        self._modules.append(factors.module)
        self._last = factors
        result = {
            f"{factors.module}.lora_a": factors.lora_A.T,
            f"{factors.module}.lora_b": factors.lora_B.T,
        }
        if factors.magnitude is not None:
            result[f"{factors.module}.m"] = factors.magnitude
        return result

    def metadata(self) -> dict[str, str]:
        """As mlx writes it."""
        return {"format": "mlx"}

    def finish(self) -> None:
        """Write both files. num_layers -1 is all of them."""
        super().finish()
        layer = re.compile(r".*?\blayers\.\d+\.")
        keys = sorted({layer.sub("", module, count=1) for module in self._modules})
        config = {
            "fine_tune_type": "dora" if self._last.magnitude is not None else "lora",
            "num_layers": -1,
            "lora_parameters": {
                "rank": self._last.lora_A.shape[0],
                "scale": self._last.scale,
                "dropout": 0.0,
                "keys": keys,
            },
        }
        write_synced(self.out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


FORMAT = Format(
    "mlx",
    "MLX",
    frozenset({"embedding", "dora"}),
    "one",
    "mlx-lm 0.32",
    one_rank=True,
    is_folder=True,
    knows=knows,
    read=read,
    writer=MlxWriter,
    file_name=MlxWriter.file_name,
)
