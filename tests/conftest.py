"""What the tests share: no network, one torch thread, and graphs that take long to trace."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # some hundred processes would compile the package

import functools
import gc
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from lora_tools.engine import memo
from lora_tools.errors import LoraToolsError
from lora_tools.verbs import frame
from lora_tools.verbs.row import Verb

from . import unsynced
from .refusals import foreign_options

if TYPE_CHECKING:
    from .traced import Traced

# The same examples in every run, so that none fails by chance; by chance with
# --hypothesis-profile=random.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="sweeps whole, not the part that CI runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is a sweep, one in so many of its cases, the same ones each time. A case's own
    mark is heard rather than its test's."""
    if config.getoption("--full"):
        return
    sweeps: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if marks := [mark for mark in item.own_markers if mark.name == "sweep"]:
            part = marks[-1].args[0]  # those of a case come after those of its test
            sweeps.setdefault((item.nodeid.split("[")[0], part), []).append(item)
    left = set()
    for (name, part), cases in sweeps.items():
        count = math.ceil(len(cases) / part) if part else 0
        chosen = random.Random(name).sample(cases, count)
        left |= set(cases) - set(chosen)
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether sweeps run whole."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_disk_is_waited_for() -> Iterator[None]:
    """Nor is one by the runs of ``forks``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", unsynced.fsync)
        yield


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage() -> Iterator[None]:
    """What was imported stays: the collector, which torch.onnx calls at every trace, need not walk
    the libraries' objects again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _next_steps_are_there() -> Iterator[None]:
    """Whatever any test makes a verb refuse: an option that the words name is one of that verb."""
    own = frame._work

    def work(row: Verb, *args: Any) -> Any:
        try:
            return own(row, *args)
        except LoraToolsError as error:
            if unknown := foreign_options(str(error), row):
                pytest.fail(f"{row.command} has no {', '.join(unknown)}: {error}")
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "_work", work)
        yield


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    """By an architecture's name: its checkpoint and graph, traced once in the whole session."""
    from .traced import traced

    folder = _shared(tmp_path_factory) / "traced"
    folder.mkdir(exist_ok=True)
    return functools.cache(functools.partial(traced, root=Path(folder)))


@pytest.fixture(scope="module")
def remembered_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """From the first test of a file that asks for it on, no model is traced anew that a test has
    traced before."""
    from .traces import remembered

    with remembered(_shared(tmp_path_factory) / "traces"):
        yield


def _shared(factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers share."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the tasks that are done."""
    done: list[str] = []
    real = memo.do

    def do(task: Any, *rest: Any) -> memo.Done:
        done.append(task.label)
        return real(task, *rest)

    monkeypatch.setattr(memo, "do", do)
    return done
