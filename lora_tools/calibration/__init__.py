"""Runs a transformers model over text to see what its layers are given, or what it makes of the
text: the only room, besides the ONNX export, that builds a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, LoraToolsError, NonFiniteError, UsageError, need
from lora_tools.pretrained import config_of, model_of, quietly, tokenizer_of
from lora_tools.totals import TextTotals

if TYPE_CHECKING:
    import torch

_WINDOW = 512  # tokens of a text at a time
_POSITIONS = 64  # of them at a time, in float64


def check_library(what: str = "collect-stats") -> None:
    """Raises NotInstalled where transformers is not there."""
    need(what, "stats", "transformers")


def tokens_of(folder: Path, text: str, trusted: bool | None = None) -> list[int]:
    """The text by the tokenizer in the folder, without special tokens.

    Args:
        trusted: see ``pretrained.config_of``.

    Raises:
        UnsafeInput: the tokenizer is made by code that comes with it.
        CheckpointError: there is no tokenizer that transformers can load, or it does not know the
            text's words.
    """
    try:
        tokenizer = tokenizer_of(folder, trusted)
        with quietly():
            tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except LoraToolsError:
        raise
    except Exception as error:  # transformers raises what it likes
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({kind_and_line(error)}); put the files of "
            "the model's tokenizer there"
        ) from None
    _refuse_empty(folder, tokenizer)
    unknown = tokens.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown > 0.9 * len(tokens):
        raise CheckpointError(
            f"{folder}: its tokenizer does not know {unknown:,} of the text's {len(tokens):,} "
            "tokens; is it the tokenizer of this model, and are all of its files there?"
        )
    return tokens


def _refuse_empty(folder: Path, tokenizer: Any) -> None:
    """Raises CheckpointError where the vocabulary was in no file: transformers makes a tokenizer of
    special tokens only then."""
    files = sorted({*tokenizer.vocab_files_names.values(), "tokenizer.json"})
    needed = bool(tokenizer.vocab_files_names)  # one that goes by bytes has none
    if needed and not any((folder / file).is_file() for file in files):
        raise CheckpointError(
            f"{folder}: it has no tokenizer (none of {', '.join(files)}); put the files of the "
            "model's tokenizer there"
        )


def sequences(folder: Path, text: str, length: int) -> torch.Tensor:
    """The text as rows of ``length`` tokens, by the tokenizer in the folder; what is left over is
    dropped.

    Raises:
        CheckpointError: there is no tokenizer that transformers can load.
        UsageError: the text has fewer tokens than one row.
    """
    import torch

    tokens = tokens_of(folder, text)
    if len(tokens) < length:
        raise UsageError(
            f"the text has {len(tokens)} tokens, and one sequence needs {length}; give more text "
            "or a smaller --length"
        )
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def window(config: Mapping[str, Any]) -> int:
    """Tokens that a model is run on at a time: 512, or as many as its config.json says it has
    positions for."""
    most = config.get("max_position_embeddings") or config.get("n_positions") or _WINDOW
    return min(_WINDOW, int(most))


def windows(
    folder: Path, text: str, config: Mapping[str, Any], trusted: bool | None = None
) -> torch.Tensor:
    """The text of --eval-text in rows of 512 tokens, or of as many as the model or the text has;
    what is left over is dropped.

    Args:
        config: the model's config.json.
        trusted: see ``pretrained.config_of``.

    Raises:
        CheckpointError: there is no tokenizer that transformers can load.
        UsageError: the text has less than two tokens.
    """
    import torch

    tokens = tokens_of(folder, text, trusted)
    length = min(window(config), len(tokens))
    if length < 2:
        raise UsageError(f"--eval-text: {len(tokens)} tokens, and at least 2 are needed")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


@dataclasses.dataclass
class TextLoss:
    """Sums over the predicted tokens of a text: negative log-likelihoods in nats, and divergence.

    Attributes:
        quantized: Σ −log q(token).
        plain: Σ −log p(token), with the weights as they were before.
        divergence: Σ KL(p‖q).
        compared: whether the latter two are known.
    """

    tokens: int = 0
    quantized: float = 0.0
    plain: float = 0.0
    divergence: float = 0.0
    compared: bool = False

    def add(self, row: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor | None) -> None:
        """One sequence (n,) of tokens and the logits (n, vocabulary) of both for it."""
        self.compared = theirs is not None
        for start in range(0, len(row) - 1, _POSITIONS):
            stop = min(start + _POSITIONS, len(row) - 1)
            following = row[start + 1 : stop + 1, None]
            q = mine[start:stop].double().log_softmax(1)
            self.tokens += stop - start
            self.quantized -= float(q.gather(1, following).sum())
            if theirs is not None:
                p = theirs[start:stop].double().log_softmax(1)
                self.plain -= float(p.gather(1, following).sum())
                self.divergence += float((p.exp() * (p - q)).sum())

    def totals(self) -> TextTotals:
        """As a report has them. Raises NonFiniteError for logits that are not finite."""
        if not math.isfinite(self.quantized + self.plain + self.divergence):
            raise NonFiniteError("the logits on the text of --eval-text hold an inf or a NaN")
        found: TextTotals = {
            "eval_tokens": self.tokens,
            "perplexity": math.exp(self.quantized / self.tokens),
        }
        if self.compared:
            found["perplexity_unquantized"] = math.exp(self.plain / self.tokens)
            found["loss_increase"] = (self.quantized - self.plain) / self.tokens
            found["kl_divergence"] = self.divergence / self.tokens
        return found


def text_loss(
    plain: Path,
    quantized: Path,
    rows: torch.Tensor,
    allow_pickle: bool,
    done: Callable[[int], None],
) -> TextTotals:
    """What a decoder with other weights loses on a text, in float32; both are in memory.

    Args:
        plain, quantized: folders of checkpoints in plain numbers.
        rows: (n, length) of tokens.
        done: hears how many rows have been run.

    Raises:
        CheckpointError: transformers cannot load or run one of them.
        NonFiniteError: an inf or a NaN among the logits.
    """
    import torch

    before, after = load(plain, allow_pickle), load(quantized, allow_pickle)
    loss = TextLoss()
    with torch.no_grad():
        for i, row in enumerate(rows):
            p, q = (run(*of, row).logits[0] for of in ((before, plain), (after, quantized)))
            loss.add(row, q, p)
            done(i + 1)
    return loss.totals()


def load(folder: Path, allow_pickle: bool) -> Any:
    """The model of a folder in float32. Raises CheckpointError, UnsafeInput."""
    import torch
    import transformers

    try:
        config = config_of(folder)
        [architecture, *_] = config.architectures or ["AutoModel"]
        model = model_of(
            getattr(transformers, architecture),
            folder,
            config,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
        )
        return model.eval()
    except LoraToolsError:
        raise
    except Exception as error:  # transformers raises what it likes
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({kind_and_line(error)})"
        ) from None


def run(model: Any, folder: Path, row: torch.Tensor) -> Any:
    """What a model makes of a row of tokens. Raises CheckpointError where its code fails."""
    try:
        return model(input_ids=row[None])
    except (LoraToolsError, MemoryError):
        raise
    except Exception as error:  # transformers raises what it likes
        raise CheckpointError(
            f"{folder}: transformers loads it but cannot run it ({kind_and_line(error)}); does its "
            "config.json fit its weights?"
        ) from None


def kind_and_line(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
