"""Stand-ins for safetensors files that stay where they are: on the hub, in a store, on a server.

A stand-in holds the file's own header and nothing of its tensors, so that nothing but ``StandIn``
takes it for the file. It lies in a folder that is laid out as the one it stands for (that of a
repository as the hub's cache is), beside copies of the small files, and is gone once the call is
over. Tensors are read by ranges, when they are asked for and shortly before.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats.regular_files import MOST, open_file
from lora_tools.formats.reopen import Stamp
from lora_tools.formats.safetensors_file import MAX_HEADER, SafetensorsFile, strict_json
from lora_tools.formats.shards import is_plain_name
from lora_tools.formats.tensor_file import WEIGHT_SUFFIXES
from lora_tools.remote import stores, urls
from lora_tools.remote.ahead import Ahead, Room, pool
from lora_tools.remote.hub_file import HubFile
from lora_tools.remote.source import Source
from lora_tools.watch import places
from lora_tools.watch.files import note
from lora_tools.within import holding

_FIRST = 100_000  # bytes, in which most headers are
_SUFFIX = ".safetensors"
OF_RUNS = r"checkpoint-\d+|global_step\d+|runs|wandb"  # folders of training
_IS_OF_RUNS = re.compile(OF_RUNS).fullmatch


class StandIn(SafetensorsFile):
    """A stand-in, opened: its tensors are read where the file is.

    Args:
        room: what the files of a call have in common, see ``Ahead``.
    """

    def __init__(self, path: Path, source: Source, room: Room | None = None) -> None:
        self.path, self.source, self._room = path, source, room
        try:
            with open_file(path) as file:
                self.stamp = Stamp.of(file.fileno())
                self._read_header(file, source.size or 0)
        except CheckpointError as error:
            raise self._of_this(error) from None

    @functools.cached_property
    def ahead(self) -> Ahead:
        """Its tensors, on their way."""
        return Ahead(self.source, {name: self.extent(name) for name in self.specs}, self._room)

    def __reduce__(self) -> tuple[Callable[..., StandIn], tuple[Any, ...]]:
        return StandIn, (self.path.absolute(), self.source)

    def memo_key(self) -> tuple[str, int | None, str]:
        """Of what it stands for."""
        return self.source.shown, self.source.size, self.source.tag

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, fetched."""
        self.extent(name)
        if not self.source.tells:
            note(self.source)
        return self.ahead.get(name)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """It may be read again, and is let go by what comes after it."""


