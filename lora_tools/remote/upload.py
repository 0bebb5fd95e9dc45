"""What was made here is put where an address says: complete, or without what makes it loadable.

The files of weights come first, then the small ones, then the configs, and the index last: a loader
finds nothing before all is there. Each object of a store appears whole or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_tools.errors import OutputError, UsageError
from lora_tools.remote import urls
from lora_tools.remote.source import tries
from lora_tools.remote.stores import opened, said_of_error, store_of

_CONFIGS = ("config.json", "adapter_config.json", "modules.json", "model_index.json")
_BESIDE = ".sidecar"


class Destination:
    """Where an address leads.

    Raises:
        UsageError: nothing is written there.
        NotInstalled: a package is missing for it.
    """

    def __init__(self, address: str) -> None:
        self.address, self.shown = address.rstrip("/"), urls.shown(address).rstrip("/")
        store = store_of(address)
        if store is None or not store.is_written:
            raise UsageError(
                f"--out {self.shown}: cannot write to such an address; name a local folder, and "
                f"upload it when it is complete ({urls.uploader(address)})"
            )
        self._put = store.put
        self._system, self._path = opened(self.address)
        if "/" not in self._path.strip("/"):
            raise UsageError(f"--out {self.shown}: is a bucket; name something new inside it")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self._path.rpartition("/")[2]

    def check(self, force: bool) -> None:
        """Raises OutputError where something is there, and not to be replaced, or the store cannot
        be asked."""
        try:
            is_there = any(map(self._system.exists, (self._path, self._path + _BESIDE)))
        except Exception as error:  # of whichever library asks
            raise OutputError(f"{self.shown}: {said_of_error(error, self.address)}") from None
        if is_there and not force:
            raise OutputError(f"{self.shown} already exists; choose another output or pass --force")

    def put(self, made: Path, done: Callable[[int, str], None]) -> None:
        """Upload a file or folder and all that lies beside it, such as a sidecar.

        Args:
            done: told the bytes of each file that was uploaded, and its name.

        Raises:
            OutputError: not all of it could be; what would make it loadable is not there.
        """
        home = self._path.rpartition("/")[0]
        files = sorted(path for path in made.parent.rglob("*") if path.is_file())
        names = {path: f"{home}/{path.relative_to(made.parent).as_posix()}" for path in files}
        old = self._old()
        for name in sorted((p for p in old if _turn(p)), key=_turn, reverse=True):
            self._try(self._system.rm_file, name)
        ordered = sorted(files, key=lambda path: (_turn(path.name), names[path]))
        stale = sorted(name for name in old - {*names.values()} if not _turn(name))

        def put(paths: Iterable[Path]) -> None:
            for path in paths:
                self._put_file(path, names[path])
                done(path.stat().st_size, path.name)

        put(path for path in ordered if not _turn(path.name))
        for name in stale:  # gone before something can be loaded with it
            self._try(self._system.rm_file, name)
        put(path for path in ordered if _turn(path.name))

    def _put_file(self, path: Path, name: str) -> None:
        self._try(functools.partial(self._system.put_file, **self._put), str(path), name)
        size, there = path.stat().st_size, self._try(self._system.info, name)["size"]
        if size != there:
            raise OutputError(
                f"{self.shown}: {path.name} has {there:,} bytes there, but {size:,} here"
            )

    def _old(self) -> set[str]:
        """What lies there, and is replaced."""
        places = self._path, self._path + _BESIDE
        there = [path for path in places if self._try(self._system.exists, path)]
        return {each for path in there for each in self._try(self._system.find, path)}

    def _try(self, call: Callable[..., Any], *args: Any) -> Any:
        """A request, and a few more where it fails. Raises OutputError."""
        said = ""
        for _ in tries():
            try:
                return call(*args)
            except Exception as error:  # noqa: PERF203 - of whichever library asks
                said = said_of_error(error, self.address)
                if isinstance(error, PermissionError):
                    break
        raise OutputError(f"{self.shown}: not uploaded ({said})")


def _turn(name: str) -> int:
    """When a file is uploaded: what makes others loadable comes after them."""
    last = name.rpartition("/")[2]
    return 2 if last.endswith(".index.json") else 1 if last in _CONFIGS else 0
