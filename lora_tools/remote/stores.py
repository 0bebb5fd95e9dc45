"""Where files can lie: object stores and web servers, reached through fsspec.

A scheme is one row of ``STORES``. What it takes to be let in (keys, tokens, endpoints) is found by
fsspec's own packages, where each looks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lora_tools.errors import CheckpointError, LoraToolsError, first_line, need
from lora_tools.remote import urls
from lora_tools.remote.ahead import pool
from lora_tools.remote.source import Absent, Answer, LastingError, NotThere, Source, total

# What a folder of a web server is asked for: it cannot be listed.
_USUAL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "adapter_config.json", "adapter_model.safetensors", "model.safetensors",
    "model.safetensors.index.json", "README.md", "LICENSE",
)  # fmt: skip
_FILE = re.compile(r".*\.(safetensors|json|bin|pt|pth|ckpt|gguf|onnx|npz)")


@dataclasses.dataclass(frozen=True)
class Store:
    """A kind of place.

    Attributes:
        module: what fsspec takes for it.
        ask: one request for a range (``Source.ask``).
        is_listed: whether it says what a folder holds.
        is_written: whether results are put there.
        tells: whether its answers say of which object they are.
        options: of fsspec's file system; put: of its ``put_file``.
    """

    module: str
    ask: Callable[[Any, str, int, int], Answer]
    is_listed: bool = True
    tells: bool = True
    is_written: bool = True
    options: Callable[[], Mapping[str, Any]] = dict
    put: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _ask_any(system: Any, path: str, begin: int, end: int) -> Answer:
    return Answer(system.cat_file(path, start=begin, end=end))


def _ask_s3(system: Any, path: str, begin: int, end: int) -> Answer:
    """``GetObject``, whose answer names the object's ETag and size."""
    from fsspec.asyn import sync

    bucket, key, version = system.split_path(path)
    given = {"VersionId": version} if version else {}
    asked = f"bytes={begin}-{end - 1}"
    answer = system.call_s3("get_object", Bucket=bucket, Key=key, Range=asked, **given)
    body, size = answer["Body"], total(answer.get("ContentRange", ""))
    try:
        if answer["ContentLength"] > end - begin:
            raise LastingError(_NO_RANGES)
        return Answer(sync(system.loop, body.read), size, answer["ETag"])
    finally:
        body.close()


def _ask_http(system: Any, path: str, begin: int, end: int) -> Answer:
    from fsspec.asyn import sync

    return sync(system.loop, _over_http, system, path, begin, end)  # type: ignore[no-any-return]


async def _over_http(system: Any, path: str, begin: int, end: int) -> Answer:
    """A request for a range, of which no more than that is read."""
    session = await system.set_session()
    asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(path), headers=asked) as answer:
        if answer.status == 200:
            raise LastingError(_NO_RANGES)
        if answer.status in (401, 403, 404, 410, 416):
            raise Absent(f"{answer.status} {answer.reason}; is the address right?")
        if answer.status != 206:
            raise OSError(f"{answer.status} {answer.reason}")
        data = bytearray()
        while piece := await answer.content.read(end - begin + 1 - len(data)):
            data += piece
        if len(data) > end - begin:
            raise LastingError(_NO_RANGES)
        size = total(answer.headers.get("Content-Range", ""))
        return Answer(bytes(data), size, _tag_of_answer(answer.headers, size))


_NO_RANGES = "the server does not serve ranges of bytes; download it first, and give the local path"


def _tag_of_answer(headers: Mapping[str, str], size: int | None) -> str:
    return headers.get("ETag") or f"{headers.get('Last-Modified', '')} {size}"


def _of_s3() -> dict[str, Any]:
    """How many parts of an object are put at a time: they lie in memory."""
    return {"max_concurrency": 4}


def _of_web() -> dict[str, Any]:
    """Proxies are those of the environment. A slow answer is waited for as long as it comes."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout}}


STORES = {
    "s3": Store("s3fs", _ask_s3, options=_of_s3, put={"chunksize": 16 << 20}),
    "gs": Store("gcsfs", _ask_any, tells=False),
    "az": Store("adlfs", _ask_any, tells=False),
    "abfs": Store("adlfs", _ask_any, tells=False),
    "https": Store("aiohttp", _ask_http, is_listed=False, is_written=False, options=_of_web),
}
STORES["http"] = STORES["https"]


def store_of(address: str) -> Store | None:
    """The row of an address; None where nothing is read there."""
    return STORES.get(address.partition(":")[0])


@functools.lru_cache(maxsize=32)
def opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and its path there. Raises NotInstalled."""
    scheme = address.partition(":")[0]
    store = STORES[scheme]
    need(f"{scheme}://", "remote", "fsspec")
    need(f"{scheme}://", "remote", store.module)
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(address, use_listings_cache=False, **store.options())
    return found


