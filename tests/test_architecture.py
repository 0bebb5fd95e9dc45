"""The rooms, what each may import, and what the package shows to the outside."""

from __future__ import annotations

import ast
import dataclasses
import functools
import graphlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import pytest

import lora_tools
from lora_tools.cli import main
from lora_tools.cli.groups import GroupedOption
from lora_tools.options import RECORDS, Quantized, Ranks
from lora_tools.verbs import VERBS

PACKAGE = Path(lora_tools.__file__).parent


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, not to be changed."""
    return ast.parse(path.read_text(encoding="utf-8"))


FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 420

# The rooms from the roof down: each may import those below it, "none" of them or those named.
SUBJECTS = (
    "exporting",
    "verifying",
    "quantizing",
    "adapting",
    "inspecting",
    "extracting",
    "merging",
)
ROOMS = (
    "__main__",
    "__init__",
    "schema",
    "cli",
    "verbs",
    *SUBJECTS,
    "nn",
    "options",
    "onnx",
    "sources",
    "engine",
    "provenance",
    "calibration",
    "pretrained",
    "formats",
    "remote",
    "linalg",
    "plots",
    "figures",
    "sentences",
    "interruption",
    "watch",
    "errors",
    "jobs",
    "records",
    "totals",
    "notebook",
    "printable",
    "within",
)
# Rooms that see less than all that lies below them.
ONLY = {
    "__main__": {"cli"},
    "__init__": {"schema", "verbs", "options", "errors", "records"},
    "schema": {"verbs", "jobs", "records", "totals"},
    "cli": {"verbs", "options", "interruption", "errors", "records", "printable", "sentences"},
    "nn": {"sources", "options", "formats", "linalg", "errors", "records"},
    "options": {"onnx", "formats", "linalg", "errors", "records"},
    "engine": {"watch", "errors", "records", "within"},
    "provenance": {"formats", "errors", "records"},
    "formats": {"remote", "interruption", "watch", "errors", "jobs", "records", "within"},
    "remote": {"watch", "errors"},
    "linalg": {"errors", "records"},
    "calibration": {"pretrained", "errors", "records", "totals"},
    "pretrained": {"formats", "errors", "records"},
    "plots": {"errors", "printable", "records"},
    "figures": {"records", "totals"},
    "sentences": {"records"},
    "jobs": {"records"},
}
# Rooms that may import what stands above them, too.
ALSO = {"nn": {"merging"}}
LIBRARIES = {
    "cli": {"click", "rich"},
    "verbs": {"torch", "xxhash"},
    **{subject: {"torch", "xxhash"} for subject in SUBJECTS},
    "nn": {"torch"},
    "onnx": {
        "torch",
        "numpy",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "onnx_ir",
        "transformers",
        "accelerate",
    },
    "sources": {"torch", "xxhash", "transformers"},
    "engine": {"torch", "numpy", "dask", "distributed"},
    "formats": {"torch", "numpy", "huggingface_hub", "xxhash", "zstandard", "gguf", "onnxruntime"},
    "remote": {"fsspec", "aiohttp", "huggingface_hub"},
    # peft: the filters of WaveFT, which no other library that is needed has
    "linalg": {"torch", "numpy", "scipy", "gguf", "peft"},
    "calibration": {"torch", "transformers", "accelerate"},
    "pretrained": {"transformers"},
    "plots": {"matplotlib", "plotly"},
    "notebook": {"pandas"},
    "records": {"pandas"},  # a type
}


def below(mine: str) -> set[str]:
    """The rooms that one may import."""
    lower = set(ROOMS[ROOMS.index(mine) + 1 :])
    return (lower & ONLY.get(mine, lower)) | ALSO.get(mine, set())


THREADS = {"threading", "concurrent", "multiprocessing", "asyncio"}
NOT_HERE = {
    **dict.fromkeys(ROOMS, THREADS),
    "linalg": THREADS | {"pathlib", "json", "os", "io", "sys", "re", "shutil"},
    "records": THREADS | {"pathlib", "os", "json"},
    "totals": THREADS | {"pathlib", "os", "json"},
    "errors": THREADS | {"pathlib", "os", "json"},
    "engine": set(),
    "remote": set(),  # several requests at a time
    "watch": THREADS - {"threading"},
}
# Never at the top of a module: a verb asks for them, ``--help`` and a dry run do not.
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "rich",
    "huggingface_hub",
    "fsspec",
    "s3fs",
    "aiohttp",
    "transformers",
    "onnx",
    "gguf",
    "onnxruntime",
    "matplotlib",
    "plotly",
    "pandas",
}
# Modules that work with tensors all along, which only a running verb imports.
NUMERIC = {
    "linalg/delta.py",
    "linalg/lora.py",
    "linalg/merge.py",
    "linalg/changes/lycoris.py",
    "linalg/changes/of_weight.py",
    "linalg/changes/patterns.py",
    "linalg/changes/products.py",
    "linalg/changes/rotations.py",
    "linalg/reversible.py",
    "linalg/svd.py",
    "linalg/krylov.py",
    "linalg/truncation.py",
    "linalg/ritz.py",
    "linalg/factors.py",
    "linalg/codebooks.py",
    "linalg/nf4.py",
    "linalg/nf4_search.py",
    "linalg/error_feedback.py",
    "linalg/scaled_feedback.py",
    "nn/__init__.py",
    "nn/attach.py",
    "nn/layers.py",
    "nn/trained.py",
    "onnx/caches.py",
    "onnx/check.py",
    "onnx/foreign.py",
    "onnx/fuse/attention.py",
    "onnx/fuse/cache.py",
    "onnx/fuse/found.py",
    "onnx/fuse/nodes.py",
    "onnx/fuse/norms.py",
    "onnx/fuse/passes.py",
    "onnx/fuse/rotary.py",
    "onnx/in_runtime.py",
    "onnx/in_torch.py",
    "onnx/runs.py",
    "onnx/graphs.py",
    "onnx/half.py",
    "onnx/outputs.py",
    "onnx/precision.py",
    "onnx/model.py",
    "onnx/parts.py",
    "onnx/precise.py",
    "onnx/rounding.py",
    "onnx/sentence_modules.py",
    "onnx/tolerance.py",
    "onnx/trace.py",
    "onnx/nbits.py",
    "onnx/weights.py",
    "onnx/linears.py",
    "onnx/runtime_adapters.py",
    "linalg/noise.py",
    "linalg/bits.py",
    "linalg/e2m1.py",
    "linalg/eight_bits.py",
    "linalg/fp8.py",
    "linalg/scaled.py",
    "linalg/int8.py",
    "linalg/ggml.py",
    "linalg/weighting.py",
    "linalg/compare.py",
    "onnx/initializers.py",
    "onnx/quantized.py",
    "onnx/quantized_weights.py",
    "onnx/quality.py",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imports(path: Path) -> tuple[tuple[str, ast.AST, bool], ...]:
    """(module, node, whether it runs on import) of every import statement in a file."""
    tree = parsed(path)

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, ast.AST, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: import by the full name"
                if child.module == "lora_tools":
                    yield from ((f"lora_tools.{a.name}", child, at_top) for a in child.names)
                else:
                    yield str(child.module), child, at_top
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), at_top)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_top and not inside)

    return tuple(walk(tree, True))


def test_the_walker_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import x.y\nif TYPE_CHECKING:\n import t\ndef f():\n from z import q\n"
        "from lora_tools import engine\nclass C:\n import c\ntry:\n import d\nexcept E:\n pass\n"
    )
    assert [(name, at_top) for name, _, at_top in imports(file)] == [
        ("x.y", True),
        ("t", False),
        ("z", False),
        ("lora_tools.engine", True),
        ("c", True),
        ("d", True),
    ]


def refused_import(mine: str, name: str) -> str | None:
    """Why a file of the room ``mine`` may not import ``name``, if it may not."""
    top, _, rest = name.partition(".")
    if top == "lora_tools":
        target = rest.split(".")[0]
        return None if target == mine or target in below(mine) else f"not below {mine}"
    if top in sys.stdlib_module_names:
        return f"not in {mine}" if top in NOT_HERE.get(mine, set()) else None
    return None if top in LIBRARIES.get(mine, ()) else f"{mine} does without"


def test_imports_run_downward_only() -> None:
    assert not [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}: {why}"  # type: ignore[attr-defined]
        for path in FILES
        for name, node, _ in imports(path)
        if (why := refused_import(room(path), name))
    ]


def test_no_two_files_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(("lora_tools", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in FILES
    }
    after: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                after[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                after[name] |= (full & names.keys()) or {str(node.module)}
    graph = {name: found & names.keys() - {name} for name, found in after.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_heavy_imports_are_lazy() -> None:
    assert not [
        f"{path}:{node.lineno}: {name}"  # type: ignore[attr-defined]
        for path in FILES
        if path.relative_to(PACKAGE).as_posix() not in NUMERIC
        for name, node, at_top in imports(path)
        if at_top and name.partition(".")[0] in HEAVY
    ]


def test_files_stay_short() -> None:
    """What is longer: give part of it a file."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}


