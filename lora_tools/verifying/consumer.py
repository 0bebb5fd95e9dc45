"""What a program that loads adapters makes of one: by its row of ``CONSUMERS``, the adapter's
headers and config, and the base's names and shapes. No tensor is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from lora_tools.adapting.convert_module import strength_of
from lora_tools.adapting.write import features
from lora_tools.errors import AdapterError, LoraToolsError, MismatchError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.format import FEATURES
from lora_tools.formats.adapters.peft import PREFIX, Adapter
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import modules_matched
from lora_tools.formats.patterns import matches
from lora_tools.formats.shards import Shards
from lora_tools.linalg.scaling import scaling
from lora_tools.merging.fit import fit_base
from lora_tools.merging.plan import plan_merge
from lora_tools.records import Action
from lora_tools.sources.transformers_names import loaded, why_unknown
from lora_tools.sources.weighted import Weighted

_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+?)(\.base_layer)*"
    r"\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)"
)
# Parts of names of what reads pictures or sound in a model that also reads text.
_TOWER = re.compile(r"(.*\.)?(visual|vision|audio|image|video|multi_modal|mm)(_\w+)?\..+")
_EXPERTS = re.compile(r"\.experts(\.|$)")
_TOWERS = ("vision_config", "audio_config")


# What is found, by the words that the rows of the table use of it.
FINDINGS = frozenset(FEATURES) | {
    *("format", "shards", "keys", "ia3", "type", "strength", "rank", "ranks"),
    *("names", "unknown", "model", "towers", "shapes", "vocabulary", "targets"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a program does not read as it is meant.

    Attributes:
        code: one of ``FINDINGS``.
        what: the same in words; keys: of the adapter, that it is about.
        mended: whether the command that writes what the program reads mends it.
    """

    code: str
    what: str
    keys: Sequence[str]
    mended: bool = True

    def verdict(self, consumer: Consumer) -> str:
        """``refused``, ``ignored``, ``changed`` (in its strength), or ``not read``, where it is not
        known which of the first two."""
        if self.code == "strength":
            return "changed"
        if self.code in consumer.refuses:
            return "refused"
        return "ignored" if self.code in consumer.ignores else "not read"


@dataclasses.dataclass(frozen=True)
class Base:
    """What an adapter is to be loaded on.

    Attributes:
        checkpoint: None of a pipeline.
        memory: names of modules and parameters as the installed transformers has them in memory.
        unknown: why these are not known, or "".
        asked: tensors that the adapter acts on, by the names that it is opened with.
        unmatched: tensors that the adapter acts on and ``merge`` would not find.
        misfit: why its shapes do not fit, or "".
        mergeable: whether ``merge`` takes the adapter.
    """

    names: BaseNames
    checkpoint: Checkpoint | None
    memory: frozenset[str] = frozenset()
    unknown: str = ""
    asked: frozenset[str] = frozenset()
    unmatched: frozenset[str] = frozenset()
    misfit: str = ""
    mergeable: bool = False

    @classmethod
    def of(
        cls, given: Adapter, consumer: Consumer, names: BaseNames, checkpoint: Checkpoint | None
    ) -> Base:
        """Looked up for an adapter, and a program."""
        asked = frozenset(module.weight for module in given.modules.values())
        base = cls(names, checkpoint, asked=asked)
        if checkpoint is None:
            return base
        if consumer.loads:
            how = loaded(checkpoint.config, checkpoint.specs)
            tensors = [*how.tensors, *how.tied] if how is not None else []
            memory = {*tensors, *(name.rpartition(".")[0] for name in tensors)}
            why = why_unknown(checkpoint.config, checkpoint.specs) if how is None else ""
            base = dataclasses.replace(base, memory=frozenset(memory), unknown=why)
        try:
            mine = [Weighted(given, 1.0, str(given.path))]
            plan = plan_merge(fit_base(checkpoint, mine, allow_unmatched=True), mine, True)
        except MismatchError as error:
            return dataclasses.replace(base, misfit=str(error))
        except AdapterError:  # none of it matches
            return dataclasses.replace(base, unmatched=asked)
        except LoraToolsError:  # found, and of a kind that is not merged
            return base
        left = frozenset(f.tensor for f in plan.unmatched if f.action == Action.UNMATCHED)
        return dataclasses.replace(base, unmatched=left, mergeable=not left)

    def has(self, module: str) -> bool:
        """Whether it is a module of the base. Of experts, which are stored one by one or as one,
        and are loaded either way, that ``merge`` finds them is enough."""
        if module in self.names.weights or module in self.memory:
            return True
        if _EXPERTS.search(module) is None:
            return False
        acted = {name for name in self.asked if name.startswith(f"{module}.")}
        found = self.checkpoint is not None and not self.misfit
        return found and bool(acted) and not acted & self.unmatched


