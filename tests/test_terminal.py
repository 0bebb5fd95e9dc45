"""What people see: where it goes, how wide it is, and that names cannot steer the terminal."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import errors
from lora_tools.cli import pages
from lora_tools.cli.table import Column, lines, short_name, short_names
from lora_tools.printable import printable
from lora_tools.records import Action, Fate, ModuleSpectrum, Report
from lora_tools.verbs import VERBS

from . import forks, models

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.pair(tmp_path_factory.mktemp("pair"))


def loratools(*args: Any, **more: Any) -> Any:
    return forks.run(*args, **more)


def on_a_terminal(args: list[Any], width: int) -> str:
    """What the command prints to a terminal of that width."""
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    code, said = forks.on_a_terminal(args, "stdout", width=width, env=env)
    assert code == 0
    return said.replace("\r\n", "\n")


# ------------------------------------------------------------------------------ which stream it is


def test_the_answer_goes_to_stdout(pair: Path, tmp_path: Path) -> None:
    base, tuned = pair / "base", pair / "tuned"
    for args, answer in (
        (["inspect", base], "checkpoint: "),
        (["diff", base, tuned], "recommended: "),
        (["extract", base, tuned, "-o", tmp_path / "a", "-n"], "nothing was written"),
    ):
        done = loratools(*args)
        assert done.returncode == 0
        assert answer in done.stdout
        assert answer not in done.stderr
        assert loratools(*args, "--quiet").stdout == ""
        as_json = loratools(*args, "--json")
        assert json.loads(as_json.stdout)["verb"] == args[0]
        assert answer in as_json.stderr


def test_what_was_written_is_told_on_stderr(pair: Path, tmp_path: Path) -> None:
    done = loratools("extract", pair / "base", pair / "tuned", "-o", tmp_path / "a")
    assert done.stdout == ""
    assert "wrote " in done.stderr


def test_diff_begins_with_what_it_recommends(pair: Path, tmp_path: Path) -> None:
    first = loratools("diff", pair / "base", pair / "tuned").stdout.splitlines()[0]
    assert first.startswith("recommended: ")
    made = models.tensors(pair / "base")
    torch.manual_seed(0)
    low = {
        name: t + torch.randn(t.shape[0], 2) @ torch.randn(2, t.shape[1]) if t.ndim == 2 else t
        for name, t in made.items()
    }
    tuned = tmp_path / "tuned of mine"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((pair / "base" / "config.json").read_bytes())
    save_file(low, tuned / "model.safetensors")
    first = loratools("diff", pair / "base", tuned).stdout.splitlines()[0]
    assert f"loratools extract {pair / 'base'} '{tuned}' -o ADAPTER --rank 2" in first


def test_an_error_is_json_as_well(pair: Path, tmp_path: Path) -> None:
    done = loratools("merge", pair / "base", tmp_path / "no", "-o", tmp_path / "m", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)["error"]
    assert said["kind"] == "AdapterError"
    assert done.stderr == f"Error: {said['message']}\n"
    assert said["next"] == "there is no such file or folder"
    assert said["tensor"] is None
    done = loratools("merge", pair / "base", "--json", "--nosuch")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("variable", "value", "asked"),
    [
        ("LORATOOLS_JSON", "1", True),
        ("LORATOOLS_MERGE_JSON", "true", True),
        ("LORATOOLS_JSON", "0", False),
        ("LORATOOLS_DIFF_JSON", "1", False),
        ("LORATOOLS_JSON", "perhaps", False),
    ],
)
def test_a_variable_asks_for_json_as_well(
    variable: str, value: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    for more in (["-o", "out"], ["--nosuch"]):
        done = loratools("merge", "no", "ad", *more)
        assert done.returncode in (1, 2)
        assert bool(done.stdout) is asked
        assert not asked or set(json.loads(done.stdout)) == {"error"}


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["quantize", "no", "-o", "out", "--scheme", "fp8-blok"], "fp8-block"),
        (["convert", "no", "-o", "out", "--to", "diffuser"], "diffusers"),
        (["check", "no", "--for", "vlm"], "vllm"),
        (["quantize", "no", "-o", "out", "--scheme", "x"], None),
        (["quantize", "no", "-o", "out", "--schem", "nf4"], "--scheme"),
        (["collect-stats", "no", "-o", "out", "--text", "t"], None),
    ],
)
def test_a_wrong_choice_is_told_the_one_like_it(args: list[str], meant: str | None) -> None:
    said = loratools(*args).stderr
    assert "is not one of" in said or "No such option" in said
    assert (f"Did you mean '{meant}'?" in said) if meant else ("Did you mean" not in said)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("q_porj", "; did you mean 'q_proj'?"), ("#", "; names end in down_proj, embed_tokens, ")],
)
def test_a_pattern_that_is_found_nowhere(pattern: str, said: str, pair: Path) -> None:
    done = loratools("diff", pair / "base", pair / "tuned", "-i", pattern)
    assert done.returncode == 2
    assert f"--include {pattern!r} matches no module name{said}" in done.stderr


def test_so_it_is_in_python() -> None:
    with pytest.raises(lora_tools.UsageError, match=r"is needed; did you mean 'fp8-block'\?$"):
        lora_tools.quantize("no", "out", scheme="fp8-blok")


def test_an_error_says_of_which_tensor_it_is(pair: Path, tmp_path: Path) -> None:
    broken = {**models.tensors(pair / "base")}
    name = "model.layers.0.mlp.down_proj.weight"
    broken[name] = broken[name].clone()
    broken[name][0, 0] = torch.nan
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((pair / "base" / "config.json").read_bytes())
    save_file(broken, tuned / "model.safetensors")
    done = loratools("extract", pair / "base", tuned, "-o", tmp_path / "a", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["tensor"] in (name, name.removesuffix(".weight"))


def test_a_failed_gate_prints_one_document(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--rank", 1]
    done = loratools(*args, "--max-error", 0, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["totals"]["relative_error"] > 0


# ----------------------------------------------------------------------------------------- tables

NAMES = st.lists(
    st.text("abcdefghij.0123", min_size=1, max_size=60), min_size=1, max_size=6, unique=True
)


@given(NAMES, st.integers(20, 200), st.integers(1, 8), st.data())
def test_numbers_are_never_cut(names: list[str], width: int, count: int, data: Any) -> None:
    numbers = [[f"{data.draw(st.integers(0, 10**9))}" for _ in names] for _ in range(count)]
    columns = [
        Column("name", names, kind="name"),
        Column("kept", numbers[0]),
        *(Column(f"c{i}", cells, i) for i, cells in enumerate(numbers[1:], 1)),
    ]
    said = list(lines(columns, width))
    rows = [line.split() for line in said if not line.startswith(("(", "all names"))]
    titles = rows[0]
    assert titles[:2] == ["name", "kept"]
    for i, row in enumerate(rows[1:]):
        for title, cell in zip(titles[1:], row[1:], strict=True):
            index = 0 if title == "kept" else int(title[1:])
            assert cell == numbers[index][i]
    if width >= 48:
        assert all(len(line) <= width for line in said if not line.startswith(("(", "all names")))
    gone = {f"c{i}" for i in range(1, count)} - set(titles)
    assert bool(gone) == any("no room for" in line for line in said)


def test_in_a_pipe_all_is_there() -> None:
    names = ["model.layers.0." + "x" * 90, "model.layers.1.y"]
    said = "\n".join(lines([Column("n", names, kind="name"), Column("v", ["1", "2"], 3)], None))
    assert all(name in said for name in names)
    assert "…" not in said


def test_at_80_columns(pair: Path) -> None:
    said = on_a_terminal(["diff", pair / "base", pair / "tuned"], 80)
    head = next(line for line in said.splitlines() if line.startswith("module"))
    assert "rank" in head.split()
    table = said[said.index("\nmodule") : said.index("(no room for")].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert "0.self_attn.q_proj" in said
    assert "1.self_attn.q_proj" in said
    wide = on_a_terminal(["diff", pair / "base", pair / "tuned"], 200)
    assert "no room" not in wide
    assert "model.layers.0.self_attn.q_proj" in wide


@given(st.text(max_size=50), st.integers(4, 40))
def test_both_ends_of_a_name_stay(name: str, width: int) -> None:
    short = short_name(name, width)
    assert len(short) <= max(width, 4)
    if short != name:
        before, after = short.split("…") if short.count("…") == 1 else (short[0], short[-1])
        assert name.startswith(before)
        assert name.endswith(after)


LAYERS = [
    f"model.layers.{i}.{part}.weight"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "post_attention_layernorm")
]


@pytest.mark.parametrize("width", [31, 40])
def test_names_stay_apart_where_there_is_room(width: int) -> None:
    """At their ends alone ``model.layers.0`` and ``.1`` would be one."""
    short = short_names(LAYERS, width)
    assert len(set(short)) == len(LAYERS)
    assert max(map(len, short)) <= width
    assert short_names(["a" * 50, "b"], width)[1] == "b"


# ----------------------------------------------------------------------- names that are no friends


@given(st.text())
def test_what_is_printed_has_no_control_characters(text: str) -> None:
    said = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") for c in said)
    assert len(said.splitlines()) <= 1


HOSTILE = "a\n::error::b\x1b[31m\u202egnp.weight"


def test_a_name_cannot_add_lines_or_steer_the_terminal(tmp_path: Path) -> None:
    save_file({HOSTILE: torch.ones(4, 4), "z.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    for args in (["inspect", tmp_path / "x.safetensors", "-v"], ["inspect", tmp_path / "a\nb"]):
        done = loratools(*args)
        for said in (done.stdout, done.stderr):
            assert "\x1b" not in said
            assert "\u202e" not in said
            assert not any(line.startswith("::error") for line in said.splitlines())
    assert (
        r"\n::error::b\x1b[31m\u202egnp.weight"
        in loratools(*args[:1], tmp_path / "x.safetensors").stdout
    )
    assert done.stderr.count("\n") == 1


def test_an_adapter_of_such_a_name_is_read_again(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "merged")]
    base, tuned, merged = files
    save_file({HOSTILE: torch.zeros(4, 4)}, base)
    save_file({HOSTILE: torch.ones(4, 4)}, tuned)
    lora_tools.extract(base, tuned, tmp_path / "a")
    lora_tools.merge(base, tmp_path / "a", merged)
    torch.testing.assert_close(load_file(merged), load_file(tuned))


# -------------------------------------------------------------------------- help and environment


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_help_begins_with_an_example_and_the_usual_options(verb: Any) -> None:
    said = loratools(verb.command, "--help").stdout
    assert said.index("$ " + verb.example.split(" -")[0][:20]) < said.index("Most used:")
    first = said[said.index("Most used:") :].split("\n\n")[0]
    for name in verb.first.split():
        assert verb.by_name[name].flag in first
    assert said == loratools("help", verb.command).stdout


def test_help_of_nothing_known_suggests() -> None:
    done = loratools("help", "mrge")
    assert done.returncode == 2
    assert "merge" in done.stderr
    assert loratools("help").stdout == loratools("--help").stdout
    assert loratools("-V").stdout == loratools("--version").stdout


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_pages_that_a_help_names_are_there(verb: Any) -> None:
    said = loratools(verb.command, "--help").stdout
    named = set(re.findall(r"docs/[\w/-]+\.md", said))
    assert named
    for name in named:
        assert pages.page(name).startswith("# ")
    assert f"loratools help {page_of(verb)}" in said


def page_of(verb: Any) -> str:
    """The one at the end of its help, in which it is used."""
    [name] = re.findall(r"help (\S+)", pages.page_of(verb.command))
    assert f"loratools {verb.command} " in pages.page(name)
    return str(name)


def test_pages_of_the_documentation() -> None:
    listed = loratools("help", "docs").stdout
    title = (ROOT / "docs/tasks/vllm.md").read_text().splitlines()[0].lstrip("# ")
    assert f"docs/tasks/vllm.md: {title}" in listed.splitlines()
    text = ROOT / "docs/tasks/vllm.md"
    assert {loratools("help", f"{at}vllm.md").stdout for at in ("docs/tasks/", "tasks/", "")} == {
        f"{text.read_text()}"
    }
    done = loratools("help", "docs/rnks.md")
    assert done.returncode == 2
    assert "No such page 'docs/rnks.md'. Did you mean 'ranks.md'?" in done.stderr


def test_as_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the package there are none then: pip has put them below the environment's top, where
    pyproject.toml says."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    root = ROOT / "docs"
    put = {
        f"../../../{folder}/{path.name}": path.resolve()
        for folder, patterns in said.items()
        for pattern in patterns
        for path in ROOT.glob(pattern)
    }
    assert set(put.values()) == {path.resolve() for path in root.rglob("*.md")}

    class File(str):
        def locate(self) -> Path:
            return put[self]

    monkeypatch.setattr(pages, "__file__", str(tmp_path / "lora_tools" / "cli" / "pages.py"))
    monkeypatch.setattr("importlib.metadata.files", lambda _: [File("x.py"), *map(File, put)])
    assert pages.page("docs/tasks/vllm.md") == (root / "tasks" / "vllm.md").read_text()
    assert pages.page("docs").count("\n") == len(put)


def test_the_environment_sets_options(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--json", "-n"]

    def bytes_with(*more: Any, **env: str) -> int:
        done = loratools(*args, *more, env={**os.environ, **env})
        return int(json.loads(done.stdout)["totals"]["expected_bytes_at_most"])

    two = bytes_with("--rank", 2)
    assert bytes_with(LORATOOLS_RANK="2") == two
    assert bytes_with(LORATOOLS_EXTRACT_RANK="2", LORATOOLS_RANK="9") == two
    assert bytes_with("--rank", 2, LORATOOLS_EXTRACT_RANK="9") == two
    done = loratools(*args, env={**os.environ, "LORATOOLS_RANK": "x"})
    assert done.returncode == 2
    assert "LORATOOLS_RANK" in done.stderr


# ------------------------------------------------------------------------------------- mistakes


def test_mistakes_that_would_pass(pair: Path, tmp_path: Path) -> None:
    base, tuned, out = pair / "base", pair / "tuned", tmp_path / "o"
    for args, words in (
        (["extract", base, tuned, "-o", out, "-e", "nosuch"], "--exclude 'nosuch'"),
        (["extract", base, tuned, "-o", out, "-i", "q_proj", "-i", "zz"], "--include 'zz'"),
        (["diff", base, tuned, "-i", "nosuch"], "--include 'nosuch'"),
        (["quantize", base, "-o", out, "-e", "nosuch"], "--exclude 'nosuch'"),
        (["merge", base, "-o", "-", "--dtype", "float16"], "stdout"),
        (["merge", base, "-o", tmp_path / "m.safetensors", "--dtype", "float16"], "a folder"),
        (["extract", base, tuned, "-o", tmp_path / "m.safetensors"], "a folder"),
        (["extract", base, tuned, "-o", out, "--device", "cuad"], "--device cuda"),
    ):
        done = loratools(*args, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_merge_without_an_adapter_changes_the_dtype(pair: Path, tmp_path: Path) -> None:
    done = loratools("merge", pair / "base", "-o", tmp_path / "m", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert {t.dtype for t in models.tensors(tmp_path / "m").values()} == {torch.float16}
    assert loratools("merge", pair / "base", "-o", tmp_path / "n").returncode == 2
    assert loratools("unmerge", pair / "base", "-o", tmp_path / "n").returncode == 2


def test_a_next_step_is_what_follows_the_last_semicolon() -> None:
    assert errors.next_step("x: wrong; a; do this") == "do this"
    assert errors.next_step("x: wrong") is None
    asked = "'nf5' is not one of 'nf4', 'fp4'. Did you mean 'nf4'? (see --help)"
    assert errors.next_step(asked) == "Did you mean 'nf4'? (see --help)"


def test_a_recommendation_where_no_rank_is_low(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_tools.cli.render import show

    deep = ModuleSpectrum("m", "linear", (99, 99), 1.0, 0.1, 50.0, {}, 0.0, None, ())
    plan = (Fate("m.weight", Action.CHANGED),)
    show(
        Report("diff", "0", (), "", False, plan, spectra=(deep,)),
        verbose=False,
        written=True,
        answer=True,
    )
    assert "no low-rank adapter: 1 of 1 module" in capsys.readouterr().out
