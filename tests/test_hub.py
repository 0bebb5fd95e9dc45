"""Ids of the hub, and what is fetched: against a small server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants, utils
from safetensors.torch import save_file

import lora_tools
from lora_tools.errors import CheckpointError, UnsafeInput, UsageError
from lora_tools.formats import hub, stand_ins, variants
from lora_tools.formats.hub import HubId
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import open_weighted

from . import iotools

SHA = "1" * 40
Repositories = dict[str, dict[str, bytes]]


class _Hub(http.server.BaseHTTPRequestHandler):
    """Listings, HEAD with etag and commit, and files; ``server.refused`` answers as the hub does
    where a repository may not be read."""

    server: Any

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            at = next((i for i, p in enumerate(parts) if p in ("revision", "tree")), len(parts))
            name, revision = "/".join(parts[2:at]), (parts[at + 1 :] or ["main"])[0]
            tree = parts[at : at + 1] == ["tree"]
            status, code = self._allowed(name, revision, listing=True)
            data = self._listing(name, tree) if status == 200 else b"{}"
        elif "resolve" not in parts:  # what a version of huggingface_hub asks besides
            status, code, data = 404, "", b""
        else:
            at = parts.index("resolve")
            name, revision, file = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])
            status, code = self._allowed(name, revision, listing=False)
            data = self.server.repositories.get(name, {}).get(file, b"")
            if status == 200 and body:
                asked = self.headers.get("Range")
                self.server.fetched.append(f"{file} {asked}" if asked else file)
        size = len(data)
        if self.headers.get("Range") and self.server.no_ranges:
            status, data = 404, b""
        if status == 200 and (asked := self.headers.get("Range")):
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            status, data = 206, data[first : last + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _allowed(self, name: str, revision: str, listing: bool) -> tuple[int, str]:
        if name == "org/gated" and not listing:
            return 403, "GatedRepo"
        if name == "org/busy":
            return 429, ""
        if name not in self.server.repositories:
            return 401, "RepoNotFound"
        if revision not in ("main", "v1", SHA):
            return 404, "RevisionNotFound"
        return 200, ""

    def _listing(self, name: str, tree: bool) -> bytes:
        files = self.server.repositories[name]
        if tree:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in files.items()
            ]
            return json.dumps(entries).encode()
        said = {"id": name, "sha": SHA, "siblings": [{"rfilename": path} for path in files]}
        return json.dumps(said).encode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The hub here: ``repositories`` are what it has, ``fetched`` the files that were."""
    found: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    found.daemon_threads = True
    found.no_ranges = False
    found.repositories, found.fetched = {"org/gated": {"config.json": b"{}"}}, []
    endpoint = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def safe(folder: Path, *names: str) -> bytes:
    """A safetensors file with tensors of these names."""
    save_file({name: torch.ones(2, 2) for name in names}, folder / "made")
    return (folder / "made").read_bytes()


def test_the_index_says_which_weights_are_fetched(server: Any, tmp_path: Path) -> None:
    """And none of the copies, steps of training and files of optimizers that lie beside them."""
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "m-1.safetensors": safe(tmp_path, "a"),
        "m-2.safetensors": safe(tmp_path, "b"),
        "tokenizer.model": b"t",
        "spiece.spm": b"s",
        "qwen.tiktoken": b"q",
        "LICENSE": b"l",
    }
    others = (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model.fp16.safetensors.index.json",
        "pytorch_model.bin",
        "optimizer.pt",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/config.json",
        "original/model.safetensors",
        "tf_model.h5",
    )
    server.repositories["org/name"] = files | dict.fromkeys(others, b"x")
    checkpoint = open_checkpoint("org/name")
    assert sorted(checkpoint.specs) == ["a", "b"]
    assert set(server.fetched) == set(files)
    server.fetched.clear()
    assert sorted(open_checkpoint("org/name@v1").specs) == ["a", "b"]
    assert sorted(open_checkpoint("https://huggingface.co/org/name/tree/main").specs) == ["a", "b"]
    assert server.fetched == []  # all is in the cache


