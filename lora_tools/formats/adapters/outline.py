"""An adapter of another format, seen as PEFT names and shapes its tensors.

A reader of a format says of every tensor that PEFT would store what it is made of (``Made``): which
keys of the file, and by which recipe of ``linalg.recipes``. Nothing is computed here, and nothing
is read before it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import AdapterError, CheckpointError, MismatchError, TensorNotFound
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.changes import INPUT_DORA, Change, ChangedModule
from lora_tools.formats.adapters.peft import PREFIX, Adapter
from lora_tools.formats.adapters.training_metadata import is_carried
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

ALPHA_METADATA = "lora_alpha"  # of a safetensors file, in formats without a place for it
# (name of a recipe, tensors of the file, its numbers) -> one tensor
Compute = Callable[[str, Sequence["torch.Tensor"], Sequence[int]], "torch.Tensor"]


@dataclasses.dataclass(frozen=True)
class Made:
    """One tensor as PEFT stores it, and how it comes out of the file.

    Attributes:
        spec: its key in PEFT's naming, dtype and shape.
        keys: the file's tensors that it is made of.
        recipe: a row of ``linalg.recipes.RECIPES``; numbers: what that recipe takes besides.
    """

    spec: TensorSpec
    keys: tuple[str, ...]
    recipe: str = "same"
    numbers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Context:
    """What a user may add to a file that does not say it all.

    Attributes:
        base: the model's names, where a base is at hand.
        alpha: lora_alpha, for formats that do not store it.
        enable_lora: which blocks of a loralib MergedLinear are adapted.
        as_stored: without a base, keep the file's own names and order of rows instead of failing.
        allow_unmatched: keep a name that is none of the base's as it is, for the plan to leave out;
            None where that cannot be asked for.
        guess: take the rank for an alpha that is not said, and all blocks for enable_lora.
    """

    base: BaseNames | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] = ()
    as_stored: bool = False
    guess: bool = False
    allow_unmatched: bool | None = None

    def need_base(self, path: Path, why: str) -> BaseNames:
        """The base. Raises AdapterError where none is at hand."""
        if self.base is None:
            raise AdapterError(
                f"{path}: {why}; give the model it was trained on with --base, or convert it "
                f"first: loratools convert {path} -o OUT --to peft --base CHECKPOINT"
            )
        return self.base

    def base_for(self, outline: Outline, why: str) -> BaseNames | None:
        """The base, or None where the file's own names are wanted. Raises AdapterError."""
        if self.base is None and self.as_stored:
            outline.unresolved = why
            return None
        return self.need_base(outline.path, why)

    def need_alpha(self, outline: Outline) -> float | None:
        """lora_alpha, or None for the rank. Raises AdapterError where it is wanted and unknown."""
        path, form = outline.path, outline.form
        if self.alpha is None and self.guess:
            note = f"{form} does not store lora_alpha: the rank is used instead"
            outline.notes += [] if note in outline.notes else [note]
        elif self.alpha is None:
            raise AdapterError(
                f"{path}: {form} does not store lora_alpha; give the alpha of the training: "
                f"loratools convert {path} -o OUT --to peft --alpha ALPHA"
            )
        return self.alpha