EXPORTED = [
    "AdapterError",
    "AdapterForm",
    "Adding",
    "Audience",
    "Check",
    "CheckTotals",
    "CheckpointError",
    "ClusterError",
    "CollectStatsTotals",
    "CombineTotals",
    "Combining",
    "Comparison",
    "ConvertTotals",
    "DequantizeTotals",
    "DiffTotals",
    "Evaluation",
    "ExportTotals",
    "ExtractTotals",
    "Fate",
    "FileError",
    "Formats",
    "Graphs",
    "Input",
    "InspectTotals",
    "LoraToolsError",
    "Matching",
    "MergeTotals",
    "Merging",
    "MismatchError",
    "ModuleResult",
    "ModuleSpectrum",
    "NonFiniteError",
    "NumberFormat",
    "Origin",
    "OutputError",
    "Progress",
    "QualityGateError",
    "QuantizeTotals",
    "Quantized",
    "Ranks",
    "Report",
    "RescaleTotals",
    "Running",
    "Sampling",
    "Search",
    "Storage",
    "Strength",
    "TensorFacts",
    "TensorNotFound",
    "TensorResult",
    "TensorSpec",
    "Tensors",
    "Undoing",
    "UnmergeTotals",
    "UnsafeInput",
    "UnsupportedAdapter",
    "UsageError",
    "VerifyTotals",
    "View",
    "Writing",
    "check",
    "collect_stats",
    "combine",
    "convert",
    "dequantize",
    "diff",
    "export",
    "extract",
    "inspect",
    "merge",
    "plan_schema",
    "quantize",
    "report_schema",
    "rescale",
    "unmerge",
    "verify",
]


