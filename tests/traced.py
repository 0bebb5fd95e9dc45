"""Checkpoints with their graphs, each traced once, however many workers and tests use it: tracing
takes seconds."""

from __future__ import annotations

import fcntl
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_tools

from . import export_models, models
from .traces import remembered


@dataclass(frozen=True)
class Traced:
    """A checkpoint, the folder that it was exported to, and the ``export``'s report. Not to be
    written to."""

    base: Path
    graph: Path
    report: dict[str, Any]


def session(file: Path) -> Any:
    """The graph in ONNX Runtime, which by default has a thread on every processor that waits for
    work without a pause."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options)


def traced(name: str, root: Path) -> Traced:
    """The model of ``export_models`` or the kind of ``models`` with that name, exported
    below ``root``, which all workers share; by the first of them that asks."""
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with remembered(root.parent / "traces"):
                _make(name, root / f"{name}.part").rename(folder)
    return Traced(folder / "base", folder / "graph", json.loads((folder / "report").read_text()))


def _make(name: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
    folder.mkdir()
    if name in export_models.ALL:
        export_models.make(name, folder / "base")
    else:
        models.save(models.make(name), folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export
        report = lora_tools.export(folder / "base", folder / "graph", atol=1e-5)
    (folder / "report").write_text(json.dumps(report.to_dict()))
    return folder