class View:
    """A ``TensorFile`` of what a reader made out of another one."""

    def __init__(self, file: TensorFile, made: Iterable[Made], compute: Compute) -> None:
        self.path, self.header = file.path, b""
        self.metadata = {k: v for k, v in file.metadata.items() if is_carried(k)}
        self._file, self._compute = file, compute
        self._made = {each.spec.name: each for each in made}
        self.specs = {name: each.spec for name, each in self._made.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, computed anew each time. Never write to it."""
        if name not in self._made:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}")
        made = self._made[name]
        given = [self._file.tensor(key) for key in made.keys]
        try:
            result = self._compute(made.recipe, given, made.numbers)
        except MismatchError as error:
            raise MismatchError(f"{self.path}: {', '.join(made.keys)}: {error}") from None
        if result.numel() != made.spec.numel:
            raise MismatchError(
                f"{self.path}: {', '.join(made.keys)}: the shapes make {list(result.shape)}, but "
                f"must make {list(made.spec.shape)}"
            )
        return result.reshape(made.spec.shape)

    def raw(self, name: str) -> memoryview:
        """Its bytes in row-major order."""
        return as_bytes(self.tensor(name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing to give back: the file's pages are shared by several tensors."""


class Foreign(Adapter):
    """An adapter that came in another format than PEFT's, with PEFT's face.

    Attributes:
        form: the format's title; format: its name in ``FORMATS``.
        stored: the file as it is. notes, blocks, unresolved: as in ``Outline``.
    """

    mixes_dora = True

    def __init__(
        self, path: Path, outline: Outline, alphas: Mapping[str, float], compute: Compute
    ) -> None:
        file = outline.file
        self._numbers: dict[str, Mapping[str, Any]] = {
            "rank_pattern": outline.ranks,
            "alpha_pattern": alphas,
        }
        self.form, self.stored = outline.form, outline.file
        self.blocks, self.unresolved = outline.blocks, outline.unresolved
        self.notes = tuple(outline.notes)
        self.differences, self.changes = outline.differences, outline.changes
        unused = set(file.specs) - outline.used
        if unused:
            raise AdapterError(f"{path}: key {min(unused)!r} is unknown in {outline.form}")
        config = {
            "peft_type": "LORA",
            "target_modules": sorted(outline.ranks),
            "use_dora": outline.dora,
            "lora_bias": any(m.spec.name.endswith(".lora_B.bias") for m in outline.made)
            or any(f"{module}.bias" in outline.differences for module in outline.ranks),
            **outline.config,
        }
        super().__init__(path, View(file, outline.made, compute), config)

    def pattern(self, which: str, module: str, default: Any) -> Any:
        """The module's own rank or alpha: no pattern stands between."""
        return self._numbers[which].get(module, default)


class Outline:
    """Collects what a reader finds out about a file.

    Args:
        form: the format's title, for messages.
        base: the model's names, where factors may have a kernel of 1 that its weight has not.
    """

    def __init__(
        self, path: Path, file: TensorFile, form: str, base: BaseNames | None = None
    ) -> None:
        self.path, self.file, self.form, self.base = path, file, form, base
        self.made: list[Made] = []
        self.ranks: dict[str, int] = {}
        self.strengths: dict[str, tuple[float, int, bool]] = {}  # alpha, rank, rslora
        self.used: set[str] = set()
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self.blocks: dict[str, tuple[bool, ...]] = {}  # of loralib's MergedLinears
        self.unresolved = ""  # why the names are the file's own, where they are
        self.dora = False
        self.differences: dict[str, str] = {}  # as in ``peft.Adapter``
        self.changes: dict[str, ChangedModule] = {}
        self.zero: list[str] = []  # modules whose alpha of 0 is taken for the rank
        self.exact: list[int] = []  # ranks of modules that are no plain factors in the file

    def add_lora(
        self,
        module: str,
        lora_A: Made,
        lora_B: Made,
        alpha: float | None,
        *,
        embedding: bool = False,
        bias: str = "",
        magnitude: str = "",
        of_rank: int | None = None,
        rslora: bool = False,
        magnitude_recipe: tuple[str, tuple[int, ...]] | None = None,
    ) -> None:
        """The factors of one module; the names of their specs are filled in here.

        ``bias`` and ``magnitude`` are keys of the file. ``alpha`` None: the rank. The scaling is
        that of ``alpha`` at ``of_rank`` (by default lora_A's own rank) with ``rslora`` or without.
        """
        if module in self.ranks or module in self.changes:
            raise self.fail(f"{module} is there twice; the second is {', '.join(lora_A.keys)}")
        lora_A, lora_B = self._as_weight(module, lora_A, lora_B)
        if magnitude and self._is_of_inputs(magnitude, lora_A):
            self._add_input_dora(module, lora_A, lora_B, alpha, magnitude, of_rank)
            return
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        self._add(f"{module}.{a}", lora_A)
        self._add(f"{module}.{b}", lora_B)
        if bias:
            self._add(f"{module}.lora_B.bias", self.same(bias))
        if magnitude:
            shape = self.shape(magnitude)
            made = self.same(magnitude)
            if magnitude_recipe is not None:
                made = self.recipe(made, *magnitude_recipe)
            if len(lora_A.spec.shape) == 2:
                made = reshaped(made, (max(shape, default=1),))
            else:
                kernel = len(lora_A.spec.shape) - 2
                made = reshaped(made, (1, max(shape, default=1), *[1] * kernel))
            self._add(f"{module}.lora_magnitude_vector", made)
            self.dora = True
        rank = lora_A.spec.shape[0]
        self.ranks[module] = rank
        self.strengths[module] = (float(rank) if alpha is None else alpha, of_rank or rank, rslora)

    def _as_weight(self, module: str, lora_A: Made, lora_B: Made) -> tuple[Made, Made]:
        """Factors of a 1x1 convolution for a weight that is a matrix, as a matrix, and the other
        way about: trainers take a transformer's ``proj_in`` for either. DyLoRA keeps no kernel of
        1 for lora_B."""
        kernel = len(lora_A.spec.shape) - 2
        if kernel and len(lora_B.spec.shape) == 2:
            lora_B = reshaped(lora_B, (*lora_B.spec.shape, *[1] * kernel))
        a, b = lora_A.spec.shape, lora_B.spec.shape
        weight = self.base.weight(module) if self.base is not None else None
        if weight is None or len(weight.shape) == len(a) or len(a) != len(b):
            return lora_A, lora_B
        if len(weight.shape) == 2 and set(a[2:]) | set(b[2:]) == {1}:
            return reshaped(lora_A, a[:2]), reshaped(lora_B, b[:2])
        ones = weight.shape[2:]
        if len(a) == 2 and set(ones) == {1}:
            return reshaped(lora_A, (*a, *ones)), reshaped(lora_B, (*b, *ones))
        return lora_A, lora_B

    def _is_of_inputs(self, magnitude: str, lora_A: Made) -> bool:
        """Whether there is one for each input, (1, in, *1), and not for each output."""
        shape = self.shape(magnitude)
        return len(shape) > 1 and shape[0] == 1 and shape[1] == lora_A.spec.shape[1] != 1

    def _add_input_dora(
        self,
        module: str,
        lora_A: Made,
        lora_B: Made,
        alpha: float | None,
        magnitude: str,
        of_rank: int | None,
    ) -> None:
        parts = {"lora_A": lora_A, "lora_B": lora_B, "dora_scale": self.same(magnitude)}
        rank = lora_A.spec.shape[0]
        numbers = {"alpha": float(rank) if alpha is None else alpha, "r": of_rank or rank}
        self.add_change(module, INPUT_DORA, parts, numbers)

    def add_change(
        self, module: str, kind: Change, parts: Mapping[str, Made], numbers: Mapping[str, float]
    ) -> None:
        """A module whose change is none of a LoRA, by what ``linalg.changes`` calls its parts."""
        if module in self.ranks or module in self.changes:
            raise self.fail(f"{module} is there twice: {next(iter(parts.values())).keys[0]} is it")
        for part, made in parts.items():
            self._add(f"{module}.{part}", made)
        keys = {part: f"{PREFIX}{module}.{part}" for part in parts}
        self.changes[module] = ChangedModule(module, kind, keys, numbers)

    def add_difference(self, name: str, key: str) -> None:
        """What is added to a tensor, by its name in the model."""
        if name in self.differences:
            raise self.fail(f"{key!r} is the second difference of {name}")
        self._add(name, self.same(key))
        self.differences[name] = PREFIX + name

    def add_saved(self, name: str, key: str) -> None:
        """A tensor saved whole, by its name in the model."""
        self._add(name, self.same(key))
        modules = {*self.config.get("modules_to_save", ()), name.rpartition(".")[0]}
        self.config["modules_to_save"] = sorted(modules)

    def _add(self, name: str, made: Made) -> None:
        self.made.append(
            dataclasses.replace(made, spec=dataclasses.replace(made.spec, name=PREFIX + name))
        )
        self.used |= set(made.keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor of the file."""
        return self.file.specs[key].shape

    def same(self, key: str) -> Made:
        """A tensor of the file as it is."""
        return Made(self.file.specs[key], (key,))

    def transposed(self, key: str) -> Made:
        """A matrix of the file, transposed."""
        shape = self.shape(key)
        if len(shape) != 2:
            raise self.fail(f"{key}: has shape {list(shape)}, but must be a matrix")
        return Made(
            dataclasses.replace(self.file.specs[key], shape=shape[::-1]), (key,), "transposed"
        )

    def recipe(self, made: Made, recipe: str, numbers: tuple[int, ...]) -> Made:
        """One tensor by a recipe that keeps its dtype and shape."""
        return dataclasses.replace(made, recipe=recipe, numbers=numbers)

    def computed(
        self, shape: Sequence[int], keys: Sequence[str], recipe: str, numbers: Sequence[int] = ()
    ) -> Made:
        """Made of several tensors; in float32, or better where one of them is."""
        dtype = "F64" if any(self.file.specs[k].dtype == "F64" for k in keys) else "F32"
        return Made(TensorSpec("", dtype, tuple(shape)), tuple(keys), recipe, tuple(numbers))

    def scalar(self, key: str) -> float:
        """The one number that a tensor of the file holds."""
        spec = self.file.specs[key]
        if spec.numel != 1 or not (spec.is_float or spec.dtype.startswith(("I", "U"))):
            raise self.fail(f"{key}: is {spec.dtype} {list(spec.shape)}, but must be one number")
        self.used.add(key)
        return float(self.file.tensor(key).double().item())

    def fail(self, what: str) -> AdapterError:
        """An error about this file."""
        return AdapterError(f"{self.path}: {what}")


def reshaped(made: Made, shape: Sequence[int]) -> Made:
    """The same numbers in another shape."""
    return dataclasses.replace(made, spec=dataclasses.replace(made.spec, shape=tuple(shape)))


def group_parts(
    outline: Outline,
    parts: Collection[str],
    split: Callable[[str], tuple[str, str] | None],
    besides: Collection[str] = (),
) -> dict[str, dict[str, str]]:
    """Keys of the file, but those ``besides``, by module and part, as ``split`` reads a key; a key
    it cannot read, or whose part is none of ``parts``, is refused by name."""
    modules: dict[str, dict[str, str]] = {}
    for key in outline.file.specs:
        if key in besides:
            continue
        found = split(key)
        if found is None or found[1] not in parts:
            raise outline.fail(f"key {key!r} is unknown in {outline.form}")
        module, part = found
        if part in modules.setdefault(module, {}):
            raise outline.fail(f"{key!r} repeats {modules[module][part]!r}")
        modules[module][part] = key
    return dict(sorted(modules.items()))


def stored_alphas(outline: Outline) -> dict[str, float]:
    """lora_alpha by module out of the file's metadata, where this tool wrote the file."""
    text = outline.file.metadata.get(ALPHA_METADATA)
    if text is None:
        return {}
    try:
        said = strict_json(text)
    except CheckpointError as error:
        raise outline.fail(f"its metadata {ALPHA_METADATA}: {error}") from None
    if not isinstance(said, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in said.values()
    ):
        raise outline.fail(f"its metadata {ALPHA_METADATA} is not a mapping of modules to numbers")
    return {module: float(alpha) for module, alpha in said.items()}


def pair(outline: Outline, module: str, keys: Mapping[str, str], a: str, b: str) -> tuple[str, str]:
    """The keys of both factors of a module. Raises AdapterError where one is missing."""
    if a not in keys or b not in keys:
        raise outline.fail(f"{module}: has {sorted(keys)}, but needs both {a} and {b}")
    return keys[a], keys[b]
