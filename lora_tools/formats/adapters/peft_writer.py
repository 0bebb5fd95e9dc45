"""Writing PEFT adapters (peft 0.21) as a stream: factors are added as they are computed, in any
order, and the config is derived from them at the end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.adapters.peft import CONFIG, PREFIX, WEIGHTS
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.names import as_held, compact, split_tensor
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.formats.synced import write_synced
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


class PeftWriter:
    """Collects an adapter and writes it into a folder.

    Ranks may differ by module; ``finish`` puts the most common one into the config and the others
    into the patterns. Not for use from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spool = SafetensorsSpool(folder)
        self._rank: dict[str, int] = {}
        self._alpha: dict[str, float] = {}
        self._saved_modules: set[str] = set()
        self._parameters: dict[str, set[str]] = {}
        self._biases = False

    def add_lora(
        self,
        module: str,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        alpha: float,
        *,
        form: str = "matrix",
        parameter: str = "weight",
        r: int | None = None,
        bias: torch.Tensor | None = None,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        """lora_A and lora_B of one module, as PEFT stores them for its form: "matrix" (r, in) and
        (out, r), "embedding", "conv", or "experts" for a ``parameter`` of the module, with its r.
        """
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if form == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        name = module
        if form == "experts":
            self._parameters.setdefault(module, set()).add(parameter)
            name = f"{module}.{parameter}"
        self._add(f"{PREFIX}{name}.{a}", lora_A)
        self._add(f"{PREFIX}{name}.{b}", lora_B)
        if bias is not None:
            self._add(f"{PREFIX}{name}.lora_B.bias", bias)
        if magnitude is not None:
            self._add(f"{PREFIX}{name}.lora_magnitude_vector", magnitude)
        self._rank[name], self._alpha[name] = lora_A.shape[0] if r is None else r, alpha

    def add_saved(self, tensor_name: str, tensor: torch.Tensor) -> None:
        """A tensor of a module that is saved whole (modules_to_save)."""
        self._saved_modules.add(split_tensor(tensor_name)[0])
        self._add(PREFIX + tensor_name, tensor)

    def add_bias(self, tensor_name: str, tensor: torch.Tensor, targeted: bool) -> None:
        """A bias, as PEFT's ``bias="all"`` stores it; ``targeted`` if its module has factors."""
        module, parameter = split_tensor(tensor_name)
        self._biases = True
        middle = ".base_layer." if targeted else "."
        self._add(f"{PREFIX}{module}{middle}{parameter}", tensor)

    def add_raw(self, key: str, tensor: torch.Tensor) -> None:
        """A tensor copied from another adapter under the same key."""
        self._add(key, tensor)

    def _add(self, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec(key, dtype_name(tensor.dtype), tuple(tensor.shape))
        self._spool.add(spec, as_bytes(tensor))

    @property
    def nbytes(self) -> int:
        """Bytes added so far."""
        return sum(spec.nbytes for spec in self._spool.specs)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module."""
        return dict(self._rank)

    @property
    def saved(self) -> set[str]:
        """Modules that are saved whole."""
        return set(self._saved_modules)

    @property
    def alphas(self) -> dict[str, float]:
        """lora_alpha by module."""
        return dict(self._alpha)

    def finish(
        self,
        base: Mapping[str, Any],
        all_modules: Collection[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write both files.

        Args:
            base: config fields that are not derived here (base_model_name_or_path, use_rslora…).
            all_modules: every module name of the model, by which target_modules can be short;
                None keeps ``target_modules`` and ``modules_to_save`` of ``base``.
        """
        config = {**DEFAULT_CONFIG, **base}
        r = _most_common(self._rank, config["r"])
        alpha = _most_common(self._alpha, config["lora_alpha"])
        config["r"], config["lora_alpha"] = r, _plain(alpha)
        config["rank_pattern"] = _pattern(self._rank, r)
        config["alpha_pattern"] = {k: _plain(v) for k, v in _pattern(self._alpha, alpha).items()}
        if self._biases:
            config["bias"] = "all"
        whole = {f"{m}.{p}" for m, names in self._parameters.items() for p in names}
        if all_modules is not None:
            config["target_modules"] = target_modules(self._rank.keys() - whole, all_modules)
            config["target_parameters"] = sorted(whole) or None
            config["modules_to_save"] = sorted(self._saved_modules) or None
        self._nest()
        self._spool.finish(self._folder / WEIGHTS, {"format": "pt", **(metadata or {})})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_synced(self._folder / CONFIG, text.encode())

    def _nest(self) -> None:
        """Name the factors of parameters as PEFT does: one wrapper around the other, the parameter
        that the module holds first innermost, and within it what else of the module is saved."""
        for module, names in self._parameters.items():
            for key in [spec.name for spec in self._spool.specs]:
                holder, parameter = split_tensor(key)
                if holder == PREFIX + module:
                    self._spool.rename(key, f"{holder}{'.base_layer' * len(names)}.{parameter}")
            for depth, parameter in enumerate(reversed(as_held(names))):
                for part in ("lora_A.weight", "lora_B.weight"):
                    self._spool.rename(
                        f"{PREFIX}{module}.{parameter}.{part}",
                        f"{PREFIX}{module}{'.base_layer' * depth}.{part}",
                    )

    def close(self) -> None:
        """Drop the scratch space, whether finished or not."""
        self._spool.close()


def target_modules(chosen: Collection[str], everything: Collection[str]) -> list[str] | str:
    """What selects exactly the chosen modules: a list of names, or where none does, a regex.

    PEFT looks at the modules that hold others, too: ``stages.1`` must not be taken for ``conv.1``.
    """
    if not chosen:
        return []
    parts = [name.split(".") for name in everything]
    holders = {".".join(p[:i]) for p in parts for i in range(1, len(p))}
    names = compact(chosen, holders | set(everything))
    return names or "(" + "|".join(re.escape(name) for name in sorted(chosen)) + ")"


DEFAULT_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "target_modules": None,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def _most_common(values: Mapping[str, Any], default: Any) -> Any:
    """The commonest value, the largest of equally common ones."""
    counts = Counter(values.values())
    return max(counts, key=lambda v: (counts[v], v)) if counts else default


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Exceptions to ``default``. PEFT takes the first key that ends the module's name, and does not
    keep the order of the keys when it saves; so a name that ends another one is anchored."""
    parts = [name.split(".") for name in values]
    endings = {".".join(p[i:]) for p in parts for i in range(1, len(p))}
    return {
        ("^" if name in endings else "") + name: value
        for name, value in sorted(values.items())
        if value != default
    }


def _plain(number: float) -> int | float:
    """16.0 → 16: PEFT declares lora_alpha an integer."""
    return int(number) if float(number).is_integer() else number
