"""Options as keywords and as records: the same call, checked the same way, for every verb."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tools
from lora_tools import (
    AdapterForm,
    Adding,
    Formats,
    Matching,
    Ranks,
    Running,
    Storage,
    Tensors,
    Writing,
)
from lora_tools.errors import LoraToolsError, UsageError
from lora_tools.options import RECORDS
from lora_tools.provenance import command_of
from lora_tools.verbs import VERBS
from lora_tools.verbs.row import Keyword, Verb, called

from . import iotools


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned and an adapter, not to be written to."""
    top = tmp_path_factory.mktemp("sides")
    tensors = iotools.weights()
    iotools.checkpoint(top / "base", tensors)
    iotools.checkpoint(top / "tuned", iotools.moved(tensors))
    iotools.adapter(top / "adapter", iotools.linear_shapes(tensors))
    return top


def arguments(verb: Verb) -> list[Any]:
    """Positional ones, of which nothing is there."""
    return [["nowhere"] if a.several else "nowhere" for a in verb.arguments]


def needed(verb: Verb) -> dict[str, Any]:
    """Keywords that must be given."""
    return {name: k.choices[0] for name, k in verb.by_name.items() if k.required}


def same(one: Path, other: Path) -> bool:
    return iotools.tree(one) == iotools.tree(other)


def test_records_and_their_fields_are_the_same_call(sides: Path, tmp_path: Path) -> None:
    base, tuned = sides / "base", sides / "tuned"
    flat = lora_tools.extract(
        base,
        tuned,
        tmp_path / "flat",
        energy=0.9,
        max_rank=4,
        include=["q_proj"],
        alpha=8,
        dtype="bfloat16",
        jobs=1,
    )
    whole = lora_tools.extract(
        base,
        tuned,
        tmp_path / "whole",
        ranks=Ranks(energy=0.9, max_rank=4),
        tensors=Tensors(include=["q_proj"]),
        adapter_form=AdapterForm(alpha=8, dtype="bfloat16"),
        running=Running(jobs=1),
    )
    assert flat.command == whole.command != "extract"
    assert same(tmp_path / "flat", tmp_path / "whole")
    mixed = lora_tools.merge(
        base, [sides / "adapter"], tmp_path / "m", storage=Storage(dtype="float16"), jobs=1
    )
    assert mixed.command == "merge dtype='float16'"


def test_a_record_can_be_all_that_is_given(sides: Path, tmp_path: Path) -> None:
    """Also where one of its fields must be."""
    report = lora_tools.convert(
        sides / "adapter", tmp_path / "out", formats=Formats(to="diffusers")
    )
    assert report.command == "convert to='diffusers'"
    with pytest.raises(TypeError, match="'to'"):
        lora_tools.convert(sides / "adapter", tmp_path / "other")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", VERBS)
def test_a_record_and_one_of_its_fields_are_refused(name: str) -> None:
    verb = VERBS[name]
    function = getattr(lora_tools, name)
    for keyword in verb.keywords:
        record = called(keyword.record)
        known = {**{keyword.name: keyword.default}, **needed(verb)}
        whole = keyword.record(
            **{
                k: v
                for k, v in needed(verb).items()
                if k in known and verb.by_name[k].record is keyword.record
            }
        )
        given = {k: v for k, v in known.items() if verb.by_name[k].record is keyword.record}
        with pytest.raises(UsageError, match=f"{record} already has .*{keyword.name}"):
            function(*arguments(verb), **{**needed(verb), **given, record: whole})


@pytest.mark.parametrize("name", VERBS)
def test_a_field_that_a_verb_does_not_take_is_refused(name: str) -> None:
    verb = VERBS[name]
    odd = {"str": "x", "bool": True, "int": 3, "float": 0.5}
    for key, record in verb.records.items():
        mine = {k.name for k in verb.keywords if k.record is record}
        required = {k: v for k, v in needed(verb).items() if k in mine}
        for field in dataclasses.fields(record):
            if field.name in mine:
                continue
            kind = next((v for t, v in odd.items() if t in str(field.type)), "x")
            whole = record(**{**required, field.name: kind})
            given = {k: v for k, v in needed(verb).items() if k not in mine}
            with pytest.raises(UsageError, match=f"does not take {field.name}"):
                getattr(lora_tools, name)(*arguments(verb), **given, **{key: whole})


