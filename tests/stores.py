"""A store of objects that speaks S3, and a web server of the same: moto's, with faults to order."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
Fault = Callable[[str, "Answer"], None]


class Answer:
    """What the server is about to answer; a fault may change it."""

    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.body = status, dict(headers), body
        self.is_cut = False


class Server:
    """It, running.

    Attributes:
        address: of its web.
        given: of each GET of an object, its name and the range asked for, "" for all of it.
        ranges: whether it heeds them.
        fault: changes an answer to a GET of an object; "" where none is wanted.
        put: called with the name of each object that is put, before it is.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.clear()

    def clear(self) -> None:
        """As it was: no fault, and nothing noted."""
        self.given: list[tuple[str, str]] = []
        self.ranges, self.fault, self.put = True, None, None

    fault: Fault | None
    put: Callable[[str], None] | None

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"].lstrip("/"), environ["REQUEST_METHOD"]
        name = path.removeprefix(f"{BUCKET}/")
        is_object = path.startswith(f"{BUCKET}/") and bool(name)
        if not self.ranges:
            environ.pop("HTTP_RANGE", None)
        if is_object and method == "GET":
            self.given.append((name, environ.get("HTTP_RANGE", "")))
        if is_object and method in ("PUT", "POST") and self.put is not None:
            try:
                self.put(name)
            except PermissionError:
                start("403 Forbidden", [("Content-Length", "0")])
                return []
        made: list[Any] = []
        body = b"".join(self._app(environ, lambda s, h, e=None: made.extend((s, h))))
        answer = Answer(made[0], made[1], body)
        if is_object and method == "GET" and self.fault is not None:
            self.fault(name, answer)
        start(answer.status, list(answer.headers.items()))
        return _cut(answer.body) if answer.is_cut else [answer.body]

    def read(self, suffix: str = ".safetensors") -> int:
        """Bytes of objects that were asked for by ranges. AssertionError for one that was asked for
        as a whole."""
        ranges = [asked for name, asked in self.given if name.endswith(suffix)]
        assert all(ranges), "all of an object was asked for"
        ends = [asked.removeprefix("bytes=").split("-") for asked in ranges]
        return sum(int(last) - int(first) + 1 for first, last in ends)


def _cut(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("as ordered")


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server, which the environment names to all that speaks S3."""
    logging.getLogger("werkzeug").disabled = True
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.address)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        try:
            system().mkdir(BUCKET)
            yield server
        finally:
            server.stop()


def system() -> Any:
    """s3fs, without what it remembers."""
    import s3fs

    # What is put may be read by all: the web server knows nobody.
    return s3fs.S3FileSystem(use_listings_cache=False, s3_additional_kwargs={"ACL": "public-read"})


def fill(folder: Path, name: str = "") -> str:
    """Put a folder or file there; its address."""
    place = f"{BUCKET}/{name or folder.name}"
    for path in [folder] if folder.is_file() else folder.rglob("*"):
        if path.is_file():
            inside = "" if path == folder else f"/{path.relative_to(folder).as_posix()}"
            system().pipe_file(place + inside, path.read_bytes())
    return f"s3://{place}"


def fetch(name: str, folder: Path) -> Path:
    """All that lies there, in a folder here."""
    system().get(f"{BUCKET}/{name}", str(folder), recursive=True)
    return folder
