"""The command as a stranger meets it: exit codes, streams, files, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import forks, models

SHELLS = {"bash": "complete", "zsh": "compdef", "fish": "complete"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned and adapter, not to be written to."""
    folder = models.pair(tmp_path_factory.mktemp("pair"))
    done = loratools("extract", folder / "base", folder / "tuned", "-o", folder / "adapter", "-q")
    assert done.returncode == 0, done.stderr
    return folder


def loratools(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, in which torch is imported already."""
    return forks.run(*args, **options)


def from_the_start(*args: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a new Python."""
    return subprocess.run(
        [sys.executable, "-m", "lora_tools", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, and nothing else anywhere."""
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


# ------------------------------------------------------------------------------------ exit codes


def test_0_when_done(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--rank", 4]
    done = from_the_start(*args)
    assert done.returncode == 0
    assert done.stdout == ""
    for expected in ("rel. error", "model.layers.0.mlp.up_proj", "16 decomposed", "wrote "):
        assert expected in done.stderr
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["extract", "nowhere", "{tuned}", "-o", "out"], "nowhere: no such file or folder"),
        (["extract", "{base}", "{base}", "-o", "out"], "nothing changed from BASE to TUNED"),
        (["extract", "{base}", "{tuned}", "-o", "{adapter}"], "already exists"),
        (["extract", "{base}", "{tuned}", "-o", "{base}"], "is the input"),
        (["extract", "{base}", "{tuned}", "-o", "no/such/folder"], "is not a folder"),
        (["extract", "{base}", "{tuned}", "-o", "out", "--rest", "error"], "--rest save"),
        (["merge", "{base}", "{tuned}", "-o", "out"], "no adapter_config.json"),
        (["unmerge", "{base}", "{adapter}", "-o", "out", "--sidecar"], "no sidecar"),
        (["rescale", "{adapter}", "-o", "out", "--for", "llama.cpp"], "does not read"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_1_when_the_input_or_the_output_will_not_do(
    pair: Path, tmp_path: Path, args: list[str], says: str
) -> None:
    paths = {name: pair / name for name in ("base", "tuned", "adapter")}
    done = loratools(*(a.format(**paths) for a in args), cwd=tmp_path)
    assert done.returncode == 1
    assert says in only_error(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["extract"], "Missing argument 'BASE'"),
        (["extract", "a", "b"], "Missing option '-o' / '--out'"),
        (["extract", "a", "b", "-o", "c", "--rnk", "3"], "--rank"),
        (["extract", "a", "b", "-o", "c", "--rank", "x"], "'x' is not a valid integer"),
        (["extract", "a", "b", "-o", "c", "--embeddings", "x"], "'lora', 'save', 'skip'"),
        (["extract", "a", "b", "-o", "c", "--report", "no/r.json"], "folder does not exist"),
        (["extract", "a", "b", "-o", "c", "--rank", "0"], "at least 1"),
        (["extract", "a", "b", "-o", "c", "--rank", "2", "--energy", ".5"], "exclude each other"),
        (["extract", "a", "b", "-o", "c", "--energy", "2"], "up to 1"),
        (["extract", "a", "b", "-o", "c", "--include", "("], "not a regular expression"),
        (["extract", "a", "b", "-o", "c", "--dtype", "int3"], "int3"),
        (["merge", "a", "-o", "c"], "ADAPTER"),
        (["merge", "a", "b", "-o", "c", "--shard-size", "huge"], "not a size"),
        (["rescale", "a", "-o", "c"], "nothing to do"),
        (["rescale", "a", "-o", "c", "--effect", "change", "--scale", "2"], "--alpha"),
        (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_2_for_a_wrong_invocation_in_one_line(tmp_path: Path, args: list[str], says: str) -> None:
    done = loratools(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert says in only_error(done)
    assert list(tmp_path.iterdir()) == []


def test_2_and_the_help_for_no_command_at_all() -> None:
    done = from_the_start()
    assert done.returncode == 2
    assert "extract" in done.stderr


def test_2_for_a_device_that_is_not_there(pair: Path, tmp_path: Path) -> None:
    done = loratools(
        "extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--device", "nonsense"
    )
    assert done.returncode == 2
    assert "--device nonsense" in only_error(done)
    assert list(tmp_path.iterdir()) == []


def test_3_when_the_gate_is_exceeded(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--rank", 4]
    report = tmp_path / "report.json"
    done = loratools(*args, "--max-error", 0.3, "--report", report, "--json")
    assert done.returncode == 3
    data = json.loads(report.read_text())
    assert json.loads(done.stdout) == data
    worst = max(data["modules"], key=lambda m: m["relative_error"])
    assert worst["module"] in done.stderr.splitlines()[-1]
    assert f"{worst['relative_error']:.4g}" in done.stderr.splitlines()[-1]
    assert "wrote" not in done.stderr
    assert list(tmp_path.iterdir()) == [report]

    done = loratools(*args, "--max-error", worst["relative_error"] * 1.01, "-q")
    assert done.returncode == 0


def test_130_and_143_leave_no_trace(pair: Path, tmp_path: Path) -> None:
    """A signal in the middle: the staging folder goes, and the message says so."""
    code = (
        "import sys, time, lora_tools.engine.threads as threads\n"
        "from lora_tools.cli import run\n"
        "real = threads.run\n"
        "def slow(*args, **options):\n"
        "    for i, result in enumerate(real(*args, **options)):\n"
        "        if i == 3:\n"
        "            print('now', flush=True)\n"
        "            while True: time.sleep(0.01)\n"
        "        yield result\n"
        "threads.run = slow\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    args = ["extract", pair / "base", pair / "tuned", "-o", out]
    for number, says in ((signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated")):
        with forks.pipe() as (stdout, end), (tmp_path / "said").open("w+b") as stderr:
            process = forks.Run(args, code=code, stdout=end, stderr=stderr)
            end.close()
            assert stdout.readline() == b"now\n"
            assert len(list(out.parent.iterdir())) == 1, "the staging folder"
            process.send_signal(number)
            assert process.wait() == 128 + number
        assert (tmp_path / "said").read_text().strip() == f"{says}; nothing was written."
        assert list(out.parent.iterdir()) == []


# --------------------------------------------------------------------------------- streams, files


def test_json_is_all_that_goes_to_stdout(pair: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    runs = [
        ["extract", pair / "base", pair / "tuned", "-o", adapter, "--energy", "0.9"],
        ["merge", pair / "base", f"{adapter}=0.5", "-o", merged, "--reversible"],
        ["unmerge", merged, f"{adapter}=0.5", "-o", tmp_path / "back"],
        ["rescale", adapter, "-o", tmp_path / "small", "--rank", "2"],
    ]
    for args in runs:
        file = tmp_path / "report.json"
        done = loratools(*args, "--json", "--report", file)
        assert done.returncode == 0, done.stderr
        data = json.loads(done.stdout, parse_constant=pytest.fail)  # no NaN, no Infinity
        assert data == json.loads(file.read_text())
        assert data["verb"] == args[0]
        assert data["dry_run"] is False
        assert len(data["plan"]) >= 29 or data["verb"] == "rescale"
        assert "wrote " in done.stderr


def test_quiet_is_silent(pair: Path, tmp_path: Path) -> None:
    done = loratools("merge", pair / "base", pair / "adapter", "-o", tmp_path / "m", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = loratools("merge", pair / "base", pair / "adapter", "-o", tmp_path / "m", "--quiet")
    assert "already exists" in only_error(done)


def test_verbose_lists_every_tensor(pair: Path, tmp_path: Path) -> None:
    names = list(models.tensors(pair / "base"))
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a"]
    plain = loratools(*args).stderr
    verbose = loratools(*args, "--force", "-v").stderr
    assert "model.norm.weight" not in plain
    for name in names:
        assert name in verbose


def test_names_are_never_cut_short_in_a_log(pair: Path, tmp_path: Path) -> None:
    env = {**os.environ, "COLUMNS": "40"}
    done = loratools("extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "-v", env=env)
    assert "…" not in done.stderr
    assert "model.layers.0.post_attention_layernorm.weight" in done.stderr


def test_dry_run_writes_nothing_and_does_without_torch(pair: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lora_tools.cli import run\ncode = run(sys.argv[1:])\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\nsys.exit(code)"
    )
    for args in (
        ["extract", pair / "base", pair / "tuned"],
        ["merge", pair / "base", pair / "adapter"],
        ["rescale", pair / "adapter", "--rank", 4],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args), "-o", "out", "--dry-run"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "nothing was written" in done.stdout
        assert "model.layers.0.self_attn.q_proj" in done.stdout
        assert list(tmp_path.iterdir()) == []


def test_force_replaces(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "-q"]
    assert loratools(*args, "--rank", 4).returncode == 0
    before = models.tensors(tmp_path / "a")
    assert loratools(*args, "--rank", 8).returncode == 1
    assert all((models.tensors(tmp_path / "a")[k] == v).all() for k, v in before.items())
    assert loratools(*args, "--rank", 8, "--force").returncode == 0
    assert models.tensors(tmp_path / "a").keys() == before.keys()
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert models.tensors(tmp_path / "a")[key].shape[0] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_report_that_cannot_be_written_is_said_before_the_work(
    pair: Path, tmp_path: Path
) -> None:
    done = loratools(
        "merge", pair / "base", pair / "adapter", "-o", tmp_path / "m", "--report", tmp_path
    )
    assert done.returncode == 2
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["base/config.json", "adapter/report.json", "base"])
def test_a_report_never_goes_into_an_input(pair: Path, tmp_path: Path, name: str) -> None:
    before = sorted(path.stat().st_mtime_ns for path in pair.rglob("*"))
    args = ["merge", pair / "base", f"{pair / 'adapter'}=0.5", "-o", tmp_path / "m"]
    done = loratools(*args, "--report", pair / name)
    assert done.returncode == 2
    assert "--report" in only_error(done)
    assert sorted(path.stat().st_mtime_ns for path in pair.rglob("*")) == before


# -------------------------------------------------------------------------------------- terminals


def on_a_terminal(args: list[Any]) -> tuple[int, str]:
    """Run the command with its stderr on a pseudo-terminal; returns what it drew there."""
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    return forks.on_a_terminal(args, "stdin", "stderr", env=env)


def test_a_bar_on_a_terminal_and_none_in_a_pipe(pair: Path, tmp_path: Path) -> None:
    args = ["extract", pair / "base", pair / "tuned", "-o", tmp_path / "a", "--force"]
    code, drawn = on_a_terminal(args)
    assert code == 0
    assert "━" in drawn
    assert "100%" in drawn
    assert "\x1b[?25h" in drawn, "the cursor comes back"
    piped = loratools(*args).stderr
    assert "━" not in piped
    assert "\x1b" not in piped
    _, quiet = on_a_terminal([*args, "-q"])
    assert quiet == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str) -> None:
    done = loratools("completion", shell)
    assert done.returncode == 0
    assert SHELLS[shell] in done.stdout
    assert "_LORATOOLS_COMPLETE" in done.stdout


def test_completion_knows_commands_and_options() -> None:
    def complete(words: str, at: int) -> str:
        env = {
            **os.environ,
            "_LORATOOLS_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(at),
        }
        return forks.run(code="from lora_tools.cli import run; run([])", env=env).stdout

    assert complete("loratools ext", 1) == "plain,extract\n"
    assert "plain,--energy" in complete("loratools rescale --en", 2)
    assert "plain,llama.cpp" in complete("loratools rescale --for ", 3)
    assert complete("loratools merge ba", 2) == "file,ba\n"


def test_help_imports_little() -> None:
    """Besides what click needs, itself and a third as much again."""

    def imported(*line: str) -> set[str]:
        found = subprocess.run(
            [sys.executable, "-X", "importtime", *line], check=True, capture_output=True, text=True
        )
        return {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}

    more = imported("-m", "lora_tools", "--help") - imported("-c", "import click")
    assert {"lora_tools.cli", "lora_tools.options"} < more
    assert len(more) < 80
    assert {"email", "rich", "numpy", "torch"}.isdisjoint({name.partition(".")[0] for name in more})


def test_version() -> None:
    from importlib.metadata import version

    script = Path(sys.executable).with_name("loratools")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == version("loratools")