@pytest.mark.parametrize("name", VERBS)
def test_a_call_that_does_not_fit_is_a_type_error(name: str) -> None:
    verb, function = VERBS[name], getattr(lora_tools, name)
    given = needed(verb)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnk'"):
        function(*arguments(verb), **given, rnk=3)
    with pytest.raises(TypeError, match="positional arguments"):
        function(*arguments(verb), "more", **given)
    with pytest.raises(TypeError, match=f"argument '{verb.arguments[-1].name}'"):
        function(*arguments(verb)[:-1], **given)
    with pytest.raises(TypeError, match="multiple values"):
        function(*arguments(verb), **given, **{verb.arguments[0].name: "x"})
    with pytest.raises(TypeError, match="Running"):
        function(*arguments(verb), **given, running=3)


CHOSEN = [
    (verb.name, keyword.name)
    for verb in VERBS.values()
    for keyword in verb.keywords
    if keyword.option is not None
    and (keyword.option.choices or "Literal" in keyword.written or keyword.option.allowed)
]


@pytest.mark.parametrize(("name", "option"), CHOSEN)
def test_python_is_told_what_the_command_line_is_told(name: str, option: str) -> None:
    """A value that is none of the choices, or out of range, is refused before anything is read."""
    verb = VERBS[name]
    keyword = verb.by_name[option]
    for wrong in _wrong(keyword):
        given = {**needed(verb), option: [wrong] if keyword.several else wrong}
        with pytest.raises(UsageError, match=f"^{option} .* is needed$"):
            getattr(lora_tools, name)(*arguments(verb), **given)


TYPED = [
    (verb.name, keyword.name)
    for verb in VERBS.values()
    for keyword in verb.keywords
    if (keyword.type in (bool, int, float, str) or keyword.several) and keyword.name != "adapters"
]
OTHER = {bool: "no", int: 2.5, float: "0.5", str: 3}


@pytest.mark.parametrize(("name", "option"), TYPED)
def test_a_value_of_another_type_is_refused(name: str, option: str) -> None:
    """Where it would be taken for something: a text for its letters, 2.5 for 2, "no" for yes."""
    verb = VERBS[name]
    keyword = verb.by_name[option]
    wrong = "text" if keyword.several else OTHER[keyword.type]
    with pytest.raises((TypeError, UsageError), match=f"{option}|{keyword.flag}"):
        getattr(lora_tools, name)(*arguments(verb), **{**needed(verb), option: wrong})


@pytest.mark.parametrize(
    "alone", [str, Path, lambda p: (p, 1.0), lambda p: (str(p), 1), lambda p: f"{p}=1"]
)
def test_one_adapter_may_stand_alone(alone: Any, sides: Path, tmp_path: Path) -> None:
    """Where several can be, as an argument, as a keyword, and in a record."""
    one = alone(sides / "adapter")
    lora_tools.merge(sides / "base", [sides / "adapter"], tmp_path / "list")
    lora_tools.merge(sides / "base", one, tmp_path / "one")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("list", "one")]
    assert weights[0] == weights[1]
    for given in ({"adapters": one}, {"adding": Adding(adapters=one)}):
        plan = lora_tools.quantize(sides / "base", tmp_path / "q", dry_run=True, **given)
        assert [i.role for i in plan.inputs] == ["checkpoint", "adapter"]


STATE = {"a.weight": torch.zeros(2, 2)}
PLACED = [
    (verb.name, keyword.name)
    for verb in VERBS.values()
    for keyword in verb.keywords
    if keyword.option is not None and keyword.option.path
]


@pytest.mark.parametrize("wrong", [b"adapter", 3, None, ("a", True), STATE, torch.nn.Linear(2, 2)])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    for name in VERBS:
        verb = VERBS[name]
        for i, argument in enumerate(verb.arguments):
            if argument.takes_tensors and wrong is STATE:  # which is read as a file is
                continue
            given = arguments(verb)
            given[i] = wrong
            with pytest.raises(TypeError, match=rf"{name}\(\) wants .*{argument.name}"):
                getattr(lora_tools, name)(*given, **needed(verb))


