"""What a graph may differ from torch by: measured, not chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lora_tools
from lora_tools.errors import CheckpointError, QualityGateError
from lora_tools.onnx.check import Check
from lora_tools.onnx.in_torch import InTorch
from lora_tools.onnx.precise import in_float64
from lora_tools.onnx.runs import Played, Run
from lora_tools.onnx.tasks import TASKS
from lora_tools.onnx.tolerance import (
    FLOOR,
    LIMIT,
    MULTIPLE,
    UNMEASURED,
    Tolerance,
    conditioning,
    tolerance,
)

from . import export_models
from .traced import Traced

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("onnxruntime")


def side_of(folder: Path, task: str = "causal-lm") -> InTorch:
    return InTorch(folder, TASKS[task], False)


def test_float64_without_a_copy_of_the_weights(tmp_path: Path) -> None:
    """GPT-2's code asks for no float32 of its own, so that ``double()`` is right for it."""
    import transformers

    torch.manual_seed(0)
    model = export_models.ALL["GPT-2"]().eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        with in_float64():
            found = model(input_ids=ids).logits
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        wanted = copy.deepcopy(model).double()(input_ids=ids).logits
        short = model(input_ids=ids).logits
    assert found.dtype == torch.float64
    assert short.dtype == torch.float32
    assert float((found - wanted).abs().max()) < 1e-13
    assert 1e-8 < float((short - wanted).abs().max()) < 1e-5
    # A norm that asks for float32 is exact, too.
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
    x = torch.randn(3, 8)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.no_grad(), in_float64():
        found = norm(x)
    assert float((found - exact).abs().max()) < 1e-14


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Whisper", "ConvNeXt", "BERT"])
def test_conditioning_of_sound_models(name: str, tmp_path: Path) -> None:
    """A few roundings of float32, whatever the model is made of."""
    tasks = {"Whisper": "speech-seq2seq", "ConvNeXt": "image-classification", "BERT": "features"}
    side = side_of(export_models.make(name, tmp_path / "m"), tasks.get(name, "causal-lm"))
    runs = side.runs(True, 4)
    found = conditioning(side, runs, [side.play(run) for run in runs])
    assert set(found) >= ({"last_hidden_state"} if name in ("BERT", "Whisper") else {"logits"})
    assert all(1e-8 < off < 5e-6 for off in found.values()), found


def test_what_is_ill_conditioned_may_differ_by_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits as the small rest of large sums: torch is off itself, and so much is allowed."""
    folder = export_models.one_layer("Llama", tmp_path / "m")
    side = side_of(folder)
    runs = side.runs(True, 0)

    def measured() -> Tolerance:
        return tolerance(side, runs, [side.play(run) for run in runs], 0.0, None)

    sound = measured()
    assert FLOOR < sound.share("logits") < 3 * FLOOR
    with torch.no_grad():  # tokens that differ in the last bits of what the norm is given
        embedded = side.model.model.embed_tokens.weight
        embedded[:] = 1000 + embedded
        side.model.model.norm.weight.fill_(1)
        head = side.model.lm_head.weight
        head -= head.mean(1, keepdim=True)
    ill = measured()
    own = side.play

    def lucky(run: Run, exact: bool = False, seed: int | None = None) -> Played:
        """torch's float32 happens to be right."""
        return own(run, exact=exact or seed is None, seed=seed)

    monkeypatch.setattr(side, "play", lucky)
    by_luck = measured()
    assert by_luck.conditioning is not None
    assert ill.conditioning is not None
    assert by_luck.conditioning > ill.conditioning / 3
    assert sound.conditioning is not None
    assert ill.conditioning > 20 * sound.conditioning
    assert ill.share("logits") == min(FLOOR + MULTIPLE * ill.conditioning, LIMIT)


