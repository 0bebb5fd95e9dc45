"""Regular expressions of files: as Python's engine matches them, in time it does not keep to."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_tools
from lora_tools.errors import AdapterError
from lora_tools.formats import patterns
from lora_tools.formats.adapters.peft_folder import open_peft
from lora_tools.formats.patterns import ends_with, matches

from . import iotools

LETTERS = st.sampled_from(["a", "b", "A", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "", "_", "3"])
PLACES = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])


def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    times = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"])
    return st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, times).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: f"(?i:{part})"),
        inner.map(lambda part: f"({part})"),
        st.sampled_from(["a", "[ab]", r"\."]).map(lambda part: f"(?<={part})"),
        st.sampled_from(["a", "[ab]", r"\."]).map(lambda part: f"(?<!{part})"),
    )


PATTERNS = st.recursive(st.one_of(LETTERS, PLACES), joined, max_leaves=8)
TEXTS = st.text("abA.3_\n", max_size=7)


@settings(max_examples=500)
@given(PATTERNS, TEXTS)
def test_all_ways_at_once_find_what_trying_finds(pattern: str, text: str) -> None:
    compiled = patterns._Pattern(re.compile(pattern), patterns._parser.parse(pattern))
    compiled._ways = patterns._Ways(0, patterns._MANY)  # never the engine
    assert compiled.matches(text, False) == (re.match(pattern, text) is not None)
    assert compiled.matches(text, True) == (re.fullmatch(pattern, text) is not None)


@settings(max_examples=300)
@given(PATTERNS, TEXTS)
def test_either_way_is_the_engines_answer(pattern: str, text: str) -> None:
    assert matches(pattern, text) == (re.match(pattern, text) is not None)
    assert matches(pattern, text, whole=True) == (re.fullmatch(pattern, text) is not None)


NAMES = [
    "q_proj",
    "layers.1.q_proj",
    "model.layers.1.q_proj",
    "k",
    "q_pro",
    "xq_proj",
    "a.q_proj\n",
]


@pytest.mark.parametrize("key", ["q_proj", "1.q_proj", r"layers\.1\.q_proj", ".*q_proj", "q-proj"])
@pytest.mark.parametrize("module", NAMES)
def test_keys_match_as_pefts(key: str, module: str) -> None:
    assert ends_with(key, module) == (re.match(rf"(.*\.)?({key})$", module) is not None)


CATASTROPHES = [
    "(a|a)*b",
    "(a*)*b",
    "(a+)+b",
    "(.*a){25}b",
    "(a|aa)+b",
    "(?:a?){40}a{40}b",
    "(((a*)*)*)*b",
    ".*.*.*.*.*.*.*.*.*.*b",
    r"(\b){4000000000}b",
    "(?:(?=a)){4000000000}b",
    "(a|b|ab)*c",
    "(?!(a+)+b)c",
    "(" * 50 + "a" + ")*" * 50 + "b",
]


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    start = time.process_time()
    for text in ("a" * 60, "a." * 60 + "a"):
        assert not matches(pattern, text)
        assert not ends_with(pattern, text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(a*)*(b)\2*", "groupref"),
        ("a" * (patterns.LONGEST + 1), "characters"),
        ("(" * 5000 + ")" * 5000, "deep"),
        ("(", "unterminated"),
        ("a{99999999999}", "deep|large"),
    ],
)
def test_what_is_not_matched_is_an_error(pattern: str, said: str) -> None:
    with pytest.raises(re.error, match=said):
        matches(pattern, "a" * 100)


def test_a_pattern_too_large_for_its_name_is_an_error() -> None:
    with pytest.raises(re.error, match="too long on a name of 9,000"):
        matches("(a|a)*(b|b)*(a|a)*", "a" * 9000, whole=True)


REAL = [
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))",
    r".*\.layers\.\d+\..*\.(q|k)_proj",
    r".*layers\.(1[0-9]|2[0-3])\.mlp\.experts\.\d+\.down_proj",
]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_in_use_are_matched_quickly(pattern: str) -> None:
    kinds = ("self_attn.q_proj", "mlp.experts.77.down_proj", "mlp.gate")
    names = [f"model.layers.{i}.{kind}" for i in range(100) for kind in kinds]
    start = time.process_time()
    found = [matches(pattern, name, whole=True) for name in names]
    assert time.process_time() - start < 20
    assert found == [re.fullmatch(pattern, name) is not None for name in names]


@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_with_such_a_key_is_read(which: str, tmp_path: Path) -> None:
    module = "model.layers.0." + "a" * 40 + ".q_proj"
    iotools.adapter(tmp_path / "a", {module: (4, 4)}, **{which: {"(a|a)*(.*a)*z": 8}})
    start = time.process_time()
    adapter = open_peft("a", tmp_path / "a")
    assert (adapter.modules[module].r, adapter.modules[module].alpha) == (2, 2)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("pattern", ["(", r"(a|a)*\1(b*)*", "(" * 5000])
def test_an_adapter_whose_key_is_none_is_refused(pattern: str, tmp_path: Path) -> None:
    folder = iotools.adapter(tmp_path / "a", {"a" * 60: (4, 4)}, rank_pattern={pattern: 8})
    with pytest.raises(AdapterError, match=r"rank_pattern: .* is a pattern that cannot be read"):
        open_peft("a", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    given = {"peft_type": "IA3", "feedforward_modules": pattern}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **given}))
    with pytest.raises(AdapterError):
        lora_tools.inspect(folder)
