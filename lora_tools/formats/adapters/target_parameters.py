"""Parameters that a PEFT config's ``target_parameters`` name, such as fused experts, and which of
an adapter's factors are for which."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError, UnsupportedAdapter
from lora_tools.formats.names import as_held, modules_matched, split_tensor
from lora_tools.formats.patterns import matches

_CONFIG = "adapter_config.json"
_WRAPPED = ".base_layer"
# PEFT's LoRA of an nn.MultiheadAttention: factors of its own for the input projections, and for the
# output projection, which lies in what it wraps.
_OUT = f"{_WRAPPED}.out_proj"
IN_PROJ = "in_proj_weight"


def attention_of(nested: str, factors: Collection[str]) -> str:
    """The nn.MultiheadAttention that factors are of, by which patterns go; "" of others.

    PEFT 0.21 adds the change of its output projection twice, whenever it runs and when it merges:
    so the adapter was trained, and so it acts.
    """
    holder = nested.removesuffix(_OUT)
    return holder if holder in factors and f"{holder}{_OUT}" in factors else ""


class TargetParameters:
    """Of one adapter, by its config.

    Raises:
        AdapterError: they are no list of names.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        given = config.get("target_parameters") or []
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise AdapterError(f"{path}: {_CONFIG}: target_parameters is not a list of names")
        self._path, self._names = path, [split_tensor(name) for name in given]
        self._modules = config.get("target_modules") or []

    def acted_on(self, nested: str, factors: Collection[str]) -> str:
        """The parameter that the factors of a module act on; "" where it is not by this list that
        they are there.

        PEFT nests one wrapper in another where several parameters of one module are targeted, in
        the order in which the module holds them, and does not say which is which.

        Args:
            nested: the module's name in the file, with ``.base_layer`` for each wrapper around it.
            factors: all such names.

        Raises:
            AdapterError, UnsupportedAdapter: list and file do not fit, or leave it open.
        """
        if attention := attention_of(nested, factors):
            return IN_PROJ if nested == attention else ""
        module, depth = nested.replace(_WRAPPED, ""), nested.count(_WRAPPED)
        deepest = max(n.count(_WRAPPED) for n in factors if n.replace(_WRAPPED, "") == module)
        named = self._named(module, deepest > 0)
        if not named:
            if depth:
                raise self._fail(
                    f"{module}: {_WRAPPED}, and no target_parameters in adapter_config.json"
                )
            return ""
        listed = ", ".join(named)
        if deepest + 1 != len(named):
            raise self._fail(
                f"{module}: target_parameters name {listed}, but the file has factors for "
                f"{deepest + 1}"
            )
        if len(named) > 2 or (len(named) == 2 and named[1] != "down_proj"):
            raise UnsupportedAdapter(
                f"{self._path}: {module}: target_parameters name {listed} of one module, and the "
                "file does not show which factors are for which"
            )
        return named[deepest - depth]

    def _fail(self, what: str) -> AdapterError:
        return AdapterError(f"{self._path}: {what}")

    def _named(self, module: str, wrapped_twice: bool) -> list[str]:
        """The parameters of a module that are named, in the module's order. A name without a module
        is for all that hold such a parameter; what ``target_modules`` select does not."""
        bare = wrapped_twice or not self._is_selected(module)
        return as_held({p for m, p in self._names if (modules_matched(m, [module]) if m else bare)})

    def _is_selected(self, module: str) -> bool:
        """Whether ``target_modules`` select a module, by PEFT's rule."""
        if isinstance(self._modules, str):
            every = self._modules == "all-linear"
            try:
                return every or matches(self._modules, module, whole=True)
            except re.error as error:
                raise self._fail(
                    f"target_modules is a pattern that cannot be read ({error})"
                ) from None
        return any(modules_matched(str(name), [module]) for name in self._modules)