def test_what_is_in_memory_is_to_be_written_first() -> None:
    with pytest.raises(TypeError, match=r"wants out to be a path, not dict"):
        lora_tools.merge("base", "adapter", STATE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not Linear; save_pretrained writes a model"):
        lora_tools.inspect(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "option"), PLACED)
def test_options_are_paths_where_they_name_a_place(name: str, option: str) -> None:
    verb = VERBS[name]
    with pytest.raises(TypeError, match=option):
        getattr(lora_tools, name)(*arguments(verb), **{**needed(verb), option: 3})
    if name in ("inspect", "diff", "verify"):
        return  # they say what else is needed
    with pytest.raises(LoraToolsError):  # taken for a path, like any other
        getattr(lora_tools, name)(*arguments(verb), **{**needed(verb), option: Path("nowhere")})


def test_other_options_of_several_values_are_lists() -> None:
    with pytest.raises(TypeError, match=r"extract\(\) wants a list of include, not 'q_proj'"):
        lora_tools.extract("base", "tuned", "out", include="q_proj")


def test_dtypes_are_those_of_torch_too(sides: Path, tmp_path: Path) -> None:
    """They are recorded by their names, so the output is the same bytes."""
    for name, dtype in (("name", "bfloat16"), ("torch", torch.bfloat16)):
        lora_tools.merge(sides / "base", sides / "adapter", tmp_path / name, dtype=dtype)
        lora_tools.merge(
            sides / "base", sides / "adapter", tmp_path / f"{name} 2", storage=Storage(dtype=dtype)
        )
    files = {p.read_bytes() for p in tmp_path.rglob("model.safetensors")}
    assert len(files) == 1
    plan = lora_tools.quantize(
        sides / "base", tmp_path / "q", compute_dtype=torch.float16, quant_storage=torch.uint8,
        dry_run=True,
    )  # fmt: skip
    assert "compute_dtype='float16'" in plan.command
    with pytest.raises(LoraToolsError, match=r"dtype 'int8' is not one of"):
        lora_tools.merge(sides / "base", sides / "adapter", tmp_path / "no", dtype=torch.int8)


def test_what_gives_its_values_once_is_read_once(sides: Path, tmp_path: Path) -> None:
    """A generator is no list, and what it gives is not lost on the way to the work."""
    merged = lora_tools.merge(sides / "base", (sides / n for n in ["adapter"]), tmp_path / "m")  # type: ignore[arg-type]
    assert len(merged.inputs) == 2
    made = lora_tools.quantize(
        sides / "base",
        tmp_path / "q",
        adapters=(sides / n for n in ["adapter"]),  # type: ignore[arg-type]
    )
    assert len(made.inputs) == 2


def _wrong(keyword: Keyword) -> list[Any]:
    if keyword.choices:
        return [-7 if keyword.type is int else "nonsense"]
    return [float("nan"), -1] if keyword.flag != "--scale" else [float("inf")]


def test_texts_that_mean_nothing_are_refused_before_anything_is_read() -> None:
    for name, given in (("merge", {"dtype": "int3"}), ("dequantize", {"shard_size": "huge"})):
        with pytest.raises(UsageError, match=r"int3|not a size"):
            getattr(lora_tools, name)(*arguments(VERBS[name]), **given)


def test_the_signature_is_as_before_the_records() -> None:
    parameters = inspect.signature(lora_tools.merge).parameters
    assert list(parameters)[:5] == ["base", "adapters", "out", "dtype", "shard_size"]
    assert str(parameters["dtype"]) == "dtype: str | None = None"
    assert list(parameters)[-5:] == ["matching", "storage", "merging", "writing", "running"]


def test_what_is_recorded_is_a_property_of_the_field() -> None:
    given = Ranks(energy=0.5), Running(jobs=3, allow_pickle=True), Writing(force=True)
    assert command_of("collect_stats", *given) == "collect-stats energy=0.5"
    assert command_of("x", Matching(allow_unmatched=True), Ranks(rank=2), order="rank") == (
        "x rank=2 allow_unmatched=True"
    )


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_records_are_values(record: Any) -> None:
    fields = dataclasses.fields(record)
    required = {f.name: "peft" for f in fields if f.default is dataclasses.MISSING}
    one = record(**required)
    assert one == record(**required) == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(record(**required))
    name = fields[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, name, None)
