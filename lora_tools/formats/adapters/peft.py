"""Reading PEFT adapters: ``adapter_model.safetensors`` and ``adapter_config.json`` (peft 0.21).

Every key of the file is classified; a key that is none of the known kinds is an error.
``peft_folder`` opens and ``peft_writer`` writes them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import AdapterError
from lora_tools.formats.adapters.changes import ChangedModule, ChangedModules, is_finite
from lora_tools.formats.adapters.target_parameters import IN_PROJ, TargetParameters, attention_of
from lora_tools.formats.adapters.unmergeable import refuse_merge_only, refuse_unmergeable
from lora_tools.formats.names import split_tensor
from lora_tools.formats.patterns import ends_with, matches
from lora_tools.formats.reopen import SmallFile
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
CONFIG = "adapter_config.json"

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.default)?(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,  # PEFT cuts names at dots, and looks at no letter
)
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta")
# What PEFT's wrappers put into the names of the tensors of the module that they stand for.
_SAVED_PARTS = re.compile(
    r"\.(modules_to_save|original_module|token_adapter(?=\.base_layer\.)|base_layer|ln_tuning_layers)"
    r"(?=\.)"
)
# Of LoRAs that differ from others in training only; PEFT merges their factors as any.
_IDLE = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler\.\w+)(\.default)?")
IDLE_FIELDS = ("velora_config", "monteclora_config")
_IA3 = re.compile(r"(?P<module>.+)\.ia3_l(?:\.default)?")


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """One module's low-rank update, as keys of the file and numbers of the config.

    Attributes:
        module: its name, without PEFT's prefix.
        form: how the factors are held: "matrix", "embedding", "conv", "merged" or "experts", as in
            ``linalg.layouts``.
        A, B, bias, magnitude: keys in the file; the last two may be None.
        r, alpha: rank and lora_alpha of this module, patterns applied.
        parameter: the module's parameter they act on.
        enabled, sizes: of form "merged": which blocks take part, and their sizes, or () for equal
            ones.
        experts: of form "experts": how many.
        on_inputs: the magnitudes are those of the inputs, which PEFT has not.
    """

    module: str
    form: str
    A: str
    B: str
    bias: str | None
    magnitude: str | None
    r: int
    alpha: float
    parameter: str = "weight"
    enabled: tuple[bool, ...] = ()
    sizes: tuple[int, ...] = ()
    experts: int = 0
    on_inputs: bool = False

    @property
    def weight(self) -> str:
        """The tensor they act on."""
        return f"{self.module}.{self.parameter}"

    @property
    def name(self) -> str:
        """The module, or of several parameters that it holds the parameter."""
        return self.module if self.parameter == "weight" else self.weight

    @property
    def parameters(self) -> dict[str, Any]:
        """What the layer kind is to know, for ``layouts.of_form``."""
        return {"enabled": self.enabled, "sizes": self.sizes, "experts": self.experts}


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Trained rows of one embedding: they replace the rows at ``indices``."""

    module: str
    key: str
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """IA³'s vector of one module: it multiplies the module's inputs, or its outputs."""

    module: str
    key: str
    on_input: bool


