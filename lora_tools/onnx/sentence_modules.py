"""Modules of sentence-transformers 6.2 in torch, as it computes them itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_tools.errors import CheckpointError
from lora_tools.onnx.sentence import TOKENS, module_weights, reads_and_writes
from lora_tools.onnx.tasks import Step, Task

# By release before 5.4, in the order in which they are put one after the other.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_LEAST = 1e-9


def attach(model: nn.Module, task: Task, *, weights: bool) -> None:
    """Put the task's modules into the model, under the names that their weights have.

    Raises:
        CheckpointError: a config that is not understood, or weights that do not fit it.
    """
    for step in task.steps:
        model.add_module(step.name, _MADE[step.kind](step))
    if weights:
        _fill(model, task)


def _fill(model: nn.Module, task: Task) -> None:
    found = module_weights(task)
    for step in task.steps:
        module = model.get_submodule(step.name)
        prefix = f"{step.name}."
        state = {
            name.removeprefix(prefix): found.tensor(name).to(torch.float32)
            for name in found.specs
            if name.startswith(prefix)
        }
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"{step.folder}: its weights do not fit ({text:.300})") from None
        module.eval()


def run(
    model: nn.Module, steps: Sequence[Step], hidden: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the modules make of (batch, length, width) states and their (batch, length) mask."""
    features = {TOKENS: hidden}
    for step in steps:
        takes, gives = reads_and_writes(step)
        module, given = model.get_submodule(step.name), features[takes]
        features[gives] = module(given, mask) if step.kind == "Pooling" else module(given)
    return features


class Pooling(nn.Module):
    """One vector of each sequence: for each mode (batch, width), one beside the other."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._modes = pooling_modes(step.config)
        unknown = [mode for mode in self._modes if mode not in _POOLED]
        if unknown:
            raise CheckpointError(f"{step.folder}: {unknown[0]!r} is not a mode of pooling")

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of (batch, length, width) and (batch, length)."""
        return torch.cat([_POOLED[mode](tokens, mask) for mode in self._modes], -1)


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes, in the order of their vectors."""
    mode = config.get("pooling_mode")
    if mode is None:
        return tuple(mode for key, mode in _SWITCHES.items() if config.get(key)) or ("mean",)
    return (mode,) if isinstance(mode, str) else tuple(mode)


def _at(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, width) of (batch, length, width), at a place of each sequence."""
    index = index.to(torch.int64)[:, None, None].expand(-1, 1, tokens.shape[-1])
    return tokens.gather(1, index).squeeze(1)


def _first(mask: torch.Tensor) -> torch.Tensor:
    """The first place that is not padding."""
    return mask.to(torch.int32).argmax(1)


def _cls(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(tokens, _first(mask))


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    last = (mask * places).amax(1) - 1
    return _at(tokens * mask[..., None].to(tokens.dtype), last.clamp(min=0))


def _max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)


def _summed(tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = weights[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1), weights.sum(1).clamp(min=_LEAST)


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    total, count = _summed(tokens, mask)
    return total / count


def _mean_sqrt(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    total, count = _summed(tokens, mask)
    return total / count.sqrt()


def _weighted(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each token by its place, counted from the first that is not padding."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    total, count = _summed(tokens, mask * (places - _first(mask)[:, None]))
    return total / count


_POOLED = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


class Dense(nn.Module):
    """activation(x·Wᵀ + b), (…, in_features) → (…, out_features); perhaps with x added."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        config = step.config
        try:
            sizes = int(config["in_features"]), int(config["out_features"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{step.folder}: its config.json has no in_features and out_features"
            ) from None
        self.linear = nn.Linear(*sizes, bias=bool(config.get("bias", True)))
        self.activation = _activation(step)
        self._adds = bool(config.get("use_residual"))
        if self._adds and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (…, width)."""
        y: torch.Tensor = self.activation(self.linear(x))
        if not self._adds:
            return y
        return y + (self.residual(x) if hasattr(self, "residual") else x)


def _activation(step: Step) -> nn.Module:
    """A class of torch.nn by its dotted name, as sentence-transformers takes without trust; tanh
    where nothing is said."""
    name = str(step.config.get("activation_function", "torch.nn.Tanh"))
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(
            f"{step.folder}: its activation function {name!r} is not a module of torch.nn, so the "
            "graph of the whole pipeline cannot be made"
        )
    module: nn.Module = kind()
    return module


class Normalize(nn.Module):
    """x / ‖x‖₂."""

    def __init__(self, step: Step) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (…, width)."""
        return nn.functional.normalize(x, p=2.0, dim=-1)


class LayerNorm(nn.Module):
    """A norm with weight and bias."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(step.config["dimension"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (…, width)."""
        y: torch.Tensor = self.norm(x)
        return y


class Dropout(nn.Module):
    """Nothing, once training is over."""

    def __init__(self, step: Step) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (…, width)."""
        return x


_MADE = {
    "Pooling": Pooling,
    "Dense": Dense,
    "Normalize": Normalize,
    "LayerNorm": LayerNorm,
    "Dropout": Dropout,
}