class Stored(Source):
    """A file of a store. It is pickled as its address, and opened anew."""

    def __init__(self, address: str, size: int | None, tag: str) -> None:
        super().__init__(urls.shown(address), size, tag)
        self.address = address
        store = store_of(address)
        assert store is not None
        self._store, self.tells = store, store.tells

    def __reduce__(self) -> tuple[type[Stored], tuple[str, int | None, str]]:
        return Stored, (self.address, self.size, self.tag)

    def ask(self, begin: int, end: int) -> Answer:
        """By one request. Raises what ``Source.ask`` does."""
        system, path = opened(self.address)
        try:
            return self._store.ask(system, path, begin, end)
        except (FileNotFoundError, PermissionError) as error:
            raise Absent(said_of_error(error, self.address)) from None

    def pin(self) -> None:
        """See ``Source.pin``. Raises CheckpointError."""
        if not self.tells:
            with plainly(self.address):
                self.tag = self.now()

    def now(self) -> str:
        """By a request for what is said of it."""
        system, path = opened(self.address)
        return tag_of(system.info(path))


def tag_of(info: Mapping[str, Any]) -> str:
    """By which an object is known again, of what a file system says of it."""
    tag = info.get("ETag") or info.get("etag") or info.get("generation")
    if tag:
        return str(tag)
    when = next((info[key] for key in _TIMES if info.get(key)), "")
    return f"{when} {info.get('size')}"


_TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")


@contextlib.contextmanager
def plainly(address: str) -> Iterator[None]:
    """What a store's package raises, as one line with the address."""
    try:
        yield
    except (LoraToolsError, ImportError):
        raise
    except LastingError as error:
        raise CheckpointError(f"{urls.shown(address)}: {error}") from None
    except Exception as error:  # of whichever library asks
        raise CheckpointError(f"{urls.shown(address)}: {said_of_error(error, address)}") from None


def said_of_error(error: BaseException, address: str) -> str:
    """The first line of an error, without the address as it was given."""
    said = first_line(error)
    if isinstance(error, FileNotFoundError):
        return "nothing is there, or access is not allowed; is the address right?"
    if type(error).__name__ == "NoCredentialsError":
        return f"{said}; set the credentials that fsspec's packages look for (docs/tasks/remote.md)"
    query = urlsplit(address).query
    return said.replace(query, "…") if query else said


def found(
    address: str, named_by: Callable[[bytes], Sequence[str]]
) -> tuple[bool, dict[str, Stored]]:
    """Whether a folder is meant by an address, and the files there by their names in it, or the one
    file, and its neighbour ``adapter_config.json``, by theirs.

    Args:
        named_by: the files that an index names, for places that cannot be listed.

    Raises:
        CheckpointError: nothing is there, or the store cannot be asked.
    """
    store = store_of(address)
    assert store is not None
    with plainly(address):
        system, path = opened(address)
        if not store.is_listed:
            return _guessed(address, named_by)
        if system.isfile(path):
            beside = posixpath.join(posixpath.dirname(path), "adapter_config.json")
            paths = {posixpath.basename(path): system.info(path)}
            if system.isfile(beside):
                paths["adapter_config.json"] = system.info(beside)
            home = address.rpartition("/")[0]
            return False, _made(home, paths)
        held = system.find(path, detail=True, withdirs=False)
        if not held:
            raise FileNotFoundError(address)
        names = {name.removeprefix(path.rstrip("/") + "/"): info for name, info in held.items()}
        return True, _made(address.rstrip("/"), names)


def _made(home: str, infos: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    made = {}
    for name, info in infos.items():
        if name.endswith("/") or not name:  # a mark of a folder
            continue
        made[name] = Stored(f"{home}/{name}", info["size"], tag_of(info))
    return made


def _guessed(
    address: str, named_by: Callable[[bytes], Sequence[str]]
) -> tuple[bool, dict[str, Stored]]:
    """Of a web server, which lists nothing: the file, or the files of usual names in the folder."""
    parts = urlsplit(address)
    is_folder = not _FILE.fullmatch(parts.path)
    home, _, last = parts.path.rstrip("/").rpartition("/")
    root = parts.path.rstrip("/") if is_folder else home

    def at(name: str) -> Stored | None:
        source = Stored(urlunsplit(parts._replace(path=f"{root}/{name}")), None, "")
        try:
            source.read(0, 1)
        except NotThere:
            if name == last and not is_folder:
                raise
            return None
        if source.size is None:
            raise LastingError("the server does not tell its size; download it first")
        return source

    names = _USUAL if is_folder else (last, "adapter_config.json")
    there = dict(zip(names, pool().map(at, names), strict=True))
    index = there.get("model.safetensors.index.json")
    shards = named_by(index.read(0, index.size or 0)) if index is not None else ()
    there |= {name: at(name) for name in shards}
    held = {name: each for name, each in there.items() if each is not None}
    if not held:
        raise FileNotFoundError(address)
    return is_folder, held
