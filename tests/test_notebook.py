"""Reports in a notebook: HTML, frames, and their schema."""

from __future__ import annotations

import copy
import json
import math
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.records import (
    Action,
    Fate,
    Input,
    ModuleResult,
    ModuleSpectrum,
    Report,
    TensorFacts,
    TensorResult,
    TensorSpec,
)
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.verbs.report_file import plain

HOSTILE = "<script>alert(1)</script>&\u202e\n"

RESULT = ModuleResult("m.q", "linear", (4, 8), 2, 0.25, 0.9375, 0.0, 1.5, 0.01, "gram")
SPECTRUM = ModuleSpectrum(
    "m.q", "linear", (4, 8), 1.5, 0.01, 1.2, {"8": 0.9, "64": math.nan}, 0.1, None,
    tuple(range(64, 0, -1)),
)  # fmt: skip
REPORT: Report[Any] = Report(
    "diff",
    "0.1.0",
    (Input("base", f"b{HOSTILE}"), Input("tuned", "t")),
    "",
    False,
    (Fate("m.q.weight", Action.CHANGED, HOSTILE, 64), Fate("m.k.weight", Action.UNCHANGED)),
    totals={"relative_change": 0.012345, "changed": 1, "left_out_most": HOSTILE},
    notes=(HOSTILE, "a note"),
    spectra=(SPECTRUM,),
)