class Adapter:
    """A PEFT adapter, its factors unread until asked for.

    Attributes:
        modules: low-rank updates by module name; of several parameters of one module, by theirs.
        whole: tensors saved whole (modules_to_save, biases, resized embeddings) → key.
        frozen: tensors as they were before training → key; ``save_embedding_layers`` of PEFT adds
            them where the vocabulary was resized.
        tokens: trained embedding rows by module name.
        multipliers: IA³'s vectors by module name; an adapter has these or low-rank updates.
        changes: of another type of PEFT, what it changes by module name. kind: the type.
        differences: tensors that are added to the base's, by its name for them → key. (LyCORIS and
            ComfyUI have them of norms and biases; PEFT has none.)
        form, format, stored, notes, blocks, unresolved: see ``view.Foreign``.
    """

    form, format = "PEFT", "peft"
    mixes_dora = False  # whether some modules may have DoRA's magnitudes and others not
    notes: tuple[str, ...] = ()
    blocks: Mapping[str, tuple[bool, ...]] = {}
    unresolved = ""
    changes: Mapping[str, ChangedModule] = {}
    differences: Mapping[str, str] = {}

    def __init__(self, path: Path, file: TensorFile, config: dict[str, Any]) -> None:
        self.path, self.file, self.config = path, file, config
        self._config_file = SmallFile.of(file.path.with_name(CONFIG))
        self.stored = getattr(self, "stored", file)
        refuse_unmergeable(path, config)
        self.use_rslora = bool(config.get("use_rslora"))
        self.use_dora = bool(config.get("use_dora"))
        self.fan_in_fan_out = bool(config.get("fan_in_fan_out"))
        self.modules: dict[str, LoraModule] = {}
        self.whole: dict[str, str] = {}
        self.frozen: dict[str, str] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.multipliers: dict[str, Multiplier] = {}
        self.kind = str(config.get("peft_type", "LORA"))
        self.is_ia3 = self.kind == "IA3"
        self._classify()

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file. Never write to it."""
        return self.file.tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.file.specs[key].shape

    @property
    def original(self) -> Adapter:
        """The adapter as it was given."""
        return self

    @property
    def transposes_experts(self) -> bool:
        """Whether it was written by a PEFT before 0.19, which took fused experts for (E, in, out)
        always."""
        version = str(self.config.get("peft_version") or "")
        return re.match(r"0\.1[0-8]\.", version) is not None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.file.specs.values())

    @property
    def saved_keys(self) -> list[str]:
        """Keys of all that is saved whole, and of what it was before training where that lies
        there as well."""
        return list(dict.fromkeys([*self.whole.values(), *self.frozen.values()]))

    def _fail(self, what: str) -> AdapterError:
        return AdapterError(f"{self.path}: {what}")

    def _classify(self) -> None:
        parts: dict[str, dict[str, str]] = {}
        targeted = TargetParameters(self.path, self.config)
        written = "LoRA" if self.kind == "LORA" else self.kind
        changed = ChangedModules(self.path, self.config, self.pattern)
        besides = {*self.differences.values()}
        besides |= {key for change in self.changes.values() for key in change.keys.values()}
        for key in self.file.specs.keys() - besides:
            name = key.removeprefix(PREFIX)
            if changed.take(name, key, self.file.specs[key]):
                continue
            if self.is_ia3 and (match := _IA3.fullmatch(name)):
                self._add_multiplier(match["module"], key)
            elif match := _FACTOR.fullmatch(name):
                if self.kind != "LORA":
                    raise self._fail(f"key {key!r} is unknown in PEFT's {self.kind}")
                module, part = match["module"], match["part"]
                leaf = "bias" if match["leaf"] == "bias" else part
                if leaf in parts.setdefault(module, {}):
                    raise self._fail(f"{key!r} repeats {parts[module][leaf]!r}")
                parts[module][leaf] = key
            elif _IDLE.fullmatch(name) and any(map(self.config.get, IDLE_FIELDS)):
                self.notes = ("ignored: tensors that VeLoRA or MonteCLoRA keep for training only",)
            elif match := _TOKENS.fullmatch(name):
                module = match["module"]
                self.tokens[module] = TokenRows(module, key, self._token_indices(module))
            elif ".lora_" in name or "." not in key or not _is_kept(self.file.specs[key]):
                raise self._fail(f"key {key!r} is unknown in PEFT's {written}")
            else:
                self._add_whole(name, key)
        for nested, keys in sorted(parts.items()):
            parameter = targeted.acted_on(nested, parts)
            asked = attention_of(nested, parts)
            found = self._module(nested.replace(".base_layer", ""), parameter, keys, asked)
            self.modules[found.name] = found
        self.changes = {**self.changes, **changed.modules()}
        held = (self.modules, self.whole, self.tokens, self.multipliers)
        if not any((*held, self.changes, self.differences)):
            raise self._fail("holds no tensors")

    def _add_whole(self, name: str, key: str) -> None:
        """A tensor saved whole. ``save_embedding_layers`` of PEFT writes a module of
        modules_to_save three times: as it loads it, as it lies in memory, and as it was before."""
        tensor = _SAVED_PARTS.sub("", name).replace(".default.", ".")
        if ".original_module." in name:
            self.frozen[tensor] = key
        elif ".modules_to_save." not in name or tensor not in self.whole:
            self.whole[tensor] = key
            if not self._is_trained(tensor):
                self.frozen[tensor] = key

    def _is_trained(self, tensor: str) -> bool:
        """Whether the config has a tensor trained that is saved whole."""
        module, parameter = split_tensor(tensor)
        if self.kind == "LN_TUNING":
            return True
        saved = self.config.get("modules_to_save") or []
        if any(module == name or module.endswith(f".{name}") for name in saved):
            return True
        return parameter == "bias" and self.config.get("bias", "none") != "none"

    def _add_multiplier(self, module: str, key: str) -> None:
        spec, given = self.file.specs[key], self.config.get("feedforward_modules") or []
        if isinstance(given, str):
            try:
                on_input = matches(given, module, whole=True)
            except re.error as error:
                raise self._fail(
                    f"{CONFIG}: feedforward_modules is not a pattern ({error})"
                ) from None
        else:
            on_input = any(module.endswith(str(name)) for name in given)
        along = 1 if on_input or len(spec.shape) > 2 else 0
        if not spec.is_float or len(spec.shape) < 2 or spec.shape[along] != spec.numel:
            raise self._fail(
                f"{key}: {spec.dtype} {list(spec.shape)} is not a vector over the module's "
                f"{'in' if on_input else 'out'}puts, which feedforward_modules in {CONFIG} asks "
                "for"
            )
        self.multipliers[module] = Multiplier(module, key, on_input)

    def need_lora(self, what: str) -> None:
        """Raises UnsupportedAdapter for an adapter that has no ``what`` but can be merged."""
        titles = [change.kind.title for change in self.changes.values()]
        refuse_merge_only(self.path, self.is_ia3, titles, self.of_attention, what, self.differences)

    @property
    def of_attention(self) -> bool:
        """Whether it is PEFT's LoRA of an nn.MultiheadAttention."""
        return any(module.parameter == IN_PROJ for module in self.modules.values())

    def _module(self, module: str, parameter: str, keys: dict[str, str], asked: str) -> LoraModule:
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if a not in keys or b not in keys:
            raise self._fail(f"{module}: has {sorted(keys)}, but needs both {a} and {b}")
        for key in keys.values():
            if not self.file.specs[key].is_float:
                raise self._fail(
                    f"{key}: stored as {self.file.specs[key].dtype}, which factors cannot have; "
                    "save them in bfloat16 with the program that made the file"
                )
        A, B = self.shape(keys[a]), self.shape(keys[b])
        # A convolution's lora_B is grouped as its layer is: each group takes its share of the rank.
        sound = len(A) == len(B) >= 2 and 0 not in A + B and A[0] % B[1] == 0
        sound = sound and set(B[2:]) <= {1}
        if not sound or (len(A) == 2 and A[0] != B[1]):
            raise self._fail(f"{module}: {a} {list(A)} and {b} {list(B)} do not multiply")
        has_dora = "lora_magnitude_vector" in keys
        if self.use_dora != has_dora and not self.mixes_dora:
            raise self._fail(
                f"{module}: use_dora is {self.use_dora} in {CONFIG}, but the file "
                f"{'has' if not self.use_dora else 'lacks'} its lora_magnitude_vector"
            )
        if has_dora and math.prod(self.shape(keys["lora_magnitude_vector"])) != B[0]:
            raise self._fail(
                f"{module}: lora_magnitude_vector is "
                f"{list(self.shape(keys['lora_magnitude_vector']))}, but must have {B[0]} numbers, "
                f"one for each row of {b}"
            )
        form = "embedding" if embedding else "matrix" if len(A) == 2 else "conv"
        name = f"{module}.{parameter}" if parameter else module
        r = self.pattern("rank_pattern", asked or name, self.config.get("r"))
        alpha = self.pattern("alpha_pattern", asked or name, self.config.get("lora_alpha"))
        experts = 0
        if name != module and type(r) is int and r > 0 and A[0] % r == 0:
            form, experts = "experts", A[0] // r
        if r != A[0] and not experts:
            raise self._fail(f"{module}: {CONFIG} says rank {r}, but its factors have rank {A[0]}")
        if not is_finite(alpha):
            raise self._fail(f"{module}: lora_alpha is {alpha!r} in {CONFIG}")
        alpha = float(alpha) * (2 if asked and not parameter else 1)  # see ``attention_of``
        return LoraModule(
            module,
            form,
            keys[a],
            keys[b],
            keys.get("bias"),
            keys.get("lora_magnitude_vector"),
            r,
            alpha,
            parameter or "weight",
            experts=experts,
        )

    def pattern(self, which: str, module: str, default: Any) -> Any:
        """The first entry of rank_pattern or alpha_pattern that matches, else ``default``."""
        patterns = self.config.get(which) or {}
        if not isinstance(patterns, dict):
            raise self._fail(f"{CONFIG}: {which} is not a mapping of names to numbers")
        fitting = (value for key, value in patterns.items() if self._fits(which, key, module))
        return next(fitting, default)

    def _fits(self, which: str, key: str, module: str) -> bool:
        try:
            return ends_with(key, module)
        except re.error as error:
            said = f"{CONFIG}: {which}: {key[:200]!r} is a pattern that cannot be read ({error})"
            raise self._fail(said) from None

    def _token_indices(self, module: str) -> tuple[int, ...]:
        given = self.config.get("trainable_token_indices", self.config.get("token_indices"))
        if isinstance(given, Mapping):
            given = next(
                (v for k, v in given.items() if module == k or module.endswith("." + k)), None
            )
        if not isinstance(given, list) or not all(type(i) is int for i in given):
            raise self._fail(f"{module}: {CONFIG} has no trainable_token_indices for it")
        return tuple(given)


def _is_kept(spec: TensorSpec) -> bool:
    """Whether a tensor can be saved whole: a float, or a counter such as a BatchNorm's."""
    return spec.is_float or spec.dtype in ("I16", "I32", "I64")
