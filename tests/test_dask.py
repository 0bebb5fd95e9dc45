"""The work done by a Dask cluster: the bytes are those of threads, whatever befalls the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools import ClusterError, NonFiniteError, UsageError
from lora_tools.cli import run
from lora_tools.engine import dask as engine
from lora_tools.engine import memo, remote
from lora_tools.engine.buffers import Buffers
from lora_tools.engine.tasks import Call
from lora_tools.formats import digest, ledger, output
from lora_tools.watch.places import saying

from . import iotools
from .campaign.lines import VERBS, command, inputs, left_over

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
SETTING = remote.Setting(digest.used, digest.using)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("small"), width=32, layers=2, shards=2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two processes."""
    with engine._local(2) as place:
        yield f"dask://{place.removeprefix('tcp://')}"


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with distributed.Client(engine.address_of(address)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"export"}))
def test_the_bytes_are_those_of_threads(
    verb: str, address: str, small: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for name, rest in (("here", ()), ("there", ("--engine", address, "--digest", "xxh3"))):
        (tmp_path / name).mkdir()
        assert run(command(verb, small, tmp_path / name / "out", *rest)) == 0
        assert left_over(tmp_path / name, tmp_path / name / "out") == []
    signal.signal(signal.SIGTERM, before)
    assert iotools.tree(tmp_path / "here") == iotools.tree(tmp_path / "there")


def test_another_kind_of_digest_is_formed_there_as_well(
    address: str, small: Path, tmp_path: Path
) -> None:
    given = small / "base", [small / "adapter"]
    there = lora_tools.merge(*given, tmp_path / "there", engine=address, digest="sha256")
    here = lora_tools.merge(*given, tmp_path / "here", digest="sha256")
    assert there.totals == here.totals
    assert there.totals["output_digest"].startswith("sha256/")


@pytest.mark.slow
def test_a_cluster_of_this_machine(small: Path, tmp_path: Path) -> None:
    line = command("merge", small, tmp_path / "there", "--engine", "dask", "--workers", "1")
    done = subprocess.run(
        [sys.executable, "-m", "lora_tools", *line], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(command("merge", small, tmp_path / "here")) == 0
    assert iotools.tree(tmp_path / "here") == iotools.tree(tmp_path / "there")


@pytest.mark.slow
def test_what_a_dead_worker_had_is_done_by_another(
    address: str, client: Any, small: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(_: lora_tools.Progress) -> None:
        if not killed:
            killed.append(min(client.run(os.getpid).values()))
            os.kill(killed[0], signal.SIGKILL)

    given = small / "base", [small / "adapter"]
    lora_tools.merge(*given, tmp_path / "there", engine=address, progress=kill_one)
    assert killed
    lora_tools.merge(*given, tmp_path / "here")
    assert iotools.tree(tmp_path / "here") == iotools.tree(tmp_path / "there")
    client.wait_for_workers(2, timeout=600)


def test_a_task_that_fails_ends_the_run_with_its_name(
    address: str, small: Path, tmp_path: Path
) -> None:
    bad = iotools.checkpoint(tmp_path / "bad", iotools.weights(width=32))
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.1.q_proj.weight"
    tensors[name][0, 0] = torch.inf
    save_file(tensors, bad / "model.safetensors")
    (tmp_path / "to").mkdir()
    with pytest.raises(NonFiniteError, match=name) as caught:
        lora_tools.merge(bad, [small / "adapter"], tmp_path / "to" / "out", engine=address)
    assert caught.value.tensor == name
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("first", ["threads", "dask"])
def test_either_engine_goes_on_with_what_the_other_did(
    first: str, address: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "WORTH", 1e-9)
    (to := tmp_path / "to").mkdir()
    engines = ["threads", address] if first == "threads" else [address, "threads"]

    def merge(out: Path, **options: Any) -> lora_tools.Report:
        return lora_tools.merge(small / "base", [small / "adapter"], out, **options)

    with monkeypatch.context() as patch:
        patch.setattr(output._Staging, "commit", lambda *_: os.close(1 << 20))
        with contextlib.suppress(OSError):
            merge(to / "out", engine=engines[0])
    assert len(left_over(to, to / "out")) == 1
    report = merge(to / "out", engine=engines[1], resume=True)
    found, *words = report.notes[-1].split()
    assert words[:4] == ["tasks", "were", "already", "done"]
    assert int(found) == len(iotools.weights(width=32))
    merge(tmp_path / "here")
    assert iotools.tree(to / "out") == iotools.tree(tmp_path / "here")


# ------------------------------------------------------------------------- before the work starts


def test_a_cluster_that_is_not_there(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "_PATIENCE", 0.2)
    before = time.monotonic()
    with pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:1: no Dask cluster with worker"):
        lora_tools.rescale(small / "adapter", tmp_path / "out", rank=1, engine="dask://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - before < 60


def test_a_cluster_without_workers(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "_PATIENCE", 0.2)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as here,
        pytest.raises(ClusterError, match="no Dask cluster with workers answers there"),
    ):
        lora_tools.rescale(
            small / "adapter", tmp_path / "out", rank=1, engine=f"dask://{here.scheduler_address}"
        )


def test_workers_of_another_version(address: str, small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lora_tools.verbs.writing.tool_version", lambda: "99.0")
    with pytest.raises(ClusterError, match=r"the worker tcp://.* in 0\.\d.*,.*99\.0,"):
        lora_tools.rescale(small / "adapter", tmp_path / "out", rank=1, engine=address)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_workers_do_not_see(address: str, client: Any) -> None:
    found = engine.Cluster(client, SETTING)
    found.check_sees([Path(__file__)])
    with pytest.raises(ClusterError, match=r"does not see /nowhere; inputs and output must lie"):
        found.check_sees([Path(__file__), Path("/nowhere")])


def test_what_stands_for_an_address_must_be_seen_too(address: str, client: Any) -> None:
    found = engine.Cluster(client, SETTING)
    with (
        saying(lambda text: text.replace("/nowhere", "s3://bucket")),
        pytest.raises(ClusterError, match=r"does not see s3://bucket/base; its small .* TMPDIR"),
    ):
        found.check_sees([Path("/nowhere/base")])


def test_a_worker_is_asked_without_the_package() -> None:
    """Where it is missing no function of it can be unpickled."""
    cloudpickle = pytest.importorskip("cloudpickle")
    sent: list[bytes] = []

    class Client:
        def run(self, question: Any, *args: Any) -> dict[str, Any]:
            sent.append(cloudpickle.dumps((question, args)))
            return {}

    asked = engine.Cluster(Client(), SETTING)
    asked.check(["1", "2"])
    asked.check_sees([Path("/nowhere")])
    code = "import sys, pickle; sys.modules['lora_tools'] = None\n" + "".join(
        f"f, args = pickle.loads({each!r}); print(f(*args))\n" for each in sent
    )
    code = "import importlib.metadata as m; m.distributions = lambda: []\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert done.splitlines() == ["['none', 'none']", "['/nowhere']"]


def test_what_is_asked_for_must_make_sense(small: Path, tmp_path: Path) -> None:
    def rescale(**options: Any) -> None:
        lora_tools.rescale(small / "adapter", tmp_path / "out", rank=1, **options)

    with pytest.raises(UsageError, match="has its own workers; leave"):
        rescale(engine="dask://127.0.0.1:1", workers=2)
    with pytest.raises(UsageError, match="needs engine dask"):
        rescale(workers=2)
    for wrong in ("ray", "dask://", "daskx", "dask:8786", ""):
        with pytest.raises(UsageError, match=r"threads, dask or dask://HOST:PORT is needed"):
            rescale(engine=wrong)
    assert list(tmp_path.iterdir()) == []


def test_where_the_scheduler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.address_of("dask") == ""
    assert engine.address_of("dask://a:1") == "tcp://a:1"
    assert engine.address_of("dask://tls://a:1") == "tls://a:1"
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://b:2")
    assert engine.address_of("dask") == "tcp://b:2"
    assert engine.address_of("dask://a:1") == "tcp://a:1"


def test_what_a_worker_does_here() -> None:
    """The part that runs elsewhere, which no test here sees there."""
    with digest.using("sha256"):
        shared = remote.pack((2,), None, SETTING)
    sent = [pickle.dumps(Call(divmod, (number,), "a number")) for number in (7, 8)]
    done = pickle.loads(remote.do(shared, sent))
    assert all(isinstance(each, memo.Done) for each in done)
    assert [each.result for each in done] == [(3, 1), (4, 0)]


@dataclasses.dataclass(frozen=True)
class Asking:
    """A task whose result is what the first of its run has found."""

    label = "asking"
    nbytes = 1

    def run(self, sources: float, _: None, buffers: Buffers) -> float:
        return buffers.once("found", lambda: sources)


def test_what_one_run_found_is_not_another_runs() -> None:
    """A worker of a cluster that stays serves one command after the other."""
    for number in (1.0, 2.0):
        shared = remote.pack(number, None, SETTING)
        [done] = pickle.loads(remote.do(shared, [pickle.dumps(Asking())]))
        assert done.result == number


def test_small_tasks_go_together_and_large_ones_alone() -> None:
    def counts(sizes: list[int], threads: int = 2) -> list[int]:
        tasks = [Call(divmod, (), str(i), nbytes) for i, nbytes in enumerate(sizes)]
        sent = list(engine._batches(tasks, threads))
        assert [task for batch in sent for task in batch] == tasks
        return [len(batch) for batch in sent]

    assert counts([1] * 20) == [1] * 20, "so few that each of the threads has several"
    assert counts([1] * 5000) == [64] * 78 + [8]
    assert counts([1] * 5000, threads=100) == [6] * 833 + [2]
    assert counts([100 << 20] * 20 + [1] * 300) == [1] * 19 + [20] * 15 + [1]
    assert counts([1 << 20] * 64) == [4] * 16, "and as much of it"


def test_what_is_small_and_fails_has_its_own_name(
    address: str, small: Path, tmp_path: Path
) -> None:
    """Though it is sent with others."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(4, 4) for i in range(200)}
    name = "model.layers.101.mlp.up_proj.weight"
    (tmp_path / "to").mkdir()
    save_file(tensors, tmp_path / "good.safetensors")
    out = tmp_path / "to" / "out.safetensors"
    lora_tools.merge(tmp_path / "good.safetensors", [], out, dtype="float16", engine=address)
    assert len(load_file(out)) == len(tensors)
    save_file({**tensors, name: tensors[name] * 1e30}, tmp_path / "bad.safetensors")
    with pytest.raises(NonFiniteError, match=name):
        lora_tools.merge(
            *(tmp_path / "bad.safetensors", [], tmp_path / "to" / "other.safetensors"),
            dtype="float16",
            engine=address,
        )
    assert [*(tmp_path / "to").iterdir()] == [out]
