"""A folder without its tokenizer: transformers makes one of special tokens, and nothing that comes
of such a one is worth anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import lora_tools
from lora_tools.calibration import tokens_of
from lora_tools.errors import CheckpointError
from tests import iotools

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
KINDS = {"bert": "vocab.txt", "roberta": "vocab.json", "gpt2": "vocab.json", "t5": "spiece.model"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("some words that a model reads " * 20)
    return path


def test_no_statistics_of_unknown_tokens(text: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=32)
    model = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(model)
    with pytest.raises(CheckpointError, match=r"bert: it has no tokenizer .*vocab.txt.; put"):
        lora_tools.collect_stats(model, text, tmp_path / "out", length=16, jobs=1)
    (model / "vocab.txt").write_text("\n".join(("[UNK]", "[CLS]", "[SEP]", "[PAD]", "other")))
    with pytest.raises(CheckpointError, match=r"does not know 120 of the text's 120 tokens"):
        lora_tools.collect_stats(model, text, tmp_path / "out", length=16, jobs=1)
    assert not (tmp_path / "out").exists()
    words = ("some", "words", "that", "a", "model")
    (model / "vocab.txt").write_text("\n".join(("[UNK]", "[CLS]", "[SEP]", "[PAD]", *words)))
    lora_tools.collect_stats(model, text, tmp_path / "out", length=16, jobs=1)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_model(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(CheckpointError, match=rf"it has no tokenizer \(none of .*{KINDS[kind]}"):
        tokens_of(tmp_path, "some words")


def test_one_that_needs_no_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert tokens_of(tmp_path, "ab") == [100, 101]


def test_its_own_is_read(tmp_path: Path) -> None:
    iotools.tokenizer(tmp_path, 8)
    assert tokens_of(tmp_path, "w3 w5") == [3, 5]
