"""A process that has imported torch once, and forks for every run of the command line.

Importing torch is most of what a short command takes. A fork of a process that has done so is a
process of its own all the same: its own streams, folder, environment, signals and exit code. What
is about the start itself (imports, ``--help``, ``python -m lora_tools``) takes a new Python.

    forkserver.py serve FD FOLDER       answers on the listening socket FD until its stdin closes,
                                        and removes FOLDER then
    forkserver.py run SOCKET WORD…      asks for one run, with this process's streams

Only Python's own library, and little of it, is imported here: the second form stands for
``loratools`` on the PATH of the documentation's snippets.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

LIMIT = 1 << 17  # bytes of a request: its arguments, code and environment
ENTRY = "from lora_tools.cli import entry; entry()"


def ask(path: str, streams: list[int], **request: Any) -> tuple[socket.socket, int]:
    """Start a run with these three streams. Returns the connection, and the run's process id."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    message = json.dumps(request).encode()
    assert len(message) < LIMIT
    socket.send_fds(connection, [message], streams)
    started = connection.recv(32)
    if not started:
        raise RuntimeError("the server that forks has ended; what it said stands above")
    return connection, int(started)


def answer(connection: socket.socket) -> int:
    """Wait for the run's end. Returns its exit code, or minus the signal that it died of."""
    status = connection.recv(32)
    connection.close()
    return os.waitstatus_to_exitcode(int(status))


def run_here(path: str, words: list[str]) -> NoReturn:
    """A run with this process's own streams, folder and environment."""
    connection, _ = ask(path, [0, 1, 2], args=words, cwd=os.getcwd(), env=dict(os.environ))  # noqa: PTH109
    code = answer(connection)
    os._exit(code if code >= 0 else 128 - code)


# ------------------------------------------------------------------------------------- the server


def serve(listener: socket.socket, folder: str) -> NoReturn:
    """Answer until stdin closes, which it does when the tests end, however they do."""
    import gc
    import selectors
    import shutil

    import unsynced  # which lies beside this script

    os.fsync = unsynced.fsync
    import_everything()
    gc.collect()
    gc.freeze()
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.buffer, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    runs: dict[Any, tuple[int, socket.socket, int]] = {}  # by its connection and by its pidfd
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin.buffer:
                for pid, _, _ in runs.values():
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, streams, _, _ = socket.recv_fds(connection, LIMIT, 3)
                request = json.loads(message)
                for name in request.get("imports", ()):
                    __import__(name)
                pid = os.fork()
                if pid == 0:
                    for held in selector.get_map().values():
                        os.close(held.fd)
                    selector.close()
                    connection.close()
                    become(streams, **request)
                for fd in streams:
                    os.close(fd)
                ended = os.pidfd_open(pid)
                for event in (connection, ended):
                    runs[event] = pid, connection, ended
                    selector.register(event, selectors.EVENT_READ)
                connection.send(b"%d" % pid)
            elif key.fileobj in runs:
                pid, connection, ended = runs[key.fileobj]
                if key.fileobj is connection:  # who asked is gone
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                for event in (connection, ended):
                    del runs[event]
                    selector.unregister(event)
                with contextlib.suppress(OSError):
                    connection.send(b"%d" % status)
                connection.close()
                os.close(ended)


def import_everything() -> None:
    """Every module of the package, and what they import when they are called."""
    import importlib
    import pkgutil
    import warnings

    import lora_tools

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (
            "torch",
            "numpy",
            "scipy.linalg",
            "onnx",
            "zstandard",
            "rich.progress",
            "huggingface_hub.repocard",
        ):
            importlib.import_module(name)
        for module in pkgutil.walk_packages(lora_tools.__path__, "lora_tools."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def become(
    streams: list[int],
    args: list[str],
    cwd: str,
    env: dict[str, str],
    code: str = ENTRY,
    imports: object = (),
) -> NoReturn:
    """In the fork: what ``python -c CODE ARGS…`` is."""
    import traceback

    # A job in the background of a shell ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *args]
    status = 0
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        with _traces():
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _traces() -> Any:
    """What ``traces.remembered`` has begun in the process that asked."""
    if "TRACES" not in os.environ:
        return contextlib.nullcontext()
    from pathlib import Path

    import traces  # which lies beside this script

    return traces.remembered(Path(os.environ["TRACES"]))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
    run_here(sys.argv[2], sys.argv[3:])
