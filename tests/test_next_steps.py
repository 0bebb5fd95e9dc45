"""A refusal names no option that its verb has not. conftest.py holds every refusal of the whole
suite to it; here are those that did not keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools
from lora_tools.errors import LoraToolsError
from lora_tools.verbs import VERBS
from tests.iotools import adapter, checkpoint, linear_shapes, weights
from tests.refusals import foreign_options

BASE = weights(layers=1)


def test_the_check_can_fail() -> None:
    assert foreign_options("give --drop dora", VERBS["rescale"]) == ["--drop"]
    assert foreign_options("`loratools convert --drop dora` does; --rank", VERBS["rescale"]) == []
    assert foreign_options("--no-double-quant, --out", VERBS["quantize"]) == []


def huge(folder: Path) -> Path:
    return adapter(folder, linear_shapes(BASE), lora_alpha=1e39)


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a stranger's adapter to verify": (
        lambda t: lora_tools.verify(
            checkpoint(t / "b", BASE), base=t / "b", adapters=[adapter(t / "a", {"x": (4, 4)})]
        ),
        r"is this the right base\?$|no key of",
    ),
    "nothing to unmerge by": (
        lambda t: lora_tools.unmerge(
            checkpoint(t / "b", BASE),
            [adapter(t / "a", linear_shapes(BASE))],
            t / "o",
            sidecar=True,
        ),
        "`loratools merge --reversible` makes one",
    ),
    "too much for four bits": (
        lambda t: lora_tools.quantize(
            checkpoint(t / "b", {k: v.half() for k, v in BASE.items()}),
            t / "o",
            adapters=[huge(t / "a")],
        ),
        "inf or a NaN",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_that_the_verb_has_not(case: str, tmp_path: Path) -> None:
    run, says = CASES[case]
    with pytest.raises(LoraToolsError, match=says):
        run(tmp_path)
    assert torch.get_num_threads() == 1
