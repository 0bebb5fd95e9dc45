"""Errors name options on the command line, and parameters in Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_tools
from lora_tools.cli import run
from lora_tools.options.spelling import for_python

from . import iotools


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ("--max-rank 0: at least 1 is needed", "max_rank 0: at least 1 is needed"),
        ("--embeddings save keeps it whole", 'embeddings="save" keeps it whole'),
        ("pass --allow-pickle to read it", "pass allow_pickle=True to read it"),
        ("see --no-double-quant", "see double_quant=False"),
        ("for --for, --from and --sv_ratio", "for consumer, source and sv_ratio"),
        ("--report x and --no-such-thing", "--report x and --no-such-thing"),
        (
            "first: loratools merge BASE -o OUT --dtype x",
            "first: loratools merge BASE -o OUT --dtype x",
        ),
        ("`loratools convert --to peft` or --rank", "`loratools convert --to peft` or rank"),
    ],
)
def test_an_option_is_a_parameter(said: str, spelled: str) -> None:
    assert for_python(said) == spelled


def test_each_caller_is_told_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = iotools.checkpoint(tmp_path / "base", iotools.weights())
    tuned = iotools.checkpoint(tmp_path / "tuned", iotools.moved(iotools.weights()))
    with pytest.raises(lora_tools.UsageError, match=r"^energy and error exclude each other"):
        lora_tools.extract(base, tuned, tmp_path / "out", energy=0.9, error=0.1)
    arguments = [
        "extract",
        base,
        tuned,
        "-o",
        tmp_path / "out",
        "--energy",
        "0.9",
        "--error",
        "0.1",
    ]
    assert run([str(a) for a in arguments]) == 2
    assert "--energy and --error exclude each other" in capsys.readouterr().err
    lora_tools.extract(base, tuned, tmp_path / "out", rank=1)
    with pytest.raises(lora_tools.OutputError, match="or pass force=True"):
        lora_tools.extract(base, tuned, tmp_path / "out", rank=1)