def findings(given: Adapter, consumer: Consumer, base: Base | None) -> list[Finding]:
    """What ``consumer`` does not read of ``given`` as it is meant."""
    found = [*_file(given, consumer), *_parts(given, consumer, base), *_strengths(given, consumer)]
    strange = [
        module.name
        for module in given.modules.values()
        if consumer.modules and module.form == "matrix"
        if module.module.rpartition(".")[2] not in consumer.modules
    ]
    if strange:
        found.append(
            Finding("unknown", "factors of modules that it does not support", strange, False)
        )
    modules = _modules(given)
    if base is not None:
        found += _names(given, modules, consumer, base)
        found += _shapes(given, consumer, base)
        found += _targets(given, modules, consumer, base)
    return found


def _modules(given: Adapter) -> dict[str, str]:
    """Modules by the names that the file itself has for them → a key of each."""
    if given.format != "peft":
        return {name: name for name in given.modules}
    matches = ((key, _KEY.fullmatch(key)) for key in given.stored.specs)
    lora = {match["module"]: key for key, match in matches if match is not None}
    rows = {rows.module: rows.key for rows in given.tokens.values()}
    return {**rows, **{m.module: m.key for m in given.multipliers.values()}, **lora}


def _file(given: Adapter, consumer: Consumer) -> Iterator[Finding]:
    """How it is stored."""
    if given.format not in consumer.reads:
        titles = " or ".join(FORMATS[name].title for name in consumer.reads)
        yield Finding("format", f"the format of {given.form}; it reads {titles}", [])
    elif isinstance(given.stored, Shards) and not consumer.shards:
        files = [file.path.name for file in given.stored.files]
        yield Finding("shards", "tensors in several files, but it opens only one", files)
    odd = [key for key in given.stored.specs if ".lora_" in key and not _KEY.fullmatch(key)]
    if given.format == "peft" and odd:
        yield Finding("keys", "keys that are not spelled as in PEFT", odd)


def _parts(given: Adapter, consumer: Consumer, base: Base | None) -> Iterator[Finding]:
    """Features that it does not read."""
    if given.is_ia3:
        if consumer.name != "peft":
            what = "an IA³ adapter, which multiplies activations"
            yield Finding("ia3", what, list(given.multipliers), mended=False)
        return
    if given.changes and consumer.name != "peft":
        titles = " and ".join(sorted({c.kind.title for c in given.changes.values()}))
        yield Finding("type", f"{titles}, which is not a LoRA", list(given.changes), mended=False)
    found = features(given, base.names if base is not None else None)
    head = found.pop("head", [])
    named = given.config.get("modules_to_save")
    if not consumer.saved and "saved" in consumer.refuses and isinstance(named, list):
        found.setdefault("saved", [str(name) for name in named])
    if base is not None and base.names.config.get("model_type") in consumer.stacked:
        found.pop("experts", None)  # which it reads in that form, of such a model
    for feature, names in found.items():
        if feature == "saved":
            names = [n for n in names if not set(n.split(".")) & set(consumer.whole)]
        if names and not consumer.has(feature):
            yield Finding(feature, FEATURES[feature], names)
    biases = given.config.get("bias")
    if "bias" in consumer.refuses and "bias" not in found and biases not in (None, "none"):
        yield Finding("bias", f"bias: {biases} in its config", [])
    tied = base is not None and bool(base.names.tied)
    shared = [*head, *found.get("embedding", ())]
    if tied and shared and not consumer.head:
        yield Finding("head", FEATURES["head"], shared)


def _strengths(given: Adapter, consumer: Consumer) -> Iterator[Finding]:
    """Modules that would be scaled otherwise, and ranks that are not taken."""
    modules, config = list(given.modules.values()), given.config
    top = max((module.r for module in modules), default=0)
    if consumer.ranks and top > consumer.ranks[-1]:
        names = [module.name for module in modules if module.r > consumer.ranks[-1]]
        yield Finding("rank", f"ranks above {consumer.ranks[-1]}", names)
    if consumer.one_rank and len({module.r for module in modules}) > 1:
        names = [module.name for module in modules if module.r != config.get("r")]
        yield Finding("ranks", "modules of another rank than the rest", names)
    if consumer.patterns or given.format != "peft" or "peft" not in consumer.reads or not modules:
        return
    r, alpha = config.get("r"), config.get("lora_alpha")
    read = math.nan  # the config gives none: all comes from patterns
    if isinstance(r, int) and isinstance(alpha, int | float) and r > 0:
        read = scaling(float(alpha), r, given.use_rslora and consumer.rslora)
    others = [m.name for m in modules if not math.isclose(strength_of(m, given), read)]
    if others:
        why = "rank_pattern or alpha_pattern gives"
        if given.use_rslora and not consumer.rslora:
            why = "use_rslora gives"
        yield Finding("strength", f"a scale that {why}, which it does not read", others)