def test_what_is_fetched_is_told_and_no_bar_is_drawn(
    server: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": safe(tmp_path, "a")}
    server.repositories["org/name"] = files
    told: list[Any] = []
    utils.enable_progress_bars()
    lora_tools.merge("org/name", [], tmp_path / "m", dtype="float16", progress=told.append)
    fetched = [p for p in told if p.label == "fetch org/name"]
    assert fetched[-1].done == fetched[-1].total == sum(map(len, files.values()))
    assert [p.done for p in fetched] == sorted({p.done for p in fetched})
    assert told[-1].label != "fetch org/name"
    assert capfd.readouterr() == ("", "")
    assert not utils.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["x.safetensors", "x.fp16.safetensors"], ["x.safetensors"]),
        (["x.fp16.safetensors"], ["x.fp16.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["adapter/adapter_model.safetensors"], ["adapter/adapter_model.safetensors"]),
        (
            ["model_index.json", "unet/d.safetensors", "vae/d.safetensors", "d.safetensors"],
            ["model_index.json", "unet/d.safetensors", "vae/d.safetensors"],
        ),
        (["modules.json", "model.safetensors", "2_Dense/model.safetensors"], None),
    ],
)
def test_one_set_of_weights_is_chosen(names: list[str], fetched: list[str] | None) -> None:
    found = hub._chosen(HubId("org/name"), names, allow_pickle=True)
    assert found == sorted(names if fetched is None else fetched)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "v1-5.ckpt", "unet/m.bin", "__0_0.distcp"])
def test_pickles_are_not_fetched_unasked(name: str) -> None:
    names = [name, "config.json", "training_args.bin"]
    with pytest.raises(UnsafeInput, match=f"are pickles.*({name}).*--allow-pickle"):
        hub._chosen(HubId("org/name"), names, allow_pickle=False)
    found = hub._chosen(HubId("org/name"), names, allow_pickle=True)
    assert found == sorted(["config.json", name])


def test_files_of_gguf_are_named() -> None:
    names = ["a/m-Q4.gguf", "a/m-Q8.gguf", "a/README.md"]
    with pytest.raises(CheckpointError, match=r"such as org/name/a/m-Q4\.gguf@v1$"):
        hub._chosen(HubId("org/name", "v1", "a"), names, allow_pickle=True)
    one = HubId("org/name", None, "a/m-Q4.gguf")
    assert hub._chosen(one, names, allow_pickle=True) == ["a/m-Q4.gguf"]
    assert hub._chosen(HubId("org/name"), ["config.json"], allow_pickle=False) == ["config.json"]


def test_a_variant_is_fetched_where_there_is_one() -> None:
    stem = "unet/diffusion_pytorch_model"
    plain = [f"{stem}-00001-of-00001.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16-00001-of-00001.safetensors", f"{stem}.safetensors.index.fp16.json"]
    alone = ["vae/diffusion_pytorch_model.safetensors"]
    with variants.using("fp16"):
        found = hub._chosen(HubId("org/name"), [*plain, *half, *alone, "model_index.json"], False)
    assert found == sorted([*half, *alone, "model_index.json"])


def test_a_folder_or_a_file_of_a_repository(server: Any, tmp_path: Path) -> None:
    keys = {f"base_model.model.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(keys, tmp_path / "lora")
    said = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]})
    one = {"adapter_config.json": said.encode(), "adapter_model.safetensors": b""}
    one["adapter_model.safetensors"] = (tmp_path / "lora").read_bytes()
    both = {f"{folder}/{name}": data for folder in "ab" for name, data in one.items()}
    server.repositories["org/two"] = both | {"x.safetensors.md": b""}
    assert list(open_adapter("org/two/a").modules) == ["q"]
    assert {name.partition("/")[0] for name in server.fetched} == {"a"}
    with pytest.raises(CheckpointError, match=r"2 folders in it do: a, b; give org/two/a$"):
        open_adapter("org/two")
    with pytest.raises(CheckpointError, match="no folder or file 'c' in org/two; it holds a, b"):
        open_adapter("org/two/c")
    assert hub.fetch("org/two/b/adapter_config.json").read_bytes() == said.encode()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/none", r"the hub shows no model.*is the name right.*hf auth login"),
        ("org/name@v9", "no revision 'v9' of it; see https://huggingface.co/org/name/tree/main"),
        ("org/gated", r"gated.*ask for access at https://huggingface.co/org/gated"),
        ("org/busy", "allows no more requests"),
    ],
)
def test_what_the_hub_refuses(source: str, said: str, server: Any, tmp_path: Path) -> None:
    server.repositories["org/name"] = {"model.safetensors": safe(tmp_path, "a")}
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(source)
    assert str(caught.value).startswith(f"{source}: ")
    assert "\n" not in str(caught.value)


