"""The documentation does what it says: snippets run, tables match the code, links lead on."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement

import lora_tools
from lora_tools.engine import rates
from lora_tools.records import Action
from lora_tools.verbs import VERBS as TABLE
from lora_tools.verbs.report_file import plain

from . import forks, iotools, models
from .traced import Traced

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
TASKS = sorted(f"docs/tasks/{path.name}" for path in (ROOT / "docs/tasks").glob("*.md"))
PAGES = [
    *TASKS,
    "docs/tour.md",
    "docs/pipeline.md",
    "docs/kept.md",
    "docs/benchmarks.md",
    "docs/index.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/cli.md",
    "docs/extract.md",
    "docs/layers.md",
    "docs/merge.md",
    "docs/formats.md",
    "docs/hub.md",
    "docs/combine.md",
    "docs/quantize.md",
    "docs/export.md",
    "docs/report.md",
    "docs/notebook.md",
    "docs/ranks.md",
    "docs/diff.md",
    "docs/verify.md",
    "docs/check.md",
    "docs/inspect.md",
    "docs/architectures.md",
    "docs/onnx-architectures.md",
    "docs/untrusted.md",
]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w:-]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


# What the snippets import beside what is imported for every run.
HEAVY = (
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "peft",
    "torch.export",
    "torch.onnx",
    "torch._dynamo",
    "torch._inductor",
    "onnxscript",
    "onnxruntime",
)
LABELS = r"module |total:|\d.*become|\d+ tensors|size:|sidecar:|the base,|note:"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(mark, language, text) of every fenced block."""
    return [(m["mark"] or "", m["kind"], m["text"]) for m in FENCE.finditer(read(page))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned and two adapters, of which the second saves nothing whole."""
    folder = models.pair(tmp_path_factory.mktemp("pair"))
    sides = folder / "base", folder / "tuned"
    lora_tools.extract(*sides, folder / "adapter", rank=4)
    lora_tools.extract(*sides, folder / "other", rank=2, rest="skip", embeddings="skip")
    lora_tools.extract(*sides, folder / "attention", rank=3, rest="skip", include=["self_attn"])
    shutil.copytree(folder / "base", folder / "words")
    iotools.tokenizer(folder / "words", models.VOCAB)
    (folder / "words.txt").write_text("w1 w2 w3 w4 w5 w6")
    return folder


@pytest.fixture
def desk(pair: Path, tmp_path: Path) -> Path:
    """A folder of one's own with base and tuned in it."""
    for name in ("base", "tuned"):
        shutil.copytree(pair / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def bucket(pair: Path) -> Iterator[None]:
    """A store with the base, the fine-tune and an adapter."""
    from . import stores

    with stores.running():
        for name in ("base", "tuned", "adapter"):
            stores.fill(pair / name)
        yield


def shell(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands as a person would, with this environment's loratools."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": forks.path(), **env},
    )


# --------------------------------------------------------------------------------------- snippets


@pytest.mark.usefixtures("remembered_traces")
@pytest.mark.parametrize("page", [p for p in PAGES if re.search("```(bash|python)", read(p))])
def test_snippets_run(page: str, desk: Path, pair: Path, request: pytest.FixtureRequest) -> None:
    """In order, in one folder, as a reader would type them; the cells of a notebook know each
    other's names."""
    forks.preload(*HEAVY)
    if page in (*TASKS, "docs/merge.md", "docs/formats.md", "docs/combine.md", "docs/export.md"):
        for name in ("adapter", "other", "attention"):
            shutil.copytree(pair / name, desk / name)
    if page == "docs/tasks/remote.md":
        request.getfixturevalue("bucket")
    count = 0
    cells = "\n".join(text for mark, _, text in blocks(page) if mark == "cell")
    found = [each for each in blocks(page) if each[0] != "cell"]
    for mark, kind, text in [*found, *([("", "python", cells)] if cells else [])]:
        if kind == "bash" and mark.startswith("ci:"):
            continue  # installs things: .ci/run executes it
        if mark in ("real", "signing"):
            continue  # test_export_real.py and test_signing.py run them, where what they need is
        if kind == "bash":
            assert mark == "run", f"neither run nor ci: {text}"
            done = shell(text, desk)
        elif kind == "python":
            done = forks.run(code=text, cwd=desk)
        else:
            continue
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        count += 1
        said = done.stdout
        if "--max-error" in text and "exit $?" in text:
            assert "exit 3" in said
        if "--no-sidecar" in text:
            assert "exit 1" in said
        if "cmp " in text:
            assert "the same bytes" in said
    assert count


def test_the_output_in_readme_is_what_is_printed(desk: Path) -> None:
    """Numbers and sizes aside: those are of another model, and .ci/run's log shows them."""

    def mask(line: str) -> str:
        return re.sub(r"[\d.,]+(e[+-]\d+)?( bytes| kB| MB)?", "#", " ".join(line.split()))

    pages = (*blocks("README.md"), *blocks("docs/tour.md"))
    shown = "".join(text for _, kind, text in pages if kind == "text")
    commands = """(
        loratools extract base tuned -o adapter --energy 0.5
        loratools merge base adapter -o merged --reversible
        loratools unmerge merged adapter -o back
        loratools extract base tuned -o attention --rank 4 --include self_attn --rest skip -q
        loratools rescale attention -o half --scale 0.5
        loratools quantize base -o nf4
        loratools rescale adapter -o small --energy 0.6
        loratools rescale attention -o padded --for llama.cpp
    ) 2>&1"""
    printed = {mask(line) for line in shell(commands, desk).stdout.splitlines()}
    lines = [line for line in shown.splitlines() if re.match(LABELS, line)]
    assert len(lines) > 10
    for line in lines:
        assert mask(line) in printed, line


def test_the_workflow_for_pipelines(desk: Path) -> None:
    """Its steps run here on the tiny pair; at rank 64 that is decomposed without loss."""
    [text] = [text for _, kind, text in blocks("docs/pipeline.md") if kind == "yaml"]
    [job] = yaml.safe_load(text)["jobs"].values()
    ran = 0
    for step in job["steps"]:
        commands = step.get("run", "")
        if not commands or "pip install" in commands:
            continue
        if "jq" in commands and shutil.which("jq") is None:
            continue
        done = shell(commands, desk, BASE="base", TUNED="tuned")
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 1


# ---------------------------------------------------------------------------- what CI executes


def target(name: str) -> list[str]:
    """What ``make NAME`` runs."""
    text = read("Makefile").split(f"\n{name}:\n")[1].split("\n\n")[0]
    return [line.strip() for line in text.splitlines()]


def test_ci_runs_the_two_commands_of_readme() -> None:
    commands = [text.strip() for mark, _, text in blocks("README.md") if mark.startswith("ci:")]
    assert commands == ["make demo", "make test"]
    script = read(".ci/run")
    assert "for command in demo test" in script
    assert 'make "$command"' in script
    assert "$(MAKE)" not in read("Makefile")  # make -n would run it, and all around it
    for name in ("demo", "test"):
        dry = subprocess.run(
            ["make", "-n", "--no-print-directory", name],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
        )
        assert [line.strip() for line in dry.stdout.splitlines()][:2] == [
            line.replace("$(PYTHON)", "python3") for line in target(name)[:2]
        ]
        installs = [line for line in target(name) if "pip install" in line]
        assert installs
        assert all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
    wanted = ("ruff check", "ruff format --check", "mypy", "mkdocs build --strict", "pytest -n 2")
    assert all(any(line.startswith(start) for line in target("test")) for start in wanted)


def test_the_image_and_the_action_install_what_is_pinned() -> None:
    action = yaml.safe_load(read("action.yml"))
    install = action["runs"]["steps"][-1]["run"]
    for text in (read("Dockerfile"), install):
        assert "--torch-backend cpu" in text
        assert "constraints.txt" in text
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    [asked] = re.findall(r"/src\[([\w,]+)\]", read("Dockerfile"))
    assert set(asked.split(",")) <= set(extras)


def test_the_readme_tells_all_extras() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    told = re.findall(r"^\| `pip install '\.\[(\w+)\]'` \|", read("README.md"), re.MULTILINE)
    assert set(told) == set(extras) - {"test"}


def test_constraints_pin_what_is_asked_for() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    pins = dict(
        line.split("==") for line in read("constraints.txt").splitlines() if line[:1] not in "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0", "other versions of torch bring gigabytes of CUDA"
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        pinned = pins[wanted.name.lower().replace("_", "-")]
        assert wanted.specifier.contains(pinned), f"{text}, pinned to {pinned}"


# ------------------------------------------------------------------------------------- reference


def test_the_cli_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == read("docs/cli.md"), "run: python docs/generate_cli.py"


def test_the_table_of_formats_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_formats", ROOT / "docs/generate_formats.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = read("docs/formats.md")
    assert module.render() in page
    assert module.insert(page) == page, "run: python docs/generate_formats.py"
    page, table = read("docs/check.md"), module.render_consumers()
    assert table in page, "run: python docs/generate_formats.py"


def section(title: str) -> str:
    return read("docs/report.md").split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(text: str) -> list[str]:
    """The code words of the first cell of every row."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [word for row in rows for word in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize(
    "record",
    ["Report", "Input", "Fate", "ModuleResult", "ModuleSpectrum", "TensorFacts", "TensorResult"],
)
def test_every_field_of_the_report_is_documented(record: str) -> None:
    fields = [field.name for field in dataclasses.fields(getattr(lora_tools, record))]
    assert first_column(section(record)) == fields


VERBS = (
    "extract",
    "merge",
    "unmerge",
    "rescale",
    "combine",
    "convert",
    "dequantize",
    "quantize",
    "export",
    "inspect",
    "diff",
    "verify",
    "check",
    "collect-stats",
)


def totals_by_key() -> dict[str, set[str]]:
    """The verbs that the page names with each key."""
    rows = [line for line in section("totals").splitlines() if line.startswith("| `")]
    return {
        key: set(re.findall("|".join(VERBS), row.split("|")[2].split("but")[0]))
        for row in rows
        for key in first_column(row)
    }


@pytest.mark.parametrize("verb", VERBS)
def test_the_totals_of_a_verb_have_the_keys_that_are_documented(verb: str) -> None:
    row = TABLE[verb.replace("-", "_")]
    documented = {key for key, verbs in totals_by_key().items() if verb in verbs}
    assert getattr(lora_tools, row.totals).__optional_keys__ == documented
    hints = get_type_hints(row.function())
    assert get_args(hints["return"]) == (getattr(lora_tools, row.totals),)


def pipeline(model: Path, out: Path) -> Path:
    """A diffusers pipeline of one model."""
    shutil.copytree(model, out / "text_encoder")
    index = '{"text_encoder": ["transformers", "LlamaForCausalLM"]}'
    (out / "model_index.json").write_text(index)
    return out


@pytest.mark.usefixtures("remembered_traces")
@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_every_total_and_action_is_documented(
    pair: Path, traced: Callable[[str], Traced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_tools.verbs.needs._WORTH", 0)
    monkeypatch.setattr(rates, "measure", lambda *_: rates.Rates(1.0, 1.0, 1.0))
    base, tuned, out = pair / "base", pair / "tuned", tmp_path
    options: list[dict[str, Any]] = [
        {},
        {"dry_run": True},
        {"exclude": ["lm_head"]},
        {"exclude": ["."], "dry_run": True},
        {"rest": "error", "dry_run": True},
    ]
    reports = [lora_tools.extract(base, tuned, out / f"a{i}", **o) for i, o in enumerate(options)]
    reports += [
        lora_tools.merge(base, [pair / "adapter"], out / "m"),
        lora_tools.merge(base, [pair / "other"], out / "r", reversible=True),
        lora_tools.merge(base, [pair / "other"], out / "n", dry_run=True),
        lora_tools.unmerge(out / "r", [pair / "other"], out / "n", dry_run=True),
        lora_tools.unmerge(out / "r", [pair / "other"], out / "u1"),
        lora_tools.unmerge(out / "r", [pair / "other"], out / "u2", sidecar=False),
        lora_tools.rescale(pair / "adapter", out / "s", scale=2),
        lora_tools.rescale(pair / "adapter", out / "n", rank=1),
        lora_tools.rescale(pair / "adapter", out / "n", rank=1, dry_run=True),
        lora_tools.combine([pair / "adapter", pair / "other"], out / "c", rank=2),
        lora_tools.combine([pair / "other"], out / "p", method="ties", density=0.5),
        lora_tools.combine([pair / "other"], out / "n", dry_run=True),
        lora_tools.convert(pair / "adapter", out / "v", to="mlx", drop=["saved"], rank=2),
        lora_tools.convert(
            pair / "adapter", out / "x", to="diffusers", drop=["saved", "embedding"], rank=2
        ),
        lora_tools.convert(pair / "adapter", out / "w", to="peft", dry_run=True),
        lora_tools.quantize(base, out / "q", dry_run=True),
        lora_tools.quantize(base, out / "q"),
        lora_tools.quantize(base, out / "l", compensate=1),
        lora_tools.dequantize(out / "q", out / "d"),
        lora_tools.dequantize(out / "q", out / "n", dry_run=True),
        lora_tools.extract(out / "q", tuned, out / "from q", rank=1),
        lora_tools.merge(out / "q", [pair / "adapter"], out / "mq"),
        lora_tools.merge(out / "q", [pair / "adapter"], out / "rq", requantize=True),
        lora_tools.export(base, out / "e", graph=traced("llama").graph),
        lora_tools.export(base, out / "f", adapters=[pair / "other"], graph=out / "e"),
        lora_tools.export(
            base, out / "i", adapters=[pair / "other"], runtime_adapters=True, graph=out / "e"
        ),
        lora_tools.export(base, out / "g", nf4=True, dry_run=True),
        lora_tools.export(base, out / "g", nf4=True, graph=out / "e"),
        lora_tools.export(
            pair / "words", out / "h", int8=True, graph=out / "e", eval_text=pair / "words.txt"
        ),
        lora_tools.export(tied := traced("Llama").base, out / "k", compute_dtype="float16"),
        lora_tools.diff(base, tuned),
        lora_tools.diff(*(pipeline(side, out / f"of {side.name}") for side in (base, tuned))),
        lora_tools.inspect(base),
        lora_tools.inspect(pair / "adapter"),
        lora_tools.inspect(out / "r" / "loratools-unmerge.sidecar"),
        lora_tools.verify(out / "m", base=base, adapters=[pair / "adapter"]),
        lora_tools.verify(pair / "other", base=base, tuned=tuned),
        lora_tools.verify(out / "q", against=base),
        lora_tools.verify(out / "f", against=base, adapters=[pair / "other"]),
        lora_tools.verify(out / "i", against=base),
        lora_tools.verify(out / "k", against=tied),
        lora_tools.check(pair / "adapter", base=base, consumer="peft"),
        lora_tools.inspect(out / "q"),
        lora_tools.inspect(out / "e"),
        lora_tools.collect_stats(pair / "words", pair / "words.txt", out / "st", length=4),
        lora_tools.collect_stats(pair / "words", pair / "words.txt", out / "s2", dry_run=True),
        lora_tools.quantize(
            pair / "words",
            out / "fed",
            activations=out / "st",
            compensate=1,
            eval_text=pair / "words.txt",
        ),
        lora_tools.merge(
            out / "q", [pair / "adapter"], out / "rf", requantize=True, activations=out / "st"
        ),
        lora_tools.export(
            pair / "words",
            out / "j",
            int4=True,
            graph=out / "e",
            no_verify=True,
            activations=out / "st",
        ),
    ]
    validators = {verb: Draft202012Validator(lora_tools.report_schema(verb)) for verb in VERBS}
    assert {report.verb for report in reports} == {*VERBS}
    for report in reports:
        validators[report.verb].validate(plain(report))
    seen: dict[str, set[str]] = {}
    for report in reports:
        for key in report.totals:
            seen.setdefault(key, set()).add(report.verb)
    assert seen == totals_by_key()
    actions = {fate.action for report in reports for fate in report.plan}
    documented = set(re.findall(r"`([^`]+)`", section("Fate")))
    assert actions <= {*Action} <= documented, {*Action} - documented
    assert {type(f["action"]) for r in reports for f in r.to_dict()["plan"]} == {str}
    assert f"{Action.SAVED_WHOLE}" == str(Action.SAVED_WHOLE) == "saved whole"
    assert {m.method for r in reports for m in r.modules} <= set(
        re.findall(r"`(\w+)`", section("ModuleResult"))
    )


def test_every_layer_kind_is_listed() -> None:
    from lora_tools.linalg.layouts import LAYOUTS

    table = read("docs/layers.md").split("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == list(LAYOUTS)


def test_what_merge_refuses_is_listed() -> None:
    """Every kind of adapter that is known and refused stands in the table of docs/merge.md."""
    from lora_tools.formats.adapters import unmergeable

    table = read("docs/merge.md").split("## What is refused")[1].split("\n## ")[0]
    flat = re.sub(r"[^a-z0-9]", "", table.lower().replace("³", "3"))
    for kind in unmergeable._NOT_LORA:
        words = {
            "MULTITASK_PROMPT_TUNING": "prompt",
            "PROMPT_TUNING": "prompt",
            "CPT": "prompt",
            "PREFIX_TUNING": "prefix",
            "P_TUNING": "ptuning",
            "ADAPTION_PROMPT": "llamaadapter",
            "TRAINABLE_TOKENS": "trainabletokens",
        }
        assert words.get(kind, re.sub(r"[^a-z0-9]", "", kind.lower())) in flat, kind
    for start in unmergeable._CHANGED_BASE:
        assert re.sub(r"[^a-z]", "", start) in flat, start


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page}: {target}"


def test_no_machine_of_ours_is_in_the_project() -> None:
    """Paths of one machine mean nothing on another."""
    for page in [*PAGES, ".ci/run", "constraints.txt", "pyproject.toml"]:
        assert not re.search(r"(?<![\w./])/(home|root|work|Users|tmp/w)/", read(page)), page
