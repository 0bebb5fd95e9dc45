"""PEFT's types that are no LoRA and yet a change of weights: what their files hold, by a table.

Each row names the tensors of a module, those that all modules share, and the numbers of the config;
``linalg.changes`` has the arithmetic. ``unmergeable`` says of the others why they are none.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import AdapterError
from lora_tools.records import TensorSpec

_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Change:
    """One type.

    Attributes:
        peft_type: as the config has it; title: in messages.
        parts: pattern of a key's end, of a module's own tensors; shared: of the rest of a key
            ``base_model.…``, of tensors for all modules.
        numbers: of the config, with their types; in a tuple with None where there may be none.
        weight, bias: rows of ``linalg.changes.table``; "" where it leaves the one or the other.
        shaped: the file does not say the weight's shape. of_base: the change depends on the weight.
        chained: several are applied one after the other, each to what the one before made.
        lacks: the part that a file may be without, and how it is saved with it.
        own: which part a module has a shared tensor for; "" for none.
        when: of which configs it is, where a type has two.
    """

    peft_type: str
    title: str
    parts: str
    numbers: Mapping[str, type | tuple[type, None]] = dataclasses.field(default_factory=dict)
    shared: str = ""
    weight: str = ""
    bias: str = ""
    shaped: bool = False
    of_base: bool = False
    chained: bool = False
    lacks: tuple[str, str] = ("", "")
    own: Callable[[str, str], str] = lambda module, name: name
    when: Callable[[Mapping[str, Any]], bool] = lambda config: True


def _frod_part(module: str, name: str) -> str:
    """FRoD shares projections among modules of one role, by the last words of their names."""
    part, _, role = name.partition(".")
    *before, last = module.split(".")
    mine = last if not before or before[-1].isdigit() else f"{before[-1]}_{last}"
    if mine == "output_dense" and before[-2:-1] == ["attention"]:
        mine = "attention_output"
    return part if role == mine else ""


_PROJECTION = "save_projection=True"
_LYCORIS = {"alpha": float, "r": int}
CHANGES = (
    Change("LOHA", "LoHa", r"hada_(w[12]_[ab]|t[12])", _LYCORIS, weight="loha"),
    Change("LOKR", "LoKr", r"lokr_(w[12](_[ab])?|t2)", _LYCORIS, weight="lokr"),
    Change(
        "ADALORA", "AdaLoRA", r"lora_[ABE]", {"lora_alpha": float, "init_r": int}, weight="adalora"
    ),
    Change(
        "VERA",
        "VeRA",
        r"vera_lambda_[bd]",
        shared=r"vera_[AB]",
        weight="vera",
        shaped=True,
        lacks=("vera_A", _PROJECTION),
    ),
    Change(
        "PVERA",
        "PVeRA",
        r"pvera_lambda_[bd]",
        shared=r"pvera_[AB]",
        weight="pvera",
        shaped=True,
        lacks=("pvera_A", _PROJECTION),
    ),
    Change(
        "RANDLORA",
        "RandLoRA",
        r"randlora_(lambda|gamma|A|B)",
        {"randlora_alpha": float},
        shared=r"randlora_[AB]",
        weight="randlora",
        shaped=True,
        lacks=("randlora_A", _PROJECTION),
    ),
    Change(
        "VBLORA",
        "VB-LoRA",
        r"vblora_logits_[AB](_topk_(indices|weights))?",
        {"topk": int},
        shared="vblora_vector_bank",
        weight="vblora",
    ),
    Change(
        "UNILORA",
        "Uni-LoRA",
        r"unilora_(indices|scales)_[AB]",
        shared="unilora_theta_d",
        weight="unilora",
        lacks=("unilora_indices_A", "save_indices=True"),
    ),
    Change(
        "GRALORA",
        "GraLoRA",
        r"gralora_[AB](_general\.weight)?",
        {"alpha": float, "hybrid_r": int},
        weight="gralora",
    ),
    Change(
        "TINYLORA",
        "TinyLoRA",
        r"tinylora_[ABP]",
        {"projection_seed": int},
        shared=r"tinylora_v\.\d+",
        weight="tinylora",
        lacks=("tinylora_P", _PROJECTION),
    ),
    Change("DELORA", "DeLoRA", r"delora_(A|B|lambda|w_norm)", weight="delora"),
    Change(
        "FOURIERFT",
        "FourierFT",
        "fourierft_spectrum",
        {"scaling": float, "random_loc_seed": int},
        weight="fourierft",
        shaped=True,
    ),
    Change(
        "WAVEFT",
        "WaveFT",
        "waveft_spectrum",
        {"scaling": float, "random_loc_seed": int, "wavelet_family": str, "use_idwt": bool},
        weight="waveft",
        shaped=True,
    ),
    Change("C3A", "C³A", "c3a_kernel", weight="c3a"),
    Change("SHIRA", "SHiRA", r"shira_(weight|indices)", weight="shira", shaped=True),
    Change(
        "SUPERTUNING",
        "Super tuning",
        r"supertuning_(values|indices|lora_[AB]\.weight)",
        {"lora_alpha": (float, None)},
        weight="supertuning",
        shaped=True,
        lacks=("supertuning_indices", "save_precomputed_indices=True"),
    ),
    Change(
        "MISS",
        "Bat",
        "miss_block",
        weight="bat",
        of_base=True,
        chained=True,
        when=lambda config: config.get("init_weights") == "bat",
    ),
    Change("MISS", "MiSS", "miss_block", weight="miss", shaped=True),
    Change("BEFT", "BEFT", "beft_bias", bias="beft"),
    Change(
        "OFT",
        "OFT",
        r"oft_(embedding_)?R\.weight",
        {"coft": bool, "eps": float, "use_cayley_neumann": bool, "num_cayley_neumann_terms": int},
        weight="oft",
        of_base=True,
        chained=True,
    ),
    Change("BOFT", "BOFT", r"boft_[Rs]", weight="boft", of_base=True, chained=True),
    Change("HRA", "HRA", "hra_u", {"apply_GS": bool}, weight="hra", of_base=True, chained=True),
    Change(
        "ROAD",
        "RoAd",
        r"road_(theta|alpha)",
        {"variant": str, "group_size": int},
        weight="road",
        bias="road_bias",
        of_base=True,
        chained=True,
    ),
    Change("HIRA", "HiRA", r"hira_(embedding_)?[AB]", weight="hira", of_base=True),
    Change(
        "GLORA",
        "GLoRA",
        r"glora_[A-E]\.(Xd|Xu|X|zeros)",
        weight="glora",
        bias="glora_bias",
        of_base=True,
    ),
    Change(
        "DEFT",
        "DEFT",
        r"deft_[PR]",
        {"decomposition_method": str, "para": bool, "alpha": (float, None)},
        weight="deft",
        of_base=True,
    ),
    Change(
        "FROD",
        "FRoD",
        r"frod_lambda_(l|s_values)",
        shared=r"frod_(V|s_indices|s_size)\..+",
        weight="frod",
        of_base=True,
        lacks=("frod_V", _PROJECTION),
        own=_frod_part,
    ),
    Change(
        "PEANUT",
        "PEANuT",
        r"peanut_([AB]|(encoders|decoders)\.\d+)\.weight",
        {"depth": int, "act_fn": str, "scaling": float},
        weight="peanut",
        of_base=True,
    ),
)

# No type of PEFT: LyCORIS' weight_decompose over the inputs, beside any factors.
INPUT_DORA = Change(
    "", "DoRA over the inputs", "", {"alpha": float, "r": int}, weight="input_dora", of_base=True
)

# LyCORIS' own types, by the part that tells each and the number of its axes (0: any): which parts
# each must have, and which it may.
OF_LYCORIS: dict[tuple[str, int], tuple[Change, frozenset[str], frozenset[str]]] = {
    ("a1.weight", 0): (
        Change("", "GLoRA", "", _LYCORIS, weight="lycoris_glora", of_base=True),
        frozenset(f"{part}.weight" for part in ("a1", "a2", "b1", "b2")),
        frozenset(("bm.weight", "alpha")),
    ),
    ("oft_blocks", 3): (
        Change("", "OFT", "", {"alpha": float}, weight="lycoris_oft", of_base=True, chained=True),
        frozenset(("oft_blocks",)),
        frozenset(("rescale", "alpha")),
    ),
    ("oft_blocks", 4): (
        Change("", "BOFT", "", {"alpha": float}, weight="lycoris_boft", of_base=True, chained=True),
        frozenset(("oft_blocks",)),
        frozenset(("rescale", "alpha")),
    ),
    ("on_input", 0): (
        Change("", "IA³", "", weight="lycoris_ia3", of_base=True, chained=True),
        frozenset(("weight", "on_input")),
        frozenset(),
    ),
}


def change_of(config: Mapping[str, Any]) -> Change | None:
    """The row of a config's type; None of LoRA, and of what is no change of weights."""
    kind = config.get("peft_type")
    return next((row for row in CHANGES if row.peft_type == kind and row.when(config)), None)