def test_exported_names() -> None:
    assert lora_tools.__all__ == EXPORTED
    for name in lora_tools.__all__:
        assert getattr(lora_tools, name).__module__.startswith("lora_tools.")
    assert dir(lora_tools) == lora_tools.__all__
    with pytest.raises(AttributeError):
        lora_tools.no_such_name  # noqa: B018


def public(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and their public methods, with their names."""
    tree = parsed(path)
    kinds = ast.FunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, kinds) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def says_nothing_new(node: ast.AST) -> bool:
    """A property, or a body of ``...``: its name and type say what it is."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = {ast.unparse(d) for d in node.decorator_list}
    return "property" in decorators or ast.unparse(node.body[-1]) == "..."


def test_what_is_public_has_a_docstring() -> None:
    trees = {path: parsed(path) for path in FILES}
    assert not [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not [
        f"{path}: {name}"
        for path in FILES
        for name, node in public(path)
        if not ast.get_docstring(node) and not says_nothing_new(node)  # type: ignore[arg-type]
    ]


COMMON = {"report_file", "as_json", "quiet", "verbose", "help"}  # the command line's own


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_one_row_one_file_and_one_command(name: str) -> None:
    verb = VERBS[name]
    assert verb.function() is getattr(lora_tools, name)
    assert (PACKAGE / "verbs" / f"{name}.py").is_file()
    assert verb.command in main.commands
    assert set(verb.order.split()) <= verb.by_name.keys()
    assert len(verb.by_name) == len(verb.keywords), "two keywords of one name"


def test_every_verb_file_has_its_row() -> None:
    files = {path.stem for path in (PACKAGE / "verbs").glob("*.py")}
    rest = {"__init__", "card", "elsewhere", "row", "frame", "paths", "report_file", "values"}
    rest |= {"in_memory", "needs", "plan_file", "writing"}
    assert files == {*VERBS, *rest}
    assert list(main.commands) == [*(verb.command for verb in VERBS.values()), "completion", "help"]


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_a_command_with_the_same_options(name: str) -> None:
    parameters = inspect.signature(getattr(lora_tools, name)).parameters
    command = {p.name for p in main.commands[name.replace("_", "-")].params} - COMMON
    assert command == set(parameters) - {"progress", *VERBS[name].records}


@pytest.mark.parametrize("name", VERBS)
def test_choices_are_those_of_the_verbs(name: str) -> None:
    hints = get_type_hints(getattr(lora_tools, name))
    for option in main.commands[name.replace("_", "-")].params:
        if isinstance(option.type, click.Choice):
            kinds = get_args(hints[option.name])
            while get_origin(kinds[0]) is Literal:  # of None or it, or of several
                kinds = get_args(kinds[0])
            assert kinds == tuple(option.type.choices), option.name


def test_choices_are_the_rows_of_the_tables() -> None:
    from lora_tools.formats.adapters.consumers import CONFORMED, CONSUMERS
    from lora_tools.formats.adapters.format import FEATURES
    from lora_tools.formats.adapters.table import FORMATS
    from lora_tools.formats.quantized.bitsandbytes import QUANT_TYPES, STORAGES
    from lora_tools.linalg.codebooks import CODEBOOKS
    from lora_tools.linalg.combine import METHODS
    from lora_tools.linalg.ranks import POLICIES, SHARED
    from lora_tools.onnx.schemes import SCHEMES

    def choices(verb: str, option: str) -> list[str]:
        return list(VERBS[verb].by_name[option].choices)

    for verb in ("extract", "rescale"):
        assert choices(verb, "consumer") == list(CONFORMED)
    assert choices("check", "consumer") == list(CONSUMERS)
    for option in ("to", "source"):
        assert choices("convert", option) == list(FORMATS)
    assert choices("convert", "drop") == list(FEATURES)
    assert choices("combine", "method") == list(METHODS)
    assert choices("quantize", "quant_type") == list(QUANT_TYPES) == list(CODEBOOKS)
    assert choices("quantize", "quant_storage") == list(STORAGES)
    fields = {field.name for field in dataclasses.fields(Ranks)}
    assert fields == {*POLICIES, *SHARED, "max_rank"}
    assert tuple(field.name for field in dataclasses.fields(Quantized)) == (*SCHEMES, "activations")


# Options that must be given.
MUST = {"convert": ["--to", "mlx"], "check": ["--for", "vllm"]}


@pytest.mark.parametrize("name", VERBS)
def test_defaults_are_those_of_the_verbs(name: str) -> None:
    verb, command = VERBS[name], main.commands[name.replace("_", "-")]
    parameters = inspect.signature(getattr(lora_tools, name)).parameters
    arguments = ["x" for p in command.params if isinstance(p, click.Argument)]
    arguments += ["-o", "out"] if verb.writes else []
    arguments += MUST.get(name, [])
    # With main's settings: click keeps the --help option of a command's first context for ever.
    given = command.make_context(name, arguments, **main.context_settings).params
    checked = 0
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty and parameter.name in given:
            assert given[parameter.name] == parameter.default, parameter.name
            assert given[parameter.name] == verb.by_name[parameter.name].default
            checked += 1
    must = {a.name for a in verb.arguments} | {k.name for k in verb.keywords if k.required}
    assert checked == len(given.keys() - COMMON - must)


def test_every_option_is_a_field_of_a_record_and_every_record_is_taken() -> None:
    taken = {(k.record, k.name) for verb in VERBS.values() for k in verb.keywords}
    fields = {(record, f.name) for record in RECORDS for f in dataclasses.fields(record)}
    assert taken == fields
    for record in RECORDS:
        assert record.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert getattr(lora_tools, record.__name__) is record


def test_the_types_are_those_of_the_table() -> None:
    written = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    assert written == generated("generate_types").render(), "run docs/generate_types.py"
    tree = ast.parse(written)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert list(functions) == list(VERBS)
    for name, node in functions.items():
        keywords = [arg.arg for arg in node.args.kwonlyargs]
        assert keywords == [
            p.name
            for p in inspect.signature(getattr(lora_tools, name)).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
    named = {node.names[0].name for node in tree.body if isinstance(node, ast.ImportFrom)}
    of_types = {"Any", "Literal", "Mapping", "Path", "ProgressCallback", "Sequence"}
    assert {*named, *functions} - of_types == set(lora_tools.__all__)


def generated(script: str) -> Any:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(script, PACKAGE.parent / "docs" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", VERBS)
def test_a_docstring_has_every_keyword(name: str) -> None:
    text = inspect.getdoc(getattr(lora_tools, name)) or ""
    listed = re.findall(r"^    (\w+): ", text, re.M)
    verb = VERBS[name]
    assert [n for n in listed if n in verb.by_name] == [
        n for n, k in verb.by_name.items() if k.option
    ]
    assert {*verb.records} <= {*listed}
    assert text.count("Args:") == 1


def test_every_command_and_option_is_documented() -> None:
    page = (PACKAGE.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")[1:]}
    assert list(sections) == list(main.commands)
    for name, command in main.commands.items():
        assert command.help, name
        assert command.short_help, name
        assert len(command.short_help) <= 60, f"{name}: cut short in loratools --help"
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts}"
                assert all(o in sections[name] for o in option.opts), f"{name} {option.opts}"
                if name != "completion":
                    assert isinstance(option, GroupedOption), f"{name} {option.opts}"


LOADED = "import sys; {}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
RUN = "from lora_tools.cli import run; run({!r})"


@pytest.mark.parametrize(
    "code",
    [
        "import lora_tools",
        "import lora_tools.cli",
        *(
            RUN.format(args)
            for args in (
                ["--help"],
                ["--version"],
                ["extract", "--help"],
                ["merge", "--help"],
                [],
                ["convert", "--help"],
                ["combine", "--help"],
                ["convert", "a", "-o", "b", "--to", "zip"],
                ["quantize", "--help"],
                ["extract", "base"],
                ["extract", "a", "b", "-o", "c", "--rank", "x"],
                ["nonsense"],
                ["extract", "no/such@", "b", "-o", "c"],
                ["diff", "a"],
                ["inspect", "no/such@"],
                ["verify", "x"],
                ["check", "--help"],
                ["check", "no/such@", "--for", "vllm"],
                ["collect-stats", "--help"],
            )
        ),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "lora_tools" in loaded
    assert not loaded & HEAVY
