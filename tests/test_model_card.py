"""Model cards: what they say, in which folders they are, and that nobody else's is passed off."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import lora_tools
from lora_tools.cli import main
from lora_tools.errors import QualityGateError
from lora_tools.formats import model_card

from . import iotools
from .test_sentence_transformers import folder as sentence_folder

CARD = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- mine\n---\n# The base\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``tuned``, ``ad`` for them; base lies in the hub's cache, too, as org/base."""
    top = tmp_path_factory.mktemp("cards")
    base = iotools.weights(layers=1)
    iotools.checkpoint(top / "base", base)
    (top / "base" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (top / "base" / "README.md").write_text(CARD)
    iotools.checkpoint(top / "tuned", iotools.moved(base))
    iotools.adapter(top / "ad", iotools.linear_shapes(base), task_type="CAUSAL_LM")
    for name in ("base", "ad"):
        snapshot = top / f"models--org--{name}" / "snapshots" / "0"
        shutil.copytree(top / name, snapshot)
    iotools.graph(top / "graph", top / "base", base)
    return top


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def card(folder: str | Path) -> ModelCard:
    return ModelCard((Path(folder) / "README.md").read_text())


def head(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = card(folder).data.to_dict()
    return found


BASE, AD = "models--org--base/snapshots/0", "models--org--ad/snapshots/0"
MADE: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "an adapter": (
        ["extract", BASE, "tuned", "--rank", "1"],
        {"base_model": ["org/base"], "base_model_relation": "adapter", "library_name": "peft"},
        "LoRA adapter for org/base",
    ),
    "another adapter": (
        ["rescale", "ad", "--rank", "1", "--base-name", "org/b"],
        {"base_model": ["org/b"], "library_name": "peft", "pipeline_tag": "text-generation"},
        "LoRA adapter for org/b",
    ),
    "an adapter of nobody knows what": (
        ["combine", "ad=0.5", "ad=-0.25"],
        {"library_name": "peft", "tags": ["loratools", "lora"]},
        "LoRA adapter",
    ),
    "an adapter of MLX": (
        ["convert", "ad", "--to", "mlx"],
        {"library_name": "mlx", "tags": ["loratools", "lora"]},
        "LoRA adapter",
    ),
    "a merge": (
        ["merge", BASE, f"{AD}=0.5", "--dtype", "bfloat16"],
        {
            "base_model": ["org/base", "org/ad"],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": "apache-2.0",
            "language": "en",
            "tags": ["loratools", "merge"],
        },
        "Merged model made of org/base",
    ),
    "four bits": (
        ["quantize", BASE, "-i", "q_proj", "--blocksize", "32"],
        {"base_model": ["org/base"], "base_model_relation": "quantized", "license": "apache-2.0"},
        "Quantized model made of org/base",
    ),
    "four bits of a merge": (
        ["quantize", BASE, "--adapter", f"{AD}=2"],
        {"base_model": ["org/base", "org/ad"], "base_model_relation": "merge"},
        "Quantized model made of org/base",
    ),
    "another dtype": (
        ["merge", BASE, "--dtype", "float16"],
        {"base_model": ["org/base"], "base_model_relation": "quantized", "tags": ["loratools"]},
        "Model made of org/base",
    ),
    "ONNX": (
        ["export", BASE, *iotools.EXPORT],
        {"base_model": ["org/base"], "base_model_relation": "quantized"},
        "ONNX model made of org/base",
    ),
}


@pytest.mark.parametrize("what", MADE)
def test_a_card_says_what_it_is_of_and_how_to_make_it_again(what: str, here: Path) -> None:
    words, wanted, title = MADE[what]
    main([words[0], *words[1:], "-o", "out"], standalone_mode=False)
    found = card("out")
    said = found.data.to_dict()
    assert {key: said.get(key) for key in wanted} == wanted
    assert model_card.TAG in said["tags"]
    assert found.text.split("\n")[1] == f"# {title}"
    assert "# The base" not in found.text
    assert str(here) not in str(found)
    assert "size: " in found.text
    line = next(line for line in found.text.splitlines() if line.startswith("    loratools "))
    _again(line, words)
    assert iotools.tree(Path("out")) == iotools.tree(Path("again"))


def _again(line: str, words: list[str]) -> None:
    """Type what a card says, with what was given in the place of its placeholders."""
    places = iter([word for word in words[1:] if Path(word.partition("=")[0]).exists()])
    weights = {"ADAPTER", "BASE", "TUNED", "CHECKPOINT"}
    typed = [
        next(places) if word.partition("=")[0] in weights else word.replace("OUT", "again")
        for word in shlex.split(line)[1:]
    ]
    typed += iotools.EXPORT if typed[0] == "export" else []
    main(typed, standalone_mode=False)


def test_the_same_input_gives_the_same_card_wherever_it_lies(here: Path, tmp_path: Path) -> None:
    lora_tools.extract("base", "tuned", "one", rank=1, base_name="org/b", jobs=1)
    lora_tools.extract(here / "base", here / "tuned", tmp_path / "b", rank=1, base_name="org/b")
    assert iotools.tree(Path("one")) == iotools.tree(tmp_path / "b")


def test_no_card_leaves_none_and_nobody_elses(here: Path) -> None:
    lora_tools.merge("base", "ad", "merged", no_card=True)
    lora_tools.extract("base", "tuned", "adapter", rank=1, no_card=True)
    assert not list(here.glob("[ma]*d*/README.md"))
    (here / "base" / "README.md").unlink()
    lora_tools.merge("base", "ad", "again", no_card=True)
    assert iotools.tree(here / "merged") == iotools.tree(here / "again")


def test_a_file_has_no_card_and_neither_has_a_folder_that_graphs_are_added_to(here: Path) -> None:
    lora_tools.convert("ad", "ad.safetensors", to="diffusers", base="base", layout=())
    lora_tools.merge("base/model.safetensors", "ad", "m.safetensors")
    assert not Path("README.md").exists()
    lora_tools.export("base", "base", graph="graph", task="features", no_verify=True)
    assert Path("base/README.md").read_text() == CARD


def test_a_failed_gate_leaves_nothing(here: Path) -> None:
    with pytest.raises(QualityGateError):
        lora_tools.quantize("base", "out", max_error=1e-6)
    assert not Path("out").exists()


# ----------------------------------------------------------------------------- the licence


@pytest.mark.parametrize("theirs", ["license: mit", "license: apache-2.0", "tags: [x]", ""])
def test_a_licence_is_handed_on_where_no_other_card_contradicts(theirs: str, here: Path) -> None:
    Path("ad/README.md").write_text(f"---\n{theirs}\n---\n")
    lora_tools.merge("base", "ad", "out")
    assert head("out").get("license") == (None if "mit" in theirs else "apache-2.0")
    assert head("out")["language"] == "en"


def test_an_adapter_has_the_licence_of_what_it_is_made_of_and_not_of_the_base(here: Path) -> None:
    lora_tools.extract("base", "tuned", "first", rank=1)
    assert "license" not in head("first")
    Path("tuned/README.md").write_text(CARD)
    lora_tools.extract("base", "tuned", "second", rank=1)
    assert head("second")["license"] == "apache-2.0"
    lora_tools.rescale("second", "third", alpha=2)
    assert head("third")["license"] == "apache-2.0"


ODD = {
    "no YAML": b"---\nlicense: [\n---\n",
    "a list": b"---\n- license\n---\n",
    "other types": b"---\nlicense: 3\ntags: loratools\nlanguage: no\n---\n",
    "no text": b"---\nlicense: \xff\xfe loratools\n---\n",
    "a line that ends the head": b'---\nlicense: "mit\\n---\\n# Not mine"\n---\n',
    "nested": b"---\nx: " + b"[" * 5000 + b"\n---\n",
    "very long": b"---\nlicense: mit\n---\n" + b"loratools\n" * 200_000,
    "empty": b"",
}


@pytest.mark.parametrize("what", ODD)
def test_a_card_that_is_not_understood_is_in_nobodys_way(what: str, here: Path) -> None:
    Path("base/README.md").write_bytes(ODD[what])
    lora_tools.merge("base", "ad", "out", reversible=True)
    assert head("out") == {"tags": ["loratools", "merge"], **_known("out")}
    lora_tools.unmerge("out", "ad", "back")
    assert iotools.tree(Path("back")) == iotools.tree(Path("base"))


def _known(folder: str) -> dict[str, Any]:
    return {"library_name": "transformers", "pipeline_tag": "text-generation"}


# ----------------------------------------------------------------------------- back to the base


@pytest.mark.parametrize("no_card", [False, True])
@pytest.mark.parametrize("given", [CARD, None, "the card of a merge"])
def test_unmerge_gives_the_bases_own_card_back(
    given: str | None, no_card: bool, here: Path
) -> None:
    if given == "the card of a merge":
        lora_tools.merge("base", "ad=2", "other")
        shutil.copy("other/README.md", "base/README.md")
    elif given is None:
        Path("base/README.md").unlink()
    before = iotools.tree(Path("base"))
    lora_tools.merge("base", "ad", "merged", reversible=True, no_card=no_card)
    assert Path("merged/README.md").exists() is not no_card
    lora_tools.unmerge("merged", "ad", "back")
    assert iotools.tree(Path("back")) == before


def test_without_a_sidecar_ours_stays_behind_and_anothers_does_not(here: Path) -> None:
    lora_tools.merge("base", "ad", "merged")
    lora_tools.unmerge("merged", "ad", "back")
    assert not Path("back/README.md").exists()
    Path("merged/README.md").write_text(CARD)
    lora_tools.unmerge("merged", "ad", "again")
    assert Path("again/README.md").read_text() == CARD


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_the_card_of_a_sentence_transformers_folder(inner: str, tmp_path: Path) -> None:
    base = sentence_folder(tmp_path / "base", inner)
    (base / "README.md").write_text(CARD)
    width = {"encoder.layer.0.attention.self.query": (32, 32)}
    iotools.adapter(tmp_path / "ad", width)
    lora_tools.merge(base, tmp_path / "ad", tmp_path / "merged", reversible=True)
    found = head(tmp_path / "merged")
    assert found["library_name"] == "sentence-transformers"
    assert found["license"] == "apache-2.0"
    lora_tools.unmerge(tmp_path / "merged", tmp_path / "ad", tmp_path / "back")
    assert iotools.tree(tmp_path / "back") == iotools.tree(base)


# ----------------------------------------------------------------------------- what is ours


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("---\ntags:\n- loratools\n---\n", True),
        ("---\ntags: [lora, loratools]\n---\n", True),
        ("---\ntags:\n- loratools-like\n---\n", False),
        ("---\ntags: loratools\n---\n", False),
        ("Made with loratools.", False),
    ],
)
def test_ours_are_told_by_the_tag(text: str, ours: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert model_card.is_ours(tmp_path / "README.md") is ours


def test_an_adapter_named_by_a_path_has_no_base_model(here: Path) -> None:
    """A path such as out/base looks like an id of the hub."""
    shutil.copytree("base", "out/base")
    config = json.loads(Path("ad/adapter_config.json").read_text())
    for named, wanted in (("out/base", None), ("org/base", ["org/base"]), ("/abs/x", None)):
        text = json.dumps(config | {"base_model_name_or_path": named})
        Path("ad/adapter_config.json").write_text(text)
        lora_tools.rescale("ad", "small", rank=1, force=True)
        assert head("small").get("base_model") == wanted


# ----------------------------------------------------------------------------- inspect


def said_by_inspect(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = lora_tools.inspect(folder).totals["hub"]
    return found


def test_inspect_says_what_the_hub_will_make_of_a_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said_by_inspect("base") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": [],
        "base_model_relation": None,
        "license": "apache-2.0",
        "missing": [],
    }
    bare = said_by_inspect("ad")
    assert bare["library_name"] == "peft"
    assert bare["missing"] == ["a model card (README.md)", "license", "pipeline_tag", "base_model"]
    lora_tools.extract(BASE, "tuned", "named", rank=1)
    found = said_by_inspect("named")
    assert (found["base_model"], found["base_model_relation"]) == (["org/base"], "adapter")
    lora_tools.extract("base", "tuned", "by-path", rank=1)
    found = said_by_inspect("by-path")
    assert found["base_model"] == []
    assert any("which has a path instead (--base-name)" in each for each in found["missing"])
    capsys.readouterr()
    main(["inspect", BASE], standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "on the Hub: library transformers; task text-generation; license apache-2.0; nothing is "
        "missing"
    )
    assert "hub" not in lora_tools.inspect("base/model.safetensors").totals


def test_a_head_of_other_types_says_nothing(here: Path) -> None:
    Path("base/README.md").write_text(
        "---\nlicense: [mit]\nlibrary_name: 3\npipeline_tag: {}\nbase_model: [1, org/x]\n"
        'base_model_relation: "\\e[1m"\n---\n'
    )
    found = said_by_inspect("base")
    assert found["base_model"] == ["org/x"]
    assert (found["license"], found["base_model_relation"]) == (None, None)
    assert found["library_name"] == "transformers"
    assert found["missing"] == ["license"]


KINDS: dict[str, tuple[str | None, str | None, Callable[[Path], object]]] = {
    "diffusers": ("diffusers", None, lambda f: (f / "model_index.json").write_text("{}")),
    "sentence-transformers": (
        "sentence-transformers",
        "sentence-similarity",
        lambda f: (f / "modules.json").write_text("[]"),
    ),
    "a LoRA of diffusers": (
        "diffusers",
        None,
        lambda f: (f / "pytorch_lora_weights.safetensors").touch(),
    ),
    "no weights that transformers loads": (
        None,
        None,
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_and_the_task_that_files_tell(kind: str, tmp_path: Path) -> None:
    library, task, make = KINDS[kind]
    make(tmp_path)
    assert (model_card.library_of(tmp_path), model_card.task_of(tmp_path)) == (library, task)
