"""A vocabulary that an adapter was trained with and that has other rows than the base's: which
tensors take the new number, and where their rows come from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.formats.regular_files import is_there, refuse_outside
from lora_tools.merging.brought import Brought, refuse_in_part
from lora_tools.merging.fitted import Made
from lora_tools.records import TensorSpec

# Files by which transformers opens a tokenizer.
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# What a config.json calls the rows of the embedding, of those that Gemma-3n has for each layer, and
# of Marian's in its decoder.
_SIZES = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Rows before and after, and the adapter that brings the new ones."""

    old: int
    new: int
    adapter: Adapter

    def sentence(self, files: Collection[str]) -> str:
        """What a user should know of it."""
        if files:
            tokenizer = f"the adapter's tokenizer is copied ({', '.join(sorted(files))})"
        else:
            tokenizer = (
                "there is no tokenizer beside the adapter: add the tokenizer of that vocabulary "
                "to the output"
            )
        return f"the vocabulary has {self.new} rows ({self.old} in the base); {tokenizer}"


def new_vocabulary(base: Checkpoint, brought: Mapping[str, Brought]) -> Vocabulary | None:
    """The vocabulary that adapters bring; None where it is the base's, or none is brought.

    Raises:
        MismatchError: they bring several.
    """
    old = _rows(base)
    if not old:
        return None
    found: dict[int, str] = {}
    adapter = None
    for name, each in brought.items():
        if _is_resized(name, each, base, old):
            found.setdefault(each.shape[0], f"{each.weighted.path}: {each.name}")
            adapter = adapter or each.weighted.adapter
    if len(found) > 1:
        said = ", ".join(f"{rows} ({name})" for rows, name in found.items())
        raise MismatchError(
            f"{base.path}: its vocabulary of {old} cannot grow to several sizes: {said}"
        )
    return Vocabulary(old, next(iter(found)), adapter) if adapter is not None else None


def _rows(base: Checkpoint) -> int:
    """Rows of the base's vocabulary, or 0."""
    embedding = base.weights.embedding
    if embedding:
        return base.weights[embedding].spec.shape[0]
    return next((size for size in _sizes(base.config)), 0)


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    size = config.get("vocab_size")
    if type(size) is int:
        yield size
    for inner in config.values():
        if isinstance(inner, Mapping):
            yield from _sizes(inner)


def _is_resized(name: str, each: Brought, base: Checkpoint, old: int) -> bool:
    """Whether it is a tensor of the vocabulary, and has other rows than the base's."""
    if not each.has_other_rows(base, name):
        return False
    weight = base.weights[name]
    role = weight.is_embedding or weight.is_head or weight.tied_to or weight.layout == "embedding"
    return weight.spec.shape[0] == old and bool(role or name == base.weights.head)


def with_vocabulary(config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The config with the new number at every level that has the old one."""
    changed = copy.deepcopy(dict(config))
    levels = [changed]
    while levels:
        level = levels.pop()
        levels += [inner for inner in level.values() if isinstance(inner, dict)]
        for key in _SIZES:
            if level.get(key) == vocabulary.old and (
                key != "decoder_vocab_size" or level.get("share_encoder_decoder_embeddings", True)
            ):
                level[key] = vocabulary.new
    if changed and not any(_sizes(changed)):
        changed["vocab_size"] = vocabulary.new  # it was the class's own default
    return changed


def resized(
    spec: TensorSpec, base: Checkpoint, brought: Mapping[str, Brought], vocabulary: Vocabulary
) -> Made:
    """A vocabulary's tensor ``spec`` of the base with the new number of rows, before training.

    PEFT's users resize the base and load the adapter. The first rows stay; of more rows only the
    adapter can say what they are.

    Raises:
        MismatchError: it does not.
    """
    name, new = spec.name, vocabulary.new
    if spec.shape[0] != vocabulary.old:  # a bias as BART has it, of zeros for what is new
        return Made(dataclasses.replace(spec, shape=(1, new)), name)
    shaped = dataclasses.replace(spec, shape=(new, *spec.shape[1:]))
    ties = base.weights.ties
    same = {name, *(head for head, source in ties.items() if source == name)}
    mine = [brought[each] for each in sorted(same, key=lambda n: n != name) if each in brought]
    mine = [each for each in mine if each.shape == shaped.shape]
    for each in mine:
        adapter = each.weighted.adapter
        if each.frozen and adapter.shape(each.frozen) == shaped.shape:
            return Made(shaped, each.frozen, adapter)
    if new < vocabulary.old:
        return Made(shaped, name)
    follows = all(each.weighted.adapter.config.get("ensure_weight_tying") for each in mine)
    if name in brought and mine and (len(mine) == len(same) or follows):
        refuse_in_part(brought[name], spec)
        return Made(shaped, brought[name].key, brought[name].weighted.adapter)
    lacking = min(same - {n for n in same if n in brought}, default=name)
    raise MismatchError(
        f"{lacking}: base has {vocabulary.old} rows, and the adapter was trained with a vocabulary "
        f"of {new}, but does not hold the new rows; save it again with model.save_pretrained(…, "
        "save_embedding_layers=True), or merge into a base whose vocabulary was resized"
        + (
            "; or, if the output head should follow the embedding, set ensure_weight_tying to "
            "true in the adapter's adapter_config.json"
            if len(same) > 1
            else ""
        )
    )


def is_left_behind(spec: TensorSpec, base: Checkpoint, vocabulary: Vocabulary) -> bool:
    """By name and shape: whether a tensor that no adapter brings is a vocabulary's.

    Raises:
        MismatchError: it has as many rows, and is none that is known.
    """
    if spec.shape == (1, vocabulary.old):
        return split_tensor(spec.name)[1] == "final_logits_bias"
    if not spec.shape or spec.shape[0] != vocabulary.old:
        return False
    weight = base.weights[spec.name]
    if weight.is_embedding or weight.is_head or spec.name == base.weights.head:
        return True
    if weight.parameter == "bias" and split_tensor(weight.module)[1] in ("predictions", "decoder"):
        return True
    raise MismatchError(
        f"{spec.name}: has {vocabulary.old} rows like the vocabulary, which grows to "
        f"{vocabulary.new}. Without transformers it is not known whether it must grow too; install "
        "transformers, or merge into a base whose vocabulary was resized"
    )


def tokenizer_files(adapter: Adapter) -> dict[str, Path]:
    """Files of the tokenizer that lie beside an adapter: it knows the new rows."""
    if not adapter.path.is_dir():
        return {}
    found = {name: adapter.path / name for name in _TOKENIZER}
    found = {name: path for name, path in found.items() if is_there(path)}
    for path in found.values():
        refuse_outside(path, adapter.path)
    return found