def test_without_a_connection_the_cache_is_used(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the repository holds more than was fetched."""
    files = {"model.safetensors": safe(tmp_path, "a"), "consolidated.safetensors": b"x"}
    server.repositories["org/name"] = files
    open_checkpoint("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list(open_checkpoint("org/name").specs) == ["a"]
    with pytest.raises(
        CheckpointError, match="org/other: no such file or folder, and not in the hub's"
    ):
        open_checkpoint("org/other")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("gpt2", HubId("gpt2")),
        ("org/name/sub/folder@v1", HubId("org/name", "v1", "sub/folder")),
        ("https://huggingface.co/org/name", HubId("org/name")),
        ("https://hf.co/org/name/", HubId("org/name")),
        ("https://huggingface.co/org/name/tree/v1/a/b", HubId("org/name", "v1", "a/b")),
        ("https://huggingface.co/org/name/blob/main/a.gguf", HubId("org/name", "main", "a.gguf")),
        ("hf://org/name", HubId("org/name")),
        ("hf://org/name@v1/sub/folder/", HubId("org/name", "v1", "sub/folder")),
        ("hf://org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("hf://name", None),
        ("hf://org/name/../other", None),
        ("https://example.com/org/name", None),
        ("model.safetensors", None),
        ("here/name", None),
        ("here/a/b", None),
        ("org/../name", None),
    ],
)
def test_ids(
    source: str, found: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path below a folder that is here has a mistake in it, and nobody is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.parse(source) == found


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_of_the_hub_by_its_address(kind: Any, server: Any, tmp_path: Path) -> None:
    """A ``Path`` of it has one slash less."""
    server.repositories["org/name"] = {"model.safetensors": safe(tmp_path, "a")}
    assert list(open_checkpoint(kind("hf://org/name")).specs) == ["a"]


@pytest.mark.parametrize(
    ("source", "shown", "how"),
    [
        ("s3://key:secret@bucket/base", "s3://bucket/base", "aws s3 cp"),
        ("gs://bucket/base", "gs://bucket/base", "gcloud storage cp"),
        ("https://host/m.safetensors?sig=secret", "https://host/m.safetensors", "curl -LO"),
        ("hf://name", "hf://name", "hf://org/name"),
    ],
)
def test_other_addresses_are_refused_without_what_is_secret(
    source: str, shown: str, how: str, tmp_path: Path
) -> None:
    for call in (open_checkpoint, open_adapter, lambda source: open_weighted([source], False)):
        with pytest.raises(CheckpointError, match=how) as caught:
            call(source)
        assert str(caught.value).startswith(f"{shown}: inputs are files and folders here")
        assert "secret" not in str(caught.value)
    if not shown.startswith("https"):
        return
    with pytest.raises(UsageError, match="upload it when it is complete") as refused:
        lora_tools.dequantize(tmp_path, source)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- dry runs


def repository(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def big(server: Any, tmp_path: Path) -> Any:
    """``org/base`` in two shards with headers above the first request, ``org/tuned``, ``org/ad``;
    the same lie in the folders ``base``, ``tuned`` and ``ad``."""
    weights = iotools.weights(width=64, layers=1)
    long = {f"model.buffers.{i:04}.{'x' * 80}": torch.zeros(1) for i in range(1000)}
    iotools.checkpoint(tmp_path / "base", weights | long, shards=2)
    iotools.checkpoint(tmp_path / "tuned", iotools.moved(weights | long))
    iotools.adapter(tmp_path / "ad", iotools.linear_shapes(weights))
    for name in ("base", "tuned", "ad"):
        server.repositories[f"org/{name}"] = repository(tmp_path / name)
    return server


def plan(report: Any) -> Any:
    """A plan, without the paths that it was asked of."""
    found = report.to_dict()
    for each in found["inputs"]:
        del each["path"]
    del found["totals"]["disk_free"]  # others write to the disk meanwhile
    return {key: found[key] for key in ("inputs", "plan", "totals", "notes", "command")}


def test_a_dry_run_fetches_no_weights(
    big: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what a dry run of the whole folders says; what was made for it is gone."""
    calls: list[Callable[[str], Any]] = [
        lambda at: lora_tools.merge(f"{at}base", f"{at}ad", "out", dry_run=True),
        lambda at: lora_tools.extract(f"{at}base", f"{at}tuned", "out", rank=2, dry_run=True),
        lambda at: lora_tools.quantize(f"{at}base", "out", dry_run=True),
    ]
    (own := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    for call in calls:
        assert plan(call("org/")) == plan(call(""))
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert not {*shards, "model.safetensors"} & set(big.fetched)
    assert "adapter_model.safetensors" in big.fetched  # is read: it is small
    ranges = [each for each in big.fetched if " " in each]
    assert {each.split()[0] for each in ranges} == {*shards, "model.safetensors"}
    assert list(own.iterdir()) == []
    assert not Path("out").exists()


def test_an_address_leaves_the_weights_where_they_are(
    big: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads each byte of them once, but for those that are in the cache."""
    monkeypatch.setattr(stand_ins, "_FIRST", 64)
    lora_tools.merge("hf://org/base", "hf://org/ad", "out")
    lora_tools.merge("base", "ad", "own")
    for path in Path("own").glob("*.safetensors"):
        assert path.read_bytes() == (Path("out") / path.name).read_bytes()
    asked = [each.split() for each in big.fetched if ".safetensors" in each.split()[0]]
    asked = [each for each in asked if not each[0].endswith(".json")]
    assert all(len(each) == 2 for each in asked), "by ranges alone"
    ends = [each[1].removeprefix("bytes=").split("-") for each in asked]
    sizes = [p.stat().st_size for name in ("base", "ad") for p in Path(name).glob("*.safetensors")]
    assert sum(int(last) - int(first) + 1 for first, last in ends) == sum(sizes)
    lora_tools.merge("org/base", "org/ad", "cached")
    big.fetched.clear()
    lora_tools.merge("hf://org/base", "hf://org/ad", "again")
    assert big.fetched == []


def test_what_is_in_the_cache_is_not_asked_for(big: Any) -> None:
    lora_tools.merge("org/base", "org/ad", "out")
    big.fetched.clear()
    lora_tools.merge("org/base", "org/ad", "again", dry_run=True)
    assert big.fetched == []


def test_a_tensor_that_a_plan_reads_is_read_where_it_is(big: Any, tmp_path: Path) -> None:
    """The states of four-bit weights are tensors."""
    lora_tools.quantize("tuned", "four")
    big.repositories["org/four"] = repository(tmp_path / "four")
    found = plan(lora_tools.dequantize("org/four", "out", dry_run=True))
    assert found == plan(lora_tools.dequantize("four", "out", dry_run=True))
    assert "model.safetensors" not in big.fetched
    assert len([each for each in big.fetched if each.startswith("model.safetensors ")]) > 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "safetensors"),
        (b"\xff" * 8 + b"{}", "it is truncated or not safetensors"),
        (
            iotools.container({"a": iotools.entry()}, bytes(4)),
            "it may be truncated: download it again",
        ),
    ],
)
def test_a_header_that_is_none(data: bytes, said: str, big: Any) -> None:
    big.repositories["org/tuned"]["model.safetensors"] = data
    with pytest.raises(CheckpointError, match=said):
        lora_tools.merge("org/tuned", "ad", "out", dry_run=True)


def test_a_header_that_is_not_given(big: Any) -> None:
    big.no_ranges = True
    with pytest.raises(CheckpointError, match="cannot be read by ranges"):
        lora_tools.merge("org/tuned", "ad", "out", dry_run=True)