@dataclasses.dataclass(frozen=True)
class ChangedModule:
    """One module that is changed.

    Attributes:
        keys: its tensors in the file, and those it shares, by part.
        numbers: what the arithmetic takes besides.
    """

    module: str
    kind: Change
    keys: Mapping[str, str]
    numbers: Mapping[str, Any]


class ChangedModules:
    """Collects the modules of one adapter.

    Args:
        pattern: a number of the config for a module: (name of the patterns, module, default).
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], pattern: Callable[[str, str, Any], Any]
    ) -> None:
        self._path, self._config, self._pattern = path, config, pattern
        self.kind = change_of(config)
        self._parts: dict[str, dict[str, str]] = {}
        self._shared: dict[str, str] = {}

    def take(self, name: str, key: str, spec: TensorSpec) -> bool:
        """Whether a key, ``name`` without PEFT's prefix, is of a part. Raises AdapterError."""
        if self.kind is None:
            return False
        shared = (
            re.fullmatch(rf"base_model\.({self.kind.shared})", key) if self.kind.shared else None
        )
        match = re.fullmatch(rf"(?P<module>.+?)\.(?P<part>{self.kind.parts})(\.default)?", name)
        if shared is None and match is None:
            return False
        if not (spec.is_float or spec.dtype in ("I16", "I32", "I64", "U8")) or 0 in spec.shape:
            raise self._fail(
                f"{key}: {spec.dtype} {list(spec.shape)} is not a part of {self._title}"
            )
        if shared is not None:
            self._shared[shared[1]] = key
        elif match is not None:
            mine = self._parts.setdefault(match["module"], {})
            if match["part"] in mine:
                raise self._fail(f"{key!r} repeats {mine[match['part']]!r}")
            mine[match["part"]] = key
        return True

    def modules(self) -> dict[str, ChangedModule]:
        """All of them, by name. Raises AdapterError."""
        found = {}
        for module, keys in sorted(self._parts.items()):
            assert self.kind is not None
            own = {self.kind.own(module, name): key for name, key in self._shared.items()}
            keys = {part: key for part, key in own.items() if part} | keys
            self._check_whole(module, keys)
            numbers = {name: self._number(name, module) for name in self.kind.numbers}
            numbers["modules"] = len(self._parts)
            found[module] = ChangedModule(module, self.kind, keys, numbers)
        if self.kind is not None and self._shared and not found:
            self._check_whole(min(self._shared), {})
        return found

    @property
    def _title(self) -> str:
        return self.kind.title if self.kind is not None else ""

    def _check_whole(self, module: str, keys: Collection[str]) -> None:
        assert self.kind is not None
        part, how = self.kind.lacks
        if part and part not in keys:
            raise self._fail(
                f"{module}: the file does not have its {part}, which PEFT makes from a seed and "
                f"the whole model; save the adapter with {how} in its config"
            )

    def _number(self, name: str, module: str) -> Any:
        """A number, flag or word of the config for a module. Raises AdapterError."""
        assert self.kind is not None
        wanted, given = self.kind.numbers[name], self._config.get(name)
        if name in _PATTERNS:
            given = self._pattern(_PATTERNS[name], module, given)
        if isinstance(wanted, tuple):
            if given is None:
                return None
            wanted = wanted[0]
        if not (is_finite(given) if wanted is float else type(given) is wanted):
            raise self._fail(
                f"{module}: {name} is {given!r} in {_CONFIG}, but must be {_TYPES[wanted]}"
            )
        return given

    def _fail(self, what: str) -> AdapterError:
        return AdapterError(f"{self._path}: {what}")


_PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
_TYPES = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


def is_finite(number: Any) -> bool:
    """Whether it is a finite number, and no flag."""
    try:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        return is_number and math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False
