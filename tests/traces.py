"""Graphs that are traced once and given again, in this process or another, where what is tested is
what is done with a graph.

A trace follows from the config, the names and shapes of the tensors, the task and the options (a
test of the export holds that another process gives the same bytes), and takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "TRACES"  # the variable that names it to the runs of ``forks``


@contextlib.contextmanager
def remembered(folder: Path) -> Iterator[None]:
    """Have ``export`` look for a trace below the folder, and keep there what it traces. The runs of
    ``forks`` that start meanwhile do the same."""
    from lora_tools.onnx import trace

    own = trace.trace
    if getattr(own, "folder", None) == folder:
        yield  # already so
        return
    folder.mkdir(exist_ok=True)

    def look(base: Path, stored: Any, task: Any, **options: Any) -> Any:
        if options.get("trust_remote_code"):
            return own(base, stored, task, **options)
        # torch sees no weights, so none of how they are stored; what is computed in is an option.
        config = json.loads((base / "config.json").read_text())
        for stored_as in ("quantization_config", "dtype"):
            config.pop(stored_as, None)
        shapes = sorted((name, *spec.shape) for name, spec in stored.items())
        key = repr((sorted(config.items()), shapes, task, sorted(options.items())))
        file = folder / hashlib.sha256(key.encode()).hexdigest()
        with Path(f"{file}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                part = Path(f"{file}.part")
                part.write_bytes(pickle.dumps(own(base, stored, task, **options)))
                part.rename(file)
        return pickle.loads(file.read_bytes())

    look.folder = folder  # type: ignore[attr-defined]
    before = os.environ.get(FOLDER)
    trace.trace = look
    os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        trace.trace = own
        if before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = before
