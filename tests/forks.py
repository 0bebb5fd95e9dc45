"""Runs of the command line, each in a process of its own, none of which imports torch anew."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import IO

from . import forkserver


@functools.cache
def _server() -> Path:
    """The folder of this process's server: its socket, and ``loratools`` for a PATH."""
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    script = Path(forkserver.__file__)
    (folder / "loratools").write_text(
        f'#!/bin/sh\nexec {sys.executable} -SE {script} run {folder / "socket"} "$@"\n'
    )
    (folder / "loratools").chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, str(script), "serve", str(listener.fileno()), str(folder)],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # an interrupt of the tests is not for it
        )
    atexit.register(_stop, server)
    return folder


def _stop(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def path() -> str:
    """A PATH on which ``loratools`` is such a run, and ``python`` is ours."""
    return os.pathsep.join([str(_server()), str(Path(sys.executable).parent), os.environ["PATH"]])


@contextlib.contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both ends of a pipe. The second is to be closed once a run has it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer


class Run:
    """A run that has begun. What stream is not given is /dev/null."""

    def __init__(
        self,
        args: Sequence[object] = (),
        *,
        code: str = forkserver.ENTRY,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        with Path(os.devnull).open("r+b") as nothing:
            given = [nothing if stream is None else stream for stream in (stdin, stdout, stderr)]
            self._connection, self.pid = forkserver.ask(
                str(_server() / "socket"),
                [stream if isinstance(stream, int) else stream.fileno() for stream in given],
                args=[str(arg) for arg in args],
                code=code,
                cwd=str(cwd or Path.cwd()),
                env=dict(os.environ if env is None else env),
                imports=list(imports),
            )

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        return forkserver.answer(self._connection)


def run(
    *args: object,
    code: str = forkserver.ENTRY,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    imports: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """The command line with these arguments, or ``code`` with them in ``sys.argv``, to its end."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        begun = Run(
            args, code=code, cwd=cwd, env=env, stdout=stdout, stderr=stderr, imports=imports
        )
        status = begun.wait()
        said = []
        for stream in (stdout, stderr):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess([str(arg) for arg in args], status, *said)


def on_a_terminal(
    args: Sequence[object], *streams: str, width: int = 0, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The exit code of a run, and all that it wrote to a terminal, which these of its streams are;
    of so many columns, or as pseudo-terminals are."""
    main, other = pty.openpty()
    if width:
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = Run(args, env=env, **dict.fromkeys(streams, other))
    os.close(other)
    written = b""
    while True:
        try:
            part = os.read(main, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    return process.wait(), written.decode()


def preload(*names: str) -> None:
    """Have these modules imported in the runs to come, where what is tested is not their import."""
    run(code="", imports=names)
