"""Tensors collected in a scratch file until the shapes of all are known."""

from __future__ import annotations

import dataclasses
import os
import secrets
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tools.formats.safetensors_writer import SafetensorsWriter, write_all
from lora_tools.records import TensorSpec

_STEP = 1 << 20  # bytes that are copied in one go


class SafetensorsSpool:
    """Collects tensors whose shapes are known only once computed, then writes them sorted by name.

    What is added goes to an unlinked scratch file in the destination's folder, never to memory, and
    ``finish`` copies it behind a header. The result depends on the tensors alone, not on the order
    in which they were added.

    Args:
        shared: give the scratch file a name until it is closed, so that other processes can read
            what was added: ``pickle`` sends that name and where everything lies.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        path = folder / (f".spool-{secrets.token_hex(4)}" if shared else ".spool")
        self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._path: Path | None = path
        if not shared:
            path.unlink()
            self._path = None
        self._end = 0
        self._at: dict[str, tuple[TensorSpec, int]] = {}

    def _open(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._finalizer = weakref.finalize(self, os.close, self._fd)

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            raise TypeError("a scratch file without a name cannot be read by another process")
        return {"path": self._path.absolute(), "at": dict(self._at)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path, self._at = None, state["at"]  # the name is its maker's to remove
        self._open(state["path"], os.O_RDONLY)

    def memo_key(self) -> dict[str, tuple[TensorSpec, int]]:
        """What was added: what its bytes are follows from the tasks that made them."""
        return self._at

    def add(self, spec: TensorSpec, data: memoryview, replace: bool = False) -> None:
        """Append one tensor's bytes. Not for use from several threads."""
        assert data.nbytes == spec.nbytes
        assert replace or spec.name not in self._at
        write_all(self._fd, data, self._end)
        self._at[spec.name] = (spec, self._end)
        self._end += data.nbytes

    def rename(self, name: str, new: str) -> None:
        """Give what was added under one name another."""
        assert new not in self._at
        spec, position = self._at.pop(name)
        self._at[new] = (dataclasses.replace(spec, name=new), position)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What was added, sorted by name."""
        return tuple(self._at[name][0] for name in sorted(self._at))

    def read(self, name: str) -> tuple[TensorSpec, bytearray]:
        """A tensor that was added, and its bytes; from any thread."""
        spec, start = self._at[name]
        data = bytearray(spec.nbytes)
        view, position = memoryview(data), 0
        while position < spec.nbytes:
            position += os.preadv(self._fd, [view[position:]], start + position)
        return spec, data

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor that was added."""
        return self._at[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def finish(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the file, synced, and drop the scratch space."""
        with SafetensorsWriter(path, self.specs, metadata) as writer:
            for spec in self.specs:
                position = self._at[spec.name][1]
                for step in range(0, spec.nbytes, _STEP):
                    size = min(_STEP, spec.nbytes - step)
                    chunk = os.pread(self._fd, size, position + step)
                    writer.write(spec.name, memoryview(chunk), step)
        self.close()

    def close(self) -> None:
        """Drop the scratch space."""
        self._fd = -1
        self._finalizer()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
