"""Safetensors files of the hub of which a plan reads the headers: stand-ins for what stays there.

A stand-in has the file's own header and its size, and a hole for the tensors. It lies in a folder
that is laid out as the hub's cache is, beside copies of the small files, and is gone once the call
is over. A tensor that is asked for all the same, such as the state of a quantized weight, is read
by a range request, as ``huggingface_hub.get_safetensors_metadata`` reads headers.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_tools.errors import CheckpointError
from lora_tools.formats.safetensors_file import MAX_HEADER, SafetensorsFile
from lora_tools.within import holding

_FIRST = 100_000  # bytes, in which most headers are
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


@dataclasses.dataclass(frozen=True)
class Remote:
    """One file of a repository at a commit."""

    repository: str
    name: str
    revision: str

    def read(self, begin: int, end: int) -> tuple[bytes, int]:
        """Its bytes [begin, end), as far as it has them, and its size. Raises CheckpointError."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, self.name, revision=self.revision)
        asked = {**build_hf_headers(), "range": f"bytes={begin}-{end - 1}"}
        try:
            response = get_session().get(url, headers=asked)
            hf_raise_for_status(response)
        except Exception as error:  # of requests or httpx, by huggingface_hub's version
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{self.repository}/{self.name}: its header cannot be read ({said}); fetch it "
                f"first with `hf download {self.repository}`"
            ) from None
        data: bytes = response.content
        total = _TOTAL.fullmatch(response.headers.get("content-range", ""))
        if total is None:  # all of it, whatever was asked for
            return data[begin:end], len(data)
        return data, int(total[1])


class StandIn(SafetensorsFile):
    """A stand-in, opened: its tensors are read where the file is."""

    def __init__(self, path: Path, remote: Remote) -> None:
        super().__init__(path)
        self._remote = remote

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, fetched."""
        begin, end = self.extent(name)
        data = self._remote.read(begin, end)[0] if end > begin else b""
        if len(data) != end - begin:
            raise CheckpointError(f"{self.path}: {name}: the hub gave {len(data)} of its bytes")
        return memoryview(bytearray(data))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """There is nothing to give back."""


class StandIns:
    """Those of one call. Their folder is made once there are some."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        self._held = held
        self._remotes: dict[Path, Remote] = {}

    @functools.cached_property
    def _folder(self) -> Path:
        return Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="loratools-")))

    def open(self, path: Path) -> SafetensorsFile | None:
        """The file at a path, where it is a stand-in."""
        remote = self._remotes.get(path.absolute())
        return StandIn(path, remote) if remote is not None else None

    def snapshot(
        self, cached: Path, repository: str, small: Sequence[str], weights: Sequence[str]
    ) -> Path:
        """A snapshot as ``cached``, one of the hub's cache, with stand-ins for ``weights``.

        Raises:
            CheckpointError: the hub does not give their headers.
        """
        home = self._folder / cached.parent.parent.name
        made = home / "snapshots" / cached.name
        main = cached.parent.parent / "refs" / "main"
        if main.is_file():
            (home / "refs").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(main, home / "refs" / "main")
        made.mkdir(parents=True, exist_ok=True)
        for name in small:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached / name, made / name)
        for name in weights:
            place = (made / name).absolute()
            if place in self._remotes:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            remote = Remote(repository, name, cached.name)
            data, size = _header(remote)
            with place.open("wb") as file:
                file.write(data)
                file.truncate(size)
            self._remotes[place] = remote
        return made


def _header(remote: Remote) -> tuple[bytes, int]:
    """The beginning of a file up to the end of its header, and its size. What it says is not looked
    at here."""
    data, size = remote.read(0, _FIRST)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= min(size, 8 + MAX_HEADER):
        data += remote.read(len(data), end)[0]
    return data[:end], size


_current: contextvars.ContextVar[StandIns | None] = contextvars.ContextVar("_current", default=None)


@contextlib.contextmanager
def headers_only() -> Iterator[None]:
    """Within, checkpoints of the hub are opened by their headers, as far as they are not here."""
    with contextlib.ExitStack() as held, holding(_current, StandIns(held)):
        yield


def stand_ins() -> StandIns | None:
    """Those of this call; None where weights are to be read."""
    return _current.get()
