"""A model cut into the graphs it is exported to: what goes in, what comes out, what is dynamic."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_tools.onnx.caches import cache_shapes
from lora_tools.onnx.senses import sensed
from lora_tools.onnx.sentence_modules import run
from lora_tools.onnx.tasks import DECODER, ENCODER_DECODER, SENSED, Task

# Example sizes, each unlike the others and unlike 0 and 1, which torch.export takes for constants.
BATCH, SEQUENCE, PAST, SOURCE = 2, 3, 5, 7


@dataclasses.dataclass(frozen=True)
class GraphPart:
    """One graph to be traced.

    Attributes:
        file: its name in the output.
        module: takes ``args`` in order and returns a flat tuple of tensors. The model is its
            attribute ``inner``.
        args: example inputs, no tensor twice.
        axes: for each input, the names of its dynamic dimensions.
        outputs: names of the outputs.
    """

    file: str
    module: nn.Module
    args: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


def parts(
    model: nn.Module, task: Task, cache: bool = True, kept: Mapping[int, int] | None = None
) -> Iterator[GraphPart]:
    """The graphs of a model, in the order of ``task.files()``.

    Args:
        cache: whether a decoder has its past as inputs and outputs.
        kept: how many layers are left of a stack that had so many.
    """
    kept = kept or {}
    config: Any = model.config
    if task.kind in SENSED:
        yield _sensed(model, config, task)
    elif task.kind == DECODER:
        yield _decoder(model, cache, kept)
    elif task.kind == ENCODER_DECODER:
        yield _encoder(model, config)
        yield _seq2seq(model, config, False, kept)
        yield _seq2seq(model, config, True, kept)
    else:
        yield _text(model, config, task)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def _tokens(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 + 1


class _Plain(nn.Module):
    """Named inputs in, named outputs out."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self._names, self._outputs = inner, names, outputs

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.inner(**dict(zip(self._names, given, strict=True)), return_dict=True)
        return tuple(result[name] for name in self._outputs)


class _Sentence(nn.Module):
    """A transformer and the modules of a sentence-transformers folder after it."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...], task: Task) -> None:
        super().__init__()
        self.inner, self._names, self._task = inner, names, task

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self._names, given, strict=True))
        hidden = self.inner(**named, return_dict=True)["last_hidden_state"].float()
        found = run(self.inner, self._task.steps, hidden, named["attention_mask"])
        return tuple(found[name] for name in self._task.outputs)


def text_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of an encoder's inputs: segment ids only where there is more than one segment."""
    config: Any = model.config
    names = ["input_ids", "attention_mask"]
    if takes(model, "token_type_ids") and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return tuple(names)