class Reader(HTMLParser):
    """The tags and texts of a piece of HTML, each tag closed again."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.depth: list[str] = []
        self.feed(text)
        self.close()
        assert not self.depth

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.depth.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def test_a_report_is_a_small_table() -> None:
    seen = Reader(REPORT._repr_html_())
    assert seen.tags == {"div", "table", "caption", "b", "tr", "th", "td", "ul", "li"}
    said = dict(zip(seen.texts, seen.texts[1:], strict=False))
    assert said["relative_change"] == "0.01235"
    assert said["plan"] == "changed: 1, unchanged: 1"
    assert said['to_frame("spectra")'] == "1 row"
    assert "<script>alert(1)</script>&\\u202e\\n" in seen.texts, "the note, nothing hidden in it"
    assert "loratools diff" in seen.texts
    assert not any("modules" in text for text in seen.texts), "no part that is empty"


@pytest.mark.parametrize(
    "record",
    [
        RESULT,
        SPECTRUM,
        REPORT.plan[0],
        REPORT.inputs[0],
        TensorSpec(HOSTILE, "F32", (2,)),
        TensorFacts(HOSTILE, "F32", (2,), 8, "f", "h", (HOSTILE,)),
        TensorResult(HOSTILE, (2,), 4.5, 0.1, 1.0),
    ],
    ids=lambda r: type(r).__name__,
)
def test_a_record_is_a_table_of_its_fields(record: Any) -> None:
    seen = Reader(record._repr_html_())
    assert seen.tags == {"div", "table", "caption", "b", "tr", "th", "td"}
    assert type(record).__name__ in seen.texts
    assert set(record.__dataclass_fields__) <= set(seen.texts)
    assert not hasattr(record, "__dict__"), "slots, as before"


def test_many_values_are_cut() -> None:
    assert "64, 63, 62, 61, 60, 59, 58, 57, … (64 in all)" in SPECTRUM._repr_html_()


def test_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = REPORT.to_frame()
    assert frame.equals(REPORT.to_frame("spectra"))
    assert frame.loc[0, "module"] == "m.q"
    assert frame.loc[0, "energy.8"] == 0.9
    assert len(frame.loc[0, "spectrum"]) == 64
    plan = REPORT.to_frame("plan")
    assert list(plan.columns) == ["tensor", "action", "reason", "nbytes"]
    assert list(plan["action"]) == ["changed", "unchanged"]
    assert {type(each) for each in plan["action"]} == {str}
    assert plan["nbytes"].sum() == 64
    empty = REPORT.to_frame("modules")
    assert isinstance(empty, pandas.DataFrame)
    assert len(empty) == 0
    assert list(empty.columns) == list(ModuleResult.__dataclass_fields__)
    with pytest.raises(ValueError, match="one of modules, tensors, spectra, stored, plan"):
        REPORT.to_frame("totals")  # type: ignore[arg-type]


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_frame\(\) needs pandas; pip install .*\[pandas\]"):
        REPORT.to_frame()


def test_the_version() -> None:
    assert lora_tools.__version__ == version("loratools")


def wrong(change: Any) -> list[str]:
    """What the schema has against a report with a change."""
    report = copy.deepcopy(plain(REPORT))
    change(report)
    validator = Draft202012Validator(lora_tools.report_schema("diff"))
    return [error.message for error in validator.iter_errors(report)]


def test_a_report_as_a_dict_keeps_to_the_schema() -> None:
    """Tuples would be none of its arrays."""
    made = REPORT.to_dict()
    Draft202012Validator(lora_tools.report_schema("diff")).validate(made)
    assert isinstance(made["plan"], list)


def test_the_schema_finds_what_is_wrong() -> None:
    for verb in (None, "diff", "collect-stats", "collect_stats"):
        Draft202012Validator.check_schema(lora_tools.report_schema(verb))
    assert wrong(lambda r: None) == [], "numbers that are not finite are null"
    assert not list(Draft202012Validator(lora_tools.report_schema()).iter_errors(plain(REPORT)))
    for change in (
        lambda r: r.update(verb="merge"),
        lambda r: r.update(more=1),
        lambda r: r.pop("notes"),
        lambda r: r["totals"].update(relative_chnage=1.0),
        lambda r: r["totals"].update(changed="1"),
        lambda r: r["plan"][0].update(action="moved"),
        lambda r: r["spectra"][0].update(spectrum=["1"]),
        lambda r: r["spectra"][0].pop("module"),
    ):
        assert wrong(change)
    with pytest.raises(ValueError, match="'dif': one of extract, "):
        lora_tools.report_schema("dif")


def test_state_dicts_stand_for_models(tmp_path: Path) -> None:
    """The same bytes as of files with the same tensors, and no name of a temporary file."""
    generator = torch.Generator().manual_seed(0)
    base = {f"l{i}.weight": torch.randn(8, 6, generator=generator) for i in range(2)}
    base["tied.weight"], base["l3.weight"] = base["l0.weight"], base["l0.weight"].T
    tuned = {name: tensor + torch.ones(tensor.shape) for name, tensor in base.items()}
    for name, tensors in ("base", base), ("tuned", tuned):
        held = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        save_file(held, tmp_path / f"{name}.safetensors")
    kept = [each.clone() for each in base.values()]
    report = lora_tools.extract(base, tuned, tmp_path / "made", rank=1)
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    lora_tools.extract(*files, tmp_path / "of_files", rank=1)
    weights = "adapter_model.safetensors"
    made, expected = tmp_path / "made", tmp_path / "of_files"
    assert (made / weights).read_bytes() == (expected / weights).read_bytes()
    assert [each.path for each in report.inputs] == ["memory:base", "memory:tuned"]
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "nobody could find it"
    assert "memory:" not in (made / "README.md").read_text()
    assert all(torch.equal(*pair) for pair in zip(kept, base.values(), strict=True))
    lora_tools.merge(base, made, tmp_path / "merged.safetensors")
    found = lora_tools.verify(tmp_path / "merged.safetensors", base=files[0], adapters=[made])
    assert {fate.action for fate in found.plan} == {Action.SAME}


def test_state_dicts_stand_for_adapters(tmp_path: Path) -> None:
    """Alone, with a weight, among paths, as keywords, in a record, and as safetensors opens it."""
    base = {"block.a.weight": torch.zeros(2, 2)}
    key = "lora_unet_block_a"
    adapter = {
        f"{key}.lora_down.weight": torch.ones(1, 2),
        f"{key}.lora_up.weight": torch.ones(2, 1),
        f"{key}.alpha": torch.tensor(1.0),
    }
    file = tmp_path / "adapter.safetensors"
    save_file(adapter, file)
    with safe_open(file, "pt") as opened:
        for number, (adapters, said, value) in enumerate(
            (
                (file, [str(file)], 1.0),
                (adapter, ["memory:adapters"], 1.0),
                (opened, ["memory:adapters"], 1.0),
                ((adapter, 0.5), ["memory:adapters=0.5"], 0.5),
                ([file, adapter], [str(file), "memory:adapters-2"], 2.0),
                (iter([(adapter, 2)]), ["memory:adapters=2"], 2.0),
            )
        ):
            out = tmp_path / f"{number}.safetensors"
            report = lora_tools.merge(base, adapters, out, allow_pickle=False)
            assert [each.path for each in report.inputs] == ["memory:base", *said]
            assert torch.equal(load_file(out)["block.a.weight"], torch.full((2, 2), value))
    for number, given in enumerate(({"base": base}, {"origin": lora_tools.Origin(base=base)})):
        report = lora_tools.convert(adapter, tmp_path / f"peft {number}", to="peft", **given)
        assert report.inputs[0].path == "memory:adapter"
        lora_tools.merge(
            base, tmp_path / f"peft {number}", tmp_path / f"merged {number}.safetensors"
        )
    plan = lora_tools.quantize(base, tmp_path / "q", adapters=adapter, dry_run=True)
    assert [each.path for each in plan.inputs] == ["memory:checkpoint", "memory:adapters"]


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    good = {"a.weight": torch.ones(2, 2)}
    with pytest.raises(TypeError, match="'b' is no tensor"):
        lora_tools.diff(good, {"b": 1})
    with pytest.raises(TypeError, match="out to be a path, not dict"):
        lora_tools.quantize(good, good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="activations to be a path, not dict"):
        lora_tools.quantize(good, tmp_path / "out", activations=good)  # type: ignore[arg-type]
    peft = {"base_model.model.a.lora_A.weight": torch.ones(1, 2)}
    with pytest.raises(lora_tools.AdapterError, match=r"memory:adapters: .*that save_pretrained"):
        lora_tools.merge(good, peft, tmp_path / "out")
    with pytest.raises(lora_tools.MismatchError, match="memory:base and memory:tuned have no"):
        lora_tools.diff(good, {"b.weight": good["a.weight"]})


def test_an_open_checkpoint_stands_for_its_path(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    assert lora_tools.inspect(opened).stored[0].tensor == "a.weight"  # type: ignore[arg-type]