def _names(
    given: Adapter, modules: Mapping[str, str], consumer: Consumer, base: Base
) -> Iterator[Finding]:
    """Keys whose module the base has not, or the program leaves out."""
    missing = [module for module in modules if not base.has(module)]
    last = {name.rpartition(".")[2] for name in base.names.weights}
    unknown = [module for module in missing if module.rpartition(".")[2] not in last]
    silent = [module for module in missing if module not in unknown]
    mended = all(map(base.has, {m.module for m in given.modules.values()}))  # with --base
    for code, chosen in (("names", silent), ("unknown", unknown)):
        if chosen:
            code = code if code in consumer.refuses | consumer.ignores else "names"
            what = f"keys of modules that {base.names.path} does not have"
            yield Finding(code, what, [modules[module] for module in chosen], mended)
    config = base.names.config
    if consumer.pipelines and "model_type" in config and "_class_name" not in config:
        what = (
            f"{base.names.path} is a {config['model_type']} model, but this program loads pipelines"
        )
        yield Finding("model", what, [], mended=False)
    if not consumer.towers and any(config.get(name) is not None for name in _TOWERS):
        towers = [key for module, key in modules.items() if _TOWER.fullmatch(module)]
        if towers:
            what = (
                "factors outside the language model (of image or sound encoders), which it does "
                "not adapt"
            )
            yield Finding("towers", what, towers, mended=False)


def _shapes(given: Adapter, consumer: Consumer, base: Base) -> Iterator[Finding]:
    """What is of another size than the base's."""
    specs = base.checkpoint.specs if base.checkpoint is not None else {}
    other = [
        name
        for name, key in given.whole.items()
        if name in specs and specs[name].shape != given.shape(key)
    ]
    if other and consumer.saved:
        what = (
            f"{other[0]} has {given.shape(given.whole[other[0]])[0]} rows, but "
            f"{specs[other[0]].shape[0]} in the base, which must be resized before the adapter is "
            "loaded"
        )
        yield Finding("vocabulary", what, other, mended=False)
    elif base.misfit:
        yield Finding("shapes", f"other shapes than the base's: {base.misfit}", [], mended=False)


def heads_to_add(given: Adapter, consumer: Consumer, base: Base | None) -> list[str]:
    """Tensors saved whole that the base has none of: a head that the model is loaded with."""
    if base is None or base.checkpoint is None or not consumer.saved:
        return []
    known = base.checkpoint.specs.keys() | base.memory | {f"{base.names.tied}.weight"}
    return sorted(name for name in given.whole if name not in known)


def _targets(
    given: Adapter, modules: Mapping[str, str], consumer: Consumer, base: Base
) -> Iterator[Finding]:
    """Keys of modules that PEFT would not look for, since the config does not name them."""
    if not consumer.loads or given.format != "peft":
        return
    plain = [m for m, key in modules.items() if ".lora_" in key and base.has(m)]
    plain = [m for m in plain if not _EXPERTS.search(m)]  # these are target_parameters
    if given.config.get("ensure_weight_tying"):  # then the head's come with the embedding's
        plain = [m for m in plain if m != base.names.tied]
    left = [modules[module] for module in plain if not _selected(given, module)]
    if left:
        what = "keys of modules that target_modules of its config does not select"
        yield Finding("targets", what, left)


def _selected(given: Adapter, module: str) -> bool:
    """Whether the config selects a module, as PEFT reads it."""
    config = given.config
    wanted, unwanted = config.get("target_modules"), config.get("exclude_modules")
    if unwanted and _matches(unwanted, module):
        return False
    if wanted != "all-linear" and not _matches(wanted, module):
        return False
    layers, found = config.get("layers_to_transform"), re.match(r".*?\.[^.]*\.(\d+)\.", module)
    if layers is None or found is None:
        return True
    return int(found[1]) in (layers if isinstance(layers, list) else [layers])


def _matches(names: object, module: str) -> bool:
    if isinstance(names, str):
        try:
            return matches(names, module, whole=True)
        except re.error:
            return False
    chosen: Collection[object] = names if isinstance(names, list) else ()
    return any(modules_matched(str(name), [module]) for name in chosen)