def _text(model: nn.Module, config: Any, task: Task) -> GraphPart:
    names = text_inputs(model)
    args = {name: _tokens(BATCH, SOURCE) for name in names}
    args["attention_mask"] = torch.ones(BATCH, SOURCE, dtype=torch.int64)
    if "token_type_ids" in args:
        args["token_type_ids"] = torch.zeros(BATCH, SOURCE, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    kind = _Sentence(model, names, task) if task.steps else _Plain(model, names, task.outputs)
    return GraphPart("model.onnx", kind, args, axes, task.outputs)


def _sensed(model: nn.Module, config: Any, task: Task) -> GraphPart:
    args: dict[str, torch.Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    for name, given in sensed(config, task, takes(model, "attention_mask"), SOURCE).items():
        rows = SEQUENCE if given.axes[0] == "texts" else BATCH  # unlike the number of images
        shape = (rows, *given.shape)
        args[name] = _tokens(*shape) if given.tokens else torch.randn(shape)
        axes[name] = given.axes
    if "attention_mask" in args:
        args["attention_mask"] = torch.ones_like(args["attention_mask"])
    module = _Plain(model, tuple(args), task.outputs)
    return GraphPart("model.onnx", module, args, axes, task.outputs)


def _filled(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
    """A cache that holds these tensors themselves; made of pairs it would hold copies."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for key, value in zip(keys, values, strict=True):
        layer: Any = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


class _Decoder(nn.Module):
    """A decoder whose cache is a flat list of keys and values, each grown by the new tokens.

    Every layer keeps its whole past: where attention slides, the mask says so, which is right for
    any length and lets one graph serve the prompt and every step after it.
    """

    def __init__(self, inner: nn.Module, names: tuple[str, ...], layers: int) -> None:
        super().__init__()
        self.inner, self._names, self._layers = inner, names, layers

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self._names, given, strict=False))
        past = given[len(self._names) :]
        cache = None
        if self._layers:
            cache = _filled(past[::2], past[1::2])
        result = self.inner(**named, past_key_values=cache, use_cache=bool(self._layers))
        present = [t for layer in cache.layers for t in (layer.keys, layer.values)] if cache else []
        return (result.logits, *present)


def decoder_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of a decoder's inputs but for the cache."""
    names = ("input_ids", "attention_mask")
    return (*names, "position_ids") if takes(model, "position_ids") else names


def _decoder(model: nn.Module, cache: bool, kept: Mapping[int, int]) -> GraphPart:
    names = decoder_inputs(model)
    length = PAST if cache else 0
    args = {
        "input_ids": _tokens(BATCH, SEQUENCE),
        "attention_mask": torch.ones(BATCH, length + SEQUENCE, dtype=torch.int64),
        "position_ids": torch.arange(length, length + SEQUENCE).repeat(BATCH, 1),
    }
    args = {name: args[name] for name in names}
    total = "total" if cache else "sequence"
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    axes["attention_mask"] = {0: "batch", 1: total}
    kept_by_layer = cache_shapes(model, kept) if cache else []
    layers = len(kept_by_layer)
    sides = [side for layer in kept_by_layer for side in layer]
    for name, (heads, size) in zip(_cache_names("past_key_values", layers), sides, strict=True):
        args[name] = torch.randn(BATCH, heads, PAST, size)
        axes[name] = {0: "batch", 2: "past"}
    outputs = ("logits", *_cache_names("present", layers))
    return GraphPart("model.onnx", _Decoder(model, names, layers), args, axes, outputs)


def _cache_names(start: str, layers: int, *sides: str) -> list[str]:
    """``past_key_values.0.key``, … or with sides ``past_key_values.0.decoder.key``, …"""
    middles = [f".{side}" for side in sides] or [""]
    return [
        f"{start}.{i}{middle}.{what}"
        for i in range(layers)
        for middle in middles
        for what in ("key", "value")
    ]


class _Encoder(nn.Module):
    """The encoder of an encoder–decoder."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self._names = inner, names

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self.inner.get_encoder()  # type: ignore[operator]
        return (encoder(**dict(zip(self._names, given, strict=True))).last_hidden_state,)


def is_speech(model: nn.Module) -> bool:
    """Whether the encoder hears, and takes no tokens."""
    return takes(model, "input_features")


def speech_shape(config: Any) -> tuple[int, int]:
    """(mel bins, frames) that a speech encoder takes."""
    return config.num_mel_bins, config.max_source_positions * 2


def _encoder(model: nn.Module, config: Any) -> GraphPart:
    outputs = ("last_hidden_state",)
    if is_speech(model):
        args = {"input_features": torch.randn(BATCH, *speech_shape(config))}
        module, axes = _Encoder(model, ("input_features",)), {"input_features": {0: "batch"}}
        return GraphPart("encoder_model.onnx", module, args, axes, outputs)
    args = {
        "input_ids": _tokens(BATCH, SOURCE),
        "attention_mask": torch.ones(BATCH, SOURCE, dtype=torch.int64),
    }
    axes = {name: {0: "batch", 1: "source"} for name in args}
    return GraphPart("encoder_model.onnx", _Encoder(model, tuple(args)), args, axes, outputs)


class _Seq2Seq(nn.Module):
    """The decoder of an encoder–decoder: its first step, or with ``past`` any later one."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...], past: bool, source: int) -> None:
        super().__init__()
        self.inner, self._names, self._past, self._source = inner, names, past, source

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        named = dict(zip(self._names, given, strict=False))
        past = given[len(self._names) :]
        own, cross = DynamicCache(), DynamicCache()
        if self._past:
            own = _filled(past[::4], past[1::4])
            cross = _filled(past[2::4], past[3::4])
        hidden = named.get("encoder_hidden_states")
        if hidden is None:  # its keys and values are in the cache: only its shape is looked at
            ids, width = named["input_ids"], int(self.inner.config.d_model)  # type: ignore
            source = past[2].shape[2]
            hidden = past[2].new_zeros((ids.shape[0], source, width))
        mask = named.get("encoder_attention_mask")
        result = self.inner(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=named["input_ids"],
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
            **({} if mask is None else {"attention_mask": mask}),
        )
        cache = result.past_key_values
        present: list[torch.Tensor] = []
        for mine, other in zip(
            cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
        ):
            present += [mine.keys, mine.values]
            present += [] if self._past else [other.keys, other.values]
        return (result.logits, *present)


def _seq2seq(model: nn.Module, config: Any, past: bool, kept: Mapping[int, int]) -> GraphPart:
    speech = is_speech(model)
    source = config.max_source_positions if speech else SOURCE
    layers = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    layers = kept.get(layers, layers)
    heads = getattr(config, "decoder_attention_heads", None) or config.num_heads
    size = getattr(config, "d_kv", None) or config.d_model // heads
    args = {
        "input_ids": _tokens(BATCH, SEQUENCE),
        "encoder_attention_mask": torch.ones(BATCH, source, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(BATCH, source, config.d_model),
    }
    along = {0: "batch"} if speech else {0: "batch", 1: "source"}
    axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "encoder_attention_mask": along,
        "encoder_hidden_states": along,
    }
    unused = ({"encoder_attention_mask"} if speech else set()) | (
        {"encoder_hidden_states"} if past else set()
    )
    args = {name: value for name, value in args.items() if name not in unused}
    axes = {name: axes[name] for name in args}
    names = tuple(args)
    if past:
        for name in _cache_names("past_key_values", layers, "decoder", "encoder"):
            own = ".decoder." in name
            args[name] = torch.randn(BATCH, heads, PAST if own else source, size)
            axes[name] = {0: "batch", 2: "past"} if own else {0: "batch"}
            if not own and not speech:
                axes[name][2] = "source"
    sides = ("decoder",) if past else ("decoder", "encoder")
    outputs = ("logits", *_cache_names("present", layers, *sides))
    file = "decoder_with_past_model.onnx" if past else "decoder_model.onnx"
    return GraphPart(file, _Seq2Seq(model, names, past, source), args, axes, outputs)