class StandIns:
    """Those of one call. Their folder is made once there are some.

    Attributes:
        is_plan: whether headers will do for all that is on the hub.
        folders: what is here (single files, too), by where it lies: the address that it stands for,
            as it is shown.
    """

    def __init__(self, held: contextlib.ExitStack, is_plan: bool) -> None:
        self._held, self.is_plan, self._room = held, is_plan, Room(is_ahead=not is_plan)
        self.folders = dict(places.files())
        self.given: dict[str, str] = {}  # addresses as they were given, and as they are shown
        self._sources: dict[Path, Source] = {}
        self._found: dict[str, Path] = {}

    @functools.cached_property
    def _folder(self) -> Path:
        made = tempfile.TemporaryDirectory(prefix="loratools-")
        return Path(os.path.realpath(self._held.enter_context(made)))

    def open(self, path: Path) -> SafetensorsFile | None:
        """The file at a path, where it is a stand-in."""
        source = self._sources.get(path.absolute())
        if source is None:
            return None
        file = StandIn(path, source, self._room)
        self._held.callback(file.ahead.close)
        return file

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
        self.folders[made] = f"hf://{repository}@{cached.name}"
        self._stand(made, {name: HubFile(repository, name, cached.name) for name in weights})
        return made

    def at(self, address: str) -> Path:
        """The folder or file here that stands for what lies at an address of a store.

        Raises:
            CheckpointError: nothing that is read is there, or it cannot be reached.
        """
        if address in self._found:
            return self._found[address]
        is_folder, held = stores.found(address, _shards)
        shown, there = urls.shown(address), _of_the_model(held)
        _refuse_others(address, there)
        last = shown.rstrip("/").rpartition("/")[2]
        home = self._folder / str(len(self._found)) / (last if is_folder else "file")
        home.mkdir(parents=True)
        path = home if is_folder else home / last
        # A file's own folder holds what is read beside it.
        self.folders[home] = shown if is_folder else shown.rpartition("/")[0]
        self.given |= {address: shown, str(Path(address)): shown}
        weights = {name: each for name, each in there.items() if name.endswith(_SUFFIX)}
        self._stand(home, weights)
        others = [name for name in there if name not in weights]
        list(pool().map(_copy, [home / n for n in others], [there[n] for n in others]))
        self._found[address] = path
        return path

    def _stand(self, home: Path, weights: Mapping[str, Source]) -> None:
        """Have stand-ins for files in a folder."""
        places = {(home / name).absolute(): source for name, source in weights.items()}
        new = {place: source for place, source in places.items() if place not in self._sources}
        for place, data in zip(new, pool().map(_header, new.values()), strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            _stamp(place, new[place].tag)
            self._sources[place] = new[place]

    def holds(self, folder: Path) -> bool:
        """Whether files in a folder are stand-ins."""
        return any(folder.absolute() in place.parents for place in self._sources)

    def said(self, text: str) -> str:
        """A text that names addresses as they are shown, where it names folders here, and addresses
        as they were given."""
        for folder, shown in self.folders.items():
            text = text.replace(str(folder), shown)
        for given, shown in self.given.items():
            text = text.replace(given, shown)
        return text


def _header(source: Source) -> bytes:
    """The beginning of a file up to the end of its header. What it says is not looked at here."""
    source.pin()
    most = _FIRST if source.size is None else min(_FIRST, source.size)
    data = source.read(0, most) if most else b""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= min(source.size or 0, 8 + MAX_HEADER):
        data += source.read(len(data), end)
    return data[:end]


def _shards(index: bytes) -> list[str]:
    """The files beside it that an index names; what else is wrong with it, its reader says."""
    try:
        said = strict_json(index)
    except CheckpointError:
        return []
    names = said.get("weight_map") if isinstance(said, dict) else None
    files = names.values() if isinstance(names, dict) else ()
    return sorted({name for name in files if isinstance(name, str) and is_plain_name(name)})


def _of_the_model(held: Mapping[str, stores.Stored]) -> dict[str, stores.Stored]:
    """The files of a folder without hidden ones, and without those of training runs where it holds
    weights itself. Raises UnsafeInput for a name that is none of a file below it."""
    for name, each in held.items():
        if not all(is_plain_name(part) for part in name.split("/")):
            raise UnsafeInput(f"{each.shown}: {name!r} is not the name of a file")
    is_whole = any(name.endswith(_SUFFIX) and "/" not in name for name in held)
    return {
        name: each
        for name, each in held.items()
        if not any(part.startswith(".") for part in name.split("/"))
        and not (is_whole and any(map(_IS_OF_RUNS, name.split("/")[:-1])))
    }


def _refuse_others(address: str, there: Mapping[str, stores.Stored]) -> None:
    """Raises CheckpointError where not all that would be read is safetensors and small files."""
    shown = urls.shown(address)
    how = f"download it first ({urls.fetcher(address)}), and give the local path"
    if not any(name.endswith(_SUFFIX) for name in there):
        others = [name for name in there if _is_weights(name)]
        said = f"this has other files ({', '.join(others[:4])})" if others else "there are none"
        raise CheckpointError(
            f"{shown}: only safetensors can be read by address, and {said}; {how}"
        )
    for name, each in there.items():
        size = each.size or 0
        if not _is_weights(name) and size > MOST:
            raise CheckpointError(
                f"{shown}/{name}: {size:,} bytes, though it holds no weights (at most {MOST:,} are "
                f"copied); {how}"
            )


def _is_weights(name: str) -> bool:
    return Path(name).suffix in WEIGHT_SUFFIXES


def _copy(place: Path, source: Source) -> None:
    """A small file. Weights that are not read have none of their bytes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    size = source.size or 0
    place.write_bytes(source.read(0, size) if size and not _is_weights(place.name) else b"")
    _stamp(place, source.tag)


def _stamp(place: Path, tag: str) -> None:
    """Have a file be as new as its tag says: another tag is another time."""
    when = xxhash.xxh3_64_intdigest(tag.encode()) >> 4  # a time that any file system has
    os.utime(place, ns=(when, when))


def refuse_loading(folder: Path) -> None:
    """Raises CheckpointError where files of a folder are stand-ins, and another program is to load
    them, which takes the files themselves."""
    made = stand_ins()
    if made is not None and made.holds(folder):
        shown = made.said(str(folder.absolute()))
        raise CheckpointError(
            f"{shown}: transformers has to load it, and needs local files; download it first "
            f"({urls.fetcher(shown)}), and give the local path"
        )


_current: contextvars.ContextVar[StandIns | None] = contextvars.ContextVar("_current", default=None)


@contextlib.contextmanager
def standing_in(is_plan: bool) -> Iterator[None]:
    """Within, what lies elsewhere is opened by stand-ins.

    Args:
        is_plan: of the hub, too, headers are read where weights are not here; nothing is fetched
            ahead.
    """
    with contextlib.ExitStack() as held:
        made = StandIns(held, is_plan)
        with holding(_current, made), places.saying(made.said):
            yield


def stand_ins() -> StandIns | None:
    """Those of this call."""
    return _current.get()