def test_other_roundings(tmp_path: Path) -> None:
    """They are the same for the same seed, near to float32, and leave masks and buckets alone."""
    side = side_of(export_models.make("T5", tmp_path / "m"), "seq2seq")
    run = side.runs(True, 0)[1]
    [own], [exact] = (
        side.play(run.at_once([])).outputs,
        side.play(run.at_once([]), exact=True).outputs,
    )
    several = [side.play(run.at_once([]), seed=seed).outputs[0]["logits"] for seed in (0, 0, 1)]
    assert (several[0] == several[1]).all()
    assert (several[0] != several[2]).any()
    largest = np.abs(exact["logits"]).max()
    for found in (own["logits"], *several):
        assert 1e-8 < np.abs(found - exact["logits"]).max() / largest < 3e-6


def test_a_chosen_tolerance_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = side_of(export_models.one_layer("Llama", tmp_path / "m"))
    runs = side.runs(True, 0)
    monkeypatch.setattr(side, "play", lambda *_, **__: pytest.fail("measured"))
    assert tolerance(side, runs, [Played() for _ in runs], 0.0, 0.5).share("logits") == 0.5


def test_where_torch_has_no_float64(
    traced: Callable[[str], Traced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken instead is said, in the report too."""
    own = InTorch.play
    made = traced("Llama")

    def play(self: InTorch, run: Run, exact: bool = False, seed: int | None = None) -> Played:
        if exact:
            raise CheckpointError("module model.layers.0 does not run in torch: no double; try it")
        return own(self, run)

    monkeypatch.setattr(InTorch, "play", play)
    report = lora_tools.export(made.base, tmp_path / "out", graph=made.graph)
    [note] = [note for note in report.notes if "float64" in note]
    assert "no double" in note
    assert "0.0003" in note
    assert "conditioning" not in report.totals
    assert report.totals["allowed_relative_difference"] > UNMEASURED


def test_a_fault_below_the_old_tolerance_is_found(
    traced: Callable[[str], Traced], tmp_path: Path
) -> None:
    """An epsilon that is wrong in one norm only."""
    made = traced("Llama")
    totals = made.report["totals"]
    assert totals["allowed_relative_difference"] < 5e-5
    assert totals["max_relative_difference"] < totals["allowed_relative_difference"]
    folder = tmp_path / "graph"
    folder.mkdir()
    for path in made.graph.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    last = [n for n in model.graph.node if n.op_type == "RMSNormalization"][-1]
    [epsilon] = [a for a in last.attribute if a.name == "epsilon"]
    epsilon.f = 7e-5
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(QualityGateError, match=r"logits .* differs from torch") as caught:
        lora_tools.verify(folder, against=made.base)
    found = caught.value.report.totals["max_relative_difference"]  # type: ignore[union-attr]
    assert 5e-5 < found < 3e-4
    assert lora_tools.verify(folder, against=made.base, rtol=3e-4).totals["same"]


def test_tokens_that_are_as_likely_as_each_other() -> None:
    """Another token is a fault, unless both are as likely within what is allowed."""
    run = Run("generation", {"attention_mask": np.ones((1, 1))}, generate=1)

    def played(*logits: float) -> Played:
        array = np.array([[logits]], np.float32)
        return Played([{"logits": array}], [int(array.argmax())])

    wanted = played(1.0, 1.0 + 1e-6, 0.0)
    check = Check()
    check.hold(run, played(1.0 + 1e-6, 1.0, 0.0), wanted, Tolerance(0.0, 1e-5))
    assert (check.failed, check.same_tokens, check.tokens) == (False, 0, 1)
    check = Check()
    close, other = played(1.0, 1.001, 0.0), played(1.001, 1.0, 0.0)
    check.hold(run, Played(close.outputs, other.tokens), close, Tolerance(0.0, 1e-5))
    assert (check.failed, check.beyond) == (True, False)


def test_the_worst_is_one_that_fails() -> None:
    """And not one that differs by more, and may."""
    check = Check()
    check.add("large", np.array([1000.0]), np.array([1000.5]), 0.0, 1e-2)
    check.add("small", np.array([1.0]), np.array([1.1]), 0.0, 1e-2)
    check.add("large again", np.array([1000.0]), np.array([1000.5]), 0.0, 1e-2)
    assert (check.worst, check.failed) == ("small", True)
    assert check.allowed == pytest.approx(1e-2)
    check.add("broken", np.array([np.nan]), np.array([1.1]), math.inf, 0.0)
    assert (check.worst, check.absolute) == ("broken", math.inf)
